"""Problems of a recipe, and how they are printed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import yaml

from rkd_plugin.printing import printable

Problem = tuple[str, str]
"""A YAML path such as ``train.criterion.key``, and one sentence."""


class Findings(NamedTuple):
    """What `examine` finds in a recipe.

    Attributes:
        problems: what torchdistill or `rkd run` fails on.
        needs: what `rkd run` needs and torchdistill does not; overrides can add it.
        missing: files and folders that a run needs and that do not exist.
        notes: what runs but is possibly not intended.
        unchecked: what was not checked, and why.
    """

    problems: list[Problem]
    needs: list[Problem]
    missing: list[Problem]
    notes: list[Problem]
    unchecked: list[Problem]


_LONGEST_LINE = 500
_LONGEST_NAME, _MOST_NAMES = 100, 2000  # limits of comparing names letter by letter, which takes time


class RecipeError(ValueError):
    """All problems of a recipe, one per line.

    Args:
        source: the file or override with the problems.
        problems: pairs of a YAML path, which can be empty, and a sentence.

    Example:
        >>> print(RecipeError("a.yaml", [("train.num_epochs", "required, but missing")]))
        a.yaml: 1 problem
          train.num_epochs: required, but missing
    """

    def __init__(self, source: object, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([printable(f"{source}: {counted(self.problems, 'problem')}"), *lines(problems)]))


def described(source: object, findings: Findings) -> str:
    """What `rkd check` prints in addition to the problems; the last line says whether a run can start.

    Example:
        >>> print(described("a.yaml", Findings([], [], [("models.model.src_ckpt", "there is no file 'a.pt'")], [], [])))
        missing files and folders:
          models.model.src_ckpt: there is no file 'a.pt'
        not checked: images, labels and checkpoints, as none is loaded; time and memory
        a.yaml: no problems in the recipe, no notes; not ready to run: 1 file is missing
    """
    listed = {
        "notes:": findings.notes,
        "`rkd run` needs in addition, in the file or on its command line:": findings.needs,
        "missing files and folders:": findings.missing,
    }
    parts = [part for title, items in listed.items() if items for part in (title, *lines(items))]
    parts += ["not checked: images, labels and checkpoints, as none is loaded; time and memory"]
    summary = f"{source}: {counted(findings.problems, 'problem')} in the recipe, {counted(findings.notes, 'note')}"
    lacking = [
        f"{counted(items, name)} {'is' if len(items) == 1 else 'are'} missing"
        for name, items in (("setting", findings.needs), ("file", findings.missing))
        if items
    ]
    ready = f"; not ready to run: {' and '.join(lacking)}" if lacking else ""
    return "\n".join([*parts, *lines(findings.unchecked), printable(summary + ready)])


def counted(items: Sequence[object], name: str) -> str:
    """The number of items with their name: ``"no notes"``, ``"1 note"`` or ``"2 notes"``."""
    return f"{len(items) or 'no'} {name}{'' if len(items) == 1 else 's'}"


def lines(problems: Iterable[Problem]) -> list[str]:
    """Problems as indented lines; see `printable`."""
    return [
        printable(f"  {path}: {message}" if path else f"  {message}", limit=_LONGEST_LINE) for path, message in problems
    ]


def difference(old: str, new: str) -> str:
    r"""The difference between two resolved recipes: the first keys with both values.

    Args:
        old: YAML, such as ``recipe.yaml`` of a run.
        new: YAML, such as from `Recipe.resolved`.

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
        return "only the notation differs"
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return ", ".join(printable(words, limit=200) for words in shown[:3]) + more


def _leaves(root: Any) -> Iterator[tuple[str, str]]:
    """Paths and values; those of an anchor once."""
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
        if isinstance(node, yaml.CollectionNode):
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            yield path, {"map": "a mapping", "seq": "a list"}.get(kind, kind)
        left += reversed([(f"{path}.{key}".lstrip("."), value) for key, value in inner])


def suggest(name: str, known: Iterable[object]) -> str:
    """The end of a sentence about an unknown name: the closest known names, or all of them if they are few.

    Close names differ in case only, have the same last part, or have most letters in common.

    Example:
        >>> suggest("RKDDLoss", ["RKDDALoss", "KDLoss", "Adam"])
        '; did you mean RKDDALoss, KDLoss?'
        >>> suggest("compose", ["torchvision.transforms.Compose", "Resize"])
        '; did you mean torchvision.transforms.Compose?'
        >>> suggest("x", ["yes", "no"])
        '; known: no, yes'
    """
    names = sorted({str(key) for key in known})  # keys of YAML can have other types
    last = _last_part(name)
    close = [other for other in names if _last_part(other) == last][:3]
    if not close and len(name) <= _LONGEST_NAME and len(names) <= _MOST_NAMES:
        by_lower_case: dict[str, list[str]] = {}
        for other in names:
            by_lower_case.setdefault(other[:_LONGEST_NAME].casefold(), []).append(other)
        matches = difflib.get_close_matches(name.casefold(), by_lower_case, n=3)
        close = [other for match in matches for other in by_lower_case[match]][:3]
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 12 else ""


def _last_part(name: str) -> str:
    return re.split(r"[./]", name)[-1].casefold()
