"""Suites: a table of recipes, to be run for several seeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rkd_plugin.experiments.recipe.catalog import find
from rkd_plugin.experiments.recipe.errors import RecipeError
from rkd_plugin.experiments.recipe.reading import read
from rkd_plugin.experiments.recipe.specs import Walk, each, of, positive, section
from rkd_plugin.experiments.recipe.values import Tagged

_ROW = section(
    {"name": of(str), "label": of(str), "recipe": of(str)},
    {
        "teacher": of(str),
        "overrides": of(list[str]),
        "fast": of(list[str]),
        "paper": each(of(float)),
        "others": each(each(of(float))),
        "trained": of(bool),
        "metrics": of(list[str]),
        "against": of(list[str]),
        "epochs_of": of(str),
        "times": positive,
    },
)
_SUITE = section(
    {"title": of(str), "metrics": each(of(str)), "seeds": of(list[int]), "rows": each(_ROW)},
    {
        "overrides": of(list[str]),  # of every row, before the row's own
        "panels": of(list[str]),
        "notes": of(str),
        "decimals": positive,
        "test_sets": each(of(str)),
        "fast": section({"label": of(str), "overrides": of(list[str])}),
    },
)


def read_suite(name: str | Path) -> dict[str, Any]:
    """The ``suite:`` section of a file: title, metrics and their labels, seeds, rows, and what they are tested on.

    Its recipes are paths from the suite's folder, or names of packaged recipes; here they become paths.

    Raises:
        RecipeError: if there is no such file, or anything in it is not as it should be, the recipes' names included.
    """
    recipe = read(name)
    walk = Walk(recipe.data)
    section({"suite": _SUITE})(walk, recipe.data, "")
    for path, tag in _tags(recipe.data.get("suite"), "suite"):
        walk.report(path, f"a plain value was expected, as torchdistill does not load suites, got {tag}")
    if not walk.found:
        _check_rows(walk, recipe.data["suite"], recipe.path.parent)
    if walk.found:
        raise RecipeError(recipe.path, list(walk.found))
    suite: dict[str, Any] = recipe.data["suite"]
    return suite


def _tags(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Where something would be computed, and its tag."""
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
            walk.report(f"{path}.name", f"{row['name']!r} is the name of two rows")
        others = {f"against.{at}": other for at, other in enumerate(row.get("against", ()))}
        for key, other in ({key: row[key] for key in ("teacher", "epochs_of") if key in row} | others).items():
            if other not in names:
                walk.report(f"{path}.{key}", f"a row above was expected, got {other!r}")
        shown = {f"metrics.{at}": column for at, column in enumerate(row.get("metrics", ()))}
        sources = {"paper": row.get("paper", ()), **{f"others.{by}": of for by, of in row.get("others", {}).items()}}
        shown |= {f"{by}.{column}": column for by, of in sources.items() for column in of}
        for key, column in shown.items():
            if column not in columns:
                walk.report(f"{path}.{key}", f"one of {', '.join(columns)} was expected")
        names.append(row["name"])
        row["recipe"] = _locate(walk, folder, f"{path}.recipe", row["recipe"])
    for name, recipe in suite.get("test_sets", {}).items():
        suite["test_sets"][name] = _locate(walk, folder, f"suite.test_sets.{name}", recipe)
    for index, name in enumerate(suite.get("panels", ())):
        if name not in names:
            walk.report(f"suite.panels.{index}", f"the name of a row was expected, got {name!r}")


def _locate(walk: Walk, folder: Path, path: str, recipe: str) -> str:
    try:
        return str(find(recipe, folder))
    except RecipeError as error:
        walk.report(path, f"{recipe!r} is {error.problems[0][1]}")
        return recipe
