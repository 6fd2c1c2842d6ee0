"""The adapter to pytorch-metric-learning: losses checked against plain loops, and PML's trainers, testers, wrappers."""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import math
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners, reducers, testers, trainers
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance
from pytorch_metric_learning.regularizers import LpRegularizer, SparseCentersRegularizer
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.common_functions import EmbeddingDataset
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor, nn

import rkd_plugin
from rkd_plugin.adapters.pml import (
    RelationalLoss,
    RKDAngleLoss,
    RKDDALoss,
    RKDDistanceLoss,
    RKDTrainer,
    RKDTrainerMixin,
    TeacherStudentTrunk,
    TensorWithTeacher,
    from_bank,
)
from rkd_plugin.teacher_bank import Bank


class RelationalAngles(RelationalLoss):
    def __init__(self, **kwargs):
        super().__init__("angle", **kwargs)


WEIGHTS = {  # of distances and angles
    RKDDistanceLoss: (1, 0),
    RKDAngleLoss: (0, 1),
    RKDDALoss: (1, 2),
    RelationalLoss: (1, 0),
    RelationalAngles: (0, 1),
}
LOSSES = list(WEIGHTS)
RTOL = 1e-5  # of PML's own tests, for float32 and wider; half precision too is computed in float32 here


def batch(rows: int = 9, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student ``(N, 5)`` with a gradient, teacher ``(N, 7)``, labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, 5, generator=generator).to(dtype).requires_grad_()
    return student, torch.randn(rows, 7, generator=generator).to(dtype), torch.arange(rows) % 3


# The formulas in float64 and plain Python.


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def points(x: Tensor, normalize: bool) -> list[list[float]]:
    listed = x.detach().double().tolist()
    return [[v / math.hypot(*row) for v in row] for row in listed] if normalize else listed


def slow_distance(student: Tensor, teacher: Tensor, normalize: bool = False, pairs=None) -> float:
    def psi(x: Tensor) -> dict[tuple[int, int], float]:
        rows = points(x, normalize)
        lengths = {(i, j): math.dist(rows[i], rows[j]) for i, j in itertools.product(range(len(rows)), repeat=2)}
        mean = sum(lengths.values()) / (len(rows) * (len(rows) - 1))
        return {pair: length / mean for pair, length in lengths.items()}

    ours, theirs = psi(student), psi(teacher)
    pairs = list(ours) if pairs is None else pairs
    return sum(huber(ours[pair] - theirs[pair]) for pair in pairs) / len(pairs)


def slow_angle(student: Tensor, teacher: Tensor, normalize: bool = False, triplets=None) -> float:
    def cosine(rows: list[list[float]], i: int, j: int, k: int) -> float:
        arms = [[b - a for a, b in zip(rows[i], rows[end], strict=True)] for end in (j, k)]
        if j == k or not all(map(any, arms)):
            return 0.0
        return sum(a * b for a, b in zip(*arms, strict=True)) / math.hypot(*arms[0]) / math.hypot(*arms[1])

    ours, theirs = points(student, normalize), points(teacher, normalize)
    triplets = list(itertools.product(range(len(ours)), repeat=3)) if triplets is None else triplets
    return sum(huber(cosine(ours, *triplet) - cosine(theirs, *triplet)) for triplet in triplets) / len(triplets)


def slow(loss: nn.Module, *args, pairs=None, triplets=None, **kwargs) -> float:
    weights = WEIGHTS[type(loss)]
    return weights[0] * slow_distance(*args, **kwargs, pairs=pairs) + weights[1] * slow_angle(
        *args, **kwargs, triplets=triplets
    )


# Losses


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("cls", LOSSES)
def test_agrees_with_a_plain_loop(cls, normalize, dtype):
    student, teacher, labels = batch(dtype=dtype)
    loss_func = cls(distance=LpDistance(normalize_embeddings=True)) if normalize else cls()
    loss = loss_func(student, labels, ref_emb=teacher)
    loss.backward()
    assert loss.item() == pytest.approx(slow(loss_func, student, teacher, normalize=normalize), rel=RTOL)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()
    assert student.grad.any()


@pytest.mark.parametrize("cls", LOSSES)
def test_only_mined_tuples_count(cls, dtype):
    student, teacher, labels = batch(dtype=dtype)
    loss_func = cls()

    a, p, n = triplets = miners.TripletMarginMiner(margin=0.3)(student.float(), labels)  # cdist lacks bfloat16
    listed = list(zip(*(index.tolist() for index in triplets), strict=True))
    assert 0 < len(listed) < 9**3
    pairs = [(i, j) for i, j, _ in listed] + [(i, k) for i, _, k in listed]
    loss = loss_func(student, labels, (a, p, n), ref_emb=teacher)
    assert loss.item() == pytest.approx(slow(loss_func, student, teacher, pairs=pairs, triplets=listed), rel=RTOL)
    loss.backward()
    assert student.grad.any()

    a1, p, a2, n = (torch.tensor(index) for index in ([0, 0, 4], [3, 6, 7], [0, 4, 5], [1, 2, 0]))
    pairs = [(0, 3), (0, 6), (4, 7), (0, 1), (4, 2), (5, 0)]
    listed = [(0, 3, 1), (0, 6, 1), (4, 7, 2)]  # anchor 5 has no positive
    loss = loss_func(student, None, (a1, p, a2, n), ref_emb=teacher)
    assert loss.item() == pytest.approx(slow(loss_func, student, teacher, pairs=pairs, triplets=listed), rel=RTOL)


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("cls", LOSSES)
def test_no_tuples_give_no_loss_but_a_graph(cls, length):
    student, teacher, labels = batch()
    # Float indices too: `torch.tensor([])` is float.
    loss = cls()(student, labels, (torch.tensor([]),) * length, ref_emb=teacher)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.eq(0).all()


@pytest.mark.parametrize("cls", LOSSES)
def test_a_missing_teacher_is_an_error(cls):
    student, _, labels = batch()
    for kwargs in ({}, {"ref_emb": student}):
        with pytest.raises(ValueError, match=f"{cls.__name__}: .*ref_emb=teacher"):
            cls()(student, labels, **kwargs)


def test_row_counts_that_differ_are_an_error_that_names_the_wrapper():
    student, teacher, labels = batch()
    with pytest.raises(ValueError, match=r"got 9 and 8 rows.*DistributedLossWrapper.*efficient=False"):
        RKDDALoss()(student, labels, ref_emb=teacher[:-1])


@pytest.mark.parametrize(
    "distance",
    [CosineSimilarity(), DotProductSimilarity(), SNRDistance(), LpDistance(p=1), LpDistance(power=2)],
    ids=lambda distance: f"{type(distance).__name__}-{distance.p}-{distance.power}",
)
@pytest.mark.parametrize("cls", LOSSES)
def test_distances_that_are_not_euclidean_raise(cls, distance):
    name = type(distance).__name__
    with pytest.raises(ValueError, match=rf"{cls.__name__}: expected a Euclidean distance, got {name}.*LpDistance"):
        cls(distance=distance)


