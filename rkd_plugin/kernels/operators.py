"""The angle loss of a kernel as a custom operator, which ``torch.compile`` and CUDA graphs do not trace into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def angle_operator(
    name: str, angle: Callable[..., tuple[Tensor, Tensor]], angle_backward: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register ``rkd_plugin::name``, differentiable by the student's squared distances.

    The forward pass computes the gradient for weights of 1, since most reductions have the same weight at each vertex.

    Args:
        name: of the operator.
        angle: squared distances ``(N, N)`` of student and teacher, the rows ``(N, D)`` of both, ``huber_delta``, the
            dtype of the computation, the number of vertices, and whether a gradient is needed -> losses
            ``(vertices,)`` and their gradient ``(N, N)``, or ``(0,)`` if no gradient is needed.
        angle_backward: weights ``(vertices,)``, the gradient for weights of 1, the squared distances and the rows of
            both, ``huber_delta`` and the dtype -> the gradient ``(N, N)`` of the weighted losses.

    Returns:
        The operator, with the arguments and results of ``angle``.
    """
    operator = torch.library.custom_op(f"rkd_plugin::{name}", angle, mutates_args=())
    backward = torch.library.custom_op(f"rkd_plugin::{name}_backward", angle_backward, mutates_args=())

    def shapes(
        student: Tensor,
        teacher: Tensor,
        student_rows: Tensor,
        teacher_rows: Tensor,
        huber_delta: float,
        dtype: torch.dtype,
        vertices: int,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        return student.new_empty(vertices), torch.empty_like(student) if needs_gradient else student.new_empty(0)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *sides, ctx.huber_delta, ctx.dtype, _, _ = inputs
        ctx.save_for_backward(output[1], *sides)

    def differentiate(ctx: Any, weights: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return backward(weights, *ctx.saved_tensors, ctx.huber_delta, ctx.dtype), *[None] * 7

    operator.register_fake(shapes)
    backward.register_fake(lambda weights, gradient, student, *_: torch.empty_like(student))
    operator.register_autograd(differentiate, setup_context=save)
    return operator
