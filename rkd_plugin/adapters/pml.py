"""RKD for pytorch-metric-learning (PML): its losses, and two ways to train with them.

* `RKDDistanceLoss`, `RKDAngleLoss`, `RKDDALoss`: PML losses, called with the teacher's embeddings as ``ref_emb``.
* `TeacherStudentTrunk` and `FromPacked`: for PML's own ``trainers.MetricLossOnly``, which has no place for a teacher.
* `RKDTrainer`: that trainer with a teacher and a loss of its own for RKD.

The formulas are in `rkd_plugin.functional`; this file translates arguments, names and shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction, CrossBatchMemory
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from rkd_plugin.functional import Impl, Pairs, Triplets, rkd_angle_loss, rkd_distance_loss

__all__ = ["FromPacked", "RKDAngleLoss", "RKDDALoss", "RKDDistanceLoss", "RKDTrainer", "TeacherStudentTrunk"]


class _RelationalLoss(BaseMetricLossFunction):
    """What the three losses share; each names its terms in ``_sub_loss_names``."""

    def __init__(
        self, distance_weight: float, angle_weight: float, huber_delta: float, impl: Impl, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.huber_delta = huber_delta
        self.impl: Impl = impl
        lp = self.distance
        if not isinstance(lp, LpDistance) or lp.p != 2 or lp.power != 1:
            raise ValueError(
                f"{type(self).__name__}: distance must be Euclidean, got {type(lp).__name__} with p={lp.p} and "
                f"power={lp.power}; pass LpDistance(p=2, power=1), with normalize_embeddings True or False"
            )
        self.add_to_recordable_attributes(list_of_names=["distance_weight", "angle_weight", "huber_delta"])
        sides = [f"{side}_{stat}" for side in ("student", "teacher") for stat in ("mean_distance", "zero_share")]
        self.add_to_recordable_attributes(
            list_of_names=[*sides, *(f"{name}_mean" for name in self._sub_loss_names())], is_stat=True
        )

    def get_default_distance(self) -> Any:
        """Embeddings as they come: both losses are invariant to scale, and the teacher's norms are knowledge too."""
        return LpDistance(p=2, normalize_embeddings=False)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """The loss of ``embeddings (N, D_s)`` beside the teacher's ``ref_emb (N, D_t)``; see the class."""
        name = type(self).__name__
        if ref_emb is None or ref_emb is embeddings:
            raise ValueError(
                f"{name}: expected the teacher's embeddings, got none; call loss(student, ref_emb=teacher), "
                "or train with RKDTrainer or FromPacked, which do"
            )
        if len(ref_emb) != len(embeddings):
            raise ValueError(
                f"{name}: embeddings and ref_emb must have one row per example, got {len(embeddings)} and "
                f"{len(ref_emb)} rows; under DistributedLossWrapper pass ref_emb=teacher and set efficient=False"
            )
        # PML keeps sub-losses in the dtype of the embeddings, where a float16 loss would lose its digits.
        student = _widen(embeddings, torch.float32)
        return super().forward(student, labels, indices_tuple, ref_emb.to(student.device), ref_labels)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """PML's loss dictionary: for each term one loss per anchor."""
        ref_emb = _widen(ref_emb.detach(), torch.float32)
        student, teacher = self.distance.maybe_normalize(embeddings), self.distance.maybe_normalize(ref_emb)
        self.distance.reset_stats()
        self.distance.set_default_stats(embeddings, ref_emb, student, teacher)
        pairs, triplets = _mined(indices_tuple, student.device)
        terms = {
            "distance_loss": self._term(rkd_distance_loss, self.distance_weight, student, teacher, pairs=pairs),
            "angle_loss": self._term(rkd_angle_loss, self.angle_weight, student, teacher, triplets=triplets),
        }
        terms = {name: terms[name] for name in self._sub_loss_names()}
        if self.collect_stats and len(student) > 1:
            self._set_stats(student, teacher, terms)
        return terms

    def _term(
        self, loss: Callable[..., Tensor], weight: float, student: Tensor, teacher: Tensor, **tuples: Any
    ) -> dict[str, Any]:
        if not weight or not len(student):
            zero: dict[str, Any] = self.zero_loss()
            return zero
        losses = weight * loss(
            student, teacher, reduction="anchor", huber_delta=self.huber_delta, impl=self.impl, **tuples
        )
        return {
            "losses": losses,
            "indices": c_f.torch_arange_from_size(losses),
            "reduction_type": "element",
            "divisor": len(losses),  # read by DivisorReducer alone
        }

    @torch.no_grad()
    def _set_stats(self, student: Tensor, teacher: Tensor, terms: dict[str, dict[str, Any]]) -> None:
        for side, x in (("student", student), ("teacher", teacher)):
            distances = torch.pdist(x)
            setattr(self, f"{side}_mean_distance", distances.mean().item())
            setattr(self, f"{side}_zero_share", (distances == 0).double().mean().item())
        for name, term in terms.items():
            setattr(self, f"{name}_mean", float(torch.as_tensor(term["losses"]).float().mean()))