def test_options_reach_the_core():
    student, teacher, _ = batch()
    loss = RKDDALoss(distance_weight=3, angle_weight=0.5, huber_delta=0.1, impl="reference")
    expected = rkd_plugin.rkd_da_loss(student, teacher, distance_weight=3, angle_weight=0.5, huber_delta=0.1)
    torch.testing.assert_close(loss(student, ref_emb=teacher), expected)
    with pytest.raises(ValueError, match="impl"):
        RKDDALoss(impl="no such kernel")(student, ref_emb=teacher)


def test_any_relation_reaches_the_core():
    student, teacher, labels = batch()
    options = {"potential": "cosine", "penalty": "kl", "scale": "softmax", "temperature": 0.2, "neighbours": 3}
    each = rkd_plugin.relational_loss(student, teacher, **options, reduction="anchor")
    for reducer, expected in ((reducers.MeanReducer(), each.mean()), (reducers.SumReducer(), each.sum())):
        loss = RelationalLoss(**options, reducer=reducer, collect_stats=True)
        torch.testing.assert_close(loss(student, labels, ref_emb=teacher), expected)
        assert loss.relational_loss_mean == pytest.approx(each.mean().item())
    one_row = RelationalLoss("identity", "mse")
    torch.testing.assert_close(one_row(student, ref_emb=teacher[:, :5]), (student - teacher[:, :5]).square().mean())
    for loss in (one_row, RelationalLoss(**options)):
        with pytest.raises(
            ValueError, match="RelationalLoss: expected pairs with a potential of 2 rows, and without ne"
        ):
            loss(student, labels, (index(0), index(3), index(1)), ref_emb=teacher[:, :5])


def test_a_memory_gets_each_batch_after_its_loss():
    (student, teacher, _), (earlier, earlier_teacher, _) = batch(), batch(seed=1)
    loss = RelationalLoss("cosine", "mse", references=rkd_plugin.RelationMemory(9))
    assert loss(earlier, ref_emb=earlier_teacher) == 0
    found = loss(TensorWithTeacher.of(student, teacher))
    rows = earlier.detach(), earlier_teacher
    torch.testing.assert_close(found, rkd_plugin.relational_loss(student, teacher, "cosine", "mse", references=rows))
    assert torch.equal(loss.references.student, student)


def test_a_term_of_weight_zero_is_skipped(monkeypatch):
    student, teacher, labels = batch()
    expected = RKDDistanceLoss()(student, labels, ref_emb=teacher)
    monkeypatch.setattr("rkd_plugin.kernels.chunked.angle", lambda *_, **__: pytest.fail("computed"))
    loss = RKDDALoss(angle_weight=0)(student, labels, ref_emb=teacher)
    loss.backward()
    assert loss == expected


def test_both_terms_share_one_set_of_relations_and_one_gather(monkeypatch):
    calls = []
    for place in ("rkd_plugin.kernels.chunked.forward_squares", "rkd_plugin.distributed.gather"):
        module, name = place.rsplit(".", 1)
        original = getattr(importlib.import_module(module), name)
        monkeypatch.setattr(place, lambda *args, f=original, n=name, **kwargs: calls.append(n) or f(*args, **kwargs))
    student, teacher, labels = batch()
    RKDDALoss(gather=True)(student, labels, ref_emb=teacher).backward()
    assert sorted(calls) == ["forward_squares", "forward_squares", "gather"]  # of student and teacher


@dataclass
class ModelOutput:
    hidden: Tensor
    pooled: Tensor


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda x: (x, x), "tuple of Tensor, Tensor"),
        (lambda x: {"pooled": x}, "dict with 'pooled'"),
        (lambda x: ModelOutput(x, x), "test_pml.ModelOutput"),
        (lambda x: x.long(), "a tensor of torch.int64"),
    ],
)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_output_that_is_no_tensor_is_named_with_its_side(side, wrong, named):
    student, teacher, labels = batch()
    given = {"student": student, "teacher": teacher}
    given[side] = wrong(given[side])
    with pytest.raises(TypeError, match=f"RKDDALoss: expected the {side}'s embeddings as one .*, got .*{named}"):
        RKDDALoss()(given["student"], labels, ref_emb=given["teacher"])


def test_options_are_checked_when_a_loss_is_made():
    with pytest.raises(TypeError, match="RKDDALoss: expected distance_weight to be a number, got '1e-4'"):
        RKDDALoss(distance_weight="1e-4")
    with pytest.raises(ValueError, match="RKDAngleLoss: expected anchors"):
        RKDAngleLoss(anchors=0)


def index(*rows: float) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("tuples", "error", "found"),
    [
        ((index(0), index(3), index(9)), ValueError, "rows from 0 to 8, got 9"),
        ((index(0), index(3), index(-1)), ValueError, "rows from 0 to 8, got -1"),
        # Four vectors whose two parts would be of one length when put together.
        ((index(0, 1), index(3), index(0), index(1, 2)), ValueError, r"got shapes \[\(2,\), \(1,\), \(1,\), \(2,\)\]"),
        (
            (index(0), index(3), index(0, 4), index(1)),
            ValueError,
            r"got shapes \[\(1,\), \(1,\), \(2,\), \(1,\)\]",
        ),
        ((index(0), index(3)), ValueError, r"3 or 4 index vectors .* got shapes"),
        ((index(0.5), index(3.0), index(1.0)), TypeError, "got torch.float32"),
        (index(0, 3, 1), TypeError, "3 or 4 index vectors .* got Tensor"),  # of a subset_batch_miner
    ],
)
@pytest.mark.parametrize("cls", LOSSES)
def test_tuples_that_do_not_fit_are_one_sentence(cls, tuples, error, found):
    student, teacher, labels = batch()
    with pytest.raises(error, match=f"{cls.__name__}: expected .*{found}"):
        cls()(student, labels, tuples, ref_emb=teacher)


@pytest.mark.gpu
def test_teacher_labels_and_tuples_follow_the_student_to_its_device():
    student, teacher, labels = batch()
    tuples = miners.TripletMarginMiner()(student, labels)
    loss = RKDDALoss()(student.cuda(), labels, tuples, ref_emb=teacher)
    loss.backward()
    assert loss.item() == pytest.approx(RKDDALoss()(student, labels, tuples, ref_emb=teacher).item(), rel=RTOL)


