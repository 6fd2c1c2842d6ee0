"""Scale, squared distances and mean distance of a batch: what both losses start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CLOSE = 1e-3  # of the squared norms: below this, three digits have cancelled and the Gram matrix is not trusted
EQUAL = 2.0**-72  # squared distance in the scale of `rescale`: closer rows count as equal, or 1 / length**3 overflows
CROWDED = 1 / 64  # of all pairs: above this, differences between all rows are cheaper than a list of pairs


def widest(x: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


class _Rescale(torch.autograd.Function):
    """``x`` in another dtype, divided by the power of two that brings its largest entry near 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        wide = x.to(dtype)
        # A power of two leaves every bit of the mantissa in place, so that close rows stay as far apart as they came.
        scale = torch.ldexp(wide.new_ones(()), -torch.frexp(wide.abs().amax()).exponent)
        ctx.save_for_backward(scale)
        ctx.dtype = x.dtype
        return wide * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        limit = torch.finfo(ctx.dtype).max
        # The scale itself needs no gradient: both losses are invariant to it. Saturate instead of overflowing to inf.
        return (grad * scale).clamp(-limit, limit).to(ctx.dtype), None


def rescale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to ``dtype`` in a scale where no finite input overflows when squared; both losses are invariant to it."""
    return _Rescale.apply(x, dtype) if x.numel() else x.to(dtype)


@torch.library.custom_op("rkd_plugin::squared_distances", mutates_args=())
def _squared_distances(x: Tensor) -> Tensor:
    # An operator of its own, since which pairs need a second look depends on the data.
    centred = x - x.mean(0)
    norms = centred.square().sum(1)
    scale = norms.unsqueeze(1) + norms
    squares = torch.addmm(scale, centred, centred.T, alpha=-2).fill_diagonal_(0)
    i, j = (squares < CLOSE * scale).triu(1).nonzero(as_tuple=True)
    if len(i) > CROWDED * scale.numel():
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    squares[i, j] = squares[j, i] = (x[i] - x[j]).square().sum(1)
    return squares


@_squared_distances.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(len(x), len(x))


def differentiate_squares(ctx: Any, grad: Tensor) -> Tensor:
    """Gradient of any computation of the squared distances of a saved ``x``."""
    (x,) = ctx.saved_tensors
    centred = x - x.mean(0)
    both = grad + grad.T
    to_x: Tensor = 2 * (both.sum(1, keepdim=True) * centred - both @ centred)
    return to_x


_squared_distances.register_autograd(
    differentiate_squares, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0])
)


def squared_distances(x: Tensor) -> Tensor:
    """``(N, D) -> (N, N)``: squared Euclidean distances, exactly 0 between equal rows, not finite where a row is not.

    A Gram matrix is fast but cancels for pairs that are close beside their distance from the centre; those pairs are
    computed again from their difference, so that an offset or a tight cluster costs no digit.
    """
    squares: Tensor = _squared_distances(x)
    return squares


def safe_sqrt(squares: Tensor) -> Tensor:
    """Square root, and 0 (with gradient 0 instead of infinite) between rows that count as equal."""
    equal = squares < EQUAL
    return squares.masked_fill(equal, 1).sqrt_().masked_fill(equal, 0)


def inverse_lengths(squares: Tensor) -> Tensor:
    """``1 / sqrt(squares)``, and 0 (with gradient 0) between equal rows: an arm of no length has no direction."""
    equal = squares < EQUAL
    return squares.masked_fill(equal, 1).rsqrt_().masked_fill(equal, 0)


def mean_distance(distances: Tensor) -> Tensor:
    """Mean of an ``(N, N)`` matrix over pairs of distinct rows, duplicates included; 1 where all rows are equal."""
    mean = distances.sum() / max(len(distances) * (len(distances) - 1), 1)
    return mean.masked_fill(mean == 0, 1)


def normalise(distances: Tensor) -> Tensor:
    """Divide an ``(N, N)`` matrix by its mean over pairs of distinct rows, duplicates included."""
    return distances / mean_distance(distances)
