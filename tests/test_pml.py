"""The adapter to pytorch-metric-learning: losses against plain loops, and the host's trainers, testers and wrappers."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import pickle
import re
from pathlib import Path

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
    FromPacked,
    RKDAngleLoss,
    RKDDALoss,
    RKDDistanceLoss,
    RKDTrainer,
    TeacherStudentTrunk,
)

LOSSES = [RKDDistanceLoss, RKDAngleLoss, RKDDALoss]
RTOL = 1e-5  # of PML's own tests, for float32 and wider; half precision too is computed in float32 here


def batch(rows: int = 9, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student ``(N, 5)`` that learns, teacher ``(N, 7)``, labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, 5, generator=generator).to(dtype).requires_grad_()
    return student, torch.randn(rows, 7, generator=generator).to(dtype), torch.arange(rows) % 3


# The formulas once more, in float64 and plain Python.


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
    weights = {RKDDistanceLoss: (1, 0), RKDAngleLoss: (0, 1), RKDDALoss: (1, 2)}[type(loss)]
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
def test_mined_tuples_are_the_only_ones_that_count(cls, dtype):
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
    # Float indices too: what `torch.tensor([])` is.
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
def test_distances_that_are_not_euclidean_are_refused(cls, distance):
    name = type(distance).__name__
    with pytest.raises(ValueError, match=rf"{cls.__name__}: distance must be Euclidean, got {name}.*LpDistance"):
        cls(distance=distance)


def test_options_reach_the_core():
    student, teacher, _ = batch()
    loss = RKDDALoss(distance_weight=3, angle_weight=0.5, huber_delta=0.1, impl="reference")
    expected = rkd_plugin.rkd_da_loss(student, teacher, distance_weight=3, angle_weight=0.5, huber_delta=0.1)
    torch.testing.assert_close(loss(student, ref_emb=teacher), expected)
    with pytest.raises(ValueError, match="impl"):
        RKDDALoss(impl="no such kernel")(student, ref_emb=teacher)


def test_a_term_of_weight_zero_is_skipped(monkeypatch):
    student, teacher, labels = batch()
    expected = RKDDistanceLoss()(student, labels, ref_emb=teacher)
    monkeypatch.setattr("rkd_plugin.adapters.pml.losses.rkd_angle_loss", lambda *_, **__: pytest.fail("was computed"))
    loss = RKDDALoss(angle_weight=0)(student, labels, ref_emb=teacher)
    loss.backward()
    assert loss == expected


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
    # A regulariser with a reducer of its own, and one term beside it.
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


def test_statistics_are_not_computed_unasked(monkeypatch):
    monkeypatch.setattr(torch, "pdist", lambda *_: pytest.fail("was computed"))
    student, teacher, _ = batch()
    loss = RKDDALoss()
    loss(student, ref_emb=teacher)
    assert not hasattr(loss, "student_mean_distance")


def test_cross_batch_memory_says_what_to_use():
    for cls in LOSSES:
        with pytest.raises(ValueError, match=rf"{cls.__name__}.*larger batch.*gather=True"):
            losses.CrossBatchMemory(cls(), embedding_size=5)


def test_cross_batch_memory_treats_other_losses_as_before():
    student, _, labels = batch()
    losses.CrossBatchMemory(losses.ContrastiveLoss(), embedding_size=5)(student, labels).backward()
    assert student.grad.any()
    with pytest.raises(Exception, match="not supported for VICRegLoss"):
        losses.CrossBatchMemory(losses.VICRegLoss(), embedding_size=5)


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
    torch.save({"grad": net.weight.grad, "message": message}, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # nobody leaves while another still listens to it
    torch.distributed.destroy_process_group()
    # Python's way out may destroy gloo's threads while they run, which aborts a process whose work is done.
    os._exit(0)


def test_two_processes_give_the_gradients_of_one(tmp_path: Path):
    torch.multiprocessing.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    net, data, teacher, labels = global_batch()
    RKDDALoss()(net(data), labels, ref_emb=teacher).backward()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(result["grad"], net.weight.grad, rtol=0, atol=1e-6)
        assert re.search(r"got 6 and 12 rows.*efficient=False", result["message"])


# Packed trunk


def nets() -> tuple[nn.Module, nn.Module]:
    """A student (trunk and embedder) and a teacher with BatchNorm, whose buffers would move in train mode."""
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


def one_step(student: nn.Module, loss) -> None:
    """What a trainer should do with the first 24 examples, by hand."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    data = dataset()
    loss(student(data.embeddings[:24]), data.embeddings[:24], data.labels[:24]).backward()
    optimizer.step()


FIRST = list(range(24))