def test_an_empty_batch_gives_zero():
    student = torch.zeros(0, 3, requires_grad=True)
    loss = RKDDALoss(collect_stats=True)(student, torch.zeros(0), ref_emb=torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0


def anchors() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student, teacher, labels = batch()
    return (
        student,
        teacher,
        labels,
        rkd_plugin.rkd_distance_loss(student, teacher, reduction="anchor").detach(),
        2 * rkd_plugin.rkd_angle_loss(student, teacher, reduction="anchor").detach(),
    )


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        (reducers.MeanReducer(), lambda losses: losses.mean()),
        (reducers.SumReducer(), lambda losses: losses.sum()),
        (reducers.DivisorReducer(), lambda losses: losses.mean()),
        (reducers.ThresholdReducer(low=0.1, high=0.5), lambda losses: losses[(losses > 0.1) & (losses < 0.5)].mean()),
        (reducers.AvgNonZeroReducer(), lambda losses: losses[losses > 0].mean()),
        (reducers.PerAnchorReducer(), lambda losses: losses.mean()),
        (reducers.PerAnchorReducer(reducers.SumReducer()), lambda losses: losses.sum()),
        (
            reducers.ClassWeightedReducer(torch.tensor([1.0, 2.0, 4.0])),
            lambda losses: (losses * torch.tensor([1.0, 2.0, 4.0])[torch.arange(9) % 3]).mean(),
        ),
        (reducers.MultipleReducers({"angle_loss": reducers.SumReducer()}), None),
    ],
    ids=lambda x: type(x).__name__,
)
def test_reducers(reducer, expected):
    student, teacher, labels, distance, angle = anchors()
    loss = RKDDALoss(reducer=reducer)(student, labels, ref_emb=teacher)
    loss.backward()
    assert student.grad.any()
    torch.testing.assert_close(
        loss.detach(), expected(distance) + expected(angle) if expected else distance.mean() + angle.sum()
    )


def test_do_nothing_reducer_returns_the_vectors():
    student, teacher, labels, distance, angle = anchors()
    terms = RKDDALoss(reducer=reducers.DoNothingReducer())(student, labels, ref_emb=teacher)
    assert list(terms) == ["distance_loss", "angle_loss"]
    torch.testing.assert_close(terms["distance_loss"]["losses"].detach(), distance)
    torch.testing.assert_close(terms["angle_loss"]["losses"].detach(), angle)
    assert terms["angle_loss"]["indices"].tolist() == list(range(9))
    assert terms["angle_loss"]["reduction_type"] == "element"


def test_avg_non_zero_leaves_out_anchors_without_tuples():
    student, teacher, labels = batch()
    tuples = (torch.tensor([0, 0, 1]), torch.tensor([3, 6, 4]), torch.tensor([1, 2, 0]))
    mean, non_zero = (
        RKDAngleLoss(reducer=reducer)(student, labels, tuples, ref_emb=teacher)
        for reducer in (reducers.MeanReducer(), reducers.AvgNonZeroReducer())
    )
    assert non_zero.item() == pytest.approx(mean.item() * 9 / 2)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_finite_where_they_would_overflow(half):
    spread = 6e-8 if half == torch.float16 else 9.2e-41  # the smallest steps that the dtype has
    student = (torch.randint(0, 4, (8, 5), generator=torch.Generator().manual_seed(0)) * spread).to(half)
    student.requires_grad_()
    loss = RKDDALoss(100, 100)(student, ref_emb=torch.randn(8, 7))
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == half
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() == torch.finfo(half).max


def test_a_half_precision_loss_keeps_the_digits_of_float32():
    student, teacher, _ = batch(dtype=torch.float16)
    expected = rkd_plugin.rkd_da_loss(student.detach().double(), teacher.double())
    # 1e-6 is a few roundings of float32; one of float16 is 5e-4.
    assert RKDDALoss()(student, ref_emb=teacher).item() == pytest.approx(expected.item(), rel=1e-6)


def test_embedding_regularizer():
    student, teacher, labels = batch()
    loss = RKDDALoss(embedding_regularizer=LpRegularizer(), embedding_reg_weight=0.5)(student, labels, ref_emb=teacher)
    loss.backward()
    expected = RKDDALoss()(student, labels, ref_emb=teacher) + 0.5 * student.norm(dim=1).mean()
    torch.testing.assert_close(loss, expected)
    # A regularizer with its own reducer, and a loss of one term.
    regularizer = SparseCentersRegularizer(num_classes=3, centers_per_class=3)
    RKDAngleLoss(embedding_regularizer=regularizer)(student, labels, ref_emb=teacher).backward()


def test_statistics():
    student, teacher, _ = batch()
    student = torch.cat([student, student[:1]])
    teacher = torch.cat([teacher, teacher[1:2]])
    distance = LpDistance(normalize_embeddings=False, collect_stats=True)
    loss = RKDDALoss(collect_stats=True, distance=distance)
    loss(student, None, ref_emb=teacher)
    assert loss.student_mean_distance == pytest.approx(torch.pdist(student).mean().item())
    assert loss.teacher_mean_distance == pytest.approx(torch.pdist(teacher).mean().item())
    assert loss.student_zero_share == pytest.approx(1 / 45)
    assert loss.teacher_zero_share == pytest.approx(1 / 45)
    assert loss.distance_loss_mean == pytest.approx(slow_distance(student, teacher), rel=RTOL)
    assert loss.angle_loss_mean == pytest.approx(2 * slow_angle(student, teacher), rel=RTOL)
    assert distance.initial_avg_query_norm == pytest.approx(student.norm(dim=1).mean().item())
    assert distance.final_avg_ref_norm == pytest.approx(teacher.norm(dim=1).mean().item())
    assert set(loss._record_these_stats) == {
        "student_mean_distance",
        "student_zero_share",
        "teacher_mean_distance",
        "teacher_zero_share",
        "distance_loss_mean",
        "angle_loss_mean",
    }
    assert {"distance_weight", "angle_weight", "huber_delta"} <= set(loss._record_these)


def test_statistics_are_not_computed_by_default(monkeypatch):
    monkeypatch.setattr(torch, "pdist", lambda *_: pytest.fail("computed"))
    student, teacher, _ = batch()
    loss = RKDDALoss()
    loss(student, ref_emb=teacher)
    assert not hasattr(loss, "student_mean_distance")


@pytest.mark.parametrize("cls", LOSSES)
def test_wrappers_of_pml_without_a_teacher_raise_for_our_losses(cls):
    with pytest.raises(Exception, match=f"CrossBatchMemory not supported for {cls.__name__}"):
        losses.CrossBatchMemory(cls(), embedding_size=5)
    with pytest.raises(Exception, match=f"SelfSupervisedLoss not supported for {cls.__name__}"):
        losses.SelfSupervisedLoss(cls())
    # The error is PML's own: importing the adapter patches nothing.
    assert losses.CrossBatchMemory.check_loss_support.__module__ == losses.CrossBatchMemory.__module__


