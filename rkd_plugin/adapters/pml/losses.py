"""The RKD losses as losses of pytorch-metric-learning."""

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
from rkd_plugin.kernels.pairwise import widen
from rkd_plugin.options import Gather, Impl, Options, Pairs, Triplets


class _RelationalLoss(BaseMetricLossFunction):
    """The base of the three losses; each names its terms in ``_sub_loss_names``."""

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
                f"{name}: expected a reducer that needs no labels with gather, got ClassWeightedReducer, since gather "
                "exchanges no labels; use DistributedLossWrapper(loss, efficient=False) instead of gather"
            )
        lp = self.distance
        if not isinstance(lp, LpDistance) or lp.p != 2 or lp.power != 1:
            raise ValueError(
                f"{name}: expected a Euclidean distance, got {type(lp).__name__} with p={lp.p} and "
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
        """No normalisation of the rows: both losses are invariant to scale, and the norms are part of the relations."""
        return LpDistance(p=2, normalize_embeddings=False)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """The loss between the embeddings of a batch and the teacher's.

        Args:
            embeddings: the student's, ``(N, D_s)``, floating point. For half precision the loss is float32, and the
                gradient saturates at the largest number of the dtype.
            labels: ``(N,)``; used by a ``ClassWeightedReducer`` only.
            indices_tuple: 3 or 4 index vectors of a PML miner. Then only the mined pairs count for the distances, each
                as often as it was mined, and only the mined triplets for the angles (vertex at the anchor, arms to
                positive and negative). The mean distance is still over the whole batch. Without tuples the loss is 0.
            ref_emb: the teacher's, ``(N, D_t)``, floating point: row i is the example of row i of ``embeddings``.
                They are moved to the student's device. Not needed if ``embeddings`` is a `TensorWithTeacher`, as
                `TeacherStudentTrunk` returns.
            ref_labels: not used.

        Returns:
            The result of the reducer, which gets one loss per anchor and term; a scalar by default.

        Raises:
            TypeError: if a side is not one floating-point tensor, such as a model's tuple, dict or ``ModelOutput``; if
                ``indices_tuple`` is not a tuple of index vectors.
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
                "RKDTrainer, or with TeacherStudentTrunk and the embedder inside its student"
            )
        student = embeddings_of(name, "student", plain(embeddings))
        teacher = embeddings_of(name, "teacher", ref_emb)
        if len(teacher) != len(student):
            raise ValueError(
                f"{name}: expected one row per example in embeddings and ref_emb, got {len(student)} and "
                f"{len(teacher)} rows; under DistributedLossWrapper pass ref_emb=teacher and set efficient=False"
            )
        if self.gather is not False and _inside_distributed_wrapper():
            raise RuntimeError(
                f"{name}: expected gather=False inside DistributedLossWrapper, which gathers too, got {self.gather!r}; "
                "remove the wrapper and keep gather, which distributes the work over the processes"
            )
        # PML casts the terms to the dtype of the embeddings; float16 would lose digits of the loss.
        return super().forward(_float32(student), labels, indices_tuple, teacher.to(student.device), ref_labels)

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
        * ``ThresholdReducer``, ``AvgNonZeroReducer``: the mean over the anchors whose loss is within the bounds.
        * ``PerAnchorReducer``: the result of its inner reducer, since there is one loss per anchor.
        * ``ClassWeightedReducer``: weighted by the anchor's label.
        * ``DoNothingReducer``: the dictionary of vectors. ``MultipleReducers``: one reducer for each of the terms
          ``distance_loss`` and ``angle_loss``, then their sum.
        """
        name = type(self).__name__
        ref_emb = _float32(ref_emb.detach())
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
        """A term in the form that PML's reducers expect."""
        if losses is None or not len(losses):
            zero: dict[str, Any] = self.zero_loss()
            return zero
        return {
            "losses": losses.to(dtype),
            "indices": c_f.torch_arange_from_size(losses),
            "reduction_type": "element",
            "divisor": len(losses),  # read by DivisorReducer only
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

    Row i of ``ref_emb`` is the teacher's embedding of the example in row i of the student's; the widths may differ. See
    ``forward`` for a call, and ``compute_loss`` for the result of each reducer. ``CrossBatchMemory`` and
    ``SelfSupervisedLoss`` raise for this loss, since their memories and views have no teacher: use a larger batch, or
    ``gather``.

    Args:
        huber_delta: the threshold between the quadratic and the linear part of the Huber function; positive.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``, as in
            `rkd_plugin.rkd_distance_loss`.
        gather: True, or a process group: the loss is over the batches of all processes, or of the group. The reducer
            then gets the anchors of all processes; statistics are those of this process. ``DistributedLossWrapper(loss,
            efficient=False)`` gives the same gradients, but each process does all the work. Use one of the two.
        kwargs: of every loss of PML. ``distance``: an ``LpDistance(p=2, power=1)``, whose ``normalize_embeddings=True``
            scales the rows of both sides to length 1 (default: False). ``reducer``. ``embedding_regularizer`` and
            ``embedding_reg_weight``. ``collect_stats``: True records ``student_mean_distance``, ``student_zero_share``
            (of pairs at distance 0), the same of the teacher, and ``distance_loss_mean``.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if an option has an invalid value, ``distance`` is not Euclidean, or ``gather`` is set with a
            ``ClassWeightedReducer``, which would need the labels of all processes.

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

    Row i of ``ref_emb`` is the teacher's embedding of the example in row i of the student's; the widths may differ. See
    ``forward`` for a call, and ``compute_loss`` for the result of each reducer. ``CrossBatchMemory`` and
    ``SelfSupervisedLoss`` raise for this loss, since their memories and views have no teacher: use a larger batch, or
    ``gather``.

    Args:
        huber_delta: the threshold between the quadratic and the linear part of the Huber function; positive.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``, as in `rkd_plugin.rkd_angle_loss`.
        gather: True, or a process group: the loss is over the batches of all processes, or of the group. The reducer
            then gets the anchors of all processes; statistics are those of this process. ``DistributedLossWrapper(loss,
            efficient=False)`` gives the same gradients, but each process does all the work. Use one of the two.
        anchors: the number of rows (an integer), or the fraction of them (a float up to 1), that are vertices, drawn
            at random in each call; None: all. Not together with mined tuples, which name their vertices.
        kwargs: of every loss of PML. ``distance``: an ``LpDistance(p=2, power=1)``, whose ``normalize_embeddings=True``
            scales the rows of both sides to length 1 (default: False). ``reducer``. ``embedding_regularizer`` and
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

    Row i of ``ref_emb`` is the teacher's embedding of the example in row i of the student's; the widths may differ. See
    ``forward`` for a call, and ``compute_loss`` for the result of each reducer. ``CrossBatchMemory`` and
    ``SelfSupervisedLoss`` raise for this loss, since their memories and views have no teacher: use a larger batch, or
    ``gather``.

    Args:
        distance_weight: of the distance term; 0 skips it. The paper has 1 in metric learning.
        angle_weight: of the angle term; 0 skips it, and its cubic cost. The paper has 2 in metric learning.
        huber_delta: of both terms: the threshold between the quadratic and the linear part of the Huber function.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``, as in `rkd_plugin.rkd_da_loss`.
        gather: True, or a process group: the loss is over the batches of all processes, or of the group. The reducer
            then gets the anchors of all processes; statistics are those of this process. ``DistributedLossWrapper(loss,
            efficient=False)`` gives the same gradients, but each process does all the work. Use one of the two.
        anchors: the number of rows (an integer), or the fraction of them (a float up to 1), that are vertices of the
            angle term, drawn at random in each call; None: all. Not together with mined tuples, which name their
            vertices.
        kwargs: of every loss of PML. ``distance``: an ``LpDistance(p=2, power=1)``, whose ``normalize_embeddings=True``
            scales the rows of both sides to length 1 (default: False). ``reducer``. ``embedding_regularizer`` and
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


def _float32(x: Tensor) -> Tensor:
    return widen(x, torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x


def _mined(name: str, indices_tuple: Any, device: torch.device, angles: bool) -> tuple[Pairs | None, Triplets | None]:
    """The pairs and, if ``angles``, the triplets of a PML miner, as `rkd_plugin.functional` expects them."""
    if indices_tuple is None:
        return None, None
    expected = f"{name}: expected indices_tuple to be 3 or 4 index vectors of a PML tuple miner"
    if not isinstance(indices_tuple, tuple | list) or not all(isinstance(index, Tensor) for index in indices_tuple):
        raise TypeError(f"{expected}, got {type(indices_tuple).__name__}; pass what miner(embeddings, labels) returns")
    shapes = [tuple(index.shape) for index in indices_tuple]
    # 3 vectors: anchors, positives, negatives. 4 vectors: anchors, positives, more anchors, negatives.
    fits = (
        len(shapes) in (3, 4) and shapes[0] == shapes[1] and shapes[-1] == shapes[-2] and {1} == set(map(len, shapes))
    )
    if not fits:
        raise ValueError(f"{expected}, got shapes {shapes}; pass what miner(embeddings, labels) returns")
    # PML's empty tuples are torch.tensor([]), which is float.
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
    """Whether `DistributedLossWrapper` is on the call stack; a module does not know which module wraps it."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is DistributedLossWrapper.forward.__code__:
            return True
        frame = frame.f_back
    return False
