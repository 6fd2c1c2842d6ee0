"""RKD losses as losses of pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction, CrossBatchMemory
from pytorch_metric_learning.reducers import ClassWeightedReducer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from rkd_plugin.functional import Gather, Impl, Pairs, Triplets, rkd_angle_loss, rkd_distance_loss


class _RelationalLoss(BaseMetricLossFunction):
    """What the three losses share; each names its terms in ``_sub_loss_names``."""

    def __init__(
        self,
        distance_weight: float,
        angle_weight: float,
        huber_delta: float,
        impl: Impl,
        gather: Gather,
        anchors: float | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.huber_delta = huber_delta
        self.impl: Impl = impl
        self.gather: Gather = gather
        self.anchors = anchors
        if gather is not False and any(isinstance(module, ClassWeightedReducer) for module in self.modules()):
            raise ValueError(
                f"{type(self).__name__}: ClassWeightedReducer needs the label of every row, and gather brings none; "
                "use DistributedLossWrapper(loss, efficient=False) instead of gather"
            )
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
        student = widen(embeddings, torch.float32)
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
        ref_emb = widen(ref_emb.detach(), torch.float32)
        student, teacher = self.distance.maybe_normalize(embeddings), self.distance.maybe_normalize(ref_emb)
        self.distance.reset_stats()
        self.distance.set_default_stats(embeddings, ref_emb, student, teacher)
        pairs, triplets = _mined(indices_tuple, student.device)
        terms = {
            "distance_loss": self._term(rkd_distance_loss, self.distance_weight, student, teacher, pairs=pairs),
            "angle_loss": self._term(
                rkd_angle_loss, self.angle_weight, student, teacher, triplets=triplets, anchors=self.anchors
            ),
        }
        terms = {name: terms[name] for name in self._sub_loss_names()}
        if self.collect_stats and len(student) > 1:
            self._set_stats(student, teacher, terms)
        return terms

    def _term(
        self, loss: Callable[..., Tensor], weight: float, student: Tensor, teacher: Tensor, **choice: Any
    ) -> dict[str, Any]:
        zero: dict[str, Any] = self.zero_loss()
        if not weight:
            return zero
        options = {"huber_delta": self.huber_delta, "impl": self.impl, "gather": self.gather}
        losses = weight * loss(student, teacher, reduction="anchor", **options, **choice)
        if not len(losses):
            return zero
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
    number of their dtype. For the batch of all processes pass ``gather=True``; ``DistributedLossWrapper(loss,
    efficient=False)`` gives the same gradients, with all of the work on each process. One of the two, not both.

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
        gather: as in `rkd_plugin.rkd_distance_loss`; a reducer then sees the anchors of all processes, and statistics
            remain those of this process's rows.
        kwargs: of every PML loss: ``distance``, an ``LpDistance(p=2, power=1)``, whose ``normalize_embeddings=True``
            scales both sides to length 1 (default: False); ``reducer``; ``embedding_regularizer``; ``collect_stats``
            to record ``student_mean_distance``, ``student_zero_share`` (of pairs at distance 0), the same of the
            teacher, and the weighted means ``distance_loss_mean`` and ``angle_loss_mean``.

    Raises:
        ValueError: if ``distance`` is not Euclidean, or ``gather`` meets a ``ClassWeightedReducer``, which would need
            all labels; when called, if ``ref_emb`` is missing or the row counts differ.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> RKDDistanceLoss()(student, ref_emb=teacher)
        tensor(0.0972)
    """

    def __init__(self, huber_delta: float = 1.0, impl: Impl = "auto", gather: Gather = False, **kwargs: Any) -> None:
        super().__init__(1.0, 0.0, huber_delta, impl, gather, None, **kwargs)

    def _sub_loss_names(self) -> list[str]:
        return ["distance_loss"]


class RKDAngleLoss(_RelationalLoss):
    """`rkd_plugin.rkd_angle_loss` as a PML loss; arguments, but for ``anchors``, and calls as `RKDDistanceLoss`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> RKDAngleLoss()(student, ref_emb=teacher)
        tensor(0.1393)
    """

    def __init__(
        self,
        huber_delta: float = 1.0,
        impl: Impl = "auto",
        gather: Gather = False,
        anchors: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(0.0, 1.0, huber_delta, impl, gather, anchors, **kwargs)

    def _sub_loss_names(self) -> list[str]:
        return ["angle_loss"]


class RKDDALoss(_RelationalLoss):
    """`rkd_plugin.rkd_da_loss` as a PML loss with two terms; further arguments and calls as `RKDDistanceLoss`.

    Args:
        distance_weight: of the distance term; 0 skips it.
        angle_weight: of the angle term; 0 skips it, and its cubic cost.
        huber_delta: as in `rkd_plugin.rkd_da_loss`.
        impl: as in `rkd_plugin.rkd_da_loss`.
        gather: as in `RKDDistanceLoss`.
        anchors: as in `rkd_plugin.rkd_da_loss`.
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
        gather: Gather = False,
        anchors: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(distance_weight, angle_weight, huber_delta, impl, gather, anchors, **kwargs)

    def _sub_loss_names(self) -> list[str]:
        return ["distance_loss", "angle_loss"]


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
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
            "teacher rows; use a larger batch, or gather=True over several processes"
        )
    _check_loss_support(cls, loss_name)


# The host refuses our losses by their names without a word on what to use. It never asks the loss, so that its check is
# the only place to answer; all other losses go through to the original.
CrossBatchMemory.check_loss_support = classmethod(_explain_loss_support)