class Wrapper(losses.BaseMetricLossFunction):
    """A user's loss that wraps one of ours."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        return self.inner(embeddings, labels, ref_emb=ref_emb)


@pytest.mark.filterwarnings("ignore:DistributedLossWrapper is being used in a non-distributed setting")
@pytest.mark.parametrize("cls", LOSSES)
def test_gather_inside_a_wrapper_that_gathers_raises(cls):
    student, teacher, labels = batch()
    for inner in (cls(gather=True), Wrapper(cls(gather=True))):
        wrapped = DistributedLossWrapper(inner)
        with pytest.raises(RuntimeError, match=f"{cls.__name__}: expected gather=False inside DistributedLossWrapper"):
            wrapped(student, labels, ref_emb=teacher)
        with pytest.raises(RuntimeError, match="gather=False inside DistributedLossWrapper"):
            losses.MultipleLosses([wrapped])(TensorWithTeacher.of(student, teacher), labels)
    expected = cls()(student, labels, ref_emb=teacher)
    assert DistributedLossWrapper(cls())(student, labels, ref_emb=teacher) == expected
    assert losses.MultipleLosses([cls(gather=True)])(TensorWithTeacher.of(student, teacher), labels) == expected


# Several processes


def global_batch() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(6, 4).double(), torch.randn(12, 6).double(), torch.randn(12, 5).double(), torch.arange(12) % 3


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net, data, teacher, labels = global_batch()
    mine = slice(6 * rank, 6 * rank + 6)
    model = nn.parallel.DistributedDataParallel(net)
    loss = DistributedLossWrapper(RKDDALoss(), efficient=False)
    loss(model(data[mine]), labels[mine], ref_emb=teacher[mine]).backward()
    try:
        DistributedLossWrapper(RKDDALoss(), efficient=True)(net(data[mine]), labels[mine], ref_emb=teacher[mine])
    except ValueError as error:
        message = str(error)
    # find_unused_parameters makes DDP change the outputs most.
    copied, guide = global_batch()[0], nn.Linear(6, 5).double()
    guide.load_state_dict({"weight": torch.eye(5, 6).double(), "bias": torch.zeros(5).double()})
    trunk = nn.parallel.DistributedDataParallel(TeacherStudentTrunk(copied, guide), find_unused_parameters=True)
    RKDDALoss(gather=True)(trunk(data[mine])).backward()
    grads = {"grad": net.weight.grad, "trunk": copied.weight.grad}
    torch.save({**grads, "message": message}, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # no process leaves while another still needs it
    torch.distributed.destroy_process_group()
    # Not a normal exit: Python may destroy gloo's threads while they run, which aborts the process.
    os._exit(0)


@pytest.mark.processes
def test_two_processes_give_the_gradients_of_one(tmp_path: Path):
    torch.multiprocessing.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    net, data, teacher, labels = global_batch()
    RKDDALoss()(net(data), labels, ref_emb=teacher).backward()
    copied = global_batch()[0]
    RKDDALoss()(copied(data), ref_emb=data[:, :5]).backward()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(result["grad"], net.weight.grad, rtol=0, atol=1e-6)
        torch.testing.assert_close(result["trunk"], copied.weight.grad, rtol=0, atol=1e-6)
        assert re.search(r"got 6 and 12 rows.*efficient=False", result["message"])


# Tensors with the teacher's rows


def rows_with_teacher() -> TensorWithTeacher:
    """Row i and the teacher's row i contain i."""
    numbers = torch.arange(6.0)[:, None]
    return TensorWithTeacher.of(numbers.expand(6, 4).clone(), numbers.expand(6, 3).clone())


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x[2:],
        lambda x: x[torch.tensor([4, 1])],
        lambda x: x[x[:, 0] > 2],
        lambda x: x[1:, :2],
        lambda x: torch.cat([x, x[:1]]),
        lambda x: torch.cat((x[3:], x), dim=0),
        lambda x: x.half().clone().to(torch.float64).type(torch.float32),
        lambda x: x.to("meta").contiguous(),
    ],
)
def test_rows_stay_with_the_rows_of_the_teacher(operation):
    found = operation(rows_with_teacher())
    assert isinstance(found, TensorWithTeacher)
    assert len(found) == len(found.teacher)
    assert found.is_meta or torch.equal(found[:, 0].float(), found.teacher[:, 0])


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.flip(0),
        lambda x: x[torch.tensor([[0, 1], [2, 3]])],
        lambda x: x[None],
        lambda x: x[:, torch.tensor([0])],
        lambda x: x.t(),
        lambda x: x.roll(1, 0),
        lambda x: torch.cat([x, torch.zeros(1, 4)]),
        lambda x: torch.cat([x, x], 1),
        lambda x: nn.Linear(4, 2)(x),
        lambda x: torch.zeros(6, 4).to(x),
    ],
)
def test_operations_that_may_change_rows_return_plain_tensors(operation):
    assert type(operation(rows_with_teacher())) is Tensor


def test_rows_and_teachers_that_differ_in_number_are_an_error():
    with pytest.raises(ValueError, match="expected one teacher's row for each row, got 3 for 4"):
        TensorWithTeacher.of(torch.zeros(4, 2), torch.zeros(3, 2))


# The trunk for PML's trainers


def nets() -> tuple[nn.Module, nn.Module]:
    """A student (trunk and embedder) and a teacher with BatchNorm, whose buffers change in train mode."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 4))
    return student, nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))


def dataset() -> EmbeddingDataset:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(48) % 4
    return EmbeddingDataset(torch.randn(48, 6, generator=generator) + 2 * labels[:, None] * torch.eye(6)[2], labels)


def host_arguments(student: nn.Module, **kwargs) -> dict:
    return {
        "optimizers": {"trunk_optimizer": torch.optim.SGD(student.parameters(), lr=0.1)},
        "batch_size": 24,
        "dataset": dataset(),
        "dataloader_num_workers": 0,
        "data_device": "cpu",
        **kwargs,
    }


def same_state(module: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def embedded(teacher: nn.Module, data: Tensor) -> Tensor:
    """The teacher's embeddings in eval mode."""
    with torch.no_grad():
        return copy.deepcopy(teacher).eval()(data)


