"""Plain PyTorch on any device, in ``O(N^2)`` memory: both losses from the matrix of squared distances.

The squares are float64, since a short arm beside a long one cancels in anything less, and cost ``N^2 D`` once. The
``N^3`` cosines exist only strip by strip, in float32 unless the input is wider, and the gradient is collected in the
same pass. With D the squared distances and r = 1 / sqrt(D), or 0 where D = 0:

    cos[a,b,c] = (D_ab + D_ac - D_bc) / 2 * r_ab * r_ac            the law of cosines at vertex a
    W          = d huber / d cos_student                           P = W * r_ab * r_ac
    dL/dD_ab   = sum_c P - r_ab^2 * sum_c W * cos - 1/2 sum_v P[v,a,b]

W and P are symmetric in b and c, so that only b < c is computed; large batches on a CPU go to ``compiled`` instead,
which computes all of them in one pass.
"""

from __future__ import annotations

import math
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
    widest,
)

STRIP = 32  # rows b of a strip; its columns are all c from the first of them on
EVEN = 64  # ratio of squares, so 8 between lengths: up to here rounding them costs no more than rounding the cosines
ELEMENTS = 2**18  # of a chunk of a strip: fewer calls than smaller ones, and temporaries that the caches still hold


class Relations(NamedTuple):
    """Squared distances ``(N, N)`` of a batch, and the dtype in which its cosines are computed."""

    squares: Tensor
    dtype: torch.dtype


def relations(x: Tensor) -> Relations:
    """Squared distances in float64, cosines in the input's dtype or float32."""
    return Relations(squared_distances(rescale(x, widest(x))), torch.promote_types(x.dtype, torch.float32))


