"""Printing of text that can come from files and recipes."""

from __future__ import annotations

import sys


def printable(text: str, limit: int | None = None) -> str:
    r"""Text as one line without control characters: characters that are not printable are escaped.

    Args:
        text: any text, such as the name of a tensor in a file.
        limit: number of characters after which the text is cut; None for no limit.

    Example:
        >>> print(printable("a\x1b[2Jb\nc"), printable("µ #"), printable("backbone.layer4", limit=8))
        a\x1b[2Jb\nc µ # backbone...
    """
    shown = text if limit is None else text[:limit]
    escaped = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in shown)
    return escaped if len(shown) == len(text) else f"{escaped}..."


def show(text: object) -> None:
    """Print a result to stdout, each of its lines escaped by `printable`."""
    print("\n".join(map(printable, str(text).split("\n"))))


def report(text: object) -> None:
    """Print an event to stderr, each of its lines escaped by `printable`, above the progress bars."""
    lines = "\n".join(map(printable, str(text).split("\n")))
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(lines, file=sys.stderr)
    else:
        print(lines, file=sys.stderr)
