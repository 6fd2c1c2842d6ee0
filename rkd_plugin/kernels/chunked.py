"""Plain PyTorch on any device, in ``O(N^2)`` memory: both losses from the matrix of squared distances.

The squares are float64, since a short arm beside a long one cancels in anything less, and cost ``N^2 D`` once. The
``N^3`` cosines exist only strip by strip, in float32 unless the input is wider, and the gradient is collected in the
same pass. With D the squared distances and r = 1 / sqrt(D), or 0 where D = 0:

    cos[a,b,c] = (D_ab + D_ac - D_bc) / 2 * r_ab * r_ac            the law of cosines at vertex a
    W          = d huber / d cos_student                           P = W * r_ab * r_ac
    dL/dD_ab   = sum_c P - r_ab^2 * sum_c W * cos - 1/2 sum_v P[v,a,b]

W and P are symmetric in b and c, so that only b < c is computed; large batches on a CPU go to ``compiled`` instead,
which computes all of them in one pass.

Where one arm is R times as long as the other, the law of cosines loses R times the rounding of float64. From an R on
that would show (`APART`), the cosines are products of unit vectors, in float64: exact for any R, for ``N^3 D`` time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from rkd_plugin.kernels import compiled
from rkd_plugin.kernels.operators import angle_operator
from rkd_plugin.kernels.pairwise import (
    EQUAL,
    inverse_lengths,
    mean_distance,
    normalise,
    rescale,
    safe_sqrt,
    squared_distances,
    substitute_value,
)

STRIP = 32  # rows b of a strip; its columns are all c from the first of them on
EVEN = 64  # ratio of squares, so 8 between lengths: up to here rounding them costs no more than rounding the cosines
# Ratio of squares from which on the law of cosines is not used: its errors reach 2^-27 or, of float64 inputs, 2^-33.
APART = {torch.float32: 2.0**52, torch.float64: 2.0**40}
NO_LIMIT = 4.0  # cosines differ by 2 at most: a threshold above changes nothing, and float32 need not hold it
ELEMENTS = 2**18  # of a chunk of a strip: fewer calls than smaller ones, and temporaries that the caches still hold


class Relations(NamedTuple):
    """Squared distances ``(N, N)`` of a batch, its rescaled rows, and the dtype in which its cosines are computed."""

    squares: Tensor
    rows: Tensor
    dtype: torch.dtype


def relations(x: Tensor) -> Relations:
    """Squared distances in float64, cosines in the input's dtype or float32."""
    rows = rescale(x)
    return Relations(squared_distances(rows), rows.detach(), torch.promote_types(x.dtype, torch.float32))


