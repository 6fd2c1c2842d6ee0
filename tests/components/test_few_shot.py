"""Few-shot learning: the loss and the accuracy of an episode, and the test of a model."""

import math

import pytest
import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torchdistill.losses.registry import get_high_level_loss, get_mid_level_loss

from rkd_plugin import rkd_da_loss
from rkd_plugin.components.few_shot import OnEpisodePart, PrototypicalAccuracy, PrototypicalLoss
from rkd_plugin.experiments.running import episodes
from rkd_plugin.experiments.running.episodes import episode_accuracies, few_shot, interval


def episode(way=4, shot=2, query=3, width=5, dtype=torch.float64, spread=1.0):
    """Embeddings and labels of an episode, class by class; labels need not be in order."""
    labels = torch.tensor([9, 2, 7, 4, 30, 1])[:way].repeat_interleave(shot + query)
    rows = torch.randn(way * (shot + query), width, dtype=torch.float64) * spread
    return rows.to(dtype), labels


def hooked(rows, path="."):
    return {path: {"output": rows}}


def by_hand(rows, labels, shot):
    """Probabilities of each query's classes, and its own class, in plain Python numbers."""
    rows, classes = rows.double(), list(dict.fromkeys(labels.tolist()))
    members = {c: (labels == c).nonzero()[:, 0].tolist() for c in classes}
    prototypes = {c: sum(rows[i] for i in members[c][:shot]) / shot for c in classes}
    for own in classes:
        for i in members[own][shot:]:
            squares = [
                sum((float(x) - float(y)) ** 2 for x, y in zip(rows[i], prototypes[c], strict=True)) for c in classes
            ]
            yield squares, classes.index(own)


@pytest.mark.parametrize(("way", "shot", "query"), [(4, 2, 3), (2, 1, 1), (6, 5, 2), (1, 1, 1)])
def test_loss_and_accuracy_are_those_of_the_formula(way, shot, query):
    rows, labels = episode(way, shot, query)
    expected = list(by_hand(rows, labels, shot))
    loss = [math.log(sum(math.exp(s[own] - other) for other in s)) for s, own in expected]
    right = [all(s[own] < other for at, other in enumerate(s) if at != own) for s, own in expected]
    assert PrototypicalLoss(shot)(hooked(rows), {}, labels).item() == pytest.approx(sum(loss) / len(loss), rel=1e-12)
    accuracy = PrototypicalAccuracy(shot)(hooked(rows), {}, labels)
    assert accuracy.item() == pytest.approx(100 * sum(right) / len(right))
    assert not accuracy.requires_grad


def test_gradient_of_the_loss():
    rows, labels = episode()
    assert torch.autograd.gradcheck(lambda x: PrototypicalLoss(2)(hooked(x), {}, labels), rows.requires_grad_())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(half):
    rows, labels = episode(dtype=half, spread=30.0)
    rows.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = PrototypicalLoss(2)(hooked(rows), {}, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        PrototypicalLoss(2)(hooked(rows.detach().double()), {}, labels).item(), rel=1e-5
    )
    loss.backward()
    assert rows.grad.dtype == half
    assert rows.grad.isfinite().all()


def test_maps_are_flattened():
    rows, labels = episode(width=12)
    loss = PrototypicalLoss(2)
    assert loss(hooked(rows.view(-1, 3, 2, 2)), {}, labels) == loss(hooked(rows), {}, labels)


