"""The Markdown table of a suite, and the pictures of suites and evaluations; `pictures` draws the figures."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rkd_plugin import markdown
from rkd_plugin.experiments.running.evaluation import Evaluation, evaluate
from rkd_plugin.experiments.running.features import compared
from rkd_plugin.experiments.running.run_folder import recipe_of_run
from rkd_plugin.experiments.running.runner import events_in
from rkd_plugin.experiments.tables import pictures as draw
from rkd_plugin.teacher_bank.labels import class_names

Result = dict[str, Any]
WHEN = {"final": "last epoch", "best": "best test epoch"}


def table(suite: Result, rows: list[Result], results: dict[str, list[Result]]) -> str:
    """A Markdown table with a line for each row and metric, the numbers of the paper, and the conditions.

    The *last epoch* involves no choice. The *best test epoch* is what the authors' code reports: the epoch with the
    highest first metric on the test data, which is optimistic for every row.
    """
    lines = [line for row in rows for line in _lines(suite, row, rows)]
    heads = max(lines, key=len)
    runs = [run for row in results.values() for run in row if "environment" in run]
    conditions = {", ".join(f"{key} {value}" for key, value in run["environment"].items()) for run in runs}
    seeds = ", ".join(map(str, suite["seeds"]))
    changed = f", with {' '.join(suite['overrides'])}" if suite["overrides"] else ""
    text = [
        f"# {suite['title']}",
        "",
        markdown.table(list(heads), [[line.get(head, "") for head in heads] for line in lines]),
        "",
        f"{', '.join(suite['metrics'].values())}. Mean ± standard deviation over the seeds {seeds}{changed}; "
        f"{len(runs)} runs, {sum(run['seconds'] for run in runs):.0f} s of training and measuring. The last epoch is "
        "not chosen; the best test epoch is chosen on the data on which it is measured, as in the authors' code. "
        + " ".join(suite.get("notes", "").split()),
        "",
        *(f"Measured with {condition}." for condition in sorted(conditions)),
        "",
    ]
    return "\n".join(text)


def _lines(suite: Result, row: Result, rows: list[Result]) -> Iterator[dict[str, str]]:
    """Head of a column -> cell, for each metric or set of test data."""
    labels: dict[str, str] = suite["test_sets"] if "test_sets" in suite else suite["metrics"]
    digits = suite.get("decimals", 1)
    has_paper = any(other["paper"] for other in rows)
    sources = dict.fromkeys(name for other in rows for name in other["others"])
    by_name = {other["name"]: other["label"] for other in rows}
    compared = {name: by_name[name] for other in rows for name in other["against"]}
    for column in (column for column in labels if column in row["final"]):
        line = {"": row["label"]}
        if "test_sets" in suite:
            line["tested on"] = column
        elif len(labels) > 1:
            line["metric"] = labels[column]
        for source in sources:
            line[source] = f"{row['others'][source][column]:.2f}" if column in row["others"].get(source, {}) else ""
        published = row["paper"].get(column)
        if has_paper:
            line["paper"] = "" if published is None else f"{published:.2f}"
        for when, head in WHEN.items():
            mean, std = row[when][column]["mean"], row[when][column]["std"]
            line[head] = f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")
            if when == "final" and f"{column}_ci95" in row["final"]:
                line["± 95 % of episodes"] = f"{row['final'][f'{column}_ci95']['mean']:.{digits}f}"
            if has_paper:
                line[f"{head} - paper"] = "" if published is None else f"{mean - published:+.{digits}f}"
        for name, label in compared.items():
            found = row["against"].get(name, {}).get(column)
            difference = "" if found is None else f"{found['mean']:+.{digits}f} ± {found['ci95']:.{digits}f}"
            line[f"over {label}"] = difference or line.get(f"over {label}", "")
        line["last epoch, each seed"] = ", ".join(f"{value:.{digits}f}" for value in row["final"][column]["values"])
        line["parameters"] = "" if row["parameters"] is None else f"{row['parameters']:,}"
        line["seconds a run"] = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        yield line


def suite_pictures(suite: Result, stem: Path, results: dict[str, list[Result]], shown: dict[str, Path]) -> list[Path]:
    """``<stem>_learning_curves.png``, and ``<stem>_retrieval.png`` for the rows that the suite lists as panels.

    Args:
        suite: from `read_suite`.
        stem: folder and beginning of the names.
        results: row -> results of each seed.
        shown: row -> folder of one run.

    Returns:
        The files; an empty list without matplotlib, which the extra ``rkd-plugin[report]`` installs.
    """
    if find_spec("matplotlib") is None:
        return []
    labels = {row["name"]: row["label"] for row in suite["rows"]}
    metric, metric_label = next(iter(suite["metrics"].items()))
    histories = {labels[name]: [run["history"] for run in results[name]] for name in shown}
    figures = {f"{stem.name}_learning_curves": draw.learning_curves(histories, metric, metric_label, suite["title"])}
    panels = [name for name in suite.get("panels", ()) if name in shown]
    if panels:
        seen = {labels[name]: evaluate(recipe_of_run(shown[name]), shown[name] / "last.pt") for name in panels}
        first = next(iter(seen.values()))
        figures[f"{stem.name}_retrieval"] = draw.retrieval_panel(
            {label: evaluation.outputs for label, evaluation in seen.items()}, first.labels, _image(first)
        )
    return draw.save(figures, stem.parent)


def evaluation_pictures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Plot the outputs of a model on test data, as PNG and TensorBoard events in ``folder``.

    The pictures are ``retrieval`` (``confusion`` for image classification), ``embedding_map`` and ``distances``, and
    ``relations`` if the recipe has a teacher. All but the first show what RKD compares; see `compared`.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("expected matplotlib for pictures, found none; install rkd-plugin[report]")
    experiment, labels = evaluation.experiment, evaluation.labels
    models = {"student": evaluation.features}
    teacher = experiment.teacher()
    if teacher is not None:
        layer = compared(experiment.config, teacher, "teacher")
        *_, models["teacher"] = experiment.embed(teacher, evaluation.loader, layer)
    if experiment.settings["task"] == "classification":
        first = {"confusion": draw.confusion(evaluation.outputs, labels, class_names(evaluation.loader.dataset))}
    else:
        first = {"retrieval": draw.retrieval_panel(models, labels, _image(evaluation))}
    figures = first | {
        "embedding_map": draw.embedding_map(models, labels),
        "distances": draw.distance_histograms(evaluation.features, models.get("teacher"), labels),
    }
    if "teacher" in models:
        figures["relations"] = draw.relations(evaluation.features, models["teacher"])
    with events_in(folder) as events:
        return draw.save(figures, folder, events)


def _image(evaluation: Evaluation) -> Any:
    return lambda index: evaluation.loader.dataset[index][0]
