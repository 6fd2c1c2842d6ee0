"""Figures of embeddings, with matplotlib from the extra ``rkd-plugin[report]``.

Figures are reproducible: of many rows, an evenly spaced or seeded part is drawn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn.functional import normalize

from rkd_plugin.functional import rkd_angle_loss, rkd_distance_loss
from rkd_plugin.printing import printable
from rkd_plugin.storage import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]


def save(figures: Mapping[str, Figure], folder: Path, events: Any = None) -> list[Path]:
    """Write ``<name>.png``, ``<name>.jpg`` for photographs, and add it to a TensorBoard writer; return the files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    paths = []
    for name, figure in figures.items():
        canvas = FigureCanvasAgg(figure)
        # Photographs as PNG are several times as large.
        has_colours = any(image.get_array().ndim == 3 for axes in figure.axes for image in axes.images)  # type: ignore[union-attr]
        path = folder / (f"{name}.jpg" if has_colours else f"{name}.png")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120)
        if events is not None:
            canvas.draw()  # type: ignore[no-untyped-call]
            pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
            events.add_image(name, pixels[..., :3], dataformats="HWC")
        paths.append(path)
    return paths


def learning_curves(runs: Mapping[str, Sequence[History]], metric: str, metric_label: str, title: str) -> Figure:
    """The mean and range of a metric over the seeds, by epoch, with one line for each label of ``runs``."""
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    for index, (label, histories) in enumerate(runs.items()):
        style = ("-", "--", ":")[index // 10 % 3]  # the colours repeat after ten lines
        epochs = [epoch["epoch"] for epoch in histories[0]]
        values = [[history[at][metric] for history in histories] for at in range(len(epochs))]
        means = [statistics.mean(at) for at in values]
        (line,) = axes.plot(epochs, means, style, marker="o", markersize=3, label=f"{_plain(label)}: {means[-1]:.1f}")
        axes.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="epoch", ylabel=_plain(metric_label), title=f"{_plain(title)}\nmean and range over the seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def retrieval_panel(
    models: Mapping[str, Tensor], labels: Tensor, image: Callable[[int], Tensor], queries: int = 8, neighbours: int = 6
) -> Figure:
    """One query per row with its nearest neighbours under each model; frames are green for its class, otherwise red.

    Args:
        models: label -> embeddings ``(M, D)``.
        labels: classes ``(M,)``.
        image: index -> image ``(C, H, W)`` of any range.
        queries: number of evenly spaced classes; the first image of each is a query.
        neighbours: number of neighbours.
    """
    figure = _figure(3.6 * len(models), 0.6 + 0.55 * queries)
    classes = torch.unique(labels)
    chosen = [int((labels == c).nonzero()[0, 0]) for c in classes[_even(len(classes), queries)]]
    for part, (label, outputs) in zip(_parts(figure, len(models)), models.items(), strict=True):
        search = CustomKNN(LpDistance(normalize_embeddings=False))
        nearest = search(outputs[chosen], min(neighbours + 1, len(outputs)), outputs)[1].tolist()
        axes = part.subplots(len(chosen), neighbours + 1, squeeze=False)
        right = 0
        for row, (query, found) in enumerate(zip(chosen, nearest, strict=True)):
            others = [index for index in found if index != query][:neighbours]
            for cell in axes[row]:
                cell.set(xticks=[], yticks=[])
            for column, index in enumerate([query, *others]):
                pixels = image(index).float()
                pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
                axes[row, column].imshow(pixels.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r")
                same = bool(labels[index] == labels[query])
                right += same and column > 0
                colour = "black" if column == 0 else "tab:green" if same else "tab:red"
                for spine in axes[row, column].spines.values():
                    spine.set(color=colour, linewidth=2.5)
        axes[0, 0].set_title("query", fontsize=8)
        part.suptitle(f"{_plain(label)}\n{right} of {len(chosen) * neighbours} nearest are right", fontsize=9)
    return figure


def embedding_map(models: Mapping[str, Tensor], labels: Tensor, limit: int = 2000, coloured: int = 10) -> Figure:
    """The embeddings of each model in two dimensions by t-SNE; the largest classes in colour, all others in grey."""
    figure = _figure(5 * len(models), 5)
    chosen = _even(len(labels), limit)
    shown = labels[chosen].cpu()
    classes, counts = torch.unique(labels, return_counts=True)
    largest = classes[counts.argsort(descending=True, stable=True)[:coloured]].sort().values.tolist()
    for axes, (label, outputs) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        rows = outputs[chosen].double().cpu().numpy()
        # t-SNE needs several distinct rows; fewer are plotted directly.
        if len(np.unique(rows, axis=0)) > 4:
            perplexity = min(30.0, (len(rows) - 1) / 3)
            places = TSNE(init="random", random_state=0, perplexity=perplexity).fit_transform(rows)
        else:
            places = np.pad(rows, ((0, 0), (0, 2)))[:, :2]
        rest = ~torch.isin(shown, torch.tensor(largest, dtype=shown.dtype)).numpy()
        axes.scatter(*places[rest].T, s=4, color="lightgrey", label="other classes")
        for number, name in enumerate(largest):
            axes.scatter(*places[(shown == name).numpy()].T, s=10, color=f"C{number % 10}", label=f"class {name}")
        axes.set(title=_plain(label), xticks=[], yticks=[])
    axes.legend(fontsize=6)
    return figure


def distance_histograms(student: Tensor, teacher: Tensor | None, labels: Tensor, limit: int = 2000) -> Figure:
    """Distances within classes and between classes, divided by the mean distance as in RKD-D."""
    sides = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
    figure = _figure(5 * len(sides), 4)
    chosen = _even(len(labels), limit)
    shown = labels[chosen].cpu()
    first, second = torch.triu_indices(len(chosen), len(chosen), 1)
    same = shown[first] == shown[second]
    for axes, (side, outputs) in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides.items(), strict=True):
        distances = _distances(outputs[chosen])
        bins = np.linspace(0, max(float(distances.max()), 1.0) if len(distances) else 1.0, 60)
        for chosen_pairs, name in ((same, "one class"), (~same, "two classes")):
            if chosen_pairs.any():
                axes.hist(
                    distances[chosen_pairs].numpy(),
                    bins,
                    density=True,
                    alpha=0.5,
                    label=f"{name}, {int(chosen_pairs.sum()):,} pairs",
                )
        title = side
        if same.any() and (~same).any():
            nearer = float((distances[~same] < distances[same].median()).double().mean())
            title += f"\n{100 * nearer:.1f} % of the pairs of two classes are nearer than the median pair of one class"
        axes.set(xlabel="distance / mean distance", ylabel="density")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=8)
    return figure


