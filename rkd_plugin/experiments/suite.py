"""A table of runs: what is missing is run, the rest is read."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rkd_plugin.experiments import report
from rkd_plugin.experiments.experiment import evaluate, of_folder
from rkd_plugin.experiments.few_shot import episode_accuracies, interval
from rkd_plugin.experiments.files import write_json, write_text
from rkd_plugin.experiments.recipe import Recipe, RecipeError, read, read_suite
from rkd_plugin.experiments.recipe.errors import suggest
from rkd_plugin.experiments.runner import run

Result = dict[str, Any]


def reproduce(
    name: str,
    out: Path | None = None,
    seeds: Sequence[int] | None = None,
    rows: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    fast: bool = False,
) -> tuple[Path, str]:
    """Run the rows of a suite for every seed, and write ``<suite>.md``, ``<suite>.json`` and pictures.

    A row that names a ``teacher`` learns from the last checkpoint of that row, of the same seed; one with ``epochs_of``
    takes as many epochs as that row's best one, for early stopping on validation data. Runs that are there
    already are read, and one that was stopped goes on. A run's folder is named by its row and seed, so that suites
    that write into one folder share the rows that they name alike.

    Args:
        name: the suite's name or path.
        out: folder for runs and tables; ``runs/`` and the suite's folder if not given.
        seeds: instead of the suite's own.
        rows: names of some of the rows; their teachers are run as well. All, if not given.
        overrides: of every recipe, such as ``recipe.data_root=/data``; the table names them.
        fast: run the fraction of the schedule that the suite states under ``fast``, in a folder of that name; the table
            is labelled so.

    Returns:
        The folder, and the table in Markdown.

    Raises:
        RecipeError: if the suite or any of its recipes has problems, or it states no fast schedule; nothing was run
            then.
    """
    suite = read_suite(name)
    suite["rows"] = _chosen(suite["rows"], rows, fast)
    common = suite.pop("overrides", [])
    suite["overrides"] = list(overrides)
    stem = Path(name).with_suffix("")
    folder = (out or Path("runs", *stem.parts[-2:-1] or stem.parts)).absolute()
    if fast:
        folder /= "fast"
        if "fast" not in suite:
            raise RecipeError(name, [("suite.fast", "no fast schedule is stated here: run the suite without --fast")])
        suite["title"] += f" ({suite['fast']['label']})"
    seeds = seeds or suite["seeds"]
    # Every recipe is read and checked before the first of them is run.
    tests = {key: read(recipe) for key, recipe in suite.get("test_sets", {}).items()}
    schedule = suite["fast"]["overrides"] if fast else None
    planned = [
        (seed, row, [*common, *_overrides(folder, row, seed, schedule, overrides)])
        for seed in seeds
        for row in suite["rows"]
    ]
    recipes = [read(row["recipe"], changes) for _, row, changes in planned]
    for recipe in [*recipes, *tests.values()]:
        recipe.validate()
    for (_, row, _), recipe in zip(planned, recipes, strict=True):
        if "against" in row and recipe.settings["task"] != "few_shot":
            problem = f"a few_shot recipe was expected, whose test episodes are paired, got {recipe.settings['task']}"
            raise RecipeError(name, [(f"{row['name']}.against", problem)])
    results: dict[str, list[Result]] = {row["name"]: [] for row in suite["rows"]}
    for (seed, row, changes), recipe in zip(tqdm(planned, desc=suite["title"], unit="run"), recipes, strict=True):
        target = _folder(folder, row["name"], seed)
        trained = row.get("trained", True)
        if "epochs_of" in row and not fast:
            epochs = results[row["epochs_of"]][-1]["best"]["epoch"] * row.get("times", 1)
            recipe = read(row["recipe"], [*changes, f"recipe.num_epochs={epochs}"])
        result = run(recipe, target, f"{row['label']}, seed {seed}") if trained else {"seed": seed}
        if tests:
            result = {**result, **_on_other_data(recipe, target, tests, next(iter(suite["metrics"])), trained)}
        if "against" in row:
            others = {name: _folder(folder, name, seed) for name in row["against"]}
            result = {**result, "against": {name: _paired(target, other) for name, other in others.items()}}
        results[row["name"]].append(result)
    columns = list(tests or suite["metrics"])
    summaries = [_summary(row, results[row["name"]], columns) for row in suite["rows"]]
    table = report.table(suite, summaries, results)
    write_text(folder / f"{stem.name}.md", table)
    write_json(folder / f"{stem.name}.json", {"title": suite["title"], "rows": summaries, "runs": results})
    shown = {row["name"]: _folder(folder, row["name"], seeds[0]) for row in suite["rows"] if row.get("trained", True)}
    report.suite_pictures(suite, folder / stem.name, results, shown)
    return folder, table


def _chosen(rows: list[Result], names: Sequence[str] | None, fast: bool) -> list[Result]:
    """The rows of these names and those that they need, in the suite's order."""
    if fast:  # its schedule tells how many epochs there are
        searches = {row.get("epochs_of") for row in rows}
        rows = [row for row in rows if row["name"] not in searches]
    by_name = {row["name"]: row for row in rows}
    wanted = list(names or by_name)
    for name in wanted:
        if name not in by_name:
            raise RecipeError("rows", [("", f"the suite has no row {name!r}{suggest(name, by_name)}")])
        row = by_name[name]
        needed = [row.get("teacher"), *row.get("against", ()), None if fast else row.get("epochs_of")]
        wanted += [other for other in needed if other is not None and other not in wanted]
    return [row for row in rows if row["name"] in wanted]


