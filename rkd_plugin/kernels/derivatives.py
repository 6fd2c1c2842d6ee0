"""Refuse the derivatives that a computation does not have, where PyTorch would give a wrong number in silence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def transformed(x: Tensor) -> str | None:
    """What else than autograd's reverse mode works on ``x``: a transform of ``torch.func``, forward mode, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    tangent = torch.autograd.forward_ad.unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    return None if tangent is None else "one in forward mode"


def first_only(x: Tensor, where: str, advice: str) -> Tensor:
    """``x`` itself; what is computed from it has a gradient, which may be kept in a graph but not differentiated again.

    Args:
        x: ``(N, D)``.
        where: the loss and what of it has no further derivatives, for the error.
        advice: what to do instead, for the error.

    Raises:
        RuntimeError: here under a transform of ``torch.func``; where a forward-mode derivative is taken; and where a
            gradient by ``x`` is differentiated.
    """
    message = f"{where}: expected a first derivative in reverse mode, got {{}}; {advice}"
    # Each would take the derivative of an operator that is written in Python for 0.
    if (how := transformed(x)) is not None:
        raise RuntimeError(message.format(how))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    once: Tensor = _FirstOnly.apply(x, x[:0].clone(), message)
    return once


class _FirstOnly(torch.autograd.Function):
    """The identity, with `_Refused` as its backward pass.

    ``path`` connects that to ``x`` in the graph, or a second derivative by ``x`` would never come across it. It has no
    rows, so that ``x`` itself may be overwritten before the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Tensor, message: str) -> Tensor:
        ctx.save_for_backward(path)
        ctx.message = message
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Refused.apply(grad, *ctx.saved_tensors, ctx.message), None, None


class _Refused(torch.autograd.Function):
    """The identity, without a derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, path: Tensor, message: str) -> Tensor:
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(ctx.message.format("a second one"))