def relations(student: Tensor, teacher: Tensor, limit: int = 1000, triplets: int = 200_000) -> Figure:
    """What RKD compares: distances, and cosines of triplets, of the student over those of the teacher.

    The titles have both losses of the plotted rows, and the correlation. Equal relations are on the diagonal.
    """
    figure = _figure(11, 5)
    chosen = _even(len(student), limit)
    sides = [x[chosen].double().cpu() for x in (teacher, student)]
    drawn = torch.randint(len(chosen), (triplets, 3), generator=torch.Generator().manual_seed(0))
    vertex, first, second = drawn[(drawn != drawn.roll(1, 1)).all(1)].T

    def cosines(x: Tensor) -> Tensor:
        return (normalize(x[first] - x[vertex]) * normalize(x[second] - x[vertex])).sum(1)

    losses = [loss(sides[1], sides[0]).item() for loss in (rkd_distance_loss, rkd_angle_loss)]
    panels = [("distance / mean distance", "RKD-D", map(_distances, sides)), ("cosine", "RKD-A", map(cosines, sides))]
    for axes, (what, name, (x, y)), loss in zip(figure.subplots(1, 2), panels, losses, strict=True):
        if len(x):
            axes.hexbin(x.numpy(), y.numpy(), gridsize=60, bins="log", mincnt=1, cmap="viridis")
            ends = [min(float(x.min()), float(y.min())), max(float(x.max()), float(y.max()))]
            axes.plot(ends, ends, color="tab:red", linewidth=1)
        spread = x.std(correction=0) * y.std(correction=0) if len(x) else torch.zeros(())
        correlation = ((x - x.mean()) * (y - y.mean())).mean() / spread if spread > 0 else spread
        axes.set(xlabel=f"teacher's {what}", ylabel=f"student's {what}")
        axes.set_title(f"{name} loss {loss:.4f}, correlation {float(correlation):.2f}", fontsize=10)
    return figure