class RKDDistanceLoss(_RelationalLoss):
    """`rkd_plugin.rkd_distance_loss` as a PML loss: ``loss(student, labels, ref_emb=teacher)``.

    Row i of ``ref_emb`` is the teacher's embedding of the example in row i of the student's; the widths may differ.
    Labels are accepted and, but for ``ClassWeightedReducer``, not needed. The teacher's embeddings are moved to the
    student's device. Embeddings in half precision give a float32 loss, and a gradient that saturates at the largest
    number of their dtype. ``DistributedLossWrapper(loss, efficient=False)`` gives the gradients of the global batch.

    **Tuples.** With ``indices_tuple`` from a PML miner, 3 or 4 index vectors, only the mined pairs count for distances
    (each as often as it was mined) and only the mined triplets for angles (vertex = anchor, arms to positive and
    negative); the mean distance still runs over the whole batch. No tuples, no loss.

    **Reducers.** Each term is a vector ``(N,)``, one loss per anchor; its mean is the mean over all pairs or triplets.

    * ``MeanReducer`` (default), ``DivisorReducer``: as ``reduction="mean"`` in `rkd_plugin.functional`.
    * ``SumReducer``: N times that.
    * ``ThresholdReducer``, ``AvgNonZeroReducer``: the mean over the anchors whose loss lies within the bounds.
    * ``PerAnchorReducer``: what its inner reducer gives, since the losses are per anchor already.
    * ``ClassWeightedReducer``: weighted by the anchor's label.
    * ``DoNothingReducer``: the dictionary of vectors. ``MultipleReducers``: one reducer for each of the terms
      ``distance_loss`` and ``angle_loss``, then their sum.

    Args:
        huber_delta: as in `rkd_plugin.rkd_distance_loss`.
        impl: as in `rkd_plugin.rkd_distance_loss`.
        kwargs: of every PML loss: ``distance``, an ``LpDistance(p=2, power=1)``, whose ``normalize_embeddings=True``
            scales both sides to length 1 (default: False); ``reducer``; ``embedding_regularizer``; ``collect_stats``
            to record ``student_mean_distance``, ``student_zero_share`` (of pairs at distance 0), the same of the
            teacher, and the weighted means ``distance_loss_mean`` and ``angle_loss_mean``.

    Raises:
        ValueError: if ``distance`` is not Euclidean; when called, if ``ref_emb`` is missing or the row counts differ.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> RKDDistanceLoss()(student, ref_emb=teacher)
        tensor(0.0972)
    """

    def __init__(self, huber_delta: float = 1.0, impl: Impl = "auto", **kwargs: Any) -> None:
        super().__init__(1.0, 0.0, huber_delta, impl, **kwargs)

    def _sub_loss_names(self) -> list[str]:
        return ["distance_loss"]