@pytest.mark.parametrize(
    ("labels", "shot", "runs"),
    [
        ([0, 0, 1, 1, 1], 1, r"\[2, 3\]"),  # of different sizes
        ([0, 1, 0, 1], 1, r"\[1\]"),  # not sorted by class
        ([0, 0, 1, 1], 2, r"\[2\]"),  # no query
        ([0, 0, 1, 1, 0, 0], 1, r"\[2\]"),  # a class twice
        ([], 1, r"\[\]"),
    ],
)
def test_a_batch_that_is_no_episode_raises(labels, shot, runs):
    for loss in (PrototypicalLoss(shot), OnEpisodePart("query", shot, {"key": "RKDDALoss", "kwargs": {}})):
        with pytest.raises(ValueError, match=f"expected an episode.*labels in runs of {runs}; use the batch sampler"):
            loss(hooked(torch.randn(len(labels), 3)), hooked(torch.randn(len(labels), 3)), torch.tensor(labels))


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="PrototypicalLoss: shot must be at least 1, got 0"):
        PrototypicalLoss(0)
    with pytest.raises(ValueError, match=r"part must be one of \('all', 'support', 'query'\), got 'queries'"):
        OnEpisodePart("queries", 1, {"key": "RKDDALoss", "kwargs": {}})
    with pytest.raises(ValueError, match=r"expected the student's output of module 'fc', got only '\.'"):
        PrototypicalLoss(1, "fc")(hooked(torch.zeros(2, 1)), {}, torch.zeros(2))


@pytest.mark.parametrize(("part", "places"), [("all", range(5)), ("support", range(2)), ("query", range(2, 5))])
def test_relations_of_a_part_of_the_episode(part, places):
    (student, labels), teacher = episode(), torch.randn(20, 7, dtype=torch.float64)
    rows = [5 * start + place for start in range(4) for place in places]
    options = {"student_module_path": ".", "teacher_module_path": ".", "distance_weight": 25.0, "angle_weight": 50.0}
    criterion = {"part": part, "shot": 2, "criterion": {"key": "RKDDALoss", "kwargs": options}}
    loss = get_mid_level_loss({"key": "OnEpisodePart", "kwargs": criterion})
    expected = rkd_da_loss(student[rows], teacher[rows], distance_weight=25.0, angle_weight=50.0)
    assert loss(hooked(student), hooked(teacher), labels).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_part_of_the_episode_for_a_loss_that_needs_a_wrapper():
    (student, labels), teacher = episode(), torch.randn(20, 5, dtype=torch.float64)
    sides = {
        "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
        "target": {"is_from_teacher": True, "module_path": ".", "io": "output"},
    }
    wrapper = {"key": "SimpleLossWrapper", "kwargs": sides}
    loss = OnEpisodePart("support", 2, {"key": "MSELoss", "kwargs": {}}, wrapper)
    rows = [5 * start + place for start in range(4) for place in range(2)]
    expected = (student[rows] - teacher[rows]).square().mean()
    assert loss(hooked(student), hooked(teacher), labels).item() == pytest.approx(expected.item(), rel=1e-12)