def confusion(scores: Tensor, labels: Tensor, names: Mapping[int, str], limit: int = 15, listed: int = 5) -> Figure:
    """The confusion matrix of the classes that are confused most often, in percent of the images of the true class.

    Every row adds up to 100; the last column is all other classes. A class with the same logit as the label counts as
    higher, as in `metrics.classification`.

    Args:
        scores: logits ``(M, C)``.
        labels: classes ``(M,)``, below C.
        names: label -> name; a class without a name is shown as its label.
        limit: number of classes: those of the most frequent mistakes.
        listed: number of mistakes in the title.
    """
    scores, labels = scores.cpu(), labels.cpu().long()
    own, others = scores.gather(1, labels[:, None]), scores.scatter(1, labels[:, None], -torch.inf).max(1)
    predicted = torch.where(own[:, 0] > others.values, labels, others.indices)
    wrong = (predicted != labels).nonzero()[:, 0]
    pairs, counts = torch.unique(torch.stack([labels[wrong], predicted[wrong]], 1), dim=0, return_counts=True)
    frequent = counts.argsort(descending=True, stable=True)
    ranked = list(zip(pairs[frequent].tolist(), counts[frequent].tolist(), strict=True))
    classes = list(dict.fromkeys(label for pair, _ in ranked for label in pair))[:limit]
    classes = classes or torch.unique(labels)[:limit].tolist()  # without mistakes there is no order of classes
    place = torch.full((scores.shape[1],), len(classes))
    place[classes] = torch.arange(len(classes))
    shares = torch.zeros(len(classes), len(classes) + 1)
    for row, label in enumerate(classes):
        found = torch.bincount(place[predicted[labels == label]], minlength=len(classes) + 1)
        shares[row] = 100 * found / found.sum().clamp(min=1)

    def name(label: int) -> str:
        return _plain(names.get(label, str(label)))

    figure = _figure(3.5 + 0.45 * len(classes), 3.5 + 0.4 * len(classes))
    axes = figure.add_subplot()
    right = torch.eye(*shares.shape, dtype=torch.bool)
    mistaken = ~right
    mistaken[:, -1] = False
    for colours, cells in (("Greens", right), ("Reds", mistaken)):
        shown: Any = np.ma.masked_array(shares.numpy(), ~(cells & (shares > 0)).numpy())
        # Without the darkest colours, on which numbers are not readable.
        axes.imshow(shown, cmap=colours, vmin=0, vmax=1.5 * max([1.0, *shares[cells].tolist()]), aspect="auto")
    for row, column in (shares > 0).nonzero().tolist():
        axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=8)
    axes.axvline(len(classes) - 0.5, color="black", linewidth=1)
    axes.set_xticks(range(len(classes) + 1), [*map(name, classes), "any other"], rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(classes)), [name(label) for label in classes], fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class, 100 % per row")
    mistakes = [f"{count} x {name(true)} predicted as {name(taken)}" for (true, taken), count in ranked[:listed]]
    heading = f"{len(wrong):,} of {len(labels):,} are wrong" + (", most often:" if mistakes else "")
    axes.set_title("\n".join([heading, *mistakes]), fontsize=9)
    return figure


def _plain(text: str) -> str:
    """A name from a recipe or a data set, escaped so that matplotlib does not read it as a formula."""
    return printable(text).replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _parts(figure: Figure, count: int) -> Any:
    return figure.subfigures(1, count, squeeze=False)[0]


def _even(count: int, limit: int) -> Tensor:
    """At most ``limit`` indices below ``count``, evenly spread."""
    return torch.linspace(0, count - 1, min(count, limit)).round().long()


def _distances(outputs: Tensor) -> Tensor:
    """The distances of all pairs, divided by their mean."""
    distances = torch.pdist(outputs.double().cpu())
    mean = distances.mean() if len(distances) else distances.sum()
    return distances / mean if mean > 0 else distances
