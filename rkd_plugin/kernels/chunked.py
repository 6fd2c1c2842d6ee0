"""Plain PyTorch on any device, in ``O(N^2)`` memory: both losses from the matrix of squared distances.

The squares are float64, since in anything narrower a short arm cancels against a long one; they cost ``N^2 D`` once.
``native`` computes the losses from them on a CPU. Elsewhere ``strips`` computes the ``N^3`` cosines. Both have float32
cosines unless the input is wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from rkd_plugin.kernels import native
from rkd_plugin.kernels.operators import angle_operator
from rkd_plugin.kernels.pairwise import (
    ELEMENTS,
    backward_squares,
    forward_squares,
    inverse_lengths,
    mean_distance,
    normalise,
    rescale,
    safe_sqrt,
    scale,
    squared_distances,
    substitute_value,
    widest,
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


def _distance_sums(student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    student_psi, teacher_psi = normalise(safe_sqrt(student)), normalise(safe_sqrt(teacher))
    return huber_loss(student_psi, teacher_psi, reduction="none", delta=huber_delta).sum(1)


def _distance_gradient(weights: Tensor, student: Tensor, teacher: Tensor, huber_delta: float) -> Tensor:
    # In place, for at most three matrices at once.
    slope = normalise(safe_sqrt(teacher)).neg_()
    lengths = safe_sqrt(student)
    mean, rows = mean_distance(lengths), student.shape[0]
    slope.addcdiv_(lengths, mean).clamp_(-huber_delta, huber_delta).mul_(weights.unsqueeze(1))
    # The gradient through the mean distance.
    through_mean = torch.dot(slope.flatten(), lengths.flatten()) / (mean.square() * max(rows * (rows - 1), 1))
    return slope.div_(mean).sub_(through_mean).div_(lengths.mul_(2).masked_fill_(lengths == 0, torch.inf))


# A custom operator saves only the squares for the backward pass; autograd would save five more matrices.
_distance = torch.library.custom_op("rkd_plugin::distance", _distance_sums, mutates_args=())
_distance_backward = torch.library.custom_op("rkd_plugin::distance_backward", _distance_gradient, mutates_args=())
_distance.register_fake(lambda student, *_: student.new_empty(student.shape[0]))
_distance_backward.register_fake(lambda weights, student, *_: torch.empty_like(student))


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


def sums(
    student: Tensor, teacher: Tensor, huber_delta: float, distance: Tensor | None, angle: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Both losses of all pairs and triplets, from the rows ``(N, D)`` of both sides, in one operator.

    For small batches, the operators between rows and losses, and their graph, would take longer than the arithmetic.

    Args:
        student: the student's rows.
        teacher: the teacher's rows.
        huber_delta: of both losses.
        distance: weights ``(N,)`` of the rows at which pairs start; None: no distances.
        angle: weights ``(V,)`` of the first V rows as vertices; None: no angles.

    Returns:
        Both losses of each row or vertex, times its weight.
    """
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    found = _sums(student, teacher, distance, angle, huber_delta, needs_gradient)
    return None if distance is None else found[0], None if angle is None else found[1]


@torch.library.custom_op("rkd_plugin::sums", mutates_args=())
def _sums(
    student: Tensor,
    teacher: Tensor,
    distance: Tensor | None,
    angle: Tensor | None,
    huber_delta: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scales = scale(student), scale(teacher)
    squares = forward_squares(student, scales[0]), forward_squares(teacher, scales[1])
    dtype = torch.promote_types(student.dtype, torch.float32)
    found = native.relations(squares, huber_delta, dtype, distance, angle, needs_gradient)
    if found is None:
        rows = scales[0].apply(student.to(widest(student))), scales[1].apply(teacher.to(widest(teacher)))
        found = _in_strips(squares, rows, huber_delta, dtype, distance, angle, needs_gradient)
    losses, gradient = [x + (scales[0].zero + scales[1].zero) for x in found[:2]], found[2]
    if gradient is None:
        return losses[0], losses[1], squares[0].new_zeros(0)
    return losses[0], losses[1], backward_squares(gradient, student, squares[0], scales[0])


def _in_strips(
    squares: tuple[Tensor, Tensor],
    rows: Sequence[Tensor],
    huber_delta: float,
    dtype: torch.dtype,
    distance: Tensor | None,
    angle: Tensor | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `native.relations`, on any device, for distances of any ratio."""
    of_distance, of_angle, gradient = squares[0].new_zeros(0), squares[0].new_zeros(0), None
    # The angles first, while there is no other gradient: this lowers the peak memory.
    if angle is not None:
        weights = angle if needs_gradient else None
        of_angle, gradient = sweep(squares, rows, min(huber_delta, NO_LIMIT), dtype, len(angle), weights)
        of_angle = of_angle * angle
    if distance is not None:
        of_distance = _distance_sums(*squares, huber_delta) * distance
        if needs_gradient:
            by_distance = _distance_gradient(distance, *squares, huber_delta)
            gradient = by_distance if gradient is None else gradient.add_(by_distance)
    return of_distance, of_angle, gradient if needs_gradient else None


@_sums.register_fake
def _(
    student: Tensor, teacher: Tensor, distance: Tensor | None, angle: Tensor | None, huber_delta: float, grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = widest(student)
    lengths = (0 if weights is None else weights.shape[0] for weights in (distance, angle))
    of_distance, of_angle = (student.new_empty(length, dtype=wide) for length in lengths)
    shape = student.shape if grad else (0,)
    return of_distance, of_angle, student.new_empty(shape, dtype=wide)


@torch.library.custom_op("rkd_plugin::sums_backward", mutates_args=())
def _sums_backward(
    of_distance: Tensor,
    of_angle: Tensor,
    gradient: Tensor,
    student: Tensor,
    teacher: Tensor,
    distance: Tensor | None,
    angle: Tensor | None,
    huber_delta: float,
) -> Tensor:
    upstream = torch.cat([of_distance, of_angle])
    factor = upstream[:1].sum()  # 0 without rows
    if not bool((upstream == factor).all()):
        weights = [w if w is None else w * u for w, u in ((distance, of_distance), (angle, of_angle))]
        factor, gradient = torch.ones_like(factor), _sums(student, teacher, *weights, huber_delta, True)[2]
    limit = torch.finfo(student.dtype).max  # saturates, instead of overflowing
    narrow = torch.empty_like(student)
    size = max(ELEMENTS // max(student.shape[1], 1), 1)  # rows that are rounded at once
    for part, into in zip(torch.split(gradient, size), torch.split(narrow, size), strict=True):
        into.copy_((part * factor).clamp_(-limit, limit))
    return narrow


@_sums_backward.register_fake
def _(of_distance: Tensor, of_angle: Tensor, gradient: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


def _save_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, *weights, ctx.huber_delta, _ = inputs
    # Copies, since the caller may overwrite the embeddings before the backward pass.
    ctx.save_for_backward(output[2], student.clone(), teacher.clone(), *weights)


def _differentiate_sums(ctx: Any, of_distance: Tensor, of_angle: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _sums_backward(of_distance, of_angle, *ctx.saved_tensors, ctx.huber_delta), *[None] * 5


_sums.register_autograd(_differentiate_sums, setup_context=_save_sums)