def one_step(student: nn.Module, loss) -> None:
    """One training step on the first 24 examples, without a trainer."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    data = dataset()
    loss(student(data.embeddings[:24]), data.embeddings[:24], data.labels[:24]).backward()
    optimizer.step()


FIRST = list(range(24))


def test_metric_loss_only_trains_the_student_as_by_hand():
    student, teacher = nets()
    teacher[0].weight.requires_grad_(False)
    teacher[1].eval()
    by_hand, before = copy.deepcopy(student), copy.deepcopy(teacher.state_dict())
    trunk = TeacherStudentTrunk(student, teacher)
    miner, task = miners.TripletMarginMiner(type_of_triplets="hard"), losses.TripletMarginLoss()
    both = losses.MultipleLosses(
        {"rkd": RKDDALoss(), "task": task}, miners={"task": miner}, weights={"rkd": 3, "task": 0.5}
    )
    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk}, loss_funcs={"metric_loss": both}, **host_arguments(trunk, sampler=FIRST)
    )
    trainer.train(num_epochs=1)

    def loss(embeddings: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        rkd = rkd_plugin.rkd_da_loss(embeddings, embedded(teacher, data))
        return 3 * rkd + 0.5 * task(embeddings, labels, miner(embeddings, labels))

    one_step(by_hand, loss)
    assert trainer.iterations_per_epoch == 1
    for ours, expected in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert same_state(teacher, before)
    assert [module.training for module in teacher.modules()] == [True, True, False]
    assert [parameter.requires_grad for parameter in teacher.parameters()] == [False, True, True, True]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_tuple_miner_of_the_trainer_mines_the_student_for_all_losses():
    student, teacher = nets()
    by_hand = copy.deepcopy(student)
    miner, rkd, task = miners.TripletMarginMiner(margin=0.5), RKDDALoss(), losses.TripletMarginLoss()
    trunk = TeacherStudentTrunk(student, teacher)
    trainers.MetricLossOnly(
        models={"trunk": trunk},
        loss_funcs={"metric_loss": losses.MultipleLosses([rkd, task])},
        mining_funcs={"tuple_miner": miner},
        **host_arguments(trunk, sampler=FIRST),
    ).train()

    def loss(embeddings: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        mined = miner(embeddings, labels)
        assert 0 < len(mined[0]) < 24 * 5 * 18
        return rkd(embeddings, labels, mined, ref_emb=embedded(teacher, data)) + task(embeddings, labels, mined)

    one_step(by_hand, loss)
    for ours, expected in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_metric_loss_only_learns_from_the_teacher():
    student, teacher = nets()
    trunk = TeacherStudentTrunk(student, teacher)
    data = dataset().embeddings

    def distance_to_teacher() -> float:
        with torch.no_grad():
            return rkd_plugin.rkd_da_loss(trunk.eval()(data), embedded(teacher, data)).item()

    before = distance_to_teacher()
    trainers.MetricLossOnly(
        models={"trunk": trunk}, loss_funcs={"metric_loss": RKDDALoss()}, **host_arguments(trunk)
    ).train(num_epochs=15)
    assert distance_to_teacher() < before / 2


def test_the_teacher_is_not_a_submodule_of_the_trunk():
    student, teacher = nets()
    trunk = TeacherStudentTrunk(student, teacher).train()
    assert [id(p) for p in trunk.parameters()] == [id(p) for p in student.parameters()]
    assert {id(b) for b in trunk.buffers()} == {id(b) for b in student.buffers()}
    assert all(name.startswith("student.") for name in trunk.state_dict())
    trunk.double()
    assert teacher[0].weight.dtype == teacher[1].running_mean.dtype == torch.float64
    assert trunk.to(torch.float16).teacher[0].weight.dtype == torch.float16
    assert trunk.to("meta").teacher[0].weight.device.type == "meta"


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_trunk_copies_and_pickles_with_its_teacher(way):
    trunk = TeacherStudentTrunk(*nets())
    if way == "torch.save":
        torch.save(trunk, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = copy.deepcopy(trunk) if way == "deepcopy" else pickle.loads(pickle.dumps(trunk))
    data = torch.randn(8, 6)
    ours, theirs = other(data), trunk(data)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours.teacher, theirs.teacher)
    assert other.teacher is not trunk.teacher


def test_trunk_under_torch_compile():
    student, teacher = nets()
    data = dataset().embeddings[:24]
    found = torch.compile(TeacherStudentTrunk(copy.deepcopy(student), teacher), backend="eager")(data)
    torch.testing.assert_close(found.teacher, embedded(teacher, data))
    torch.testing.assert_close(RKDDALoss()(found), RKDDALoss()(student(data), ref_emb=embedded(teacher, data)))


def test_trunk_inside_data_parallel_raises():
    trunk = TeacherStudentTrunk(*nets())
    # DataParallel calls this on a machine with several devices.
    with pytest.raises(RuntimeError, match=r"write TeacherStudentTrunk\(DataParallel\(student\), DataParallel\(teach"):
        trunk._replicate_for_data_parallel()
    inside = TeacherStudentTrunk(*map(nn.DataParallel, nets()))
    assert torch.equal(inside(torch.ones(3, 6)).teacher, trunk(torch.ones(3, 6)).teacher)


def test_a_separate_embedder_loses_the_teacher_which_is_an_error():
    student, teacher = nets()
    trunk = TeacherStudentTrunk(student[0], teacher)
    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk, "embedder": student[1]},
        loss_funcs={"metric_loss": losses.MultipleLosses([RKDDALoss(), losses.TripletMarginLoss()])},
        **host_arguments(student),
    )
    with pytest.raises(ValueError, match=r"RKDDALoss: expected the teacher's embeddings, got none; .* embedder inside"):
        trainer.train()


def test_embeddings_of_a_trunk_in_eval_mode_have_no_teacher():
    trunk = TeacherStudentTrunk(*nets()).eval()
    assert type(trunk(torch.randn(8, 6))) is Tensor
    with pytest.raises(ValueError, match="expected the teacher's embeddings, got none"):
        RKDDALoss()(trunk(torch.randn(8, 6)))


def test_a_subset_batch_miner_gets_the_students_embeddings_only():
    trunk = TeacherStudentTrunk(*nets())
    seen = []

    def first_half(embeddings: Tensor, labels: Tensor) -> Tensor:
        seen.append((type(embeddings), embeddings.shape[1]))
        return torch.arange(len(labels) // 2)

    trainers.MetricLossOnly(
        models={"trunk": trunk},
        loss_funcs={"metric_loss": RKDDALoss()},
        mining_funcs={"subset_batch_miner": first_half},
        **host_arguments(trunk),
    ).train()
    assert seen == [(Tensor, 4)] * 2


# Both ways to train: the trunk in PML's trainers, and PML's trainers with the mixin


def trained_both_ways(student, teacher, rows: int = 24, **options):
    """The losses of one step of each way; ``options`` are of the trunk and of the trainer."""
    seen = []
    hook = {"end_of_iteration_hook": lambda trainer: seen.append(trainer.losses["total_loss"].item())}
    start = copy.deepcopy(student)
    trunk = TeacherStudentTrunk(copy.deepcopy(start), teacher, **options)
    trainers.MetricLossOnly(
        models={"trunk": trunk}, loss_funcs={"metric_loss": RKDDALoss()}, **host_arguments(trunk, sampler=FIRST, **hook)
    ).train()
    RKDTrainer(
        models={"trunk": student, "teacher": teacher},
        loss_funcs={"rkd_loss": RKDDALoss()},
        **host_arguments(student, sampler=FIRST, **hook),
        **options,
    ).train()
    return seen


@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_teacher_of_another_dtype(teacher_dtype):
    student, teacher = nets()
    expected = RKDDALoss()(student(dataset().embeddings[:24]), ref_emb=embedded(teacher, dataset().embeddings[:24]))
    teacher.to(teacher_dtype)
    # The rounding of the teacher, for inputs up to 6.
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: RTOL}[teacher_dtype]
    assert trained_both_ways(student, teacher) == [pytest.approx(expected.item(), rel=tolerance)] * 2
    assert teacher[0].weight.dtype == teacher_dtype


def test_a_trunk_under_autocast_gives_a_float32_loss():
    student, teacher = nets()
    trunk, data = TeacherStudentTrunk(student, teacher), dataset().embeddings[:24]
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = trunk(data)
        loss = RKDDALoss()(embeddings)
    assert embeddings.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert student[1].weight.grad.isfinite().all()


class Parts(nn.Module):
    """Returns the embeddings of ``model`` as part of a tuple, dict or dataclass."""

    def __init__(self, model: nn.Module, form):
        super().__init__()
        self.model, self.form = model, form

    def forward(self, data: Tensor):
        return self.form(data, self.model(data))


FORMS = {
    "tuple": (lambda hidden, pooled: (hidden, pooled), [1, -1, lambda output: output[1]]),
    "dict": (lambda hidden, pooled: {"hidden": hidden, "pooled": pooled}, ["pooled", lambda output: output["pooled"]]),
    "dataclass": (ModelOutput, ["pooled", lambda output: output.pooled]),
}


@pytest.mark.parametrize(
    ("form", "part"), [(form, part) for form, parts in FORMS.values() for part in parts], ids=lambda x: str(x)[:12]
)
def test_a_part_of_a_models_output_is_chosen(form, part):
    plain = trained_both_ways(*nets())
    student, teacher = (Parts(net, form) for net in nets())
    assert trained_both_ways(student, teacher, student_output=part, teacher_output=part) == plain


def test_an_embedder_may_read_all_parts_of_the_trunks_output():
    student, teacher = nets()
    by_hand = copy.deepcopy(student)

    class Second(nn.Module):
        def forward(self, output: tuple[Tensor, Tensor]) -> Tensor:
            return output[1]

    RKDTrainer(
        models={"trunk": Parts(student, FORMS["tuple"][0]), "embedder": Second(), "teacher": teacher},
        loss_funcs={"rkd_loss": RKDDALoss()},
        **host_arguments(student, sampler=FIRST),
    ).train()
    one_step(by_hand, lambda x, data, labels: rkd_plugin.rkd_da_loss(x, embedded(teacher, data)))
    for ours, expected in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_missing_part_is_named(side):
    for form in FORMS.values():
        models = dict(zip(("student", "teacher"), nets(), strict=True))
        models[side] = Parts(models[side], form[0])
        ways = [
            lambda models=models, **options: TeacherStudentTrunk(*models.values(), **options)(torch.randn(8, 6)),
            lambda models=models, **options: RKDTrainer(
                models={"trunk": models["student"], "teacher": models["teacher"]},
                loss_funcs={"rkd_loss": RKDDALoss()},
                **host_arguments(models["student"]),
                **options,
            ).train(),
        ]
        for way in ways:
            with pytest.raises(TypeError, match=f"expected the {side}'s embeddings as one .* {side}_output"):
                way()
            with pytest.raises(ValueError, match=rf"expected {side}_output=7 to choose a part of the {side}'s output"):
                way(**{f"{side}_output": 7})


def test_a_side_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"TeacherStudentTrunk: expected the teacher's .* \(N, D\), got \(2, 3, 1\)"):
        TeacherStudentTrunk(nn.Linear(3, 2), nn.Unflatten(1, (3, 1)))(torch.randn(2, 3))


@pytest.mark.parametrize("way", ["trunk", "trainer"])
def test_a_backbone_that_both_share_trains_as_by_hand(way):
    student, _ = nets()
    teacher = nn.Sequential(student[0], nn.Dropout(), nn.Linear(8, 5))
    by_hand, guide = copy.deepcopy((student, teacher))
    seen = []
    teacher.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    arguments = host_arguments(student, sampler=FIRST)
    if way == "trunk":
        trunk = TeacherStudentTrunk(student, teacher)
        trainer = trainers.MetricLossOnly(models={"trunk": trunk}, loss_funcs={"metric_loss": RKDDALoss()}, **arguments)
    else:
        models = {"trunk": student, "teacher": teacher}
        trainer = RKDTrainer(models=models, loss_funcs={"rkd_loss": RKDDALoss()}, **arguments)
    trainer.train()

    def loss(embeddings: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        return rkd_plugin.rkd_da_loss(embeddings, embedded(guide, data))

    one_step(by_hand, loss)
    assert seen == [False]  # one pass, without a graph
    assert not torch.equal(student[0][0].weight, nets()[0][0][0].weight)
    for ours, expected in zip(student.state_dict().values(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected)  # with BatchNorm's statistics, of one pass in train mode
    assert all(parameter.requires_grad for parameter in (*student.parameters(), *teacher.parameters()))
    assert all(module.training for module in (*student.modules(), *teacher.modules()))
    assert all(parameter.grad is None for parameter in teacher[2].parameters())


def test_the_teachers_mode_is_restored_when_it_fails():
    student, teacher = nets()
    with pytest.raises(RuntimeError, match="shapes"):
        TeacherStudentTrunk(student, nn.Sequential(teacher, nn.Linear(3, 3)))(torch.randn(8, 6))
    assert all(module.training for module in teacher.modules())


@pytest.mark.parametrize("which", ["trunk", "trainer"])
def test_a_tester_gets_the_students_embeddings_only(which):
    student, teacher = nets()
    seen = []
    tester = testers.GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0,
        data_device="cpu",
        normalize_embeddings=False,
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1, knn_func=CustomKNN(LpDistance())),
        end_of_testing_hook=lambda tester: seen.append(tester.embeddings_and_labels["train"][0]),
    )
    if which == "trunk":
        trunk = TeacherStudentTrunk(student, teacher)
        arguments = {"models": {"trunk": trunk}, "loss_funcs": {"metric_loss": RKDDALoss()}}
        trainer = trainers.MetricLossOnly(
            **arguments, **host_arguments(trunk, end_of_epoch_hook=lambda t: test_epoch(t) and None)
        )
    else:
        trainer = RKDTrainer(
            models={"trunk": student, "teacher": teacher},
            loss_funcs={"rkd_loss": RKDDALoss()},
            **host_arguments(student, end_of_epoch_hook=lambda t: test_epoch(t) and None),
        )

    def test_epoch(trainer):
        return tester.test({"train": dataset()}, trainer.epoch, trainer.models["trunk"], trainer.models["embedder"])

    trainer.train(num_epochs=2)
    assert [tuple(x.shape) for x in seen] == [(48, 4)] * 2
    torch.testing.assert_close(seen[-1], student.eval()(dataset().embeddings).detach())
    assert tester.all_accuracies["train"]["precision_at_1_level0"] > 0


# Every trainer of PML


class TwoStreams(EmbeddingDataset):
    """Anchors, other images of their classes, and labels."""

    def __getitem__(self, idx):
        return self.embeddings[idx], self.embeddings[(idx + 4) % len(self)], self.labels[idx]


def further_arguments(host: type, width: int) -> tuple[dict, dict, dict]:
    """The models, losses and arguments of a trainer other than trunk, embedder and first metric loss."""
    triplet, cross_entropy = losses.TripletMarginLoss, nn.CrossEntropyLoss
    cases = {
        "MetricLossOnly": lambda: ({}, {}, {}),
        "TrainWithClassifier": lambda: ({"classifier": nn.Linear(4, 4)}, {"classifier_loss": cross_entropy()}, {}),
        "CascadedEmbeddings": lambda: (
            {"classifier_0": nn.Linear(1, 4)},
            {"metric_loss_1": triplet(), "classifier_loss_0": cross_entropy()},
            {"embedding_sizes": [1, 3]},
        ),
        "TwoStreamMetricLoss": lambda: ({}, {}, {"dataset": TwoStreams(dataset().embeddings, dataset().labels)}),
        "DeepAdversarialMetricLearning": lambda: (
            {"classifier": nn.Linear(4, 4), "generator": nn.Linear(3 * width, width)},
            {"classifier_loss": cross_entropy(), "synth_loss": triplet(), "g_adv_loss": triplet()},
            {"g_triplets_per_anchor": 2},
        ),
    }
    return cases[host.__name__]()


HOSTS = [
    host
    for host in vars(trainers).values()
    if isinstance(host, type) and issubclass(host, trainers.BaseTrainer) and host is not trainers.BaseTrainer
]


def one_host_step(host: type, models: dict, metric_loss: nn.Module, student: nn.Module, rkd_loss=None) -> list[Tensor]:
    """The student's parameters after one step of a trainer of PML."""
    torch.manual_seed(2)
    others, more, arguments = further_arguments(host, 4 if "embedder" not in models else 8)
    first = "metric_loss_0" if "metric_loss_1" in more else "metric_loss"
    loss_funcs = {first: metric_loss, **more, **({"rkd_loss": rkd_loss} if rkd_loss else {})}
    np.random.seed(3)
    host(
        models={**models, **others}, loss_funcs=loss_funcs, **host_arguments(student, sampler=FIRST, **arguments)
    ).train()
    return [parameter.detach() for parameter in student.parameters()]


