"""The one way in which text reaches a terminal; what comes from files and recipes is in it."""

from __future__ import annotations

import sys


def printable(text: str, limit: int | None = None) -> str:
    r"""Text as one line that cannot move a terminal's cursor: what is not printable is escaped.

    Args:
        text: such as the name of a tensor.
        limit: the number of characters, after which the rest is cut.

    Example:
        >>> print(printable("a\x1b[2Jb\nc"), printable("µ #"), printable("backbone.layer4", limit=8))
        a\x1b[2Jb\nc µ # backbone...
    """
    shown = text if limit is None else text[:limit]
    escaped = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in shown)
    return escaped if len(shown) == len(text) else f"{escaped}..."


def show(text: object) -> None:
    """Print a result, each of its lines printable, to stdout."""
    print("\n".join(map(printable, str(text).split("\n"))))


def report(text: object) -> None:
    """Print what happened, each line printable, to stderr; progress bars stay whole."""
    lines = "\n".join(map(printable, str(text).split("\n")))
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(lines, file=sys.stderr)
    else:
        print(lines, file=sys.stderr)