def _folder(folder: Path, row: str, seed: int) -> Path:
    return folder / f"{row}-seed{seed}"


def _overrides(
    folder: Path, row: Result, seed: int, schedule: list[str] | None, everywhere: Sequence[str]
) -> list[str]:
    shorter = [] if schedule is None else [*schedule, *row.get("fast", [])]
    overrides = [*shorter, *everywhere, f"recipe.seed={seed}", *row.get("overrides", [])]
    if "teacher" in row:
        overrides.append(f"recipe.teacher_checkpoint={_folder(folder, row['teacher'], seed) / 'last.pt'}")
    return overrides


def _on_other_data(recipe: Recipe, folder: Path, tests: dict[str, Recipe], metric: str, trained: bool) -> Result:
    """``final`` and ``best`` with a value for each set of test data, measured once and kept beside the run."""
    measured: Result = {"final": {}, "best": {}}
    for key, data in tests.items():
        kept = folder / f"test_{key}.json"
        described = {"recipe": recipe.resolved(), "data": data.resolved()}
        found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if found.get("described") != described:
            checkpoints = {"final": folder / "last.pt", "best": folder / "best.pt"}
            found = {"described": described} | {
                when: evaluate(of_folder(folder) if trained else recipe, path if trained else None, data).metrics
                for when, path in checkpoints.items()
            }
            write_json(kept, found)
        for when, values in measured.items():
            values[key] = found[when][metric]
    return measured


def _paired(folder: Path, other: Path) -> Result:
    """By task, the mean difference of two runs' accuracies on the same episodes, and half of its 95 % interval."""
    first, second = (_episodes(path) for path in (folder, other))
    return {task: interval(first[task] - second[task]) for task in first}


def _episodes(folder: Path) -> dict[str, Tensor]:
    """By task, the accuracy of each test episode after the last epoch, measured once and kept beside the run."""
    kept, recipe = folder / "episodes.json", of_folder(folder)
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if found.get("described") != recipe.resolved():
        evaluation = evaluate(recipe, folder / "last.pt")
        accuracies = evaluation.experiment.measure(evaluation.outputs, evaluation.labels, episode_accuracies)
        found = {"described": recipe.resolved(), "final": {task: of.tolist() for task, of in accuracies.items()}}
        write_json(kept, found)
    return {task: torch.tensor(of, dtype=torch.float64) for task, of in found["final"].items()}


def _summary(row: Result, results: list[Result], columns: Sequence[str]) -> Result:
    def over_seeds(when: str, column: str) -> Result:
        values = [result[when][column] for result in results]
        std = statistics.stdev(values) if len(values) > 1 else None
        return {"values": values, "mean": statistics.mean(values), "std": std}

    def against(other: str, column: str) -> Result:
        # Each seed has episodes of its own.
        means, halves = zip(*(result["against"][other][column] for result in results), strict=True)
        return {"mean": statistics.mean(means), "ci95": math.hypot(*halves) / len(halves)}

    trained = row.get("trained", True)
    columns = row.get("metrics", columns)
    with_ci95 = [f"{column}_ci95" for column in columns if f"{column}_ci95" in results[0].get("final", {})]
    return {
        "name": row["name"],
        "label": row["label"],
        "paper": row.get("paper", {}),
        "others": row.get("others", {}),
        **{when: {column: over_seeds(when, column) for column in [*columns, *with_ci95]} for when in ("final", "best")},
        "against": {other: {column: against(other, column) for column in columns} for other in row.get("against", ())},
        "parameters": results[0]["parameters"] if trained else None,
        "seconds": statistics.mean(result["seconds"] for result in results) if trained else None,
    }
