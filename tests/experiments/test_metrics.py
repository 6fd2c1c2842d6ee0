"""Retrieval and accuracy are equal to a plain search for all ties, sizes and scales, with little memory."""

import ctypes
import resource

import pytest
import torch
from children import result_of_child
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from rkd_plugin.experiments.running import metrics
from rkd_plugin.experiments.running.metrics import Layer, classification, embed, retrieval


def by_hand(outputs, labels, recall_at):
    """Query by query: all other rows sorted by distance; at equal distances, other classes come first."""
    outputs, labels = outputs.double(), labels.tolist()
    hits, precisions = [], []
    for i, label in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i]
        relevant = sum(labels[j] == label for j in others)
        if not relevant:
            continue
        squares = (outputs[i] - outputs).square().sum(1).tolist()
        others.sort(key=lambda j: (squares[j], labels[j] == label))
        right = [labels[j] == label for j in others]
        hits.append([any(right[:k]) for k in recall_at])
        precisions.append(sum(right[n] * sum(right[: n + 1]) / (n + 1) for n in range(relevant)) / relevant)
    recalls = torch.tensor(hits, dtype=torch.float64).mean(0) * 100
    return {
        **{f"recall_at_{k}": recall for k, recall in zip(recall_at, recalls.tolist(), strict=True)},
        "map_at_r": 100 * sum(precisions) / len(precisions),
    }


def assert_equal(outputs, labels, recall_at=(1, 2, 3, 1000), device="cpu"):
    ours = retrieval(outputs.to(device), labels, recall_at)
    assert ours == pytest.approx(by_hand(outputs, labels, recall_at), abs=1e-9)
    assert list(ours) == [*(f"recall_at_{k}" for k in recall_at), "map_at_r"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_to_a_search_by_hand(data):
    """Small whole coordinates make ties and duplicates common; classes are of all sizes, one included."""
    rows = data.draw(st.integers(3, 24))
    dim = data.draw(st.integers(1, 3))
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows)))
    if len(labels.unique()) == rows:
        labels[0] = labels[1]
    values = data.draw(st.lists(st.integers(-2, 2), min_size=rows * dim, max_size=rows * dim))
    assert_equal(torch.tensor(values, dtype=torch.float32).view(rows, dim), labels)


@pytest.mark.parametrize("block", [1, 100, 1000])
def test_blocks_change_nothing(block, monkeypatch):
    outputs, labels = torch.randn(53, 4), torch.randint(0, 9, (53,))
    expected = retrieval(outputs, labels, [1, 5])
    monkeypatch.setattr(metrics, "DISTANCES_AT_ONCE", block)
    assert retrieval(outputs, labels, [1, 5]) == pytest.approx(expected, abs=1e-12)


def test_a_collapsed_model_gets_nothing():
    labels = torch.arange(40) // 4
    for row in (torch.zeros(1, 8), torch.randn(1, 8), 1000 + torch.randn(1, 8)):
        assert retrieval(row.expand(40, 8), labels, [1, 10]) == {"recall_at_1": 0, "recall_at_10": 0, "map_at_r": 0}


@pytest.mark.parametrize("copies", ["of its class", "of another class"])
def test_equal_rows_of_many_dimensions(copies, device):
    """Rounding can separate the distances of a row and its copy, which are equal."""
    outputs, labels = torch.randn(100, 512), torch.arange(100) // 4
    if copies == "of its class":
        assert_equal(outputs.repeat(2, 1), labels.repeat(2), device=device)
        assert retrieval(outputs.repeat(2, 1), labels.repeat(2))["recall_at_1"] == 100
    else:
        outputs[1::2] = outputs[::2]
        assert_equal(outputs.repeat(2, 1), torch.cat([labels, labels + 25]), device=device)


