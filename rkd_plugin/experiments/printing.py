"""The one way in which text reaches a terminal; what comes from files and recipes is in it."""

from __future__ import annotations

import sys


def printable(line: str) -> str:
    r"""A text that neither ends the line nor moves the cursor of a terminal.

    Example:
        >>> print(printable("a\x1b[2Jb\nc"), printable("µ #"))
        a\x1b[2Jb\nc µ #
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)


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
