"""Scale, squared distances and mean distance of a batch: the first steps of both losses.

Everything is float64 (float32 on a device without float64), since both losses compare lengths of very different sizes.
The limit of the arithmetic: two rows count as equal if their distance is less than 2^-500 (2^-42 in float32) of the
largest difference of two entries of one column. Entries of float32 and narrower dtypes cannot be that close.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkd_plugin.kernels.derivatives import transformed

# A squared distance below this fraction of the squared norms loses three digits in the Gram matrix.
GRAM_LIMIT = 1e-3
# A squared distance below this fraction of the squared norm loses a gradient of 1e-10 in the matrix product.
GRADIENT_LIMIT = 2.0**-40
# Rows with a smaller squared distance, after `rescale`, count as equal; products of two reciprocals would overflow.
EQUAL = {torch.float64: 2.0**-1000, torch.float32: 2.0**-84}
EVEN = 64  # ratio of squares, 8 between lengths: up to here, rounding them adds no more error than rounding the cosines
# Ratio of squares from which the law of cosines is not used: its error reaches 2^-27 or, for float64 inputs, 2^-33.
APART = {torch.float32: 2.0**52, torch.float64: 2.0**40}
ELEMENTS = 2**20  # of the wide copy of some columns
# If more than this fraction of all pairs is close, computing all differences is cheaper than a list of pairs.
MANY_PAIRS = 1 / 64


def widest(x: Tensor) -> torch.dtype:
    """float64, or float32 on a device without float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.narrow = x.dtype
        return x.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        limit = torch.finfo(ctx.narrow).max
        return grad.clamp(-limit, limit).to(ctx.narrow), None


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in a wider dtype; the gradient saturates at the largest number of the narrow one instead of overflowing."""
    # In forward mode, PyTorch's transforms take the second derivative of a Function of two derivatives for 0.
    wide: Tensor = x.to(dtype) if transformed(x) else _Widen.apply(x, dtype)
    return wide


class _SubstituteValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def substitute_value(x: Tensor, value: Tensor) -> Tensor:
    """``value`` with the gradient of ``x``."""
    substituted: Tensor = _SubstituteValue.apply(x, value)
    return substituted


class Scale(NamedTuple):
    """A shift and a scale of a batch; and 0, or NaN for a batch that is not finite."""

    shift: Tensor | None
    factors: tuple[Tensor, ...]
    zero: Tensor

    def apply(self, wide: Tensor) -> Tensor:
        """Shift and scale rows."""
        wide = wide if self.shift is None else wide - self.shift
        for factor in self.factors:
            wide = wide * factor
        return wide


def scale(x: Tensor) -> Scale:
    """The scale of a batch ``(N, D)``, for its entries in `widest`."""
    zero = torch.zeros((), dtype=widest(x), device=x.device)
    if not x.numel():
        return Scale(None, (), zero)
    lowest, highest = x.aminmax()
    largest = torch.maximum(highest, -lowest).to(zero.dtype)
    if x.dtype != zero.dtype:  # differences and squares of such entries are far from the limits of the wide dtype
        positive = largest.masked_fill(largest == 0, 1)
        return Scale(None, (torch.frexp(positive).mantissa / positive,), largest * 0)
    lowest, highest = x.amin(0), x.amax(0)
    within_factor_2 = highest - lowest <= torch.minimum(lowest.abs(), highest.abs())
    shift = torch.where(within_factor_2, lowest, 0)
    exponent = -torch.frexp((x - shift).abs().amax()).exponent
    # Two factors: the scale of a batch of subnormal numbers would itself overflow.
    factors = (torch.ldexp(zero + 1, e) for e in (exponent // 2, exponent - exponent // 2))
    return Scale(shift, tuple(factors), largest * 0)


def rescale(x: Tensor) -> Tensor:
    """Shift and scale a batch, in `widest`, so that its largest entry is near 1.

    Nothing is rounded. The scale is a power of 2. In a batch that was not narrower before, no column is then further
    from 0 than twice its range: a column is shifted if all its entries are within a factor of 2 of each other, so that
    their differences are exact (Sterbenz's lemma); any other column is already close enough to 0.
    Both losses are invariant to shift and scale, so derivatives of every order treat the two as constants.
    """
    wide = widen(x, widest(x))
    with torch.no_grad():
        found = scale(x.detach())
    return found.apply(wide)


def _columns(x: Tensor, found: Scale | None) -> Iterator[Tensor]:
    """Columns of ``x`` in `widest`, shifted and scaled, some at a time: a feature map may have many."""
    size = max(ELEMENTS // max(x.shape[0], 1), 1)
    for start in range(0, x.shape[1], size):
        part = x[:, start : start + size].to(widest(x))
        if found is not None:
            shift = None if found.shift is None else found.shift[start : start + size]
            part = found._replace(shift=shift).apply(part)
        yield part


def forward_squares(x: Tensor, found: Scale | None = None) -> Tensor:
    """`squared_distances` without a graph; ``found`` scales the rows first."""
    norms, squares = x.new_zeros(len(x), dtype=widest(x)), x.new_zeros((len(x), len(x)), dtype=widest(x))
    for part in _columns(x, found):
        part = part - part.mean(0)
        norms += part.square().sum(1)
        squares.addmm_(part, part.T, alpha=-2)
    sizes = norms.unsqueeze(1) + norms
    squares.add_(sizes).fill_diagonal_(0)
    i, j = (squares < sizes.mul_(GRAM_LIMIT)).triu_(1).nonzero(as_tuple=True)
    if len(i) > MANY_PAIRS * squares.numel():
        squares.zero_()
        for part in _columns(x, found):
            squares += torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist").square_()
    elif len(i):
        squares[i, j] = squares[j, i] = sum((part[i] - part[j]).square().sum(1) for part in _columns(x, found))
    return squares


# A custom operator, since the number of close pairs depends on the data.
@torch.library.custom_op("rkd_plugin::squared_distances", mutates_args=())
def _squared_distances(x: Tensor) -> Tensor:
    return forward_squares(x)


@_squared_distances.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[0])


def backward_squares(grad: Tensor, x: Tensor, squares: Tensor, found: Scale | None = None) -> Tensor:
    """The gradient ``(N, D)`` by ``x`` from the gradient ``(N, N)`` by its squared distances."""
    both = grad + grad.T
    total = both.sum(1, keepdim=True)
    # Two terms cancel for a row that is much closer to another row than to the centre: use differences there.
    nearest = squares.masked_fill(squares < EQUAL[squares.dtype], torch.inf).amin(1) if len(x) else squares.sum(1)
    from_centre = squares.mean(1) - squares.mean() / 2
    close = (nearest < GRADIENT_LIMIT * from_centre).nonzero().flatten().tolist()
    gradient, start = torch.empty_like(x, dtype=both.dtype), 0
    for part in _columns(x, found):
        centred = part - part.mean(0)
        into = gradient[:, start : (start := start + part.shape[1])]
        torch.addmm(total * centred, both, centred, alpha=-1, out=into)
        for row in close:
            into[row] = both[row] @ (part[row] - part)
        into.mul_(2)
        for factor in () if found is None else found.factors:
            into.mul_(factor)
    return gradient


@torch.library.custom_op("rkd_plugin::squared_distances_backward", mutates_args=())
def _squared_distances_backward(grad: Tensor, x: Tensor, squares: Tensor) -> Tensor:
    return backward_squares(grad, x, squares)


@_squared_distances_backward.register_fake
def _(grad: Tensor, x: Tensor, squares: Tensor) -> Tensor:
    return torch.empty_like(x)


_squared_distances.register_autograd(
    lambda ctx, grad: _squared_distances_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


def squared_distances(x: Tensor) -> Tensor:
    """``(N, D) -> (N, N)``: squared Euclidean distances, exactly 0 between equal rows, not finite for such rows.

    A Gram matrix is fast, but it cancels for pairs that are much closer to each other than to the centre. Such pairs
    are computed again from their difference, so that an offset or a tight cluster loses no digits.
    """
    squares: Tensor = _squared_distances(x)
    return squares


def safe_sqrt(squares: Tensor) -> Tensor:
    """Square root; between rows that count as equal 0, with gradient 0 instead of an infinite one."""
    equal = squares < EQUAL[squares.dtype]
    return squares.masked_fill(equal, 1).sqrt_().masked_fill(equal, 0)


def inverse_lengths(squares: Tensor) -> Tensor:
    """``1 / sqrt(squares)``; between rows that count as equal 0, with gradient 0: such an arm has no direction."""
    equal = squares < EQUAL[squares.dtype]
    return squares.masked_fill(equal, 1).rsqrt_().masked_fill(equal, 0)


def mean_distance(distances: Tensor) -> Tensor:
    """Mean of an ``(N, N)`` matrix over pairs of distinct rows, duplicates included; 1 if all rows are equal."""
    rows = distances.shape[0]
    mean = distances.sum() / max(rows * (rows - 1), 1)
    return mean.masked_fill(mean == 0, 1)


def normalise(distances: Tensor) -> Tensor:
    """Divide an ``(N, N)`` matrix by its mean over pairs of distinct rows, duplicates included."""
    return distances / mean_distance(distances)


@torch.library.custom_op("rkd_plugin::cross_squares", mutates_args=())
def _cross_squares(x: Tensor, y: Tensor) -> Tensor:
    centre = y.mean(-2, keepdim=True) if y.shape[-2] else y.sum(-2, keepdim=True)
    from_x, from_y = x - centre, y - centre
    scale = from_x.square().sum(-1, keepdim=True) + from_y.square().sum(-1).unsqueeze(-2)
    squares = (from_x @ from_y.mT).mul_(-2).add_(scale)
    *sets, i, j = (squares < GRAM_LIMIT * scale).nonzero(as_tuple=True)
    if len(i) > MANY_PAIRS * scale.numel():
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    squares[(*sets, i, j)] = (x[(*sets, i)] - y[(*sets, j)]).square().sum(-1)
    return squares


@_cross_squares.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], y.shape[-2])


@torch.library.custom_op("rkd_plugin::cross_squares_backward", mutates_args=())
def _cross_squares_backward(grad: Tensor, x: Tensor, y: Tensor, squares: Tensor) -> Tensor:
    centre = y.mean(-2, keepdim=True) if y.shape[-2] else y.sum(-2, keepdim=True)
    from_x, from_y = x - centre, y - centre
    to_x = grad.sum(-1, keepdim=True).mul(from_x).sub_(grad @ from_y)
    if y.shape[-2]:  # as in `_squared_distances_backward`
        nearest = squares.masked_fill(squares < EQUAL[squares.dtype], torch.inf).amin(-1)
        for row in (nearest < GRADIENT_LIMIT * from_x.square().sum(-1)).nonzero().tolist():
            *sets, i = row
            to_x[(*sets, i)] = grad[(*sets, i)] @ (x[(*sets, i)] - y[tuple(sets)])
    return to_x.mul_(2)


@_cross_squares_backward.register_fake
def _(grad: Tensor, x: Tensor, y: Tensor, squares: Tensor) -> Tensor:
    return torch.empty_like(x)


def _differentiate_cross_squares(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, y, squares = ctx.saved_tensors
    needs_x, needs_y = ctx.needs_input_grad
    return (
        _cross_squares_backward(grad, x, y, squares) if needs_x else None,
        _cross_squares_backward(grad.mT, y, x, squares.mT) if needs_y else None,
    )


_cross_squares.register_autograd(
    _differentiate_cross_squares,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


def cross_squares(x: Tensor, y: Tensor) -> Tensor:
    """``(..., N, D), (..., M, D) -> (..., N, M)``: `squared_distances` from the rows of ``x`` to those of ``y``."""
    squares: Tensor = _cross_squares(x, y)
    return squares
