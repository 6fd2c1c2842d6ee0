"""What Markdown does not know of the docstrings, which have formulas and tables as Sphinx writes them."""

from __future__ import annotations

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

DISPLAY = re.compile(r"^\.\. math::\n+((?:    .*\n?)+)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
TABLE = re.compile(r"^(?:=+ +)+=+\n(?:.+\n)+?(?:=+ +)+=+\n(?:(?:.+\n)+(?:=+ +)+=+)?", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</\1>', re.DOTALL)


class Docstrings(griffe.Extension):
    """Formulas become Markdown's; a table becomes a block of text."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring:
            text = DISPLAY.sub(r"$$\n\1\n$$\n", obj.docstring.value)
            text = INLINE.sub(r"$\1$", text)
            obj.docstring.value = TABLE.sub(lambda found: f"```text\n{found[0].strip()}\n```\n", text)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script."""
    display = {"(": "inline", "[": "block"}
    return FORMULA.sub(lambda found: convert(html.unescape(found[3]), display=display[found[2]]), content)
