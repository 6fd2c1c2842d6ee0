"""The k nearest rows in the teacher's space, found in strips: time ``N^2 D``, memory of one strip.

The relations among neighbours are those of N sets of one row and its k neighbours, which `potentials` computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rkd_plugin.kernels.functions import in_strips
from rkd_plugin.kernels.pairwise import cross_squares, rescale


@torch.library.custom_op("rkd_plugin::nearest", mutates_args=())
def _nearest(x: Tensor, rows: Tensor, columns: Tensor, k: int, own: bool) -> Tensor:
    # A custom operator, since torch.compile cannot trace `nonzero`.
    def strip(part: slice) -> Tensor:
        squares = cross_squares(x[rows[part]], columns)
        limit = torch.finfo(squares.dtype).max
        squares.nan_to_num_(limit, limit)
        if own:
            squares.scatter_(1, rows[part].unsqueeze(1), torch.inf)  # a row is not its own neighbour
        farthest = squares.topk(k, largest=False).values[:, -1:]
        nearer, ties = squares < farthest, squares == farthest
        # Of equal distances, those with the lowest index.
        nearer |= ties & (ties.cumsum(1) <= k - nearer.sum(1, keepdim=True))
        return nearer.nonzero()[:, 1].view(-1, k)

    with torch.no_grad():
        return in_strips(strip, len(rows), max(len(columns), 1), dim=0)


@_nearest.register_fake
def _(x: Tensor, rows: Tensor, columns: Tensor, k: int, own: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], k)


def nearest(x: Tensor, rows: Tensor, columns: Tensor | None, k: int) -> Tensor:
    """``(R, k)``: the indices of the k rows nearest to each of some rows of ``x``, in increasing order.

    Args:
        x: ``(N, D)``.
        rows: ``(R,)``, indices of ``x``.
        columns: ``(M, D)`` with M > k, the rows among which neighbours are searched; None: the other rows of ``x``.
        k: at least 1; of equal distances, those with the lowest index count.
    """
    own, count = columns is None, x.shape[0]
    scaled = rescale(x if columns is None else torch.cat([x, columns]))
    found: Tensor = _nearest(scaled[:count], rows, scaled if own else scaled[count:], k, own)
    return found
