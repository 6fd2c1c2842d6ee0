"""How a problem of a recipe is told."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

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
