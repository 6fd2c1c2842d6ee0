"""How a problem of a recipe is told."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from rkd_plugin.experiments.printing import printable

Problem = tuple[str, str]
"""A YAML path such as ``train.criterion.key``, and one sentence."""


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one problem a line.

    Args:
        source: what was read, a file or an override.
        problems: pairs of a YAML path, which may be empty, and a sentence.

    Example:
        >>> print(RecipeError("a.yaml", [("train.num_epochs", "required, but missing")]))
        a.yaml: 1 problem
          train.num_epochs: required, but missing
    """

    def __init__(self, source: object, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        lines = [f"  {path}: {message}" if path else f"  {message}" for path, message in self.problems]
        count = f"{len(lines)} problem{'s' if len(lines) != 1 else ''}"
        super().__init__("\n".join(map(printable, [f"{source}: {count}", *lines])))


def difference(old: Any, new: Any) -> str:
    """The first difference between the plain data of two recipes, and how many more there are; "" if they are equal.

    Example:
        >>> difference({"a": {"b": 1, "c": [1]}}, {"a": {"b": 2, "c": [1, 3]}})
        'a.b is 1 there and 2 here, and 1 more difference'
        >>> difference({"a": 1}, {"a": 1})
        ''
    """
    found = list(_differences(old, new, ()))
    if not found:
        return ""
    path, there, here = found[0]
    more = len(found) - 1
    end = f", and {more} more difference{'s' if more > 1 else ''}" if more else ""
    return f"{'.'.join(map(str, path)) or 'it'} is {_brief(there)} there and {_brief(here)} here{end}"


_MISSING = object()


def _differences(old: Any, new: Any, path: tuple[object, ...]) -> Iterator[tuple[tuple[object, ...], Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key, _MISSING), new.get(key, _MISSING), (*path, key))
    elif isinstance(old, list) and isinstance(new, list):
        for index, (first, second) in enumerate(zip_longest(old, new, fillvalue=_MISSING)):
            yield from _differences(first, second, (*path, index))
    elif (tag := getattr(old, "tag", None)) is not None and tag == getattr(new, "tag", None):
        yield from _differences(old.value, new.value, path)
    elif type(old) is not type(new) or (old != new and not (old != old and new != new)):  # NaN is not itself
        yield path, old, new


def _brief(value: Any) -> str:
    text = "missing" if value is _MISSING else getattr(value, "tag", None) or repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def suggest(name: str, known: Iterable[object]) -> str:
    """The end of a sentence about an unknown name: the closest known ones, or all of them if they are few.

    Example:
        >>> suggest("RKDDLoss", ["RKDDALoss", "KDLoss", "Adam"])
        '; did you mean RKDDALoss, KDLoss?'
        >>> suggest("x", ["yes", "no"])
        '; known: no, yes'
    """
    names = sorted({str(key) for key in known})  # YAML has keys of other types as well
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 12 else ""
