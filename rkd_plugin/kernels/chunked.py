"""Plain PyTorch on any device, in ``O(N^2)`` memory: both losses from the matrix of squared distances.

The squares are float64, since in anything narrower a short arm cancels against a long one; they cost ``N^2 D`` once.
The ``N^3`` cosines and their gradient are computed by ``strips``, in float32 unless the input is wider.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from rkd_plugin.kernels.operators import angle_operator
from rkd_plugin.kernels.pairwise import (
    inverse_lengths,
    mean_distance,
    normalise,
    rescale,
    safe_sqrt,
    squared_distances,
    substitute_value,
)
from rkd_plugin.kernels.strips import exact_numerators, numerators, sweep

NO_LIMIT = 4.0  # cosines differ by at most 2, so a larger threshold has no effect; float32 may not hold it


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
    """As ``reference.distance``, from squared distances."""
    if pairs is None:
        sums: Tensor = _distance(student.squares, teacher.squares, huber_delta)
        return sums
    student_psi, teacher_psi = normalise(safe_sqrt(student.squares)), normalise(safe_sqrt(teacher.squares))
    losses = huber_loss(student_psi[pairs], teacher_psi[pairs], reduction="none", delta=huber_delta)
    return losses.new_zeros(student_psi.shape[0]).index_add(0, pairs[0], losses)


@torch.library.custom_op("rkd_plugin::distance", mutates_args=())
def _distance(student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    # A custom operator saves only the squares for the backward pass; autograd would save five more matrices.
    student_psi, teacher_psi = normalise(safe_sqrt(student)), normalise(safe_sqrt(teacher))
    return huber_loss(student_psi, teacher_psi, reduction="none", delta=huber_delta).sum(1)


@_distance.register_fake
def _(student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    return student.new_empty(student.shape[0])


@torch.library.custom_op("rkd_plugin::distance_backward", mutates_args=())
def _distance_backward(weights: Tensor, student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    # In place, for at most three matrices at once.
    slope = normalise(safe_sqrt(teacher)).neg_()
    lengths = safe_sqrt(student)
    mean, rows = mean_distance(lengths), student.shape[0]
    slope.addcdiv_(lengths, mean).clamp_(-huber_delta, huber_delta).mul_(weights.unsqueeze(1))
    # The gradient through the mean distance.
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
    """As ``reference.angle``, from squared distances."""
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
        rounded = numerators(d_ab / 2, d_ac / 2, d_bc / 2)
        exact = exact_numerators(rounded.detach(), side.squares.detach(), side.rows, a, b, c, side.dtype)
        cosines = substitute_value(rounded, exact) * inverse_lengths(d_ab) * inverse_lengths(d_ac)
        return cosines.to(side.dtype)

    losses = huber_loss(psi(student), psi(teacher), reduction="none", delta=huber_delta).masked_fill(b == c, 0)
    return losses.new_zeros(student.squares.shape[0]).index_add(0, a, losses)


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
    return sweep((student, teacher), (student_rows, teacher_rows), huber_delta, dtype, vertices, weights)


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
        return gradient * weights[:1].sum()  # 0 without vertices
    rows = student_rows, teacher_rows
    return sweep((student, teacher), rows, huber_delta, dtype, len(weights), weights)[1]


# A custom operator, so that torch.compile does not unroll the loops.
_angle = angle_operator("angle", _forward, _backward)