class RKDAngleLoss(_RelationalLoss):
    """`rkd_plugin.rkd_angle_loss` as a PML loss; arguments and calls as `RKDDistanceLoss`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> RKDAngleLoss()(student, ref_emb=teacher)
        tensor(0.1393)
    """

    def __init__(self, huber_delta: float = 1.0, impl: Impl = "auto", **kwargs: Any) -> None:
        super().__init__(0.0, 1.0, huber_delta, impl, **kwargs)

    def _sub_loss_names(self) -> list[str]:
        return ["angle_loss"]


class RKDDALoss(_RelationalLoss):
    """`rkd_plugin.rkd_da_loss` as a PML loss with two terms; further arguments and calls as `RKDDistanceLoss`.

    Args:
        distance_weight: of the distance term; 0 skips it.
        angle_weight: of the angle term; 0 skips it, and its cubic cost.
        huber_delta: as in `rkd_plugin.rkd_da_loss`.
        impl: as in `rkd_plugin.rkd_da_loss`.
        kwargs: as in `RKDDistanceLoss`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> loss = RKDDALoss(collect_stats=True)
        >>> loss(student, ref_emb=teacher)  # 0.0972 + 2 * 0.1393
        tensor(0.3757)
        >>> loss.teacher_mean_distance  # of a 3-4-5 triangle
        4.0
    """

    def __init__(
        self,
        distance_weight: float = 1.0,
        angle_weight: float = 2.0,
        huber_delta: float = 1.0,
        impl: Impl = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(distance_weight, angle_weight, huber_delta, impl, **kwargs)

    def _sub_loss_names(self) -> list[str]:
        return ["distance_loss", "angle_loss"]


class TeacherStudentTrunk(nn.Module):
    """A trunk for PML's own trainers that carries the teacher's embeddings to the loss, `FromPacked`.

    In train mode it returns ``[student | teacher]``, shape ``(N, D_s + D_t)``, in the wider of the two dtypes; in eval
    mode the student's embeddings alone, ``(N, D_s)``, so that PML's testers, ``InferenceModel`` and
    ``subset_batch_miner`` see nothing of the teacher. The teacher is frozen: it runs in eval mode without gradient and
    is no part of ``parameters()`` or ``state_dict()``, yet moves with ``.to()`` and its kin, copies and pickles. A PML
    ``embedder`` would meet the packed vectors: put it into the student, ``nn.Sequential(trunk, embedder)``.

    Args:
        student: maps a batch to embeddings ``(N, D_s)``.
        teacher: maps the same batch to embeddings ``(N, D_t)``; put into eval mode here.

    Raises:
        ValueError: when called, if a model does not return ``(N, D)``.

    Example:
        >>> import torch
        >>> trunk = TeacherStudentTrunk(torch.nn.Linear(5, 3), torch.nn.Linear(5, 4))
        >>> trunk(torch.zeros(2, 5)).shape, trunk.eval()(torch.zeros(2, 5)).shape
        (torch.Size([2, 7]), torch.Size([2, 3]))
        >>> list(trunk.state_dict())
        ['student.weight', 'student.bias']
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        # Inside a tuple the teacher is no submodule: no optimiser, checkpoint or train() reaches it.
        self._teacher = (teacher.eval(),)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TeacherStudentTrunk:
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, data: Any) -> Tensor:
        """A batch -> ``(N, D_s + D_t)`` in train mode, ``(N, D_s)`` in eval mode."""
        student: Tensor = self.student(data)
        if not self.training:
            return student
        with torch.no_grad():
            teacher: Tensor = self.teacher(data)
        for side, x in (("student", student), ("teacher", teacher)):
            if x.ndim != 2:
                raise ValueError(
                    f"TeacherStudentTrunk: {side} must return (N, D), got {tuple(x.shape)}; pool or flatten it"
                )
        return torch.cat([_widen(student, teacher.dtype), teacher], 1)


class FromPacked(nn.Module):
    """The ``metric_loss`` beside a `TeacherStudentTrunk`: unpacks its vectors, adds RKD and a task loss.

    Args:
        student_dim: ``D_s``, the width of the student's embeddings.
        rkd_loss: a loss of this file, or its ``DistributedLossWrapper``; gets student, labels and the teacher.
        task_loss: any PML loss; gets student, labels and what ``task_miner`` finds.
        task_miner: any PML tuple miner. The trainer's own ``tuple_miner`` would mine packed vectors, and is refused.
        rkd_weight: of ``rkd_loss``.
        task_weight: of ``task_loss``.
        teacher_dim: ``D_t``; if given, the packed width must be exactly ``D_s + D_t``.

    Raises:
        ValueError: when called with tuples, or with vectors too narrow to be packed, as those of a trunk in eval mode.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> trunk = TeacherStudentTrunk(torch.nn.Linear(5, 3), torch.nn.Linear(5, 4))
        >>> loss = FromPacked(3, RKDDALoss())(trunk(torch.randn(8, 5)), torch.arange(8))
        >>> loss.backward()
        >>> trunk.student.weight.grad.shape, trunk.teacher.weight.grad
        (torch.Size([3, 5]), None)
    """

    def __init__(
        self,
        student_dim: int,
        rkd_loss: nn.Module,
        task_loss: nn.Module | None = None,
        task_miner: nn.Module | None = None,
        rkd_weight: float = 1.0,
        task_weight: float = 1.0,
        teacher_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.rkd_loss = rkd_loss
        self.task_loss = task_loss
        self.task_miner = task_miner
        self.rkd_weight = rkd_weight
        self.task_weight = task_weight

    def forward(self, packed: Tensor, labels: Tensor | None = None, indices_tuple: Any = None) -> Tensor:
        """``(N, D_s + D_t)``, labels ``(N,)`` -> a scalar."""
        if indices_tuple is not None:
            raise ValueError(
                "FromPacked: expected no indices_tuple, got one mined from packed vectors; "
                "pass the miner as FromPacked(task_miner=...) instead of the trainer's tuple_miner"
            )
        width = packed.shape[-1] - self.student_dim
        if width < 1 or width != (self.teacher_dim or width):
            raise ValueError(
                f"FromPacked: expected vectors (N, {self.student_dim} + {self.teacher_dim or 'teacher width'}), got "
                f"{tuple(packed.shape)}; check student_dim, and that TeacherStudentTrunk is in train mode"
            )
        student, teacher = packed[:, : self.student_dim], packed[:, self.student_dim :]
        loss: Tensor = self.rkd_weight * self.rkd_loss(student, labels, ref_emb=teacher)
        if self.task_loss is not None:
            mined = self.task_miner(student, labels) if self.task_miner is not None else None
            loss = loss + self.task_weight * self.task_loss(student, labels, mined)
        return loss


class RKDTrainer(MetricLossOnly):
    """PML's ``MetricLossOnly`` with a frozen ``teacher`` among the models and an ``rkd_loss`` among the losses.

    ``models={"trunk": ..., "teacher": ...}``, an ``embedder`` if wanted; ``loss_funcs={"rkd_loss": RKDDALoss()}``, a
    ``metric_loss`` if wanted; ``loss_weights`` for each. The teacher sees the same batches. ``tuple_miner`` mines the
    student's embeddings for ``metric_loss``; ``rkd_loss`` always takes the whole batch. Other arguments are the host's.

    The teacher is put into eval mode, needs no gradient and no optimiser, and is kept as ``trainer.teacher``, outside
    ``trainer.models``, whose members the host sets to train mode, optimises and writes to disk.

    Raises:
        AssertionError: from the host, if a model or loss is missing or unknown.
        ValueError: if the teacher is given an optimiser.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.utils.common_functions import EmbeddingDataset
        >>> student, teacher = torch.nn.Linear(5, 3), torch.nn.Linear(5, 4)
        >>> trainer = RKDTrainer(
        ...     models={"trunk": student, "teacher": teacher},
        ...     optimizers={"trunk_optimizer": torch.optim.Adam(student.parameters())},
        ...     batch_size=8,
        ...     loss_funcs={"rkd_loss": RKDDALoss()},
        ...     dataset=EmbeddingDataset(torch.randn(16, 5), torch.arange(16)),
        ...     dataloader_num_workers=0,
        ...     data_device="cpu",
        ... )
        >>> trainer.train(num_epochs=1)
        >>> student.training, teacher.training
        (True, False)
    """

    models: dict[str, nn.Module]

    def modify_schema(self) -> None:
        """Add the teacher and its loss to what the host accepts and requires."""
        if "teacher_optimizer" in self.optimizers:
            raise ValueError("RKDTrainer: the teacher is frozen, got a teacher_optimizer; remove it from optimizers")
        self.schema["models"].keys += ["teacher"]
        self.schema["models"].essential += ["teacher"]
        self.schema["loss_funcs"].keys += ["rkd_loss"]
        self.schema["loss_funcs"].essential += ["rkd_loss"]
        self.schema["loss_funcs"].important = []  # metric_loss is a choice here, and missing without a warning
        self.schema["optimizers"].important = [f"{name}_optimizer" for name in self.models if name != "teacher"]

    def initialize_models(self) -> None:
        """Freeze the teacher and take it out of the host's hands."""
        self.teacher = self.models["teacher"].eval().requires_grad_(False)
        self.models = {name: model for name, model in self.models.items() if name != "teacher"}
        super().initialize_models()

    def calculate_loss(self, curr_batch: tuple[Any, Tensor]) -> None:
        """Fill ``self.losses`` for one batch."""
        data, labels = curr_batch
        embeddings = self.compute_embeddings(data)
        if "metric_loss" in self.loss_funcs:
            indices_tuple = self.maybe_mine_embeddings(embeddings, labels)
            self.losses["metric_loss"] = self.maybe_get_metric_loss(embeddings, labels, indices_tuple)
        if self.loss_weights["rkd_loss"] > 0:
            teacher = self.teacher(c_f.to_device(data, device=self.data_device, dtype=self.dtype))
            self.losses["rkd_loss"] = self.loss_funcs["rkd_loss"](embeddings, labels, ref_emb=teacher)


def _widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in the wider of its dtype and ``dtype``; the gradient that comes back saturates instead of overflowing."""
    wide = x.to(torch.promote_types(x.dtype, dtype))
    if wide.requires_grad and wide is not x:
        limit = torch.finfo(x.dtype).max
        wide.register_hook(lambda grad: grad.clamp(-limit, limit))  # type: ignore[no-untyped-call]
    return wide


def _mined(
    indices_tuple: tuple[Tensor, ...] | None, device: torch.device
) -> tuple[Pairs, Triplets] | tuple[None, None]:
    """The pairs and triplets of a PML miner, as `rkd_plugin.functional` takes them."""
    if indices_tuple is None:
        return None, None
    indices_tuple = tuple(indices.to(device, torch.long) for indices in indices_tuple)
    anchors, positives, more_anchors, negatives = lmu.convert_to_pairs(indices_tuple, None)
    pairs = torch.cat([anchors, more_anchors]), torch.cat([positives, negatives])
    return pairs, lmu.convert_to_triplets(indices_tuple, None)


_check_loss_support = CrossBatchMemory.check_loss_support.__func__


def _explain_loss_support(cls: type, loss_name: str) -> None:
    if loss_name in ("RKDDistanceLoss", "RKDAngleLoss", "RKDDALoss"):
        raise ValueError(
            f"CrossBatchMemory: expected a loss that needs no teacher, got {loss_name}, and the memory keeps no "
            "teacher rows; use a larger batch, or DistributedLossWrapper(loss, efficient=False) over several processes"
        )
    _check_loss_support(cls, loss_name)


# The host refuses our losses by their names without a word on what to use. It never asks the loss, so that its check is
# the only place to answer; all other losses go through to the original.
CrossBatchMemory.check_loss_support = classmethod(_explain_loss_support)
