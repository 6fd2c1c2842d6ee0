"""The cosines of ``chunked`` and their gradient, strip by strip, so that never all ``N^3`` of them are in memory.

With D the squared distances and r = 1 / sqrt(D), or 0 where D = 0:

    cos[a,b,c] = (D_ab + D_ac - D_bc) / 2 * r_ab * r_ac            the law of cosines at vertex a
    W          = d huber / d cos_student                           P = W * r_ab * r_ac
    dL/dD_ab   = sum_c P - r_ab^2 * sum_c W * cos - 1/2 sum_v P[v,a,b]

W and P are symmetric in b and c, so only b < c is computed. ``native`` does the same in C++, in one pass.

If one arm is R times as long as the other, the law of cosines loses R times the rounding of float64. From an R on that
would be visible (`APART`), the cosines are products of unit vectors, in float64: exact for any R, in ``N^3 D`` time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rkd_plugin.kernels.pairwise import APART, EQUAL, EVEN, inverse_lengths, widest

STRIP = 32  # rows b of a strip; its columns are all c from the first of them on
ELEMENTS = 2**18  # of a chunk of a strip: fewer calls than with smaller ones, and temporaries still fit the caches


def numerators(h_ab: Tensor, h_ac: Tensor, h_bc: Tensor, out: Tensor | None = None) -> Tensor:
    """The law of cosines from halved squares, without ``r_ab * r_ac``, not yet rounded, since it cancels."""
    return torch.sub(h_ac, h_bc, out=out).add_(h_ab)


@torch.library.custom_op("rkd_plugin::exact_numerators", mutates_args=())
def exact_numerators(
    rounded: Tensor, squares: Tensor, rows: Tensor, a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype
) -> Tensor:
    """`numerators` of index tuples, from the differences of ``rows`` if the law of cosines loses digits."""
    # A custom operator, since this depends on the data. The capture of a CUDA graph cannot read data: always exact.
    capturing = squares.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing and not _lengths(squares).apart(dtype):
        return rounded.clone()
    size = max(ELEMENTS // max(rows.shape[1], 1), 1)
    parts = zip(*(torch.split(index, size) for index in (a, b, c)), strict=True)
    return torch.cat([((rows[j] - rows[i]) * (rows[k] - rows[i])).sum(1) for i, j, k in parts])


@exact_numerators.register_fake
def _(rounded: Tensor, squares: Tensor, rows: Tensor, a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(rounded)


class _Lengths(NamedTuple):
    """The shortest squared distance of rows that are not equal, and the longest."""

    shortest: float
    longest: float

    def apart(self, dtype: torch.dtype) -> bool:
        """Whether the law of cosines loses digits that a cosine in ``dtype`` has."""
        return self.longest > APART[dtype] * self.shortest

    def even(self) -> bool:
        """Whether all lengths are so similar that the squares may be rounded before the law of cosines."""
        return self.longest < EVEN * self.shortest


def _lengths(squares: Tensor) -> _Lengths:
    shortest = squares.masked_fill(squares < EQUAL[squares.dtype], torch.inf).min()
    return _Lengths(*torch.stack([shortest, squares.max()]).tolist())


class _Side(NamedTuple):
    """The input of a sweep from one side of the batch."""

    halves: Tensor  # half of the squared distances, rounded to the dtype of the cosines if that loses no digits
    inverses: Tensor  # of the lengths
    rows: Tensor | None  # if the cosines are computed from differences of the rows


def _sides(squares: Sequence[Tensor], rows: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[_Side], torch.dtype]:
    """Both sides of a sweep, and the dtype of its cosines: ``dtype``, or float64 for very different lengths."""
    lengths = [_lengths(side) for side in squares]
    if any(side.apart(dtype) for side in lengths):
        wide = squares[0].dtype
        return [_Side(d / 2, inverse_lengths(d), x) for d, x in zip(squares, rows, strict=True)], wide
    halves = [(d / 2).to(dtype if found.even() else d.dtype) for d, found in zip(squares, lengths, strict=True)]
    return [_Side(h, inverse_lengths(d).to(dtype), None) for h, d in zip(halves, squares, strict=True)], dtype


class _Arms(NamedTuple):
    """One side's part of a strip: all vertices with their arms to the rows b and the columns c."""

    h_ab: Tensor
    h_ac: Tensor
    h_bc: Tensor
    r_ab: Tensor
    r_ac: Tensor
    rows: tuple[Tensor, Tensor, Tensor] | None


def _arms(side: _Side, b: slice, c: slice) -> _Arms:
    rows = None if side.rows is None else (side.rows[:, None], side.rows[b], side.rows[c])
    h, r = side.halves, side.inverses
    return _Arms(h[:, b, None], h[:, None, c], h[b, c], r[:, b, None], r[:, None, c], rows)


def _write_cosines(arms: _Arms, a: slice, cosines: Tensor, scales: Tensor, wide: Tensor) -> None:
    """Write the cosines at the vertices ``a``, and their ``r_ab * r_ac``; ``wide`` is memory for numerators."""
    r_ab, r_ac = arms.r_ab[a], arms.r_ac[a]
    torch.mul(r_ab, r_ac, out=scales)
    if arms.rows is not None:
        x_a, x_b, x_c = arms.rows
        torch.bmm((x_b - x_a[a]).mul_(r_ab), (x_c - x_a[a]).mul_(r_ac.mT).mT, out=cosines)
        return
    total = cosines if arms.h_bc.dtype == cosines.dtype else wide[: cosines.numel()].view_as(cosines)
    numerators(arms.h_ab[a], arms.h_ac[a], arms.h_bc, total)
    if total is not cosines:
        cosines.copy_(total)
    cosines.mul_(scales)