def test_metric_loss_only_trains_the_student_as_by_hand():
    student, teacher = nets()
    by_hand, frozen = copy.deepcopy(student), copy.deepcopy(teacher.state_dict())
    trunk = TeacherStudentTrunk(student, teacher)
    miner, task = miners.TripletMarginMiner(type_of_triplets="hard"), losses.TripletMarginLoss()
    packed = FromPacked(4, RKDDALoss(), task, miner, rkd_weight=3, task_weight=0.5, teacher_dim=5)
    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk},
        loss_funcs={"metric_loss": packed},
        **host_arguments(trunk, sampler=FIRST),
    )
    trainer.train(num_epochs=1)

    def loss(embeddings: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        rkd = rkd_plugin.rkd_da_loss(embeddings, teacher.eval()(data))
        return 3 * rkd + 0.5 * task(embeddings, labels, miner(embeddings, labels))

    one_step(by_hand, loss)
    assert trainer.iterations_per_epoch == 1
    for ours, expected in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert same_state(teacher, frozen)
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_metric_loss_only_learns_from_the_teacher():
    student, teacher = nets()
    trunk = TeacherStudentTrunk(student, teacher)
    data = dataset().embeddings

    def distance_to_teacher() -> float:
        with torch.no_grad():
            return rkd_plugin.rkd_da_loss(trunk.eval()(data), teacher(data)).item()

    before = distance_to_teacher()
    trainers.MetricLossOnly(
        models={"trunk": trunk}, loss_funcs={"metric_loss": FromPacked(4, RKDDALoss())}, **host_arguments(trunk)
    ).train(num_epochs=15)
    assert distance_to_teacher() < before / 2


def test_trunk_holds_the_teacher_without_owning_it():
    student, teacher = nets()
    trunk = TeacherStudentTrunk(student, teacher).train()
    assert [id(p) for p in trunk.parameters()] == [id(p) for p in student.parameters()]
    assert {id(b) for b in trunk.buffers()} == {id(b) for b in student.buffers()}
    assert all(name.startswith("student.") for name in trunk.state_dict())
    assert not teacher.training
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
    assert torch.equal(other(data), trunk(data))
    assert other.teacher is not trunk.teacher
    other.train()
    assert not other.teacher.training


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float16, torch.float32)])
def test_trunk_unifies_dtypes_without_a_gradient_that_overflows(dtypes):
    class Cast(nn.Module):
        def __init__(self, dtype: torch.dtype, scale: float):
            super().__init__()
            self.weight = nn.Parameter(torch.full((1,), scale, dtype=dtype))

        def forward(self, data: Tensor) -> Tensor:
            return data.to(self.weight.dtype) * self.weight

    data = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    trunk = TeacherStudentTrunk(Cast(dtypes[0], 1e-7), Cast(dtypes[1], 1.0))
    seen = []
    trunk.student.register_forward_hook(lambda module, args, out: out.register_hook(seen.append) and None)
    packed = trunk(data)
    assert packed.dtype == dtypes[1]
    assert torch.equal(packed[:, 6:], data.to(dtypes[1]))
    loss = FromPacked(6, RKDDALoss(), rkd_weight=1e4)(packed)
    loss.backward()
    assert seen[0].dtype == dtypes[0]
    assert seen[0].isfinite().all()
    assert dtypes[0] != torch.float16 or seen[0].abs().max() == torch.finfo(torch.float16).max


def test_trunk_names_the_side_that_is_no_vector():
    with pytest.raises(ValueError, match=r"teacher must return \(N, D\), got \(2, 3, 1\)"):
        TeacherStudentTrunk(nn.Linear(3, 2), nn.Unflatten(1, (3, 1)))(torch.randn(2, 3))


def test_packed_vectors_of_another_width_are_an_error():
    trunk = TeacherStudentTrunk(*nets())
    data = torch.randn(8, 6)
    with pytest.raises(ValueError, match=r"expected vectors \(N, 4 \+ teacher width\), got \(8, 4\).*train mode"):
        FromPacked(4, RKDDALoss())(trunk.eval()(data))
    with pytest.raises(ValueError, match=r"\(N, 3 \+ 5\), got \(8, 9\).*student_dim"):
        FromPacked(3, RKDDALoss(), teacher_dim=5)(trunk.train()(data))


def test_a_tuple_miner_of_the_trainer_is_refused():
    trunk = TeacherStudentTrunk(*nets())
    trainer = trainers.MetricLossOnly(
        models={"trunk": trunk},
        loss_funcs={"metric_loss": FromPacked(4, RKDDALoss(), losses.TripletMarginLoss())},
        mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},
        **host_arguments(trunk),
    )
    with pytest.raises(ValueError, match="task_miner"):
        trainer.train()