def assert_steps_differ_by(step: list[Tensor], plain_step: list[Tensor], student: nn.Module, loss: Tensor):
    """The teacher adds the step of ``loss`` to the step of PML's trainer: SGD's rate times the gradient."""
    grads = torch.autograd.grad(loss, student.parameters(), materialize_grads=True)
    assert any(grad.abs().max() > 1e-2 for grad in grads)
    for ours, host, grad in zip(step, plain_step, grads, strict=True):
        # 1e-6 is a few roundings of parameters up to 1.
        torch.testing.assert_close(ours - host, -0.1 * grad, rtol=1e-3, atol=1e-6)


def streams(host: type) -> list[Tensor]:
    data = dataset().embeddings
    return [data[:24], data[4:28]] if host is trainers.TwoStreamMetricLoss else [data[:24]]


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_every_trainer_of_pml_trains_with_a_teacher_by_the_mixin(host):
    steps = []
    for rkd_loss in (RKDDALoss(), None):
        student, teacher = nets()
        models = {"trunk": student[0], "embedder": student[1], **({"teacher": teacher} if rkd_loss else {})}
        kind = type("WithTeacher", (RKDTrainerMixin, host), {}) if rkd_loss else host
        kind.__name__ = host.__name__
        steps.append(one_host_step(kind, models, losses.TripletMarginLoss(), student, rkd_loss))
    student, teacher = nets()
    data = streams(host)
    embeddings = torch.cat([student(x) for x in data])
    loss = rkd_plugin.rkd_da_loss(embeddings, torch.cat([embedded(teacher, x) for x in data]))
    assert_steps_differ_by(*steps, student, loss)


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_every_trainer_of_pml_trains_with_a_teacher_in_its_trunk(host):
    steps = []
    for has_teacher in (True, False):
        student, teacher = nets()
        trunk = TeacherStudentTrunk(student, teacher) if has_teacher else student
        metric_loss = losses.MultipleLosses([losses.TripletMarginLoss(), *([RKDDALoss()] if has_teacher else [])])
        steps.append(one_host_step(host, {"trunk": trunk}, metric_loss, student))
    student, teacher = nets()
    data = streams(host)
    embeddings, ref_emb = torch.cat([student(x) for x in data]), torch.cat([embedded(teacher, x) for x in data])
    tuples = None
    if host is trainers.CascadedEmbeddings:  # its first loss gets the first column
        embeddings = embeddings[:, :1]
    if host is trainers.TwoStreamMetricLoss:  # which gives each loss the triplets of labels
        labels = dataset().labels[:24]
        a, p, n = torch.where((labels[:, None] == labels)[:, :, None] & (labels[:, None] != labels)[:, None])
        tuples = a, p + 24, n + 24
    assert_steps_differ_by(*steps, student, RKDDALoss()(embeddings, None, tuples, ref_emb=ref_emb))