def distance(
    student: Relations, teacher: Relations, huber_delta: float, pairs: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """See ``reference.distance``; the same from squared distances."""
    if pairs is None:
        sums: Tensor = _distance(student.squares, teacher.squares, huber_delta)
        return sums
    student_psi, teacher_psi = normalise(safe_sqrt(student.squares)), normalise(safe_sqrt(teacher.squares))
    losses = huber_loss(student_psi[pairs], teacher_psi[pairs], reduction="none", delta=huber_delta)
    return losses.new_zeros(student_psi.shape[0]).index_add(0, pairs[0], losses)


@torch.library.custom_op("rkd_plugin::distance", mutates_args=())
def _distance(student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    # An operator of its own keeps the squares alone for the backward pass; autograd would keep five matrices more.
    student_psi, teacher_psi = normalise(safe_sqrt(student)), normalise(safe_sqrt(teacher))
    return huber_loss(student_psi, teacher_psi, reduction="none", delta=huber_delta).sum(1)


@_distance.register_fake
def _(student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    return student.new_empty(student.shape[0])


@torch.library.custom_op("rkd_plugin::distance_backward", mutates_args=())
def _distance_backward(weights: Tensor, student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    # In place: at most three matrices at once.
    slope = normalise(safe_sqrt(teacher)).neg_()
    lengths = safe_sqrt(student)
    mean, rows = mean_distance(lengths), len(student)
    slope.addcdiv_(lengths, mean).clamp_(-huber_delta, huber_delta).mul_(weights.unsqueeze(1))
    # What each distance changes in the mean, by which all are divided.
    through_mean = torch.dot(slope.flatten(), lengths.flatten()) / (mean.square() * max(rows * (rows - 1), 1))
    return slope.div_(mean).sub_(through_mean).div_(lengths.mul_(2).masked_fill_(lengths == 0, torch.inf))


@_distance_backward.register_fake
def _(weights: Tensor, student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    return torch.empty_like(student)


def _save_distance(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *squares, ctx.huber_delta = inputs
    ctx.save_for_backward(*squares)


def _differentiate_distance(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
    return _distance_backward(weights, *ctx.saved_tensors, ctx.huber_delta), None, None


_distance.register_autograd(_differentiate_distance, setup_context=_save_distance)


def angle(
    student: Relations,
    teacher: Relations,
    huber_delta: float,
    triplets: tuple[Tensor, Tensor, Tensor] | None = None,
    vertices: int | None = None,
) -> Tensor:
    """See ``reference.angle``; the same from squared distances, a strip at a time."""
    huber_delta = min(huber_delta, NO_LIMIT)
    if triplets is None:
        needs_gradient = torch.is_grad_enabled() and student.squares.requires_grad
        vertices = student.squares.shape[0] if vertices is None else vertices
        sides = student.squares, teacher.squares, student.rows, teacher.rows
        sums: Tensor = _angle(*sides, huber_delta, student.dtype, vertices, needs_gradient)[0]
        return sums
    a, b, c = triplets

    def psi(side: Relations) -> Tensor:
        d_ab, d_ac, d_bc = side.squares[a, b], side.squares[a, c], side.squares[b, c]
        numerators = _numerators(d_ab / 2, d_ac / 2, d_bc / 2)
        exact = _exact_numerators(numerators.detach(), side.squares.detach(), side.rows, a, b, c, side.dtype)
        cosines = substitute_value(numerators, exact) * inverse_lengths(d_ab) * inverse_lengths(d_ac)
        return cosines.to(side.dtype)

    losses = huber_loss(psi(student), psi(teacher), reduction="none", delta=huber_delta).masked_fill(b == c, 0)
    return losses.new_zeros(student.squares.shape[0]).index_add(0, a, losses)


def _numerators(h_ab: Tensor, h_ac: Tensor, h_bc: Tensor, out: Tensor | None = None) -> Tensor:
    """The law of cosines from halved squares, without ``r_ab * r_ac``; it cancels, so it is rounded only afterwards."""
    return torch.sub(h_ac, h_bc, out=out).add_(h_ab)


@torch.library.custom_op("rkd_plugin::exact_numerators", mutates_args=())
def _exact_numerators(
    numerators: Tensor, squares: Tensor, rows: Tensor, a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype
) -> Tensor:
    """`_numerators` of index tuples; from the differences of ``rows`` where the law of cosines loses digits."""
    # An operator of its own, since that depends on the data; a CUDA graph, which cannot ask for it, is always exact.
    capturing = squares.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing and not _lengths(squares).apart(dtype):
        return numerators.clone()
    size = max(ELEMENTS // max(rows.shape[1], 1), 1)
    parts = zip(*(torch.split(index, size) for index in (a, b, c)), strict=True)
    return torch.cat([((rows[j] - rows[i]) * (rows[k] - rows[i])).sum(1) for i, j, k in parts])


@_exact_numerators.register_fake
def _(numerators: Tensor, squares: Tensor, rows: Tensor, a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(numerators)


class _Lengths(NamedTuple):
    """The shortest squared distance of rows that are not equal, and the longest."""

    shortest: float
    longest: float

    def apart(self, dtype: torch.dtype) -> bool:
        """Whether the law of cosines loses digits that cosines in ``dtype`` would show."""
        return self.longest > APART[dtype] * self.shortest

    def even(self) -> bool:
        """Whether no arm is so short beside another that rounding the squares first would show."""
        return self.longest < EVEN * self.shortest


def _lengths(squares: Tensor) -> _Lengths:
    shortest = squares.masked_fill(squares < EQUAL[squares.dtype], torch.inf).min()
    return _Lengths(*torch.stack([shortest, squares.max()]).tolist())


class _Side(NamedTuple):
    """What a sweep reads of one batch."""

    halves: Tensor  # of the squared distances; of few bits, where that is enough
    inverses: Tensor  # of the lengths
    rows: Tensor | None  # given where the cosines come from them


def _sides(
    squares: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[list[_Side], torch.dtype]:
    """Both sides of a sweep, and the dtype of its cosines: the one that is asked for, or float64 for lengths apart."""
    lengths = [_lengths(side) for side in squares]
    if any(side.apart(dtype) for side in lengths):
        wide = squares[0].dtype
        return [_Side(d / 2, inverse_lengths(d), x) for d, x in zip(squares, rows, strict=True)], wide
    halves = [(d / 2).to(dtype if found.even() else d.dtype) for d, found in zip(squares, lengths, strict=True)]
    return [_Side(h, inverse_lengths(d).to(dtype), None) for h, d in zip(halves, squares, strict=True)], dtype


class _Arms(NamedTuple):
    """One side's part in a strip: all vertices with their arms to its rows b and its columns c."""

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
    """Cosines at the vertices ``a`` and their ``r_ab * r_ac``; ``wide`` is memory for what is not yet rounded."""
    r_ab, r_ac = arms.r_ab[a], arms.r_ac[a]
    torch.mul(r_ab, r_ac, out=scales)
    if arms.rows is not None:
        x_a, x_b, x_c = arms.rows
        torch.bmm((x_b - x_a[a]).mul_(r_ab), (x_c - x_a[a]).mul_(r_ac.mT).mT, out=cosines)
        return
    total = cosines if arms.h_bc.dtype == cosines.dtype else wide[: cosines.numel()].view_as(cosines)
    _numerators(arms.h_ab[a], arms.h_ac[a], arms.h_bc, total)
    if total is not cosines:
        cosines.copy_(total)
    cosines.mul_(scales)


def _strips(rows: int) -> Iterator[tuple[slice, slice]]:
    """Rows b and columns c that together hold every pair b < c once."""
    for first in range(0, rows, STRIP):
        yield slice(first, min(first + STRIP, rows)), slice(first, rows)


def _chunks(vertices: int, elements: int) -> Iterator[slice]:
    """As many vertices at a time as their ``elements`` each allow."""
    size = max(ELEMENTS // elements, 1)
    for start in range(0, vertices, size):
        yield slice(start, min(start + size, vertices))


def _sweep(
    squares: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    huber_delta: float,
    dtype: torch.dtype,
    last: int,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Angle losses ``(last,)`` per vertex and, given ``weights`` of the vertices, their gradient ``(N, N)``.

    ``squares`` and ``rows`` are those of student and teacher.
    """
    student, count = squares[0], len(squares[0])
    losses = student.new_zeros(last)
    if last == 0:
        return losses, torch.zeros_like(student)
    sides, dtype = _sides(squares, rows, dtype)
    if weights is not None and sides[0].rows is None:
        swept = compiled.sweep([(side.halves, side.inverses) for side in sides], huber_delta, weights)
        if swept is not None:
            losses, through_arms, opposite = swept
            inverses = sides[0].inverses
            del sides, swept
            return losses, _gradient(weights, through_arms, opposite.div_(2), inverses)
    # sum_c P and sum_c W * cos at [a, b], and sum_a P at [b, c]
    through_arms = student.new_zeros((2, last, count) if weights is not None else (2, 0), dtype=dtype)
    opposite = student.new_zeros((count, count) if weights is not None else 0, dtype=dtype)
    narrow = losses.to(dtype) if weights is None else weights.to(dtype)
    # Memory is allocated once: pages that are new in every chunk cost more than the arithmetic.
    size = min(max(ELEMENTS, STRIP * count), STRIP * count * last)
    buffers = student.new_empty(2, 2 * size, dtype=dtype)
    wide = student.new_empty(size if any(side.halves.dtype != dtype for side in sides) else 0)
    for b, c in _strips(count):
        height, width = b.stop - b.start, c.stop - c.start
        upper = torch.ones(height, height, dtype=dtype, device=student.device).triu(1)
        strip = [_arms(side, b, c) for side in sides]
        for a in _chunks(last, height * width):
            shape = (a.stop - a.start, height, width)
            cosines, products = (buffer[: 2 * math.prod(shape)].view(2, *shape) for buffer in buffers)
            for arms, cosine, scale in zip(strip, cosines, products, strict=True):
                _write_cosines(arms, a, cosine, scale, wide)
            cosine, difference = cosines
            # Both cosines are rounded before they are compared, so that equal relations differ by exactly 0.
            torch.sub(cosine, difference, out=difference)
            difference[:, :, :height].mul_(upper)
            scale, slope = products[0], torch.clamp(difference, -huber_delta, huber_delta, out=products[1])
            losses[a].add_(difference.sub_(slope, alpha=0.5).mul_(slope).sum((1, 2)))
            if weights is None:
                continue
            scale.mul_(slope)
            slope.mul_(cosine)
            through_arms[:, a, b].add_(products.sum(3))
            through_arms[:, a, c].add_(products.sum(2))
            opposite[b, c].add_((narrow[a] @ scale.flatten(1)).view(height, width))
    if weights is None:
        return 2 * losses, student.new_zeros(0)
    return 2 * losses, _gradient(weights, through_arms, opposite, sides[0].inverses)


def _gradient(weights: Tensor, through_arms: Tensor, opposite: Tensor, inverses: Tensor) -> Tensor:
    """By the squared distances, from ``sum_c P`` and ``sum_c W * cos``, both overwritten, and half of ``sum_a P``."""
    arms, turns = through_arms
    arms.sub_(turns.mul_(inverses[: len(weights)].square()))
    gradient = opposite.to(weights.dtype).neg_()
    # Of one dtype: PyTorch makes wide copies of both operands else.
    gradient[: len(weights)].add_(arms.mul_(weights.unsqueeze(1).to(arms.dtype)))
    return gradient


def _forward(
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    huber_delta: float,
    dtype: torch.dtype,
    vertices: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    weights = student.new_ones(vertices) if needs_gradient else None
    return _sweep((student, teacher), (student_rows, teacher_rows), huber_delta, dtype, vertices, weights)


def _backward(
    weights: Tensor,
    gradient: Tensor,
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    huber_delta: float,
    dtype: torch.dtype,
) -> Tensor:
    if bool((weights == weights[:1]).all()):
        return gradient * weights[:1].sum()  # of none, where there is no vertex
    rows = student_rows, teacher_rows
    return _sweep((student, teacher), rows, huber_delta, dtype, len(weights), weights)[1]


# An operator of its own keeps torch.compile from unrolling the loops.
_angle = angle_operator("angle", _forward, _backward)
