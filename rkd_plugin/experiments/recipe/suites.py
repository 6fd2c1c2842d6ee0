"""Suites: tables of recipes, which are run with several seeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rkd_plugin.experiments.recipe.catalog import find
from rkd_plugin.experiments.recipe.errors import RecipeError
from rkd_plugin.experiments.recipe.reading import read
from rkd_plugin.experiments.recipe.specs import Walk, each, of_type, positive, section
from rkd_plugin.experiments.recipe.values import Tagged

_ROW = section(
    {"name": of_type(str), "label": of_type(str), "recipe": of_type(str)},
    {
        "teacher": of_type(str),
        "overrides": of_type(list[str]),
        "fast": of_type(list[str]),
        "paper": each(of_type(float)),
        "others": each(each(of_type(float))),
        "trained": of_type(bool),
        "seeds": of_type(list[int]),
        "metrics": of_type(list[str]),
        "against": of_type(list[str]),
        "epochs_of": of_type(str),
        "times": positive,
    },
)
_SUITE = section(
    {"title": of_type(str), "metrics": each(of_type(str)), "seeds": of_type(list[int]), "rows": each(_ROW)},
    {
        "overrides": of_type(list[str]),  # of every row, before the row's own
        "panels": of_type(list[str]),
        "notes": of_type(str),
        "decimals": positive,
        "test_sets": each(of_type(str)),
        "fast": section({"label": of_type(str), "overrides": of_type(list[str])}),
    },
)


def read_suite(name: str | Path) -> dict[str, Any]:
    """Read the ``suite:`` section of a file: title, metrics and their labels, seeds, rows, and test sets.

    In the file, recipes are paths relative to its folder, or names of packaged recipes; the result has paths.

    Raises:
        RecipeError: if there is no such file, or it has problems, such as recipes that do not exist.
    """
    recipe = read(name)
    walk = Walk(recipe.data)
    section({"suite": _SUITE})(walk, recipe.data, "")
    for path, tag in _tags(recipe.data.get("suite"), "suite"):
        walk.report(path, f"expected a plain value, as torchdistill does not load suites, got {tag}")
    if not walk.found:
        _check_rows(walk, recipe.data["suite"], recipe.path.parent)
    if walk.found:
        raise RecipeError(recipe.path, list(walk.found))
    suite: dict[str, Any] = recipe.data["suite"]
    return suite


def _tags(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Paths and tags of values that torchdistill would compute."""
    if isinstance(value, Tagged):
        yield path, value.tag
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tags(inner, f"{path}.{key}")


def _check_rows(walk: Walk, suite: dict[str, Any], folder: Path) -> None:
    names: list[str] = []
    columns = suite.get("test_sets", suite["metrics"])
    for index, row in enumerate(suite["rows"]):
        path = f"suite.rows.{index}"
        if row["name"] in names:
            walk.report(f"{path}.name", f"expected a name of its own, got {row['name']!r}, which another row has")
        others = {f"against.{at}": other for at, other in enumerate(row.get("against", ()))}
        for key, other in ({key: row[key] for key in ("teacher", "epochs_of") if key in row} | others).items():
            if other not in names:
                walk.report(f"{path}.{key}", f"expected the name of a row above, got {other!r}")
        shown = {f"metrics.{at}": column for at, column in enumerate(row.get("metrics", ()))}
        sources = {"paper": row.get("paper", ()), **{f"others.{by}": own for by, own in row.get("others", {}).items()}}
        shown |= {f"{by}.{column}": column for by, own in sources.items() for column in own}
        for key, column in shown.items():
            if column not in columns:
                walk.report(f"{path}.{key}", f"expected one of {', '.join(columns)}")
        names.append(row["name"])
        row["recipe"] = _locate(walk, folder, f"{path}.recipe", row["recipe"])
    for name, recipe in suite.get("test_sets", {}).items():
        suite["test_sets"][name] = _locate(walk, folder, f"suite.test_sets.{name}", recipe)
    for index, name in enumerate(suite.get("panels", ())):
        if name not in names:
            walk.report(f"suite.panels.{index}", f"expected the name of a row, got {name!r}")


def _locate(walk: Walk, folder: Path, path: str, recipe: str) -> str:
    try:
        return str(find(recipe, folder))
    except RecipeError as error:
        walk.report(path, f"{recipe!r} is {error.problems[0][1]}")
        return recipe
