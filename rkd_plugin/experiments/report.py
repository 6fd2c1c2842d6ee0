"""Tables for the eye and pictures of a suite."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.inference import CustomKNN

from rkd_plugin.experiments.files import replacing
from rkd_plugin.experiments.metrics import embed
from rkd_plugin.experiments.runner import load

NEIGHBOURS = 6


def table(suite: dict[str, Any], rows: list[dict[str, Any]], results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row per method with mean and standard deviation over the seeds, and the conditions below it."""
    runs = [result for row in results.values() for result in row]
    seeds = [result["seed"] for result in results[rows[0]["name"]]]
    lines = [
        f"# {suite['title']}",
        "",
        f"| | {suite['metric_label']} | each seed | parameters | seconds a run |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "" if row["std"] is None else f" ± {row['std']:.1f}"
        each = ", ".join(f"{value:.1f}" for value in row["values"])
        lines.append(
            f"| {row['label']} | {row['mean']:.1f}{spread} | {each} | {row['parameters']:,} | {row['seconds']:.1f} |"
        )
    conditions = sorted(
        {", ".join(f"{key} {value}" for key, value in result["environment"].items()) for result in runs}
    )
    seconds = sum(result["seconds"] for result in runs)
    lines += [
        "",
        f"Mean ± standard deviation over the seeds {', '.join(map(str, seeds))}, last epoch, no selection; "
        f"{len(runs)} runs, {seconds:.0f} s of training and measuring. " + " ".join(suite.get("notes", "").split()),
        "",
        *(f"Measured with {condition}." for condition in conditions),
        "",
    ]
    return "\n".join(lines)


def pictures(
    suite: dict[str, Any], folder: Path, results: dict[str, list[dict[str, Any]]], shown: dict[str, Path]
) -> list[Path]:
    """``learning_curves.png``, and ``retrieval.png`` for the runs in ``shown`` that the suite lists as its panels.

    Returns:
        The files; none without matplotlib, which the extra ``rkd-plugin[report]`` brings.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    labels = {row["name"]: row["label"] for row in suite["rows"]}
    curves, panel = folder / "learning_curves.png", folder / "retrieval.png"
    _learning_curves(curves, suite, labels, results)
    _retrieval(panel, {labels[name]: shown[name] for name in suite.get("panels", shown)})
    return [curves, panel]


def _learning_curves(
    path: Path, suite: dict[str, Any], labels: dict[str, str], results: dict[str, list[dict[str, Any]]]
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, runs in results.items():
        epochs = [epoch["epoch"] for epoch in runs[0]["history"]]
        values = [[run["history"][i][suite["metric"]] for run in runs] for i in range(len(epochs))]
        means = [statistics.mean(at) for at in values]
        (line,) = axes.plot(epochs, means, marker="o", markersize=3, label=f"{labels[name]}: {means[-1]:.1f}")
        axes.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="epoch", ylabel=suite["metric_label"], title=f"{suite['title']}\nmean and range over the seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _retrieval(path: Path, runs: dict[str, Path]) -> None:
    """For the first image of every class, its nearest images under each model, framed green if of its class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(runs), 4.2), layout="constrained")
    for part, (label, folder) in zip(figure.subfigures(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        experiment = load(folder)
        loader = experiment.test_loader()
        outputs, labels = embed(experiment.student, loader, experiment.device)
        queries = torch.stack([(labels == c).nonzero()[0, 0] for c in torch.unique(labels)]).cpu()
        search = CustomKNN(LpDistance(normalize_embeddings=False))
        nearest = search(outputs[queries], NEIGHBOURS + 1, outputs)[1].cpu()
        axes = part.subplots(len(queries), NEIGHBOURS + 1, squeeze=False)
        right = 0
        for row, query in enumerate(queries.tolist()):
            others = [i for i in nearest[row].tolist() if i != query][:NEIGHBOURS]
            for column, index in enumerate([query, *others]):
                image = loader.dataset[index][0]
                axes[row, column].imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r")
                axes[row, column].set(xticks=[], yticks=[])
                same = bool(labels[index] == labels[query])
                right += same and column > 0
                colour = "black" if column == 0 else "tab:green" if same else "tab:red"
                for spine in axes[row, column].spines.values():
                    spine.set(color=colour, linewidth=2.5)
        axes[0, 0].set_title("query", fontsize=8)
        part.suptitle(f"{label}\n{right} of {len(queries) * NEIGHBOURS} nearest are right", fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