def _strips(rows: int) -> Iterator[tuple[slice, slice]]:
    """Rows b and columns c that together contain every pair b < c once."""
    for first in range(0, rows, STRIP):
        yield slice(first, min(first + STRIP, rows)), slice(first, rows)


def _chunks(vertices: int, elements: int) -> Iterator[slice]:
    """Slices of vertices, each of about `ELEMENTS` numbers at ``elements`` per vertex."""
    size = max(ELEMENTS // elements, 1)
    for start in range(0, vertices, size):
        yield slice(start, min(start + size, vertices))


def sweep(
    squares: Sequence[Tensor],
    rows: Sequence[Tensor],
    huber_delta: float,
    dtype: torch.dtype,
    vertices: int,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Angle losses of the first ``vertices`` rows and, given their ``weights``, the gradient of the weighted losses.

    Args:
        squares: squared distances ``(N, N)`` of student and teacher.
        rows: the rescaled rows ``(N, D)`` of both.
        huber_delta: of the loss.
        dtype: of the cosines, unless very different lengths need float64.
        vertices: how many rows are vertices.
        weights: ``(vertices,)``, or None for the losses only.

    Returns:
        Losses ``(vertices,)``, and their gradient ``(N, N)`` by the student's squares, ``(0,)`` without weights.
    """
    if vertices == 0:
        return squares[0].new_zeros(0), torch.zeros_like(squares[0])
    sides, dtype = _sides(squares, rows, dtype)
    losses, through_arms, opposite = _sweep_strips(sides, huber_delta, dtype, vertices, weights)
    if weights is None:
        return 2 * losses, losses.new_zeros(0)
    return 2 * losses, _gradient(weights, through_arms, opposite, sides[0].inverses)


def _sweep_strips(
    sides: list[_Side], huber_delta: float, dtype: torch.dtype, vertices: int, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the losses; and for their gradient ``sum_c P`` and ``sum_c W * cos`` at [a, b], ``sum_a P`` at [b, c]."""
    inverses, count = sides[0].inverses, sides[0].inverses.shape[0]
    losses = inverses.new_zeros(vertices, dtype=widest(inverses))
    through_arms = losses.new_zeros((2, vertices, count) if weights is not None else (2, 0), dtype=dtype)
    opposite = losses.new_zeros((count, count) if weights is not None else 0, dtype=dtype)
    narrow = losses.to(dtype) if weights is None else weights.to(dtype)
    # Memory is allocated once: new pages for every chunk cost more than the arithmetic.
    size = min(max(ELEMENTS, STRIP * count), STRIP * count * vertices)
    buffers = losses.new_empty(2, 2 * size, dtype=dtype)
    wide = losses.new_empty(size if any(side.halves.dtype != dtype for side in sides) else 0)
    for b, c in _strips(count):
        height, width = b.stop - b.start, c.stop - c.start
        upper = torch.ones(height, height, dtype=dtype, device=losses.device).triu(1)
        strip = [_arms(side, b, c) for side in sides]
        for a in _chunks(vertices, height * width):
            shape = (2, a.stop - a.start, height, width)
            cosines, products = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            for arms, cosine, scale in zip(strip, cosines, products, strict=True):
                _write_cosines(arms, a, cosine, scale, wide)
            (cosine, teacher_cosine), (scale, slope) = cosines, products
            losses[a].add_(_write_slopes(cosine, teacher_cosine, upper, huber_delta, slope))
            if weights is None:
                continue
            scale.mul_(slope)
            slope.mul_(cosine)
            through_arms[:, a, b].add_(products.sum(3))
            through_arms[:, a, c].add_(products.sum(2))
            opposite[b, c].add_((narrow[a] @ scale.flatten(1)).view(height, width))
    return losses, through_arms, opposite


def _write_slopes(cosines: Tensor, teacher: Tensor, upper: Tensor, huber_delta: float, slopes: Tensor) -> Tensor:
    """Losses of the vertices of a chunk; writes the slopes of the Huber function, and overwrites ``teacher``."""
    # Both cosines are rounded before they are compared, so that equal relations differ by exactly 0.
    difference = torch.sub(cosines, teacher, out=teacher)
    difference[:, :, : upper.shape[0]].mul_(upper)
    torch.clamp(difference, -huber_delta, huber_delta, out=slopes)
    return difference.sub_(slopes, alpha=0.5).mul_(slopes).sum((1, 2))


def _gradient(weights: Tensor, through_arms: Tensor, opposite: Tensor, inverses: Tensor) -> Tensor:
    """The gradient by the squared distances, from the sums of a sweep; ``through_arms`` is overwritten."""
    arms, turns = through_arms
    arms.sub_(turns.mul_(inverses[: weights.shape[0]].square()))
    gradient = opposite.to(weights.dtype).neg_()
    # In one dtype; otherwise PyTorch makes wide copies of both operands.
    gradient[: weights.shape[0]].add_(arms.mul_(weights.unsqueeze(1).to(arms.dtype)))
    return gradient
