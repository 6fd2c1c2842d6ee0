"""The losses of `rkd_plugin.functional` as modules: they keep the options, and ``forward`` is one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rkd_plugin.functional import Gather, Impl, Reduction, rkd_angle_loss, rkd_da_loss, rkd_distance_loss


class RKDDistanceLoss(nn.Module):
    """See `rkd_distance_loss`.

    Example:
        >>> RKDDistanceLoss(reduction="tuple_mean")
        RKDDistanceLoss(reduction='tuple_mean', huber_delta=1.0, impl='auto', gather=False)
    """

    _names: tuple[str, ...] = ("reduction", "huber_delta", "impl", "gather")

    def __init__(
        self, reduction: Reduction = "mean", huber_delta: float = 1.0, impl: Impl = "auto", gather: Gather = False
    ) -> None:
        super().__init__()
        self.reduction: Reduction = reduction
        self.huber_delta = huber_delta
        self.impl: Impl = impl
        self.gather: Gather = gather

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(N, D_s)``, ``(N, D_t)`` -> a scalar, or ``(N,)`` for ``reduction="anchor"``."""
        return rkd_distance_loss(student, teacher, **self._options())

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())


class RKDAngleLoss(RKDDistanceLoss):
    """See `rkd_angle_loss`."""

    _names = (*RKDDistanceLoss._names, "anchors")

    def __init__(
        self,
        reduction: Reduction = "mean",
        huber_delta: float = 1.0,
        impl: Impl = "auto",
        gather: Gather = False,
        anchors: float | None = None,
    ) -> None:
        super().__init__(reduction, huber_delta, impl, gather)
        self.anchors = anchors

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(N, D_s)``, ``(N, D_t)`` -> a scalar, or ``(N,)`` for ``reduction="anchor"``."""
        return rkd_angle_loss(student, teacher, **self._options())


class RKDDALoss(RKDAngleLoss):
    """See `rkd_da_loss`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]], requires_grad=True)
        >>> loss = RKDDALoss(distance_weight=25, angle_weight=50)(student, teacher)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([3, 2])
    """

    _names = ("distance_weight", "angle_weight", *RKDAngleLoss._names)

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
        super().__init__(reduction, huber_delta, impl, gather, anchors)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(N, D_s)``, ``(N, D_t)`` -> a scalar, or ``(N,)`` for ``reduction="anchor"``."""
        return rkd_da_loss(student, teacher, **self._options())
