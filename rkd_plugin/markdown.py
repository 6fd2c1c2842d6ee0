"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A Markdown table with one line of heads and one line per row.

    Example:
        >>> print(table(["loss", "ms"], [["RKD-D | RKD-A", "1.5"], ["RKD-DA", ""]]))
        | loss | ms |
        | --- | --- |
        | RKD-D \| RKD-A | 1.5 |
        | RKD-DA |  |
    """
    lines = [list(heads), ["---"] * len(heads), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
