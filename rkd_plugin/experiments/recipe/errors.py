"""How a problem of a recipe is told."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

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


def difference(old: str, new: str) -> str:
    r"""How two resolved recipes differ: the first keys with both values.

    Args:
        old: YAML, such as ``recipe.yaml`` of a run.
        new: YAML, such as `Recipe.resolved` gives it.

    Example:
        >>> difference("recipe: {seed: &s 0}\nval: *s", "recipe: {seed: &s 1}\nval: *s")
        'recipe.seed is 0 there and 1 here'
    """
    try:
        there, here = (dict(_leaves(yaml.compose(text, Loader=yaml.SafeLoader))) for text in (old, new))
    except (yaml.YAMLError, RecursionError):
        return "its recipe.yaml cannot be read"
    differing = [path for path in here | there if here.get(path) != there.get(path)]
    shown = [f"{path} is {there.get(path, 'missing')} there and {here.get(path, 'missing')} here" for path in differing]
    if not shown:
        return "it is written differently"
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return ", ".join(printable(words, limit=200) for words in shown[:3]) + more


def _leaves(root: Any) -> Iterator[tuple[str, str]]:
    """Paths and values; what an anchor names, once."""
    seen: set[int] = set()
    left = [("", root)]
    while left:
        path, node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        inner: list[tuple[Any, Any]] = []
        if isinstance(node, yaml.MappingNode):
            inner = [(key.value, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            inner = list(enumerate(node.value))
        elif node is not None:
            yield path, node.value
        if inner or isinstance(node, yaml.CollectionNode):
            yield f"{path}{{}}", node.tag.removeprefix("tag:yaml.org,2002:")
        left += reversed([(f"{path}.{key}".lstrip("."), value) for key, value in inner])


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
