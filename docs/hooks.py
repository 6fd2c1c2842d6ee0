"""What Markdown does not know of the docstrings, which have formulas and tables as Sphinx writes them."""

from __future__ import annotations

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

DISPLAY = re.compile(r"^\.\. math::\n+((?:    .*\n?)+)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
TABLE = re.compile(r"^(?:=+ +)+=+\n(?:.+\n)+?(?:=+ +)+=+\n(?:(?:.+\n)+(?:=+ +)+=+)?", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</\1>', re.DOTALL)
CODE = re.compile(r"<(pre|code)\b.*?</\1>", re.DOTALL)
RAW = re.compile(r"\$\$|:math:|\\[a-z]+\{|\.\. \w+::|<blockquote>\s*<blockquote>")  # >>> outside of code is a quotation


class Docstrings(griffe.Extension):
    """Formulas and examples become what Markdown and griffe read; a table becomes a block of text."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring:
            text = DISPLAY.sub(lambda found: f"$$\n{found[1].strip()}\n$$\n\n", obj.docstring.value)
            text = re.sub("^Example:$", "Examples:", text, flags=re.MULTILINE)
            text = INLINE.sub(r"$\1$", text)
            obj.docstring.value = TABLE.sub(lambda found: f"```text\n{found[0].strip()}\n```\n", text)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script; a formula or example left as text is an error."""
    display = {"(": "inline", "[": "block"}
    content = FORMULA.sub(lambda found: convert(html.unescape(found[3]), display=display[found[2]]), content)
    if raw := RAW.search(CODE.sub("", content)):
        raise PluginError(f"{page.file.src_uri}: expected formulas and examples, got {raw[0]!r} as text")
    return content
