"""Pictures show the numbers, and are reproducible, for all numbers."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from rkd_plugin import rkd_distance_loss
from rkd_plugin.experiments.tables import pictures

LABELS = torch.arange(40) // 4


def line():
    """Ten classes of four rows, far apart on a line: the three nearest neighbours are always right."""
    return (100.0 * LABELS + torch.arange(40) % 4)[:, None]


def image(index):
    return torch.full((3, 4, 4), float(index)) + torch.arange(16.0).view(4, 4)


def frames(figure):
    """Colours of the frames around neighbours, by model."""
    return [
        [colour for cell in part.axes if (colour := cell.spines["left"].get_edgecolor()) != to_rgba("black")]
        for part in figure.subfigs
    ]


def test_learning_curves_show_means_and_ranges():
    histories = [[{"epoch": e, "recall": 10.0 * e + shift} for e in (1, 2, 3)] for shift in (0, 4)]
    (axes,) = pictures.learning_curves({"RKD-D": histories}, "recall", "Recall", "A table").axes
    assert axes.lines[0].get_ydata().tolist() == [12, 22, 32]
    assert axes.get_legend().texts[0].get_text() == "RKD-D: 32.0"
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 10
    assert band[:, 1].max() == 34


def test_frames_of_neighbours_are_green_if_right():
    wrong = (100.0 * (torch.arange(40) % 4) + LABELS)[:, None]  # the nearest rows have the neighbouring classes
    figure = pictures.retrieval_panel({"good": line(), "bad": wrong}, LABELS, image, queries=5, neighbours=3)
    good, bad = frames(figure)
    assert set(good) == {to_rgba("tab:green")}
    assert set(bad) == {to_rgba("tab:red")}
    assert len(good) == len(bad) == 5 * 3
    assert [part.get_suptitle() for part in figure.subfigs] == [
        "good\n15 of 15 nearest are right", "bad\n0 of 15 nearest are right",
    ]  # fmt: skip


def test_maps_colour_the_largest_classes():
    labels = torch.cat([torch.zeros(20), torch.ones(20), torch.arange(2, 22)]).long()
    figure = pictures.embedding_map({"a": torch.randn(60, 5), "b": torch.randn(60, 3)}, labels, coloured=2)
    assert len(figure.axes) == 2
    grey, first, second = figure.axes[0].collections
    assert [len(points.get_offsets()) for points in (grey, first, second)] == [20, 20, 20]
    assert tuple(first.get_facecolor()[0]) == to_rgba("C0")


def test_histograms_count_every_pair():
    figure = pictures.distance_histograms(line(), torch.randn(40, 3), LABELS)
    teacher, student = figure.axes
    assert [text.get_text() for text in student.get_legend().texts] == ["one class, 60 pairs", "two classes, 720 pairs"]
    assert "\n0.0 %" in student.get_title()
    assert "\n0.0 %" not in teacher.get_title()
    for axes in figure.axes:
        areas = [sum(bar.get_width() * bar.get_height() for bar in bars) for bars in axes.containers]
        assert areas == pytest.approx([1, 1])


def test_equal_relations_lie_on_the_diagonal():
    teacher = torch.randn(50, 4)
    student = 7 * teacher @ torch.linalg.qr(torch.randn(4, 4)).Q + 3
    for axes in pictures.relations(student, teacher).axes:
        x, y = axes.collections[0].get_offsets().T
        assert np.abs(x - y).max() < 2 * (x.max() - x.min()) / 60  # a hexagon's width
        assert "loss 0.0000, correlation 1.00" in axes.get_title()
    other = torch.randn(50, 3)
    distance, _ = pictures.relations(other, teacher).axes
    expected = rkd_distance_loss(other.double(), teacher.double()).item()
    assert f"RKD-D loss {expected:.4f}" in distance.get_title()
    assert distance.collections[0].get_array().sum() == 50 * 49 / 2


def cells(figure):
    """Numbers of a confusion picture by row and column, and the names of both."""
    (axes,) = figure.axes
    rows, columns = ([tick.get_text() for tick in ticks] for ticks in (axes.get_yticklabels(), axes.get_xticklabels()))
    shown = {
        (rows[int(text.get_position()[1])], columns[int(text.get_position()[0])]): text.get_text()
        for text in axes.texts
    }
    return shown, rows, columns


def predictions(pairs, classes=6):
    """Scores and labels: for each pair of a true and a predicted class one row."""
    labels, predicted = torch.tensor(pairs).T
    return torch.nn.functional.one_hot(predicted, classes).float(), labels


def test_confusion_shows_the_most_frequent_mistakes():
    pairs = [(0, 0)] * 5 + [(0, 3)] * 3 + [(0, 5)] * 2 + [(3, 3)] * 6 + [(3, 0)] * 2 + [(5, 5)] * 4 + [(1, 1)] * 9
    scores, labels = predictions([*pairs, (1, 2)])
    figure = pictures.confusion(scores, labels, {0: "auk", 3: "jay"}, limit=2, listed=2)
    shown, rows, columns = cells(figure)
    assert rows == ["auk", "jay"]
    assert columns == ["auk", "jay", "any other"]
    assert shown == {
        ("auk", "auk"): "50", ("auk", "jay"): "30", ("auk", "any other"): "20",
        ("jay", "auk"): "25", ("jay", "jay"): "75",
    }  # fmt: skip
    assert figure.axes[0].get_title() == (
        "8 of 32 are wrong, most often:\n3 x auk predicted as jay\n2 x auk predicted as 5"
    )


def test_confusion_of_few_mistakes():
    """Only classes with mistakes; with equal frequencies in the order of labels; a tie is a mistake."""
    scores, labels = predictions([(4, 1), (2, 3), (0, 0), (5, 5)])
    assert cells(pictures.confusion(scores, labels, {}))[1] == ["2", "3", "4", "1"]
    scores, labels = predictions([(0, 0), (5, 5), (5, 5)])
    figure = pictures.confusion(scores, labels, {})
    assert cells(figure) == ({("0", "0"): "100", ("5", "5"): "100"}, ["0", "5"], ["0", "5", "any other"])
    assert figure.axes[0].get_title() == "0 of 3 are wrong"
    shown, rows, _ = cells(pictures.confusion(torch.zeros(2, 2), torch.tensor([0, 0]), {}))
    assert rows == ["0", "1"]
    assert shown == {("0", "1"): "100"}
    shown, rows, _ = cells(pictures.confusion(torch.zeros(2, 1), torch.tensor([0, 0]), {}))
    assert shown == {("0", "0"): "100"}


@pytest.mark.parametrize("rows", [torch.zeros(6, 3), torch.ones(2, 3), torch.arange(12.0).view(3, 4)])
def test_degenerate_embeddings_are_drawn(rows, tmp_path):
    labels = torch.arange(len(rows)) // 2
    figures = {
        "retrieval": pictures.retrieval_panel({"model": rows}, labels, image),
        "map": pictures.embedding_map({"model": rows}, labels),
        "distances": pictures.distance_histograms(rows, rows, labels),
        "relations": pictures.relations(rows, rows),
    }
    assert all(path.stat().st_size > 1000 for path in pictures.save(figures, tmp_path))


def test_files_and_events(tmp_path):
    def draw(folder, events=None):
        torch.manual_seed(0)
        outputs = torch.randn(40, 5)
        figures = {
            "map": pictures.embedding_map({"m": outputs}, LABELS),
            "pairs": pictures.relations(outputs, line()),
            "confusion": pictures.confusion(outputs.repeat(1, 2), LABELS, {}),
        }
        return pictures.save(figures, folder, events)

    with SummaryWriter(str(tmp_path / "events")) as events:
        paths = draw(tmp_path / "once", events)
    again = draw(tmp_path / "again")
    assert [path.name for path in paths] == ["map.png", "pairs.png", "confusion.png"]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 50
    written = EventAccumulator(str(tmp_path / "events")).Reload()
    assert written.Tags()["images"] == ["map", "pairs", "confusion"]


def test_names_are_neither_formulas_nor_escapes(tmp_path):
    """A formula that matplotlib cannot read would stop the picture."""
    name = "$\\frac$ \x1b[31m"
    figure = pictures.confusion(torch.eye(3)[[0, 2, 2]], torch.tensor([0, 1, 2]), {1: name})
    curves = pictures.learning_curves({name: [[{"epoch": 1, "recall": 1.0}]]}, "recall", name, name)
    for path in pictures.save({"confusion": figure, "curves": curves}, tmp_path):
        assert path.stat().st_size > 1000
    assert r"\$\frac\$ \x1b[31m" in [label.get_text() for label in figure.axes[0].get_yticklabels()]
