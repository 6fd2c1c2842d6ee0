"""Where the packaged recipes are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from rkd_plugin.experiments.recipe.errors import RecipeError, suggest

PACKAGE = Path(__file__).parents[2]


class Entry(NamedTuple):
    """A packaged file: its name, the first sentence of its header, and whether it is a suite of recipes."""

    name: str
    summary: str
    is_suite: bool


def configs_root() -> Path:
    """The folder of the packaged recipes: inside an installed package, beside the package in a checkout."""
    for root in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if root.is_dir():
            return root
    raise RecipeError(PACKAGE, [("", "the packaged recipes are missing: reinstall rkd-plugin")])


def _names() -> dict[str, Path]:
    root = configs_root()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find(name: str | Path, folder: Path = Path()) -> Path:
    """The file of a recipe or suite, given its path or the name of a packaged one.

    Args:
        name: a path that exists, or a name such as ``quickstart/rkd_da``, with or without ``.yaml``.
        folder: where a relative path starts.

    Raises:
        RecipeError: if there is no such file; it names the closest packaged ones.
    """
    try:
        if (path := folder / name).is_file():
            return path
    except (OSError, ValueError):  # a name that no file can have
        pass
    packaged = _names()
    wanted = Path(name).as_posix().removesuffix(".yaml")
    if wanted not in packaged:
        hint = suggest(wanted, packaged)
        raise RecipeError(name, [("", f"neither a file nor a packaged recipe, which `rkd ls` lists{hint}")])
    return packaged[wanted]


def names() -> list[Entry]:
    """All packaged recipes and suites in the order of their names."""
    return [_entry(name, path.read_text(encoding="utf-8")) for name, path in _names().items()]


def _entry(name: str, text: str) -> Entry:
    header = re.match(r"(?:#.*\n)*", text)
    words = " ".join(line.lstrip("# ") for line in header.group().splitlines()) if header else ""
    sentence = re.match(r".*?\.(?=\s|$)", words)
    is_suite = re.search(r"^suite:", text, re.MULTILINE) is not None  # parsing all files as YAML takes a second
    return Entry(name, sentence.group() if sentence else words, is_suite)