def test_far_from_the_origin_and_in_any_dtype(dtype, device):
    # As far as the rows are distinct in the dtype.
    offset = {torch.float64: 1e6, torch.float32: 1000}.get(dtype, 10)
    assert_equal((torch.randn(60, 6) + offset).to(dtype), torch.arange(60) // 5, device=device)


@pytest.mark.parametrize("scale", [2.0**-600, 2.0**600])
def test_scale_changes_nothing(scale):
    """Not even a scale whose square overflows float64."""
    outputs, labels = torch.randn(60, 6, dtype=torch.float64), torch.arange(60) // 5
    assert retrieval(scale * outputs, labels) == retrieval(outputs, labels)


def test_a_row_far_away_blurs_no_others():
    outputs = torch.randn(60, 6)
    outputs[7] *= 1e6
    assert_equal(outputs, torch.arange(60) // 5)


def test_classes_of_very_different_size():
    """All rows of one class; one class of nearly all; a pair among single rows."""
    outputs = torch.randn(40, 2)
    assert set(retrieval(outputs, torch.zeros(40).long()).values()) == {100}
    assert_equal(outputs, (torch.arange(40) > 37).long())
    assert_equal(outputs, torch.arange(40).clamp(min=1))


def test_agrees_with_pytorch_metric_learning():
    outputs, labels = torch.randn(120, 6, dtype=torch.float64) + torch.arange(120)[:, None] // 8, torch.arange(120) // 8
    labels[::17] = torch.arange(100, 100 + len(labels[::17]))  # some classes of one image, which both leave out
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        knn_func=CustomKNN(LpDistance(normalize_embeddings=False)),
        device=torch.device("cpu"),
        k="max_bin_count",
    )
    theirs = calculator.get_accuracy(outputs, labels)
    ours = retrieval(outputs, labels)
    assert 20 < ours["recall_at_1"] < 80
    assert ours["recall_at_1"] == pytest.approx(100 * theirs["precision_at_1"])
    assert ours["map_at_r"] == pytest.approx(100 * theirs["mean_average_precision_at_r"])


def test_recall_is_the_authors():
    """metric/utils.py, recall: the K nearest others by squared distance, any of the query's class."""
    outputs, labels = torch.randn(90, 5, dtype=torch.float64), torch.arange(90) // 6
    squares = (outputs[:, None] - outputs).square().sum(2)
    nearest = squares.topk(9, dim=1, largest=False).indices[:, 1:]
    for k in (1, 2, 4, 8):
        share = (labels[nearest[:, :k]] == labels[:, None]).any(1).double().mean()
        assert retrieval(outputs, labels, [k])[f"recall_at_{k}"] == pytest.approx(100 * share.item())


def _growth_of_memory():
    """In KiB, of 3,000 rows after 100."""
    ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD: glibc gives larger blocks back as soon as they are freed
    metrics.DISTANCES_AT_ONCE = 2**17
    outputs, labels = torch.randn(3000, 32), torch.arange(3000) // 5
    retrieval(outputs[:100], labels[:100])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    retrieval(outputs, labels, [1, 500])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_is_that_of_blocks():
    # Blocks of 1 MiB, with their masks and copies; the matrix alone would take 70,312 KiB.
    assert result_of_child(_growth_of_memory) < 10_000


@pytest.mark.parametrize(
    ("outputs", "labels", "recall_at", "message"),
    [
        (torch.zeros(4), torch.zeros(4), [1], r"outputs must be \(M, D\) and floating point, got \(4,\) torch.float32"),
        (torch.zeros(4, 2, dtype=torch.long), torch.zeros(4), [1], r"floating point, got \(4, 2\) torch.int64"),
        (torch.zeros(4, 2), torch.zeros(3), [1], r"labels must be \(M,\), .* got \(3,\) for 4 outputs"),
        (torch.zeros(1, 2), torch.zeros(1), [1], r"for M of at least 2, got \(1,\) for 1 outputs"),
        (torch.zeros(4, 2), torch.zeros(4).long(), [1, 0], r"every K of recall_at must be at least 1, got \[1, 0\]"),
        (torch.zeros(4, 2), torch.arange(4) / 2, [1], r"labels that are whole numbers, got 0.0, a float, for item 0"),
        (torch.zeros(4, 2), torch.arange(4), [1], r"a class with two rows or more, got 4 rows of as many classes"),
        (torch.tensor([[0.0], [torch.nan]]), torch.zeros(2).long(), [1], r"got NaN or Inf in 1 of 2 rows"),
    ],
)
def test_errors(outputs, labels, recall_at, message):
    with pytest.raises(ValueError, match=message):
        retrieval(outputs, labels, recall_at)


def test_accuracies_by_hand():
    scores, labels = torch.randn(200, 9), torch.randint(9, (200,))
    scores[torch.arange(200), labels] += 1
    ranks = [sorted(range(9), key=row.__getitem__, reverse=True).index(label)
             for row, label in zip(scores.tolist(), labels.tolist(), strict=True)]  # fmt: skip
    expected = {f"top{k}": 100 * sum(rank < k for rank in ranks) / 200 for k in (1, 5)}
    assert 20 < expected["top1"] < expected["top5"] < 100
    assert classification(scores, labels) == expected


def test_a_tie_or_nan_is_no_hit_and_few_classes_are_all_among_five():
    assert classification(torch.zeros(4, 7), torch.arange(4)) == {"top1": 0, "top5": 0}
    assert classification(torch.full((4, 7), torch.nan), torch.arange(4)) == {"top1": 0, "top5": 0}
    assert classification(torch.zeros(4, 4), torch.arange(4)) == {"top1": 0, "top5": 100}


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (torch.zeros(4), torch.zeros(4), r"expected outputs \(M, C\) and labels \(M,\), got \(4,\) and \(4,\)"),
        (torch.zeros(4, 2), torch.zeros(3), r"got \(4, 2\) and \(3,\)"),
        (torch.zeros(0, 2), torch.zeros(0), r"got \(0, 2\) and \(0,\)"),
        (
            torch.zeros(4, 3),
            torch.arange(4) / 2,
            r"labels that are whole numbers, got 0.0, a float, for item 0; number",
        ),
        (
            torch.zeros(4, 3),
            torch.arange(4),
            r"labels from 0 to 2, as the model has 3 outputs, got 0 to 3; set num_class",
        ),
        (torch.zeros(4, 3), torch.arange(4) - 1, r"labels from 0 to 2, as the model has 3 outputs, got -1 to 2"),
    ],
)
def test_errors_of_accuracies(outputs, labels, message):
    with pytest.raises(ValueError, match=f"^classification: expected .*{message.removeprefix('expected ')}"):
        classification(outputs, labels)


