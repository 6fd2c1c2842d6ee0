"""The packaged recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from rkd_plugin.experiments.recipe.errors import RecipeError, suggest

PACKAGE = Path(__file__).parents[2]


class Entry(NamedTuple):
    """A packaged file: its name, the first sentence of its header, and whether it is a suite."""

    name: str
    summary: str
    is_suite: bool


def configs_root() -> Path:
    """The folder of the packaged recipes: inside an installed package, next to the package in a checkout."""
    for root in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if root.is_dir():
            return root
    raise RecipeError(PACKAGE, [("", "expected the packaged recipes, found none; reinstall rkd-plugin")])


def _names() -> dict[str, Path]:
    root = configs_root()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find(name: str | Path, folder: Path = Path()) -> Path:
    """Find the file of a recipe or suite.

    Args:
        name: a path, or the name of a packaged file such as ``quickstart/rkd_da``, with or without ``.yaml``.
        folder: folder from which a relative path starts.

    Raises:
        RecipeError: if there is no such file; the message has the closest packaged ones.
    """
    try:
        if (path := folder / name).is_file():
            return path
    except (OSError, ValueError):  # no file can have this name
        pass
    packaged = _names()
    wanted = Path(name).as_posix().removesuffix(".yaml")
    if wanted not in packaged:
        hint = suggest(wanted, packaged)
        raise RecipeError(name, [("", f"neither a file nor a packaged recipe, which `rkd ls` lists{hint}")])
    return packaged[wanted]


def names() -> list[Entry]:
    """All packaged recipes and suites, sorted by name."""
    return [_entry(name, path.read_text(encoding="utf-8")) for name, path in _names().items()]


def _entry(name: str, text: str) -> Entry:
    header = re.match(r"(?:#.*\n)*", text)
    words = " ".join(line.lstrip("# ") for line in header.group().splitlines()) if header else ""
    sentence = re.match(r".*?\.(?=\s|$)", words)
    is_suite = re.search(r"^suite:", text, re.MULTILINE) is not None  # parsing all files as YAML would take a second
    return Entry(name, sentence.group() if sentence else words, is_suite)
