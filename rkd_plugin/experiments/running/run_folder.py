"""The folder of a run, and the recipe in it."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.recipe.errors import difference
from rkd_plugin.experiments.recipe.reading import parse
from rkd_plugin.experiments.support.files import write_text

RECIPE = "recipe.yaml"
RUNS = Path("runs")


def default_folder(name: str | Path) -> Path:
    """``runs/`` and the last two parts of the name or path of a recipe; never a folder outside of ``runs/``.

    Example:
        >>> [default_folder(name).as_posix() for name in ("quickstart/rkd_da", "../mine.yaml", "/data/mine.yaml")]
        ['runs/quickstart/rkd_da', 'runs/mine', 'runs/data/mine']
    """
    path = Path(name)
    inside = [part for part in (*path.parent.parts, path.stem) if part not in (path.anchor, "..")]
    return RUNS.joinpath(*inside[-2:])


def write_recipe(folder: Path, resolved: str) -> None:
    """Write a resolved recipe to the folder of its run, with the digest that `recipe_of_run` compares."""
    write_text(folder / RECIPE, _head(resolved) + resolved)


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Check that a folder contains a run of this recipe, or no run.

    Raises:
        FileExistsError: if it contains a run of another recipe; the message has the difference.
    """
    path = folder / RECIPE
    if not path.is_file():
        return
    _, held = _parts(path)
    if held != recipe.resolved():
        raise FileExistsError(
            f"{folder} holds a run of another recipe: {difference(held, recipe.resolved())}; give this one another "
            "folder with --out, or delete that one"
        )


def recipe_of_run(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a run; nothing that it names is imported.

    Raises:
        FileNotFoundError: if the folder contains no run.
        ValueError: if the recipe was changed after the run wrote it.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"expected a folder of `rkd run` with {RECIPE}, found none in {folder}")
    head, resolved = _parts(path)
    if head != _head(resolved):
        raise ValueError(
            f"{path}: expected the recipe that the run wrote, got a changed one, which can execute other code and "
            f"measure another model; read it, then give it as a recipe: rkd eval {shlex.quote(str(path))} --checkpoint "
            f"{shlex.quote(str(folder / 'last.pt'))}"
        )
    return parse(resolved, path, overrides)


def _head(resolved: str) -> str:
    digest = hashlib.sha256(resolved.encode("utf-8", "surrogatepass")).hexdigest()
    return f"# The recipe of this run with all overrides; sha256 of what follows: {digest}\n"


def _parts(path: Path) -> tuple[str, str]:
    """The first line, and the rest."""
    text = path.read_text(encoding="utf-8", errors="replace")
    head, newline, resolved = text.partition("\n")
    return head + newline, resolved