def test_images_of_another_number_of_channels_are_named():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Flatten(), torch.nn.LazyLinear(2))
    model(torch.zeros(1, 3, 4, 4))
    for channels, remedy in ((1, r"add torchvision.transforms.v2.RGB\(\) to the data set's transform"), (4, "RGB")):
        batches = [(torch.zeros(2, channels, 4, 4), torch.arange(2))]
        with pytest.raises(
            ValueError, match=f"^test data: expected images of 3 channels, .* got {channels}; .*{remedy}"
        ):
            embed(model, batches, torch.device("cpu"))
    assert all(module.training for module in model.modules())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # other errors are not changed
        embed(model, [(torch.zeros(2, 3, 5, 4), torch.arange(2))], torch.device("cpu"))


def test_labels_that_a_loader_leaves_in_a_list():
    batches = [(torch.zeros(2, 1), [4, 5])]
    assert embed(torch.nn.Identity(), batches, torch.device("cpu"))[1].tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"^test data: expected labels that are whole numbers, got 'auk', a str"):
        embed(torch.nn.Identity(), [(torch.zeros(2, 1), ("auk", "jay"))], torch.device("cpu"))


def test_each_module_gets_its_own_mode_again():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    model[0].eval()
    embed(model, [(torch.zeros(2, 2), torch.arange(2))], torch.device("cpu"))
    assert [module.training for module in model.modules()] == [True, False, True]


def test_one_pass_gives_outputs_and_features():
    calls = []
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2))
    model.register_forward_hook(lambda *_: calls.append(1))
    batches = [(torch.randn(5, 3), torch.arange(5)), (torch.randn(2, 3), torch.arange(2))]
    images = torch.cat([batch for batch, _ in batches])
    for io, expected in (("input", images), ("output", model[0](images))):
        calls.clear()
        outputs, labels, features = embed(model, batches, torch.device("cpu"), Layer(model[0], io, lambda x: 2 * x))
        assert len(calls) == 2
        torch.testing.assert_close(features, 2 * expected)
        torch.testing.assert_close(outputs, model[2](model[0](images)))
        assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert model.training
    assert not model[0]._forward_hooks
    outputs, _, features = embed(model, batches, torch.device("cpu"))
    assert features is outputs
