"""The losses of `rkd_plugin.functional` as modules: a module stores the options, and ``forward`` is one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from rkd_plugin.functional import rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.options import Gather, Impl, Options, Reduction, RelationalOptions
from rkd_plugin.relational import Penalty, Potential, References, Scale, relational_loss


class _LossModule(nn.Module):
    """Stores the options of a loss function as attributes, which may change between two calls."""

    _function: ClassVar[Callable[..., Tensor]]
    _checked: ClassVar[type[Options]] = Options

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._checked(**options).check(type(self).__name__)
        self._option_names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._option_names}

    def forward(self, student: Tensor, teacher: Tensor, *unexpected: Any) -> Tensor:
        """``(N, D_s)``, ``(N, D_t)`` -> a scalar, or ``(N,)`` for ``reduction="anchor"``."""
        if unexpected:
            name = type(self).__name__
            raise TypeError(
                f"{name}: expected student and teacher, got {2 + len(unexpected)} arguments; for "
                f"pytorch-metric-learning, import {name} from rkd_plugin.adapters.pml"
            )
        return self._function(student, teacher, **self._options())

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())


class RKDDistanceLoss(_LossModule):
    """`rkd_distance_loss` as a module: RKD-D, between mean-normalised pairwise distances.

    Args:
        reduction: ``"mean"`` over all ``N^2`` entries, ``"tuple_mean"`` over pairs of distinct rows, ``"sum"``, or
            ``"anchor"``, a vector ``(N,)``.
        huber_delta: the threshold between the quadratic and the linear part of the Huber function; positive.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``.
        gather: True, or a process group: the loss is over the batches of all processes, or of the group.

    Raises:
        TypeError, ValueError: if an option has the wrong type or an invalid value; when called, as `rkd_distance_loss`.

    Example:
        >>> RKDDistanceLoss(reduction="tuple_mean")
        RKDDistanceLoss(reduction='tuple_mean', huber_delta=1.0, impl='auto', gather=False)
    """

    _function = staticmethod(rkd_distance_loss)

    def __init__(
        self, reduction: Reduction = "mean", huber_delta: float = 1.0, impl: Impl = "auto", gather: Gather = False
    ) -> None:
        super().__init__(reduction=reduction, huber_delta=huber_delta, impl=impl, gather=gather)


class RKDAngleLoss(_LossModule):
    """`rkd_angle_loss` as a module: RKD-A, between the cosines of all triplets' angles.

    Args:
        reduction: ``"mean"`` over all ``N^3`` entries, ``"tuple_mean"`` over triplets of distinct rows, ``"sum"``, or
            ``"anchor"``, a vector ``(N,)``.
        huber_delta: the threshold between the quadratic and the linear part of the Huber function; positive.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``.
        gather: True, or a process group: the loss is over the batches of all processes, or of the group.
        anchors: the number of rows (an integer), or the fraction of them (a float up to 1), that are vertices, drawn
            at random in each call; None: all of them.

    Raises:
        TypeError, ValueError: if an option has the wrong type or an invalid value; when called, as `rkd_angle_loss`.

    Example:
        >>> RKDAngleLoss(anchors=0.5)
        RKDAngleLoss(reduction='mean', huber_delta=1.0, impl='auto', gather=False, anchors=0.5)
    """

    _function = staticmethod(rkd_angle_loss)

    def __init__(
        self,
        reduction: Reduction = "mean",
        huber_delta: float = 1.0,
        impl: Impl = "auto",
        gather: Gather = False,
        anchors: float | None = None,
    ) -> None:
        super().__init__(reduction=reduction, huber_delta=huber_delta, impl=impl, gather=gather, anchors=anchors)


class RKDDALoss(_LossModule):
    """`rkd_da_loss` as a module: the weighted sum of RKD-D and RKD-A.

    Args:
        distance_weight: of the distance term; 0 skips it. The paper has 1 in metric learning, 25 in classification.
        angle_weight: of the angle term; 0 skips it, and its cubic cost. The paper has 2 and 50.
        reduction: of both terms: ``"mean"`` over all entries, ``"tuple_mean"`` over tuples of distinct rows, ``"sum"``,
            or ``"anchor"``, a vector ``(N,)``.
        huber_delta: of both terms: the threshold between the quadratic and the linear part of the Huber function.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``.
        gather: True, or a process group: the loss is over the batches of all processes, or of the group.
        anchors: the number of rows (an integer), or the fraction of them (a float up to 1), that are vertices of the
            angle term, drawn at random in each call; None: all of them.

    Raises:
        TypeError, ValueError: if an option has the wrong type or an invalid value; when called, as `rkd_da_loss`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]], requires_grad=True)
        >>> loss = RKDDALoss(distance_weight=25, angle_weight=50)(student, teacher)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([3, 2])
    """

    _function = staticmethod(rkd_da_loss)

    def __init__(
        self,
        distance_weight: float = 1.0,
        angle_weight: float = 2.0,
        reduction: Reduction = "mean",
        huber_delta: float = 1.0,
        impl: Impl = "auto",
        gather: Gather = False,
        anchors: float | None = None,
    ) -> None:
        super().__init__(
            distance_weight=distance_weight,
            angle_weight=angle_weight,
            reduction=reduction,
            huber_delta=huber_delta,
            impl=impl,
            gather=gather,
            anchors=anchors,
        )


class RelationalLoss(_LossModule):
    """`relational_loss` as a module: any relation, any penalty.

    Args:
        potential: a name, or a function of 1, 2 or 3 rows.
        penalty: ``"huber"``, ``"mse"``, ``"l1"``, ``"kl"``, ``"js"``, or a function of both sides' relations.
        scale: None, ``"mean"``, ``"row_sum"``, ``"row_norm"``, ``"softmax"``, or ``"auto"``: that of the potential.
        temperature: of ``"softmax"``, and of ``"gaussian"``.
        huber_delta: the threshold between the quadratic and the linear part of the Huber function.
        neighbours: k: only relations among the k nearest of each row in the teacher's space; None: all.
        references: a `RelationMemory`, or ``(student_rows, teacher_rows)``: relations to these rows; None: to the
            batch.
        reduction: ``"mean"`` over all entries, ``"tuple_mean"`` over tuples of distinct rows, ``"sum"``, or
            ``"anchor"``, a vector ``(N,)``.
        anchors: the number of rows (an integer), or the fraction of them (a float up to 1), that start tuples, drawn at
            random in each call; None: all of them.
        gather: True, or a process group: the loss is over the batches of all processes, or of the group.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``.

    Raises:
        TypeError, ValueError: if an option has the wrong type or an invalid value; when called, as `relational_loss`.

    Example:
        >>> import torch
        >>> loss = RelationalLoss("cosine", "kl", scale="softmax", temperature=0.1)
        >>> loss(torch.eye(4, 3), torch.eye(4)).shape
        torch.Size([])
    """

    _function = staticmethod(relational_loss)
    _checked = RelationalOptions

    def __init__(
        self,
        potential: Potential = "distance",
        penalty: Penalty = "huber",
        scale: Scale | None = "auto",
        temperature: float = 1.0,
        huber_delta: float = 1.0,
        neighbours: int | None = None,
        references: References | None = None,
        reduction: Reduction = "mean",
        anchors: float | None = None,
        gather: Gather = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(
            potential=potential,
            penalty=penalty,
            scale=scale,
            temperature=temperature,
            huber_delta=huber_delta,
            neighbours=neighbours,
            references=references,
            reduction=reduction,
            anchors=anchors,
            gather=gather,
            impl=impl,
        )
