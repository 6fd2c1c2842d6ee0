"""Raise for derivatives that a computation does not have, for which PyTorch would give a wrong number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def transformed(x: Tensor) -> str | None:
    """The kind of differentiation of ``x`` other than reverse mode, for an error message; None if there is none."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    tangent = torch.autograd.forward_ad.unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    return None if tangent is None else "one in forward mode"


def first_only(x: Tensor, where: str, advice: str) -> Tensor:
    """``x``, with a first derivative in reverse mode only; ``create_graph=True`` works, a second derivative raises.

    Args:
        x: ``(N, D)``.
        where: the loss and its part without further derivatives, for the error message.
        advice: what to do instead, for the error message.

    Raises:
        RuntimeError: at once under a transform of ``torch.func`` or in forward mode; in the backward pass if a gradient
            with respect to ``x`` is differentiated.
    """
    message = f"{where}: expected a first derivative in reverse mode, got {{}}; {advice}"
    # In these modes, the derivative of an operator that is written in Python would be 0.
    if (how := transformed(x)) is not None:
        raise RuntimeError(message.format(how))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    once: Tensor = _FirstOnly.apply(x, x[:0].clone(), message)
    return once


class _FirstOnly(torch.autograd.Function):
    """The identity, with `_NoDerivative` as its backward pass.

    ``path`` connects `_NoDerivative` to ``x`` in the graph; without it a second derivative with respect to ``x`` would
    not reach it. It has no rows, so that ``x`` may be overwritten before the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Tensor, message: str) -> Tensor:
        ctx.save_for_backward(path)
        ctx.message = message
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _NoDerivative.apply(grad, *ctx.saved_tensors, ctx.message), None, None


class _NoDerivative(torch.autograd.Function):
    """The identity; its derivative raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, path: Tensor, message: str) -> Tensor:
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(ctx.message.format("a second one"))
