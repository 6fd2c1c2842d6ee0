"""A user's function of 1, 2 or 3 rows, and the strips in which relations are computed.

A strip is computed again in the backward pass, so that only one strip at a time is in memory, whatever the function
computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
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


def in_strips(compute: Callable[[slice], Tensor], total: int, width: int, dim: int = -1) -> Tensor:
    """``compute`` of all slices of ``range(total)``, concatenated, with the memory of one strip.

    Args:
        compute: gives the results of a slice.
        total: the number of results.
        width: how many numbers the computation of one of them needs; 0 if one strip is enough.
        dim: the dimension of the results.
    """
    parts = list(_slices(total, width))
    if len(parts) == 1:
        return compute(parts[0])
    if not torch.is_grad_enabled():
        return torch.cat([compute(part) for part in parts], dim)
    strips = [checkpoint(compute, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(strips, dim)


def _slices(total: int, width: int) -> Iterator[slice]:
    size = max(ELEMENTS // width, 1) if width else max(total, 1)
    for start in range(0, max(total, 1), size):
        yield slice(start, min(start + size, total))