def test_a_subset_batch_miner_sees_the_student_alone():
    trunk = TeacherStudentTrunk(*nets())
    widths = []

    def first_half(embeddings: Tensor, labels: Tensor) -> Tensor:
        widths.append(embeddings.shape[1])
        return torch.arange(len(labels) // 2)

    trainers.MetricLossOnly(
        models={"trunk": trunk},
        loss_funcs={"metric_loss": FromPacked(4, RKDDALoss())},
        mining_funcs={"subset_batch_miner": first_half},
        **host_arguments(trunk),
    ).train()
    assert widths == [4, 4]


@pytest.mark.parametrize("which", ["packed", "trainer"])
def test_a_tester_sees_the_student_alone(which):
    student, teacher = nets()
    seen = []
    tester = testers.GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0,
        data_device="cpu",
        normalize_embeddings=False,
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1, knn_func=CustomKNN(LpDistance())),
        end_of_testing_hook=lambda tester: seen.append(tester.embeddings_and_labels["train"][0]),
    )
    if which == "packed":
        trunk = TeacherStudentTrunk(student, teacher)
        arguments = {"models": {"trunk": trunk}, "loss_funcs": {"metric_loss": FromPacked(4, RKDDALoss())}}
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


# RKDTrainer


def test_rkd_trainer_trains_the_student_as_by_hand():
    student, teacher = nets()
    by_hand, frozen = copy.deepcopy(student), copy.deepcopy(teacher.train().state_dict())
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
    assert not teacher.training
    trainer.train(num_epochs=1)

    def loss(embeddings: Tensor, data: Tensor, labels: Tensor) -> Tensor:
        rkd = rkd_plugin.rkd_da_loss(embeddings, teacher(data))
        return 3 * rkd + 0.5 * task(embeddings, labels, miner(embeddings, labels))

    one_step(by_hand, loss)
    for ours, expected in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert same_state(teacher, frozen)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert seen[0]["total_loss"] == pytest.approx(seen[0]["rkd_loss"] + seen[0]["metric_loss"])
    assert models["teacher"] is trainer.teacher
    assert "teacher" not in trainer.models


def test_rkd_trainer_keeps_the_teacher_frozen_whatever_the_host_does():
    student, teacher = nets()
    frozen = copy.deepcopy(teacher.state_dict())
    trainer = RKDTrainer(
        models={"trunk": student, "teacher": teacher},
        loss_funcs={"rkd_loss": RKDDALoss()},
        freeze_these=("teacher",),
        **host_arguments(student),
    )
    trainer.train(num_epochs=3)
    trainer.set_to_eval()
    trainer.set_to_train()
    assert student.training
    assert not teacher.training
    assert same_state(teacher, frozen)


def test_rkd_trainer_skips_what_has_no_weight():
    student, teacher = nets()
    teacher.forward = lambda _: pytest.fail("was run")
    trainer = RKDTrainer(
        models={"trunk": student, "teacher": teacher},
        loss_funcs={"metric_loss": losses.TripletMarginLoss(), "rkd_loss": RKDDALoss()},
        loss_weights={"metric_loss": 1, "rkd_loss": 0},
        **host_arguments(student),
    )
    trainer.train(num_epochs=1)
    assert trainer.iterations_per_epoch == 2


def test_rkd_trainer_says_what_is_missing_or_too_much():
    student, teacher = nets()
    rkd = {"rkd_loss": RKDDALoss()}
    with pytest.raises(AssertionError, match='models must contain "teacher"'):
        RKDTrainer(models={"trunk": student}, loss_funcs=rkd, **host_arguments(student))
    both = {"trunk": student, "teacher": teacher}
    with pytest.raises(AssertionError, match='loss_funcs must contain "rkd_loss"'):
        RKDTrainer(models=both, loss_funcs={"metric_loss": losses.TripletMarginLoss()}, **host_arguments(student))
    optimizers = {"teacher_optimizer": torch.optim.SGD(teacher.parameters(), lr=1)}
    with pytest.raises(ValueError, match="teacher is frozen"):
        RKDTrainer(models=both, loss_funcs=rkd, **{**host_arguments(student), "optimizers": optimizers})


def test_rkd_trainer_logs_no_warning_for_what_it_does_not_need(caplog):
    student, teacher = nets()
    models = {"trunk": student, "embedder": nn.Identity(), "teacher": teacher}
    arguments = host_arguments(student)
    arguments["optimizers"]["embedder_optimizer"] = torch.optim.SGD([torch.zeros(1)], lr=1)
    RKDTrainer(models=models, loss_funcs={"rkd_loss": RKDDALoss()}, **arguments)
    assert not caplog.records