def test_accuracy_as_a_term_of_a_criterion_that_weighs_nothing():
    rows, labels = episode()
    term = {"weight": 1.0, "criterion": {"key": "PrototypicalLoss", "kwargs": {"shot": 2}}}
    zero = {"weight": 0.0, "criterion": {"key": "PrototypicalAccuracy", "kwargs": {"shot": 2}}}
    loss = get_high_level_loss({"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"loss": term, "accuracy": zero}}})
    both = loss({"student": hooked(rows), "teacher": {}}, {}, labels)
    assert both == PrototypicalLoss(2)(hooked(rows), {}, labels)


# Test episodes

LABELS = torch.arange(12).repeat_interleave(9)[torch.randperm(108, generator=torch.Generator().manual_seed(1))]


def test_accuracies_are_those_of_episodes_drawn_one_by_one(monkeypatch):
    drawn = []
    original = episodes._episodes
    monkeypatch.setattr(episodes, "_episodes", lambda *a: drawn.append(original(*a)) or drawn[-1])
    outputs = torch.randn(108, 4) + LABELS[:, None] / 4
    accuracies = episode_accuracies(outputs, LABELS, 3, [(5, 2), (3, 1)], test_queries=4, test_episodes=20)
    assert list(accuracies) == ["5way_2shot", "3way_1shot"]
    for (way, shot), values, rows_of in zip([(5, 2), (3, 1)], accuracies.values(), drawn, strict=True):
        assert rows_of.shape == (20, way, shot + 4)
        assert values.dtype == torch.float64
        for value, rows in zip(values, rows_of, strict=True):
            labels = LABELS[rows]
            assert (labels == labels[:, :1]).all()
            assert len(labels[:, 0].unique()) == way
            assert len(rows.flatten().unique()) == rows.numel()
            expected = PrototypicalAccuracy(shot)(hooked(outputs[rows.flatten()].double()), {}, labels.flatten())
            assert value.item() == pytest.approx(expected.item())


def test_every_class_and_row_is_as_likely_in_a_test_episode():
    labels = torch.arange(7).repeat_interleave(torch.tensor([4, 6, 5, 4, 9, 2, 4]))  # the sixth has too few rows
    rows = episodes._episodes(labels, 0, 3, 1, 2, 20_000)
    classes = torch.bincount(labels[rows[:, :, 0]].flatten(), minlength=7).double()
    assert classes[5] == 0
    assert (classes[classes > 0] / 20_000 - 0.5).abs().max() < 5 * (0.25 / 20_000) ** 0.5
    supports = torch.bincount(rows[:, :, 0].flatten(), minlength=len(labels)).double()
    for label in (0, 1, 2, 3, 4, 6):
        share = supports[labels == label] / classes[label]
        assert (share - 1 / len(share)).abs().max() < 5 * (1 / len(share) / classes[label]) ** 0.5


def test_two_models_are_tested_on_the_same_episodes_whatever_their_width(monkeypatch):
    outputs = torch.randn(108, 3) + LABELS[:, None] / 4
    wide = torch.cat([outputs, torch.zeros(108, 500)], 1)
    options = {"seed": 5, "test_tasks": [(4, 1)], "test_queries": 3, "test_episodes": 50}
    accuracies = episode_accuracies(outputs, LABELS, **options)["4way_1shot"]
    monkeypatch.setattr(episodes, "NUMBERS_AT_ONCE", 4 * 4 * 503 * 7)  # seven episodes at once
    torch.manual_seed(77)  # which is not used
    assert torch.equal(episode_accuracies(wide, LABELS, **options)["4way_1shot"], accuracies)
    assert not torch.equal(episode_accuracies(outputs, LABELS, **{**options, "seed": 6})["4way_1shot"], accuracies)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e8, math.nan, math.inf])
@pytest.mark.parametrize("shot", [1, 3, 5])
def test_a_model_that_has_collapsed_gets_nothing(value, shot):
    outputs = torch.full((108, 6), value)
    options = {"test_tasks": [(5, shot)], "test_queries": 4, "test_episodes": 10}
    assert few_shot(outputs, LABELS, **options)[f"5way_{shot}shot"] == 0.0


def test_an_offset_changes_nothing():
    outputs = torch.randn(108, 6, dtype=torch.float64) + LABELS[:, None] / 4
    options = {"test_tasks": [(5, 2)], "test_queries": 4, "test_episodes": 30}
    assert few_shot(outputs + 1000, LABELS, **options) == few_shot(outputs, LABELS, **options)


@pytest.mark.parametrize(
    "options", [{"test_tasks": [(13, 1)]}, {"test_tasks": [(5, 6)]}, {"test_episodes": 0}, {"test_tasks": [(0, 1)]}]
)
def test_episodes_that_cannot_be(options):
    options = {"test_tasks": [(5, 1)], "test_queries": 4, "test_episodes": 10, **options}
    with pytest.raises(ValueError, match=r"few_shot: expected .* rows or more each, .*; change test_tasks"):
        few_shot(torch.randn(108, 3), LABELS, **options)
    with pytest.raises(ValueError, match=r"expected outputs \(M, D\) and labels \(M,\), got \(108,\) and \(108,\)"):
        few_shot(torch.randn(108), LABELS)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = 3 + 2 * torch.randn(2000, 100, generator=generator, dtype=torch.float64)
    holds = sum(abs(mean - 3) <= half for mean, half in map(interval, samples)) / 2000
    assert abs(holds - 0.95) < 5 * (0.95 * 0.05 / 2000) ** 0.5
    assert interval(torch.tensor([1.0, 3.0])) == (2.0, pytest.approx(1.96))
    assert math.isnan(interval(torch.tensor([1.0]))[1])