def test_a_two_stream_trainer_with_a_miner_trains_with_a_teacher_in_its_trunk():
    student, teacher = nets()
    trunk = TeacherStudentTrunk(student, teacher)
    before = copy.deepcopy(student.state_dict())
    seen = []
    trainers.TwoStreamMetricLoss(
        models={"trunk": trunk},
        loss_funcs={"metric_loss": RKDDALoss()},
        mining_funcs={"tuple_miner": miners.TripletMarginMiner()},
        end_of_iteration_hook=lambda trainer: seen.append(trainer.losses["metric_loss"].item()),
        **host_arguments(trunk, sampler=FIRST, dataset=TwoStreams(dataset().embeddings, dataset().labels)),
    ).train()
    assert seen[0] > 0
    assert not same_state(student, before)


def test_a_generator_that_trains_alone_does_not_change_the_embeddings():
    student, teacher = nets()
    frozen = copy.deepcopy(student.state_dict())
    others, more, arguments = further_arguments(trainers.DeepAdversarialMetricLearning, 8)
    seen = []

    class Adversarial(RKDTrainerMixin, trainers.DeepAdversarialMetricLearning):
        pass

    trainer = Adversarial(
        g_alone_epochs=1,
        models={"trunk": student[0], "embedder": student[1], "teacher": teacher, **others},
        loss_funcs={"metric_loss": losses.TripletMarginLoss(), "rkd_loss": RKDDALoss(), **more},
        end_of_epoch_hook=lambda t: seen.append((same_parameters(student, frozen), float(t.loss_weights["rkd_loss"]))),
        **host_arguments(student, **arguments),
    )
    trainer.train(num_epochs=2)
    assert seen == [(True, 1), (False, 1)]


def same_parameters(module: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in module.named_parameters())


def test_an_order_of_bases_that_hides_one_raises():
    for bases in ((RKDTrainer, trainers.CascadedEmbeddings), (trainers.CascadedEmbeddings, RKDTrainerMixin)):
        with pytest.raises(TypeError, match=r"Mine: .*write class Mine\(RKDTrainerMixin, CascadedEmbeddings\)"):
            type("Mine", bases, {})
    assert issubclass(type("Mine", (RKDTrainer, trainers.TrainWithClassifier), {}), trainers.TrainWithClassifier)


