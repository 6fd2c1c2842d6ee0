"""Running a suite: missing runs are trained, the others are read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from rkd_plugin.experiments.recipe import Recipe, RecipeError, quoted, read, read_suite
from rkd_plugin.experiments.recipe.errors import suggest
from rkd_plugin.experiments.running import runner
from rkd_plugin.experiments.running.checkpoints import read_measured
from rkd_plugin.experiments.running.episodes import episode_accuracies, interval
from rkd_plugin.experiments.running.evaluation import evaluate
from rkd_plugin.experiments.running.run_folder import RUNS, default_folder, recipe_of_run
from rkd_plugin.experiments.support.files import write_json, write_text
from rkd_plugin.experiments.tables import report
from rkd_plugin.printing import printable

Result = dict[str, Any]


def reproduce(
    name: str,
    out: Path | None = None,
    seeds: Sequence[int] | None = None,
    rows: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    fast: bool = False,
) -> tuple[Path, str]:
    """Run the rows of a suite with every seed, and write ``<suite>.md``, ``<suite>.json`` and pictures.

    A row with ``teacher`` learns from the last checkpoint of that row with the same seed. A row with ``epochs_of``
    trains for the number of the best epoch of that row, for early stopping on validation data. Runs that have ended are
    read, and stopped runs continue. The folder of a run is named after row and seed, so that suites with one output
    folder share the rows with equal names.

    Args:
        name: name or path of the suite.
        out: folder for runs and tables; None for ``runs/`` and the folder of the suite.
        seeds: seeds; None for those of the suite.
        rows: names of rows to run, together with the rows that they need; None for all rows.
        overrides: overrides of every recipe, such as ``recipe.data_root=/data``; the table names them.
        fast: whether to use the shorter schedule of the suite, in a folder ``fast``; the title of the table names it.

    Returns:
        The folder, and the table in Markdown.

    Raises:
        RecipeError: before the first run, if the suite or a recipe of it has problems, or it has no fast schedule.
    """
    own = default_folder(name)
    shared = own if own.parent == RUNS else own.parent  # the folder in which the suite is
    folder = (out or shared).absolute()
    plan = _plan(name, folder / "fast" if fast else folder, seeds, rows, overrides, fast)
    results = _results(plan)
    return plan.folder, _write(plan, own.name, results)


class _Run(NamedTuple):
    """One row with one seed."""

    row: Result
    seed: int
    recipe: Recipe
    overrides: list[str]
    folder: Path


class _Plan(NamedTuple):
    """The checked runs of a call of `reproduce`."""

    suite: Result
    folder: Path
    runs: list[_Run]
    tests: dict[str, Recipe]
    searches: bool  # whether `epochs_of` is followed


def _plan(
    name: str, folder: Path, seeds: Sequence[int] | None, rows: Sequence[str] | None, overrides: Sequence[str],
    fast: bool,
) -> _Plan:  # fmt: skip
    """Read and check all recipes before the first run."""
    suite = read_suite(name)
    suite["rows"] = _chosen(suite["rows"], rows, fast)
    common = suite.pop("overrides", [])
    suite["overrides"] = list(overrides)
    suite["seeds"] = list(seeds or suite["seeds"])
    schedule = None
    if fast:
        if "fast" not in suite:
            raise RecipeError(
                name, [("suite.fast", "expected a fast schedule, found none; run the suite without --fast")]
            )
        suite["title"] += f" ({suite['fast']['label']})"
        schedule = suite["fast"]["overrides"]
    tests = {key: read(recipe) for key, recipe in suite.get("test_sets", {}).items()}
    runs = []
    for seed in suite["seeds"]:
        for row in suite["rows"]:
            changes = [*common, *_overrides(folder, row, seed, schedule, overrides)]
            runs.append(_Run(row, seed, read(row["recipe"], changes), changes, _folder(folder, row["name"], seed)))
    for recipe in [*(run.recipe for run in runs), *tests.values()]:
        recipe.validate()
    for run in runs:
        if "against" in run.row and run.recipe.settings["task"] != "few_shot":
            task = run.recipe.settings["task"]
            problem = f"expected a few_shot recipe, whose test episodes are paired, got {task}"
            raise RecipeError(name, [(f"{run.row['name']}.against", problem)])
    return _Plan(suite, folder, runs, tests, searches=not fast)


def _results(plan: _Plan) -> dict[str, list[Result]]:
    """Train missing runs and read the others; return row -> results of each seed."""
    results: dict[str, list[Result]] = {row["name"]: [] for row in plan.suite["rows"]}
    for planned in tqdm(plan.runs, desc=printable(plan.suite["title"]), unit="run"):
        row, recipe = planned.row, planned.recipe
        if "epochs_of" in row and plan.searches:
            epochs = results[row["epochs_of"]][-1]["best"]["epoch"] * row.get("times", 1)
            recipe = read(row["recipe"], [*planned.overrides, f"recipe.num_epochs={epochs}"])
        trained = row.get("trained", True)
        label = f"{row['label']}, seed {planned.seed}"
        result = runner.run(recipe, planned.folder, label) if trained else {"seed": planned.seed}
        if not trained and not plan.tests:
            result |= _untrained(recipe, planned.folder)
        if plan.tests:
            metric = next(iter(plan.suite["metrics"]))
            result = {**result, **_on_other_data(recipe, planned.folder, plan.tests, metric, trained)}
        if "against" in row:
            others = {name: _folder(plan.folder, name, planned.seed) for name in row["against"]}
            result = {**result, "against": {name: _paired(planned.folder, other) for name, other in others.items()}}
        results[row["name"]].append(result)
    return results


def _write(plan: _Plan, name: str, results: dict[str, list[Result]]) -> str:
    """Write the table as Markdown and JSON, and the pictures; return the table."""
    suite = plan.suite
    columns = list(plan.tests or suite["metrics"])
    summaries = [_summary(row, results[row["name"]], columns) for row in suite["rows"]]
    table = report.table(suite, summaries, results)
    write_text(plan.folder / f"{name}.md", table)
    write_json(plan.folder / f"{name}.json", {"title": suite["title"], "rows": summaries, "runs": results})
    shown = {run.row["name"]: run.folder for run in reversed(plan.runs) if run.row.get("trained", True)}  # first seed
    shown = {row["name"]: shown[row["name"]] for row in suite["rows"] if row["name"] in shown}
    report.suite_pictures(suite, plan.folder / name, results, shown)
    return table


def _chosen(rows: list[Result], names: Sequence[str] | None, fast: bool) -> list[Result]:
    """The rows with these names and those that they need, in the order of the suite."""
    if fast:  # the fast schedule sets the number of epochs
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
        overrides.append(quoted("recipe.teacher_checkpoint", _folder(folder, row["teacher"], seed) / "last.pt"))
    return overrides


def _on_other_data(recipe: Recipe, folder: Path, tests: dict[str, Recipe], metric: str, trained: bool) -> Result:
    """``final`` and ``best`` with a value for each set of test data, which are saved in the folder of the run."""
    measured: Result = {"final": {}, "best": {}}
    for key, data in tests.items():
        kept = folder / f"test_{key}.json"
        described = {"recipe": recipe.resolved(), "data": data.resolved()}
        found = read_measured(kept, described, {when: {metric: 0.0} for when in measured})
        if found is None:
            checkpoints = {"final": folder / "last.pt", "best": folder / "best.pt"}
            found = {"described": described} | {
                when: evaluate(recipe_of_run(folder) if trained else recipe, path if trained else None, data).metrics
                for when, path in checkpoints.items()
            }
            write_json(kept, found)
        for when, values in measured.items():
            values[key] = found[when][metric]
    return measured


def _untrained(recipe: Recipe, folder: Path) -> Result:
    """``final`` and ``best`` of a model without training, which are saved in the folder of the run."""
    kept, described = folder / "untrained.json", recipe.resolved()
    found = read_measured(kept, described, {"final": {}})
    if found is None:
        found = {"described": described, "final": evaluate(recipe).metrics}
        write_json(kept, found)
    return dict.fromkeys(("final", "best"), found["final"])


def _paired(folder: Path, other: Path) -> Result:
    """Task -> mean difference of the accuracies of two runs on the same episodes, and half of its 95 % interval."""
    first, second = (_episodes(path) for path in (folder, other))
    return {task: interval(first[task] - second[task]) for task in first}


def _episodes(folder: Path) -> dict[str, Tensor]:
    """Task -> accuracy of each test episode after the last epoch, which are saved in the folder of the run."""
    kept, recipe = folder / "episodes.json", recipe_of_run(folder)
    found = read_measured(kept, recipe.resolved(), {"final": {}})
    if found is None:
        evaluation = evaluate(recipe, folder / "last.pt")
        accuracies = evaluation.experiment.measure(evaluation.outputs, evaluation.labels, episode_accuracies)
        found = {
            "described": recipe.resolved(),
            "final": {task: values.tolist() for task, values in accuracies.items()},
        }
        write_json(kept, found)
    return {task: torch.tensor(values, dtype=torch.float64) for task, values in found["final"].items()}


def _summary(row: Result, results: list[Result], columns: Sequence[str]) -> Result:
    def over_seeds(when: str, column: str) -> Result:
        values = [result[when][column] for result in results]
        std = statistics.stdev(values) if len(values) > 1 else None
        return {"values": values, "mean": statistics.mean(values), "std": std}

    def against(other: str, column: str) -> Result:
        # Seeds have different episodes, so that their intervals are independent.
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
