"""The baselines of the paper agree with the definitions that its authors published."""

import itertools
import math

import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss, TripletMarginLoss
from pytorch_metric_learning.reducers import MeanReducer
from torch import nn
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.losses.mid_level import ATLoss

from rkd_plugin import rkd_angle_loss, rkd_distance_loss
from rkd_plugin.adapters.torchdistill import PMLLoss, TrainedWith
from rkd_plugin.components.baselines import (
    DarkRankLoss,
    DistanceWeightedNegatives,
    HardDarkRank,
    HintRegressor,
    HintRegressors,
)


def sphere(rows, dim, spread=0.7):
    """Clusters of four on the unit sphere, so that near and far negatives exist."""
    centres = torch.randn(-(-rows // 4), dim).repeat_interleave(4, 0)[:rows]
    return nn.functional.normalize(centres + spread * torch.randn(rows, dim)), torch.arange(rows) // 4


# Triplets


def authors_weights(embeddings, labels, floor=0.5, cutoff=1.4):
    """Row by row: the weights of metric/pairsampler.py, DistanceWeighted, as it defines them."""
    rows, dim = embeddings.shape
    out = torch.zeros(rows, rows)
    for i in range(rows):
        logs = []
        for j in range(rows):
            distance = 1.0 if i == j else max(float((embeddings[i] - embeddings[j]).norm()), floor)
            logs.append((2 - dim) * math.log(distance) - (dim - 3) / 2 * math.log(1 - distance**2 / 4))
        allowed = [
            bool(labels[i] != labels[j]) and max(float((embeddings[i] - embeddings[j]).norm()), floor) < cutoff
            for j in range(rows)
        ]
        weights = [float(torch.tensor(log - max(logs)).exp()) * allow for log, allow in zip(logs, allowed, strict=True)]
        if sum(weights) == 0:
            weights = [float(labels[i] != labels[j]) for j in range(rows)]
        out[i] = torch.tensor(weights) / sum(weights)
    return out


@pytest.mark.parametrize("dim", [3, 16, 128, 512])
def test_negatives_are_drawn_with_the_authors_probabilities(dim):
    embeddings, labels = sphere(24, dim)
    probabilities = DistanceWeightedNegatives().probabilities(embeddings, labels, embeddings, labels)
    # Logarithms of a few hundred in float32 have errors of 1e-5.
    torch.testing.assert_close(probabilities, authors_weights(embeddings, labels), rtol=2e-4, atol=1e-7)


def test_in_wide_embeddings_all_weights_underflow_and_the_draw_is_uniform():
    """As in the authors' float32 code at 512 dimensions, with which their teachers were trained."""
    embeddings, labels = sphere(24, 512, spread=0.3)
    probabilities = DistanceWeightedNegatives().probabilities(embeddings, labels, embeddings, labels)
    others = (labels[:, None] != labels).float()
    torch.testing.assert_close(probabilities, others / others.sum(1, keepdim=True))


def test_every_positive_pair_has_one_negative_of_another_class():
    embeddings, labels = sphere(20, 8)
    anchors, positives, negatives = DistanceWeightedNegatives()(embeddings, labels)
    expected = {(i, j) for i, j in itertools.permutations(range(20), 2) if labels[i] == labels[j]}
    pairs = list(zip(anchors.tolist(), positives.tolist(), strict=True))
    assert len(pairs) == len(expected)
    assert set(pairs) == expected
    assert (labels[anchors] != labels[negatives]).all()


def test_draws_follow_the_probabilities():
    embeddings, labels = sphere(12, 4)
    miner = DistanceWeightedNegatives()
    counts = torch.zeros(12, 12)
    for _ in range(400):
        anchors, _, negatives = miner(embeddings, labels)
        counts.index_put_((anchors, negatives), torch.ones(len(anchors)), accumulate=True)
    drawn = counts / counts.sum(1, keepdim=True)
    expected = miner.probabilities(embeddings, labels, embeddings, labels)
    # 1,200 draws a row: four standard deviations of the most uncertain share.
    assert (drawn - expected).abs().max() < 4 * math.sqrt(0.25 / 1200)


def test_a_batch_of_one_class_has_no_triplets():
    embeddings = sphere(4, 8)[0]
    anchors, _, _ = DistanceWeightedNegatives()(embeddings, torch.zeros(4))
    assert len(anchors) == 0


def test_opposite_rows_are_not_nan():
    embeddings = torch.cat([torch.eye(5), -torch.eye(5)])
    probabilities = DistanceWeightedNegatives().probabilities(
        embeddings, torch.arange(10), embeddings, torch.arange(10)
    )
    torch.testing.assert_close(probabilities.sum(1), torch.ones(10))


def test_triplet_loss_is_the_authors():
    """metric/loss.py, L2Triplet: torch's triplet_margin_loss with p = 2, margin 0.2, mean over all triplets."""
    embeddings, labels = sphere(20, 8)
    triplets = DistanceWeightedNegatives()(embeddings, labels)
    loss = TripletMarginLoss(margin=0.2, reducer=MeanReducer())(embeddings, labels, triplets)
    # torch adds 1e-6 to every component of a difference.
    expected = nn.functional.triplet_margin_loss(*(embeddings[index] for index in triplets), margin=0.2, p=2)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


# DarkRank


def brute_force_likelihood(student, teacher, alpha, beta, length):
    """Each row's probability of drawing the teacher's nearest in order, out of those that are left."""
    total = 0.0
    for i in range(len(student)):
        order = sorted(
            (j for j in range(len(student)) if j != i), key=lambda j: float((teacher[i] - teacher[j]).norm())
        )
        left = [math.exp(-alpha * float((student[i] - student[j]).norm()) ** beta) for j in order[:length]]
        probability = 1.0
        while left:
            probability *= left[0] / sum(left)
            left = left[1:]
        total -= math.log(probability)
    return total / len(student)


@pytest.mark.parametrize(("alpha", "beta", "length"), [(3.0, 3.0, 4), (2.0, 3.0, 4), (1.0, 1.0, 2), (3.0, 2.0, 100)])
def test_darkrank_is_the_negative_log_likelihood(alpha, beta, length):
    student, teacher = sphere(9, 5)[0].double(), sphere(9, 7)[0].double()
    loss = HardDarkRank(alpha, beta, length)(student, teacher)
    expected = brute_force_likelihood(student, teacher, alpha, beta, length)
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # returned in float32


def test_darkrank_gradient():
    student, teacher = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.randn(6, 4)
    loss = HardDarkRank(1.0, 3.0)
    direction, step = torch.randn(6, 3, dtype=torch.float64), 1e-3
    loss(student, teacher).backward()
    with torch.no_grad():
        numeric = (loss(student + step * direction, teacher) - loss(student - step * direction, teacher)) / (2 * step)
    # The value is float32: 6e-8 of it over a step of 2e-3.
    assert (student.grad * direction).sum().item() == pytest.approx(numeric.item(), rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_darkrank_of_equal_rows_is_finite(beta):
    student = torch.ones(5, 3, requires_grad=True)
    loss = HardDarkRank(beta=beta)(student, torch.randn(5, 3))
    loss.backward()
    # The draws are uniform over four, three, two and one rows.
    assert loss.item() == pytest.approx(math.log(24), rel=1e-6)
    assert student.grad.isfinite().all()


def test_darkrank_in_torchdistill_and_its_errors():
    student, teacher = torch.randn(6, 3), torch.randn(6, 4)
    hooked = DarkRankLoss(student_module_path="fc", teacher_module_path=".", alpha=2.0, beta=3.0)
    value = hooked({"fc": {"output": student}}, {".": {"output": teacher}})
    assert torch.equal(value, HardDarkRank(2.0, 3.0)(student, teacher))
    with pytest.raises(ValueError, match="as many student as teacher rows, at least 2, got 6 and 5"):
        HardDarkRank()(student, teacher[:5])
    with pytest.raises(ValueError, match="at least 2, got 1 and 1"):
        HardDarkRank()(student[:1], teacher[:1])


# Attention and RKD


def test_attention_is_the_authors():
    """metric/loss.py, AttentionTransfer: mean squared difference of the normalised mean squared activations."""
    student, teacher = torch.randn(4, 3, 5, 5), torch.randn(4, 7, 5, 5)
    pair = {side: {"io": "output", "path": "block"} for side in ("student", "teacher")}
    loss = ATLoss({"block2": pair}, mode="code")({"block": {"output": student}}, {"block": {"output": teacher}})
    maps = [x.pow(2).mean(1).view(4, -1) for x in (student, teacher)]
    maps = [x / x.norm(dim=1, keepdim=True) for x in maps]
    torch.testing.assert_close(loss, (maps[0] - maps[1]).pow(2).mean())


def huber(a, b):
    difference = (a - b).abs()
    return torch.where(difference < 1, 0.5 * difference**2, difference - 0.5)


def test_rkd_is_the_authors():
    """metric/loss.py: all pairs and triplets, zero ones included; each side in units of its mean positive distance."""
    student, teacher = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    sides = []
    for x in (student, teacher):
        distances = (x[:, None] - x).norm(dim=2)
        directions = nn.functional.normalize(x[None] - x[:, None], dim=2)
        sides.append((distances / distances[distances > 0].mean(), directions @ directions.transpose(1, 2)))
    (student_d, student_a), (teacher_d, teacher_a) = sides
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(
        huber(student_d, teacher_d).mean().item(), rel=1e-6
    )
    assert rkd_angle_loss(student, teacher).item() == pytest.approx(huber(student_a, teacher_a).mean().item(), rel=1e-6)


# Modules that train with the student


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block = nn.Conv2d(3, width, 3)
        self.linear = nn.Linear(width, width)

    def forward(self, images):
        return self.linear(self.block(images).mean((2, 3)))


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.randn(3, 6, 6), index // 2


def loader_config():
    return {
        "dataset_id": "data",
        "sampler": {"class_or_func": torch.utils.data.SequentialSampler},
        "kwargs": {"batch_size": 8},
    }


def hint(name, target):
    return {
        "criterion": {"key": "MSELoss", "kwargs": {}},
        "criterion_wrapper": {
            "key": "SimpleLossWrapper",
            "kwargs": {
                "input": {"is_from_teacher": False, "module_path": f"regressors.{name}", "io": "output"},
                "target": {"is_from_teacher": True, "module_path": target, "io": "output"},
            },
        },
        "weight": 1.0,
    }


def pml_term(loss):
    return {"criterion": {"key": "PMLLoss", "kwargs": {"loss": loss}}, "weight": 1.0}


def test_hint_regressors_train_with_the_student_and_go_with_their_stage():
    student, teacher = Net(4), Net(6)
    regressors = {
        "map": {"path": "student_model.block", "channels": [4, 6]},
        "embedding": {"path": ".", "channels": [4, 6]},
    }
    stage = {
        "num_epochs": 1,
        "train_data_loader": loader_config(),
        "val_data_loader": loader_config(),
        "teacher": {
            "forward_proc": "forward_in_eval_mode", "requires_grad": False, "forward_hook": {"output": ["block"]},
        },
        "student": {
            "forward_proc": "forward_batch_only",
            "auxiliary_model_wrapper": {"key": "HintRegressors", "kwargs": {"regressors": regressors}},
            "forward_hook": {"output": ["student_model.block", "regressors.map", "regressors.embedding"]},
        },
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"map": hint("map", "block"), "embedding": hint("embedding", ".")}},
        },
    }  # fmt: skip
    later = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "no_forward", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"triplet": pml_term(TripletMarginLoss())}},
        },
    }  # fmt: skip
    box = get_distillation_box(
        teacher, student, {"data": Batches()}, {"stage1": stage, "stage2": later}, torch.device("cpu"), None, False, 1
    )
    wrapper = box.student_model
    assert isinstance(wrapper, HintRegressors)
    assert all(weight.abs().max() <= 0.005 for weight in wrapper.regressors.parameters())
    before = {name: value.clone() for name, value in wrapper.state_dict().items()}
    images, labels = torch.randn(8, 3, 6, 6), torch.arange(8) // 2
    loss = box.forward_process(images, labels, None)
    maps = wrapper.regressors["map"].weight.flatten(1)
    with torch.no_grad():
        expected = (torch.einsum("nchw,dc->ndhw", student.block(images), maps) - teacher.block(images)).square().mean()
        expected += (
            (student(images) @ wrapper.regressors["embedding"].weight.flatten(1).T - teacher(images)).square().mean()
        )
    torch.testing.assert_close(loss, expected)
    box.post_forward_process(loss)
    assert all(not torch.equal(value, before[name]) for name, value in wrapper.state_dict().items())
    box.post_epoch_process()
    assert box.student_model is student
    teacher.forward = None  # the second stage does not call it
    box.post_forward_process(box.forward_process(images, labels, None))


