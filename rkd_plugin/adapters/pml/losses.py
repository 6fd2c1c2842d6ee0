"""RKD losses as losses of pytorch-metric-learning."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import ClassWeightedReducer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor

from rkd_plugin.adapters.pml.tensors import TensorWithTeacher, embeddings_of, plain
from rkd_plugin.functional import relation_terms
from rkd_plugin.options import Gather, Impl, Options, Pairs, Triplets


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
        name = type(self).__name__
        self._options().check(name)
        if gather is not False and any(isinstance(module, ClassWeightedReducer) for module in self.modules()):
            raise ValueError(
                f"{name}: ClassWeightedReducer needs the label of every row, and gather brings none; "
                "use DistributedLossWrapper(loss, efficient=False) instead of gather"
            )
        lp = self.distance
        if not isinstance(lp, LpDistance) or lp.p != 2 or lp.power != 1:
            raise ValueError(
                f"{name}: distance must be Euclidean, got {type(lp).__name__} with p={lp.p} and "
                f"power={lp.power}; pass LpDistance(p=2, power=1), with normalize_embeddings True or False"
            )
        self.add_to_recordable_attributes(list_of_names=["distance_weight", "angle_weight", "huber_delta"])
        sides = [f"{side}_{stat}" for side in ("student", "teacher") for stat in ("mean_distance", "zero_share")]
        self.add_to_recordable_attributes(
            list_of_names=[*sides, *(f"{name}_mean" for name in self._sub_loss_names())], is_stat=True
        )

    def _options(self, pairs: Pairs | None = None, triplets: Triplets | None = None) -> Options:
        return Options(
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
            reduction="anchor",
            huber_delta=self.huber_delta,
            impl=self.impl,
            pairs=pairs,
            triplets=triplets,
            anchors=self.anchors,
            gather=self.gather,
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
        """The loss of a batch of embeddings beside the teacher's.

        Args:
            embeddings: the student's, ``(N, D_s)``, floating point. In half precision they give a float32 loss, and a
                gradient that saturates at the largest number of their dtype.
            labels: ``(N,)``; not used, but by a ``ClassWeightedReducer``.
            indices_tuple: 3 or 4 index vectors of a PML miner. Only the mined pairs then count for distances, each as
                often as it was mined, and only the mined triplets for angles (vertex at the anchor, arms to positive
                and negative); the mean distance still runs over the whole batch. No tuples, no loss.
            ref_emb: the teacher's, ``(N, D_t)``, floating point: row i is of the example in row i of ``embeddings``.
                Moved to the student's device. May be left out if ``embeddings`` bring them, as those of
                `TeacherStudentTrunk` do.
            ref_labels: not used.

        Returns:
            What the reducer makes of one loss per anchor and term; a scalar by default.

        Raises:
            TypeError: if a side is not one floating point tensor, as a model's tuple, dict or ``ModelOutput``; if
                ``indices_tuple`` is no tuple of index vectors.
            ValueError: if the teacher's embeddings are missing, a side is not ``(N, D)``, the numbers of rows differ,
                or ``indices_tuple`` does not fit the batch.
            RuntimeError: if ``gather`` is set inside a ``DistributedLossWrapper``, which gathers too.
        """
        name = type(self).__name__
        if ref_emb is None and isinstance(embeddings, TensorWithTeacher):
            ref_emb = embeddings.teacher
        if ref_emb is None or ref_emb is embeddings:
            raise ValueError(
                f"{name}: expected the teacher's embeddings, got none; call loss(student, ref_emb=teacher), train with "
                "RKDTrainer, or with TeacherStudentTrunk, whose student has the embedder inside"
            )
        student = embeddings_of(name, "student", plain(embeddings))
        teacher = embeddings_of(name, "teacher", ref_emb)
        if len(teacher) != len(student):
            raise ValueError(
                f"{name}: embeddings and ref_emb must have one row per example, got {len(student)} and "
                f"{len(teacher)} rows; under DistributedLossWrapper pass ref_emb=teacher and set efficient=False"
            )
        if self.gather is not False and _inside_distributed_wrapper():
            raise RuntimeError(
                f"{name}: expected gather=False inside DistributedLossWrapper, which gathers too, got {self.gather!r}; "
                "drop the wrapper, and keep gather, which shares the work among processes"
            )
        # PML keeps sub-losses in the dtype of the embeddings, where a float16 loss would lose its digits.
        return super().forward(_widen(student), labels, indices_tuple, teacher.to(student.device), ref_labels)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """Each term as a vector ``(N,)`` for the reducer: one loss per anchor, whose mean is the mean over all tuples.

        * ``MeanReducer`` (default), ``DivisorReducer``: as ``reduction="mean"`` in `rkd_plugin.functional`.
        * ``SumReducer``: N times that.
        * ``ThresholdReducer``, ``AvgNonZeroReducer``: the mean over the anchors whose loss lies within the bounds.
        * ``PerAnchorReducer``: what its inner reducer gives, since the losses are per anchor already.
        * ``ClassWeightedReducer``: weighted by the anchor's label.
        * ``DoNothingReducer``: the dictionary of vectors. ``MultipleReducers``: one reducer for each of the terms
          ``distance_loss`` and ``angle_loss``, then their sum.
        """
        name = type(self).__name__
        ref_emb = _widen(ref_emb.detach())
        student, teacher = self.distance.maybe_normalize(embeddings), self.distance.maybe_normalize(ref_emb)
        self.distance.reset_stats()
        self.distance.set_default_stats(embeddings, ref_emb, student, teacher)
        pairs, triplets = _mined(name, indices_tuple, student.device, angles=bool(self.angle_weight))
        distance, angle, _ = relation_terms(name, student, teacher, self._options(pairs, triplets))
        vectors = {"distance_loss": distance, "angle_loss": angle}
        losses = {term: self._reducible(vectors[term], student.dtype) for term in self._sub_loss_names()}
        if self.collect_stats and len(student) > 1:
            self._set_stats(student, teacher, losses)
        return losses

    def _reducible(self, losses: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
        """A term as PML's reducers take it."""
        if losses is None or not len(losses):
            zero: dict[str, Any] = self.zero_loss()
            return zero
        return {
            "losses": losses.to(dtype),
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
    """`rkd_plugin.rkd_distance_loss` as a loss of PML: ``loss(student, labels, ref_emb=teacher)``.

    Row i of ``ref_emb`` is the teacher's embedding of the example in row i of the student's; the widths may differ.
    ``forward`` describes a call, ``compute_loss`` what each reducer gives. ``CrossBatchMemory`` and
    ``SelfSupervisedLoss`` raise on this loss, since their memories and views have no teacher: use a larger batch, or
    ``gather``.

    Args:
        huber_delta: where the loss turns from quadratic to linear; positive.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``, as in
            `rkd_plugin.rkd_distance_loss`.
        gather: True, or a process group: the loss of the batches of all its processes together. A reducer then sees the
            anchors of all of them; statistics remain those of this process. ``DistributedLossWrapper(loss,
            efficient=False)`` gives the same gradients, with all of the work on each process. One of the two, not both.
        kwargs: of every PML loss. ``distance``: an ``LpDistance(p=2, power=1)``, whose ``normalize_embeddings=True``
            scales both sides to length 1 (default: False). ``reducer``. ``embedding_regularizer`` and
            ``embedding_reg_weight``. ``collect_stats``: True records ``student_mean_distance``, ``student_zero_share``
            (of pairs at distance 0), the same of the teacher, and ``distance_loss_mean``.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if an option has a value that it cannot have, ``distance`` is not Euclidean, or ``gather`` meets a
            ``ClassWeightedReducer``, which would need all labels.

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
    """`rkd_plugin.rkd_angle_loss` as a loss of PML: ``loss(student, labels, ref_emb=teacher)``.

    Row i of ``ref_emb`` is the teacher's embedding of the example in row i of the student's; the widths may differ.
    ``forward`` describes a call, ``compute_loss`` what each reducer gives. ``CrossBatchMemory`` and
    ``SelfSupervisedLoss`` raise on this loss, since their memories and views have no teacher: use a larger batch, or
    ``gather``.

    Args:
        huber_delta: where the loss turns from quadratic to linear; positive.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``, as in `rkd_plugin.rkd_angle_loss`.
        gather: True, or a process group: the loss of the batches of all its processes together. A reducer then sees the
            anchors of all of them; statistics remain those of this process. ``DistributedLossWrapper(loss,
            efficient=False)`` gives the same gradients, with all of the work on each process. One of the two, not both.
        anchors: how many rows (an integer) or which share of them (a float up to 1) are vertices, drawn anew in each
            call; None: all. Not beside mined tuples, which name their vertices.
        kwargs: of every PML loss. ``distance``: an ``LpDistance(p=2, power=1)``, whose ``normalize_embeddings=True``
            scales both sides to length 1 (default: False). ``reducer``. ``embedding_regularizer`` and
            ``embedding_reg_weight``. ``collect_stats``: True records ``student_mean_distance``, ``student_zero_share``
            (of pairs at distance 0), the same of the teacher, and ``angle_loss_mean``.

    Raises:
        TypeError, ValueError: as `RKDDistanceLoss`.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019.

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
    """`rkd_plugin.rkd_da_loss` as a loss of PML with two terms: ``loss(student, labels, ref_emb=teacher)``.

    Row i of ``ref_emb`` is the teacher's embedding of the example in row i of the student's; the widths may differ.
    ``forward`` describes a call, ``compute_loss`` what each reducer gives. ``CrossBatchMemory`` and
    ``SelfSupervisedLoss`` raise on this loss, since their memories and views have no teacher: use a larger batch, or
    ``gather``.

    Args:
        distance_weight: of the distance term; 0 skips it. The paper: 1 in metric learning.
        angle_weight: of the angle term; 0 skips it, and its cubic cost. The paper: 2 in metric learning.
        huber_delta: where either loss turns from quadratic to linear; positive.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``, as in `rkd_plugin.rkd_da_loss`.
        gather: True, or a process group: the loss of the batches of all its processes together. A reducer then sees the
            anchors of all of them; statistics remain those of this process. ``DistributedLossWrapper(loss,
            efficient=False)`` gives the same gradients, with all of the work on each process. One of the two, not both.
        anchors: how many rows (an integer) or which share of them (a float up to 1) are vertices of angles, drawn anew
            in each call; None: all. Not beside mined tuples, which name their vertices.
        kwargs: of every PML loss. ``distance``: an ``LpDistance(p=2, power=1)``, whose ``normalize_embeddings=True``
            scales both sides to length 1 (default: False). ``reducer``. ``embedding_regularizer`` and
            ``embedding_reg_weight``. ``collect_stats``: True records ``student_mean_distance``, ``student_zero_share``
            (of pairs at distance 0), the same of the teacher, and the weighted means ``distance_loss_mean`` and
            ``angle_loss_mean``.

    Raises:
        TypeError, ValueError: as `RKDDistanceLoss`.

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019.

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


def _widen(x: Tensor) -> Tensor:
    """``x`` in float32 at least; the gradient that comes back saturates instead of overflowing."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return x
    wide = x.float()
    if wide.requires_grad:
        limit = torch.finfo(x.dtype).max
        wide.register_hook(lambda grad: grad.clamp(-limit, limit))  # type: ignore[no-untyped-call]
    return wide


def _mined(name: str, indices_tuple: Any, device: torch.device, angles: bool) -> tuple[Pairs | None, Triplets | None]:
    """The pairs and, for ``angles``, the triplets of a PML miner, as `rkd_plugin.functional` takes them."""
    if indices_tuple is None:
        return None, None
    expected = f"{name}: expected indices_tuple to be 3 or 4 index vectors of a PML tuple miner"
    if not isinstance(indices_tuple, tuple | list) or not all(isinstance(index, Tensor) for index in indices_tuple):
        raise TypeError(f"{expected}, got {type(indices_tuple).__name__}; pass what miner(embeddings, labels) returns")
    shapes = [tuple(index.shape) for index in indices_tuple]
    # Anchors beside positives, and beside negatives, which follow them or have anchors of their own.
    fits = (
        len(shapes) in (3, 4) and shapes[0] == shapes[1] and shapes[-1] == shapes[-2] and {1} == set(map(len, shapes))
    )
    if not fits:
        raise ValueError(f"{expected}, got shapes {shapes}; pass what miner(embeddings, labels) returns")
    # The host's empty tuples are what torch.tensor([]) is.
    fractional = [
        index.dtype for index in indices_tuple if len(index) and index.dtype not in (torch.int64, torch.int32)
    ]
    if fractional:
        raise TypeError(f"{expected}, got {fractional[0]}; pass int64")
    indices = tuple(index.to(device, torch.long) for index in indices_tuple)
    anchors, positives, more_anchors, negatives = lmu.convert_to_pairs(indices, None)
    pairs = torch.cat([anchors, more_anchors]), torch.cat([positives, negatives])
    return pairs, lmu.convert_to_triplets(indices, None) if angles else None


def _inside_distributed_wrapper() -> bool:
    """Whether `DistributedLossWrapper` is among the callers, since a module does not know what wraps it."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is DistributedLossWrapper.forward.__code__:
            return True
        frame = frame.f_back
    return False