def test_a_trainer_that_computes_embeddings_elsewhere_raises():
    class Elsewhere(trainers.MetricLossOnly):
        def compute_embeddings(self, data):
            return self.models["trunk"](data)

    student, teacher = nets()
    trainer = type("Mine", (RKDTrainerMixin, Elsewhere), {})(
        models={"trunk": student, "teacher": teacher},
        loss_funcs={"metric_loss": losses.TripletMarginLoss(), "rkd_loss": RKDDALoss()},
        **host_arguments(student),
    )
    with pytest.raises(RuntimeError, match="Mine: expected embeddings of get_trunk_output"):
        trainer.train()


def test_two_streams_cannot_learn_from_a_bank():
    bank = Bank(torch.zeros(48, 5))
    data = TwoStreams(dataset().embeddings, dataset().labels)
    student, _ = nets()
    trainer = type("Mine", (RKDTrainerMixin, trainers.TwoStreamMetricLoss), {})(
        models={"trunk": student},
        loss_funcs={"rkd_loss": RKDDALoss()},
        teacher_bank=bank,
        **host_arguments(student, dataset=data),
    )
    with pytest.raises(ValueError, match="from_bank: expected items of one image and its label, got 3 parts"):
        trainer.train()
    arguments = from_bank(bank, dataset(), data_and_label_getter=lambda items: ([items[0]], items[1]))
    with pytest.raises(TypeError, match="from_bank: expected a batch of images as one tensor, got list"):
        arguments["data_and_label_getter"](arguments["collate_fn"]([arguments["dataset"][0]]))


# RKDTrainer


def test_rkd_trainer_trains_the_student_as_by_hand():
    student, teacher = nets()
    teacher[0].weight.requires_grad_(False)
    teacher[1].eval()
    by_hand, before = copy.deepcopy(student), copy.deepcopy(teacher.state_dict())
    miner, task = miners.TripletMarginMiner(type_of_triplets="hard"), losses.TripletMarginLoss()
    models = {"trunk": student[0], "embedder": student[1], "teacher": teacher}
    seen = []
    trainer = RKDTrainer(
        models=models,
        loss_funcs={"metric_loss": task, "rkd_loss": RKDDALoss()},
        loss_weights={"metric_loss": 0.5, "rkd_loss": 3},
        mining_funcs={"tuple_miner": miner},
        end_of_iteration_hook=lambda t: seen.append({name: loss.item() for name, loss in t.losses.items()}),
        **host_arguments(student, sampler=FIRST),
    )
    trainer.train(num_epochs=1)

    def loss(embeddings: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        rkd = rkd_plugin.rkd_da_loss(embeddings, embedded(teacher, data))
        return 3 * rkd + 0.5 * task(embeddings, labels, miner(embeddings, labels))

    one_step(by_hand, loss)
    for ours, expected in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert same_state(teacher, before)
    assert [module.training for module in teacher.modules()] == [True, True, False]
    assert [parameter.requires_grad for parameter in teacher.parameters()] == [False, True, True, True]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert seen[0]["total_loss"] == pytest.approx(seen[0]["rkd_loss"] + seen[0]["metric_loss"])
    assert models["teacher"] is trainer.teacher
    assert "teacher" not in trainer.models


def test_rkd_trainer_does_not_change_the_teacher():
    student, teacher = nets()
    before = copy.deepcopy(teacher.state_dict())
    trainer = RKDTrainer(
        models={"trunk": student, "teacher": teacher},
        loss_funcs={"rkd_loss": RKDDALoss()},
        freeze_these=("teacher",),
        **host_arguments(student),
    )
    trainer.train(num_epochs=3)
    trainer.set_to_eval()
    assert not student.training
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert same_state(teacher, before)


def test_a_subset_batch_miner_of_rkd_trainer_runs_the_teacher_once():
    student, teacher = nets()
    seen = []
    teacher.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    RKDTrainer(
        models={"trunk": student, "teacher": teacher},
        loss_funcs={"rkd_loss": RKDDALoss()},
        mining_funcs={"subset_batch_miner": lambda embeddings, labels: torch.arange(len(labels) // 2)},
        **host_arguments(student),
    ).train()
    assert seen == [12, 12]


def test_rkd_trainer_skips_a_loss_of_weight_zero():
    student, teacher = nets()
    teacher.forward = lambda _: pytest.fail("called")
    trainer = RKDTrainer(
        models={"trunk": student, "teacher": teacher},
        loss_funcs={"metric_loss": losses.TripletMarginLoss(), "rkd_loss": RKDDALoss()},
        loss_weights={"metric_loss": 1, "rkd_loss": 0},
        **host_arguments(student),
    )
    trainer.train(num_epochs=1)
    assert trainer.iterations_per_epoch == 2


def test_rkd_trainer_names_missing_and_unexpected_models():
    student, teacher = nets()
    rkd = {"rkd_loss": RKDDALoss()}
    with pytest.raises(AssertionError, match='models must contain "teacher"'):
        RKDTrainer(models={"trunk": student}, loss_funcs=rkd, **host_arguments(student))
    both = {"trunk": student, "teacher": teacher}
    with pytest.raises(AssertionError, match='loss_funcs must contain "rkd_loss"'):
        RKDTrainer(models=both, loss_funcs={"metric_loss": losses.TripletMarginLoss()}, **host_arguments(student))
    optimizers = {"teacher_optimizer": torch.optim.SGD(teacher.parameters(), lr=1)}
    with pytest.raises(ValueError, match=r"expected no optimizer of the teacher, .* got a teacher_optimizer"):
        RKDTrainer(models=both, loss_funcs=rkd, **{**host_arguments(student), "optimizers": optimizers})


@pytest.mark.parametrize(
    ("loss_funcs", "message"),
    [
        ({"rkd_loss": rkd_plugin.RKDDALoss()}, "as rkd_loss, got rkd_plugin.RKDDALoss, .* rkd_plugin.adapters.pml"),
        (
            {"rkd_loss": RKDDALoss(), "metric_loss": losses.MultipleLosses([rkd_plugin.RKDAngleLoss()])},
            "as metric_loss, got rkd_plugin.RKDAngleLoss",
        ),
        ({"rkd_loss": nn.MSELoss()}, "rkd_loss that takes the teacher's embeddings as ref_emb, got MSELoss"),
    ],
)
def test_a_loss_that_cannot_be_given_a_teacher_is_named(loss_funcs, message):
    student, teacher = nets()
    models = {"trunk": student, "teacher": teacher}
    with pytest.raises(TypeError, match=f"RKDTrainer: expected .*{message}"):
        RKDTrainer(models=models, loss_funcs=loss_funcs, **host_arguments(student))


def test_rkd_trainer_logs_no_warning_for_optional_arguments(caplog):
    student, teacher = nets()
    models = {"trunk": student, "embedder": nn.Identity(), "teacher": teacher}
    arguments = host_arguments(student)
    arguments["optimizers"]["embedder_optimizer"] = torch.optim.SGD([torch.zeros(1)], lr=1)
    RKDTrainer(models=models, loss_funcs={"rkd_loss": RKDDALoss()}, **arguments)
    assert not caplog.records
