"""The losses of `rkd_plugin.functional` as modules: they keep the options, and ``forward`` is one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rkd_plugin.functional import rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.options import Gather, Impl, Options, Reduction


class _OptionsModule(nn.Module):
    """Keeps the options of a loss as attributes, which may change between two calls."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        Options(**options).check(type(self).__name__)
        self._option_names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._option_names}

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())


class RKDDistanceLoss(_OptionsModule):
    """`rkd_distance_loss` as a module: RKD-D, between mean-normalised pairwise distances.

    Args:
        reduction: ``"mean"`` over all ``N^2`` entries, ``"tuple_mean"`` over pairs of distinct rows, ``"sum"``, or
            ``"anchor"``, a vector ``(N,)``.
        huber_delta: where the loss turns from quadratic to linear; positive.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``.
        gather: whether the loss is over the batches of all processes, or of a process group.

    Raises:
        TypeError, ValueError: if an option is not one of these, as `rkd_distance_loss`.

    Example:
        >>> RKDDistanceLoss(reduction="tuple_mean")
        RKDDistanceLoss(reduction='tuple_mean', huber_delta=1.0, impl='auto', gather=False)
    """

    def __init__(
        self, reduction: Reduction = "mean", huber_delta: float = 1.0, impl: Impl = "auto", gather: Gather = False
    ) -> None:
        super().__init__(reduction=reduction, huber_delta=huber_delta, impl=impl, gather=gather)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(N, D_s)``, ``(N, D_t)`` -> a scalar, or ``(N,)`` for ``reduction="anchor"``."""
        return rkd_distance_loss(student, teacher, **self._options())


class RKDAngleLoss(_OptionsModule):
    """`rkd_angle_loss` as a module: RKD-A, between the cosines of all triplets' angles.

    Args:
        reduction: ``"mean"`` over all ``N^3`` entries, ``"tuple_mean"`` over triplets of distinct rows, ``"sum"``, or
            ``"anchor"``, a vector ``(N,)``.
        huber_delta: where the loss turns from quadratic to linear; positive.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``.
        gather: whether the loss is over the batches of all processes, or of a process group.
        anchors: how many rows (an integer) or which share of them (a float up to 1) are vertices, drawn anew in each
            call; all of them for ``None``.

    Raises:
        TypeError, ValueError: if an option is not one of these, as `rkd_angle_loss`.

    Example:
        >>> RKDAngleLoss(anchors=0.5)
        RKDAngleLoss(reduction='mean', huber_delta=1.0, impl='auto', gather=False, anchors=0.5)
    """

    def __init__(
        self,
        reduction: Reduction = "mean",
        huber_delta: float = 1.0,
        impl: Impl = "auto",
        gather: Gather = False,
        anchors: float | None = None,
    ) -> None:
        super().__init__(reduction=reduction, huber_delta=huber_delta, impl=impl, gather=gather, anchors=anchors)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(N, D_s)``, ``(N, D_t)`` -> a scalar, or ``(N,)`` for ``reduction="anchor"``."""
        return rkd_angle_loss(student, teacher, **self._options())


class RKDDALoss(_OptionsModule):
    """`rkd_da_loss` as a module: the weighted sum of RKD-D and RKD-A.

    Args:
        distance_weight: of the distance term; 0 skips it. The paper: 1 in metric learning, 25 in classification.
        angle_weight: of the angle term; 0 skips it, and its cubic cost. The paper: 2 and 50.
        reduction: of both terms: ``"mean"`` over all entries, ``"tuple_mean"`` over tuples of distinct rows, ``"sum"``,
            or ``"anchor"``, a vector ``(N,)``.
        huber_delta: where either loss turns from quadratic to linear; positive.
        impl: the kernel: ``"auto"``, ``"reference"``, ``"chunked"`` or ``"fused"``.
        gather: whether the loss is over the batches of all processes, or of a process group.
        anchors: how many rows (an integer) or which share of them (a float up to 1) are vertices of the angle term,
            drawn anew in each call; all of them for ``None``.

    Raises:
        TypeError, ValueError: if an option is not one of these, as `rkd_da_loss`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]], requires_grad=True)
        >>> loss = RKDDALoss(distance_weight=25, angle_weight=50)(student, teacher)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([3, 2])
    """

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

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(N, D_s)``, ``(N, D_t)`` -> a scalar, or ``(N,)`` for ``reduction="anchor"``."""
        return rkd_da_loss(student, teacher, **self._options())