def test_a_loss_with_proxies_trains_with_the_model():
    model, proxies = Net(4), ProxyAnchorLoss(num_classes=4, embedding_size=4)
    with pytest.raises(ValueError, match=r"got ProxyAnchorLoss, whose parameters .* the key TrainedWith as well"):
        PMLLoss(proxies)
    config = {
        "num_epochs": 1,
        "train_data_loader": loader_config(),
        "val_data_loader": loader_config(),
        "model": {
            "forward_proc": "forward_batch_only",
            "auxiliary_model_wrapper": {"key": "TrainedWith", "kwargs": {"modules": {"proxies": proxies}}},
        },
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"proxies": pml_term(proxies)}},
        },
    }  # fmt: skip
    box = get_training_box(model, {"data": Batches()}, config, torch.device("cpu"), None, False, 1)
    before = {name: value.clone() for name, value in box.model.state_dict().items()}
    assert isinstance(box.model, TrainedWith)
    assert "trained.proxies.proxies" in before
    box.post_forward_process(box.forward_process(torch.randn(8, 3, 6, 6), torch.arange(8) // 2, None))
    moved = {name for name, value in box.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before)


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 5, 5, 6), (4, 5)])
def test_a_hint_does_not_guess_the_axis_of_channels(shape):
    with pytest.raises(
        ValueError, match=r"HintRegressor: expected feature maps \(N, 6, H, W\) or vectors \(N, 6\), got"
    ):
        HintRegressor(6, 3, init_range=0.1)(torch.zeros(shape))
