"""The losses of `rkd_plugin.functional` as modules: they keep the options, and ``forward`` is one call."""

from __future__ import annotations

from torch import Tensor, nn

from rkd_plugin.functional import Impl, Reduction, rkd_angle_loss, rkd_da_loss, rkd_distance_loss


class RKDDistanceLoss(nn.Module):
    """See `rkd_distance_loss`.

    Example:
        >>> RKDDistanceLoss(reduction="tuple_mean")
        RKDDistanceLoss(reduction='tuple_mean', huber_delta=1.0, impl='auto')
    """

    def __init__(self, reduction: Reduction = "mean", huber_delta: float = 1.0, impl: Impl = "auto") -> None:
        super().__init__()
        self.reduction: Reduction = reduction
        self.huber_delta = huber_delta
        self.impl: Impl = impl

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(N, D_s)``, ``(N, D_t)`` -> a scalar, or ``(N,)`` for ``reduction="anchor"``."""
        return rkd_distance_loss(
            student, teacher, reduction=self.reduction, huber_delta=self.huber_delta, impl=self.impl
        )

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return f"reduction={self.reduction!r}, huber_delta={self.huber_delta}, impl={self.impl!r}"


class RKDAngleLoss(RKDDistanceLoss):
    """See `rkd_angle_loss`."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(N, D_s)``, ``(N, D_t)`` -> a scalar, or ``(N,)`` for ``reduction="anchor"``."""
        return rkd_angle_loss(student, teacher, reduction=self.reduction, huber_delta=self.huber_delta, impl=self.impl)


class RKDDALoss(RKDDistanceLoss):
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

    def __init__(
        self,
        distance_weight: float = 1.0,
        angle_weight: float = 2.0,
        reduction: Reduction = "mean",
        huber_delta: float = 1.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(reduction, huber_delta, impl)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``(N, D_s)``, ``(N, D_t)`` -> a scalar, or ``(N,)`` for ``reduction="anchor"``."""
        return rkd_da_loss(
            student,
            teacher,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
            reduction=self.reduction,
            huber_delta=self.huber_delta,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}, {super().extra_repr()}"
