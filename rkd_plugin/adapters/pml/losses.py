"""The RKD losses as losses of pytorch-metric-learning."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from rkd_plugin.adapters.pml.base import LossWithTeacher, mined
from rkd_plugin.functional import relation_terms
from rkd_plugin.options import Gather, Impl


class _RKDLoss(LossWithTeacher):
    """The base of the three losses; each names its terms in ``_sub_loss_names``."""

    distance_weight: float
    angle_weight: float
    _recorded: ClassVar[list[str]] = ["distance_weight", "angle_weight", "huber_delta"]

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
        options = {
            "distance_weight": distance_weight,
            "angle_weight": angle_weight,
            "huber_delta": huber_delta,
            "impl": impl,
            "gather": gather,
            "anchors": anchors,
        }
        super().__init__(options, **kwargs)

    def _terms(
        self, student: Tensor, teacher: Tensor, indices_tuple: tuple[Tensor, ...] | None
    ) -> dict[str, Tensor | None]:
        name = type(self).__name__
        pairs, triplets = mined(name, indices_tuple, student.device, angles=bool(self.angle_weight))
        options = self._options(pairs=pairs, triplets=triplets)
        distance, angle, _ = relation_terms(name, student, teacher, options)
        return {"distance_loss": distance, "angle_loss": angle}


class RKDDistanceLoss(_RKDLoss):
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


class RKDAngleLoss(_RKDLoss):
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


class RKDDALoss(_RKDLoss):
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