def distance(
    student: Relations, teacher: Relations, huber_delta: float, pairs: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """See ``reference.distance``; the same from squared distances."""
    if pairs is None:
        sums: Tensor = _distance(student.squares, teacher.squares, huber_delta)
        return sums
    student_psi, teacher_psi = normalise(safe_sqrt(student.squares)), normalise(safe_sqrt(teacher.squares))
    losses = huber_loss(student_psi[pairs], teacher_psi[pairs], reduction="none", delta=huber_delta)
    return losses.new_zeros(len(student_psi)).index_add(0, pairs[0], losses)


@torch.library.custom_op("rkd_plugin::distance", mutates_args=())
def _distance(student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    # An operator of its own keeps the squares alone for the backward pass; autograd would keep five matrices more.
    student_psi, teacher_psi = normalise(safe_sqrt(student)), normalise(safe_sqrt(teacher))
    return huber_loss(student_psi, teacher_psi, reduction="none", delta=huber_delta).sum(1)


@_distance.register_fake
def _(student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    return student.new_empty(len(student))


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
    if triplets is None:
        needs_gradient = torch.is_grad_enabled() and student.squares.requires_grad
        vertices = len(student.squares) if vertices is None else vertices
        sums: Tensor = _angle(student.squares, teacher.squares, huber_delta, student.dtype, vertices, needs_gradient)[0]
        return sums
    a, b, c = triplets

    def psi(side: Relations) -> Tensor:
        d_ab, d_ac, d_bc = side.squares[a, b], side.squares[a, c], side.squares[b, c]
        scale = inverse_lengths(d_ab) * inverse_lengths(d_ac)
        return _numerators(d_ab / 2, d_ac / 2, d_bc / 2).to(side.dtype) * scale

    losses = huber_loss(psi(student), psi(teacher), reduction="none", delta=huber_delta).masked_fill(b == c, 0)
    return losses.new_zeros(len(student.squares)).index_add(0, a, losses)


def _numerators(h_ab: Tensor, h_ac: Tensor, h_bc: Tensor, out: Tensor | None = None) -> Tensor:
    """The law of cosines from halved squares, without ``r_ab * r_ac``; it cancels, so it is rounded only afterwards."""
    return torch.sub(h_ac, h_bc, out=out).add_(h_ab)


def _halves(squares: Tensor, dtype: torch.dtype) -> Tensor:
    """Halved squares; in ``dtype`` already where no arm is so short beside another that rounding first would show."""
    shortest, longest = squares.masked_fill(squares < EQUAL, torch.inf).min(), squares.max()
    return (squares / 2).to(dtype if bool(longest < EVEN * shortest) else squares.dtype)


def _sweep(
    student: Tensor, teacher: Tensor, huber_delta: float, dtype: torch.dtype, last: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Angle losses ``(last,)`` per vertex and, given ``weights`` of the vertices, their gradient ``(N, N)``."""
    rows = len(student)
    losses = student.new_zeros(last)
    if last == 0:
        return losses, torch.zeros_like(student)
    sides = [(_halves(squares, dtype), inverse_lengths(squares).to(dtype)) for squares in (student, teacher)]
    if weights is not None and (swept := compiled.sweep(sides, huber_delta, weights)) is not None:
        losses, arms, opposite = swept
        lengths = sides[0][1]
        del sides, swept
        return losses, _gradient(weights, arms, opposite.div_(2), lengths)
    # sum_c P and sum_c W * cos at [a, b], and sum_a P at [b, c]
    arms = student.new_zeros((2, last, rows) if weights is not None else (2, 0), dtype=dtype)
    opposite = student.new_zeros((rows, rows) if weights is not None else 0, dtype=dtype)
    narrow = losses.to(dtype) if weights is None else weights.to(dtype)
    # Memory is asked for once: pages that are new in every chunk cost more than the arithmetic.
    size = min(max(ELEMENTS, STRIP * rows), STRIP * rows * last)
    buffers = student.new_empty(2, 2 * size, dtype=dtype)
    wide_buffer = student.new_empty(size if any(halves.dtype != dtype for halves, _ in sides) else 0)
    for first in range(0, rows, STRIP):
        b, c = slice(first, first + STRIP), slice(first, rows)
        height, width = min(STRIP, rows - first), rows - first
        upper = torch.ones(height, height, dtype=dtype, device=student.device).triu(1)
        parts = [(h[:, b, None], h[:, None, c], h[b, c], r[:, b, None], r[:, None, c]) for h, r in sides]
        below, across, facing = arms[..., b], arms[..., c], opposite[b, c] if weights is not None else opposite
        vertices = max(ELEMENTS // (height * width), 1)
        for start in range(0, last, vertices):
            a = slice(start, min(start + vertices, last))
            shape = (a.stop - start, height, width)
            cosines, products = (buffer[: 2 * math.prod(shape)].view(2, *shape) for buffer in buffers)
            for i, (h_ab, h_ac, h_bc, r_ab, r_ac) in enumerate(parts):
                torch.mul(r_ab[a], r_ac[a], out=products[i])
                wide = cosines[i] if h_bc.dtype == dtype else wide_buffer[: math.prod(shape)].view(shape)
                total = _numerators(h_ab[a], h_ac[a], h_bc, wide)
                if h_bc.dtype != dtype:
                    cosines[i].copy_(total)
            cosine, difference = cosines.mul_(products)
            # Both cosines are rounded before they are compared, so that equal relations differ by exactly 0.
            torch.sub(cosine, difference, out=difference)
            difference[:, :, :height].mul_(upper)
            scale, slope = products[0], torch.clamp(difference, -huber_delta, huber_delta, out=products[1])
            losses[a].add_(difference.sub_(slope, alpha=0.5).mul_(slope).sum((1, 2)))
            if weights is None:
                continue
            scale.mul_(slope)
            slope.mul_(cosine)
            below[:, a].add_(products.sum(3))
            across[:, a].add_(products.sum(2))
            facing.add_((narrow[a] @ scale.flatten(1)).view(height, width))
    if weights is None:
        return 2 * losses, student.new_zeros(0)
    return 2 * losses, _gradient(weights, arms, opposite, sides[0][1])


def _gradient(weights: Tensor, arms: Tensor, opposite: Tensor, lengths: Tensor) -> Tensor:
    """By the squared distances, from ``sum_c P`` and ``sum_c W * cos``, both overwritten, and half of ``sum_a P``."""
    through_arms, turns = arms
    through_arms.sub_(turns.mul_(lengths[: len(weights)].square()))
    gradient = opposite.to(weights.dtype).neg_()
    # Of one dtype: PyTorch makes wide copies of both operands else.
    gradient[: len(weights)].add_(through_arms.mul_(weights.unsqueeze(1).to(through_arms.dtype)))
    return gradient


def _forward(
    student: Tensor, teacher: Tensor, huber_delta: float, dtype: torch.dtype, vertices: int, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    weights = student.new_ones(vertices) if needs_gradient else None
    return _sweep(student, teacher, huber_delta, dtype, vertices, weights)


def _backward(
    weights: Tensor, student: Tensor, teacher: Tensor, gradient: Tensor, huber_delta: float, dtype: torch.dtype
) -> Tensor:
    if bool((weights == weights[:1]).all()):
        return gradient * weights[:1].sum()  # of none, where there is no vertex
    return _sweep(student, teacher, huber_delta, dtype, len(weights), weights)[1]


# An operator of its own keeps torch.compile from unrolling the loops.
_angle = angle_operator("angle", _forward, _backward)
