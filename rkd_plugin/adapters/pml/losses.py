"""The losses of `rkd_plugin.losses` as losses of pytorch-metric-learning."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

from torch import Tensor

from rkd_plugin import losses
from rkd_plugin.adapters.pml.base import TeacherLoss, mined
from rkd_plugin.functional import relation_terms
from rkd_plugin.options import Gather, Impl, Options, RelationalOptions
from rkd_plugin.relational import Penalty, Potential, relational_loss


class _RKDLoss(TeacherLoss):
    """The base of the three losses of the paper."""

    def __init__(self, kwargs: dict[str, Any], **options: Any) -> None:
        Options(**options).check(type(self).__name__)
        super().__init__(options, **kwargs)

    def _terms(
        self, student: Tensor, teacher: Tensor, indices_tuple: tuple[Tensor, ...] | None
    ) -> dict[str, Tensor | None]:
        name = type(self).__name__
        options = Options(reduction="anchor", **self._values())
        pairs, triplets = mined(name, indices_tuple, student.device, triplets=bool(options.angle_weight))
        terms = relation_terms(name, student, teacher, replace(options, pairs=pairs, triplets=triplets))
        return {"distance_loss": terms.distance, "angle_loss": terms.angle}


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
        super().__init__(
            kwargs, distance_weight=1.0, angle_weight=0.0, huber_delta=huber_delta, impl=impl, gather=gather
        )

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
        super().__init__(
            kwargs,
            distance_weight=0.0,
            angle_weight=1.0,
            huber_delta=huber_delta,
            impl=impl,
            gather=gather,
            anchors=anchors,
        )

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
        super().__init__(
            kwargs,
            distance_weight=distance_weight,
            angle_weight=angle_weight,
            huber_delta=huber_delta,
            impl=impl,
            gather=gather,
            anchors=anchors,
        )

    def _sub_loss_names(self) -> list[str]:
        return ["distance_loss", "angle_loss"]


class RelationalLoss(TeacherLoss):
    """`rkd_plugin.relational_loss` as a loss of PML: ``loss(student, labels, ref_emb=teacher)``.

    Rows, reducers, ``CrossBatchMemory`` and ``SelfSupervisedLoss`` are as for `RKDDistanceLoss`. The mined pairs count
    for a potential of two rows, the mined triplets for one of three rows.

    Args:
        potential: as in `rkd_plugin.relational_loss`.
        penalty: as in `rkd_plugin.relational_loss`.
        options: the other options of `rkd_plugin.RelationalLoss`, except ``reduction``, and those of every loss of PML,
            as in `RKDDistanceLoss`; the name of the term is ``relational_loss``.

    Raises:
        TypeError, ValueError: as `RKDDistanceLoss`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> RelationalLoss("dot", "mse")(student, ref_emb=teacher)
        tensor(0.1463)
    """

    def __init__(self, potential: Potential = "distance", penalty: Penalty = "huber", **options: Any) -> None:
        known = signature(losses.RelationalLoss).parameters.keys() - {"reduction"}
        kwargs = {name: options.pop(name) for name in options.keys() - known}
        checked = losses.RelationalLoss(potential, penalty, **options)
        super().__init__({name: getattr(checked, name) for name in known}, **kwargs)

    def _sub_loss_names(self) -> list[str]:
        return ["relational_loss"]

    def _terms(
        self, student: Tensor, teacher: Tensor, indices_tuple: tuple[Tensor, ...] | None
    ) -> dict[str, Tensor | None]:
        of_three = RelationalOptions(potential=self.potential).order == 3
        pairs, triplets = mined(type(self).__name__, indices_tuple, student.device, triplets=of_three)
        options = {"pairs": None if of_three else pairs, "triplets": triplets, **self._values()}
        return {"relational_loss": relational_loss(student, teacher, reduction="anchor", **options)}
