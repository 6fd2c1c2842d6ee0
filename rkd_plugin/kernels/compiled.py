"""The cosines of ``chunked`` with ``torch.compile``: one vertex at a time, a single pass over its ``N^2`` cosines.

On a CPU this is 1.4 times as fast as the strips of ``chunked`` at 384 rows, and 2.3 times at 1024, since only sums are
written to memory. The first call compiles C++ for 5 to 20 seconds, less if PyTorch finds the result in its cache on
disk; one compilation serves every N. Without a compiler, or if ``torch.compile`` is disabled, ``chunked`` uses its
strips, without a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

FAILURES: list[Exception] = []  # why the compiled path is not used any more
ROWS = 384  # the smallest batch; below, the calls cost more than their arithmetic


def sweep(sides: Sequence[tuple[Tensor, Tensor]], huber_delta: float, weights: Tensor) -> tuple[Tensor, ...] | None:
    """Sums over all pairs of arms at each of the first V rows.

    Args:
        sides: halved squares and inverse lengths, ``(N, N)`` each, of student and teacher.
        huber_delta: of the loss.
        weights: of the vertices, ``(V,)``.

    Returns:
        Losses ``(V,)``; ``sum_c P`` and ``sum_c W * cos`` at ``[a, b]``, ``(2, V, N)``; ``sum_a weights_a * P`` at
        ``[b, c]``. None if this cannot run.
    """
    (halves, lengths), (teacher_halves, teacher_lengths) = sides
    rows = len(halves)
    if rows < ROWS or halves.device.type != "cpu" or FAILURES or torch._dynamo.config.disable:
        return None
    losses = weights.new_empty(len(weights))
    arms, opposite = lengths.new_empty(2, len(weights), rows), lengths.new_zeros(rows, rows)
    distinct = 1 - torch.eye(rows, dtype=lengths.dtype)
    delta = lengths.new_tensor(huber_delta)
    if teacher_halves.dtype != halves.dtype:  # two compilations instead of four
        halves, teacher_halves = halves.to(weights.dtype), teacher_halves.to(weights.dtype)
    shared = halves, teacher_halves, distinct, delta, opposite
    vertex = _compiled(torch.get_num_threads())
    try:
        for a in range(len(weights)):
            own = halves[a], lengths[a], teacher_halves[a], teacher_lengths[a], weights[a]
            losses[a] = vertex(*shared, *own, arms[0, a], arms[1, a])
    except Exception as error:  # a missing or broken compiler raises many types
        FAILURES.append(error)
        return None
    return losses, arms, opposite


@cache
def _compiled(threads: int) -> Any:
    # Without the option, the cache on disk may return code for another number of threads.
    return torch.compile(_vertex, dynamic=True, options={"cpp.threads": threads})


def _vertex(
    halves: Tensor,
    teacher_halves: Tensor,
    distinct: Tensor,
    delta: Tensor,
    opposite: Tensor,
    h: Tensor,
    r: Tensor,
    teacher_h: Tensor,
    teacher_r: Tensor,
    weight: Tensor,
    arm: Tensor,
    turn: Tensor,
) -> Tensor:
    """The loss of one vertex with the rows ``h`` and ``r``; writes ``arm`` and ``turn``, and adds to ``opposite``."""
    scale = r[:, None] * r
    cosine = (h - halves + h[:, None]).to(r.dtype) * scale
    # Both cosines are rounded before they are compared, so that equal relations differ by exactly 0.
    teacher_cosine = (teacher_h - teacher_halves + teacher_h[:, None]).to(r.dtype) * (teacher_r[:, None] * teacher_r)
    difference = (cosine - teacher_cosine) * distinct
    slope = torch.minimum(torch.maximum(difference, -delta), delta)
    scaled = slope * scale
    loss = ((difference - 0.5 * slope) * slope).sum(1).to(weight.dtype).sum()
    arm.copy_(scaled.sum(1))
    turn.copy_((slope * cosine).sum(1))
    opposite.add_((scaled * weight).to(opposite.dtype))
    # Returned, not written: in another compilation, PyTorch 2.15 loses writes to a tensor without dimensions.
    return loss
