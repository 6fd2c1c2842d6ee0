"""A table of runs: what is missing is run, the rest is read."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rkd_plugin.experiments import report
from rkd_plugin.experiments.files import write_json, write_text
from rkd_plugin.experiments.recipe import read, read_suite
from rkd_plugin.experiments.runner import run


def reproduce(name: str, out: Path | None = None, seeds: list[int] | None = None) -> tuple[Path, str]:
    """Run every row of a suite for every seed, and write ``table.md``, ``results.json`` and pictures.

    A row that names a ``teacher`` learns from the last checkpoint of that row, of the same seed. Runs that are there
    already are read, and one that was stopped goes on.

    Args:
        name: the suite's name or path.
        out: folder for runs and tables; ``runs/<suite>`` if not given.
        seeds: instead of the suite's own.

    Returns:
        The folder, and the table in Markdown.

    Raises:
        RecipeError: if the suite or any of its recipes has problems; nothing was run then.
    """
    suite = read_suite(name)
    folder = (out or Path("runs") / Path(name).stem).absolute()
    seeds = seeds or suite["seeds"]
    # Every recipe is read and checked before the first of them is run.
    planned = [(seed, row, _folder(folder, row["name"], seed)) for seed in seeds for row in suite["rows"]]
    recipes = [read(row["recipe"], _overrides(folder, row, seed)) for seed, row, _ in planned]
    for recipe in recipes:
        recipe.validate()
    results: dict[str, list[dict[str, Any]]] = {row["name"]: [] for row in suite["rows"]}
    for (seed, row, target), recipe in zip(tqdm(planned, desc=suite["title"], unit="run"), recipes, strict=True):
        results[row["name"]].append(run(recipe, target, f"{row['label']}, seed {seed}"))
    rows = [_summary(row, results[row["name"]], suite["metric"]) for row in suite["rows"]]
    table = report.table(suite, rows, results)
    write_text(folder / "table.md", table)
    write_json(
        folder / "results.json", {"title": suite["title"], "metric": suite["metric"], "rows": rows, "runs": results}
    )
    report.pictures(
        suite, folder, results, {row["name"]: _folder(folder, row["name"], seeds[0]) for row in suite["rows"]}
    )
    return folder, table


def _folder(folder: Path, row: str, seed: int) -> Path:
    return folder / f"{row}-seed{seed}"


def _overrides(folder: Path, row: dict[str, Any], seed: int) -> list[str]:
    overrides = [f"recipe.seed={seed}", *row.get("overrides", [])]
    if "teacher" in row:
        overrides.append(f"recipe.teacher_checkpoint={_folder(folder, row['teacher'], seed) / 'last.pt'}")
    return overrides


def _summary(row: dict[str, Any], results: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    values = [result["final"][metric] for result in results]
    return {
        "name": row["name"],
        "label": row["label"],
        "values": values,
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "parameters": results[0]["parameters"],
        "seconds": statistics.mean(result["seconds"] for result in results),
    }
