"""A user's function of 1, 2 or 3 rows, and the strips in which relations are computed.

A strip is computed again in the backward pass, so that only one strip at a time is in memory, whatever the function
computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

ELEMENTS = 2**21  # numbers of the largest tensor of a strip


def number_of_rows(function: Callable[..., Any]) -> int | None:
    """How many positional arguments without a default ``function`` has; None if it has no readable signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function that is written in C
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def related(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """The relations of rows ``(..., D)`` whose other dimensions broadcast; one number for each tuple of rows.

    A function of one row may return several numbers ``(..., E)``.

    Raises:
        TypeError: if ``function`` does not return a tensor.
        ValueError: if the tensor has another shape.
    """
    relations = function(*rows)
    if not isinstance(relations, Tensor):
        raise TypeError(f"potential: expected a tensor from the function, got {type(relations).__name__}")
    shape = torch.broadcast_shapes(*(x.shape[:-1] for x in rows))  # type: ignore[no-untyped-call]
    if len(rows) == 1 and relations.shape[: len(shape)] == shape:
        return relations if relations.ndim > len(shape) else relations.unsqueeze(-1)
    if relations.ndim != len(shape) or any(r not in (1, n) for r, n in zip(relations.shape, shape, strict=True)):
        raise ValueError(
            f"potential: expected one number for each tuple of rows, shape {tuple(shape)}, got "
            f"{tuple(relations.shape)}; reduce the last dimension, as in (x - y).norm(dim=-1)"
        )
    return relations.expand(shape)


def in_strips(compute: Callable[..., Tensor], total: int, width: int, *inputs: Tensor | None, dim: int = -1) -> Tensor:
    """``compute(part, *inputs)`` of all slices of ``range(total)``, concatenated, with the memory of one strip.

    Args:
        compute: gives the results of a slice from the inputs.
        total: the number of results.
        width: how many numbers the computation of one of them needs; 0 if one strip is enough.
        inputs: tensors that may need a gradient, or None. Gradients of other tensors of ``compute``, such as parameters
            of a user's function, need more memory: a small part of the computation stays for each strip.
        dim: the dimension of the results.
    """
    parts = list(_slices(total, width))
    if len(parts) == 1:
        return compute(parts[0], *inputs)
    # The compiler cannot trace a Function with `torch.autograd.grad`.
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _other_leaves(compute, parts[0], inputs)):
        strips = [checkpoint(compute, part, *inputs, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat(strips, dim)
    results: Tensor = _Strips.apply(compute, parts, dim, *inputs)
    return results


class _Strips(torch.autograd.Function):
    """All strips as one node of the graph.

    A node for each strip, as of `checkpoint`, is a small block of memory between the large ones of two strips. The
    allocator then cannot join these when they are free, and the memory of the process grows with every strip.
    """

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., Tensor], parts: list[slice], dim: int, *inputs: Tensor | None
    ) -> Tensor:
        ctx.compute, ctx.parts, ctx.dim = compute, parts, dim
        ctx.save_for_backward(*inputs)
        first = compute(parts[0], *inputs)
        shape = list(first.shape)
        shape[dim] = parts[-1].stop
        results = first.new_empty(shape)
        for part in parts:
            strip = results.narrow(dim, part.start, part.stop - part.start)
            strip.copy_(compute(part, *inputs) if part.start else first)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = _detached(ctx.saved_tensors, ctx.needs_input_grad[3:])
        needed = [x for x in inputs if x is not None and x.requires_grad]
        totals = [torch.zeros_like(x) for x in needed]
        for part in ctx.parts:
            # As in the forward pass, which is outside of autocast.
            with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
                strip = ctx.compute(part, *inputs)
            if strip.requires_grad:
                upstream = grad.narrow(ctx.dim, part.start, part.stop - part.start)
                found = torch.autograd.grad(strip, needed, upstream, allow_unused=True)
                for sum_, gradient in zip(totals, found, strict=True):
                    if gradient is not None:
                        sum_ += gradient
        of_input = iter(totals)
        return None, None, None, *(next(of_input) if x is not None and x.requires_grad else None for x in inputs)


def _detached(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    return [x if x is None else x.detach().requires_grad_(needs) for x, needs in zip(inputs, needed, strict=True)]


def _other_leaves(compute: Callable[..., Tensor], part: slice, inputs: Sequence[Tensor | None]) -> bool:
    """Whether a strip has a gradient with respect to tensors that are not among its inputs."""
    leaves = _detached(inputs, [x is not None and x.requires_grad for x in inputs])
    own = {id(x) for x in leaves}
    nodes, seen = [compute(part, *leaves).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in own:
            return True
        nodes += [before for before, _ in node.next_functions]
    return False


def _slices(total: int, width: int) -> Iterator[slice]:
    size = max(ELEMENTS // width, 1) if width else max(total, 1)
    for start in range(0, max(total, 1), size):
        yield slice(start, min(start + size, total))
