"""What the cosines of embeddings are worth: by rank, and as they are, for a threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROWS = 1024  # of a matrix of cosines at once


def unrelated_cosine(vectors: Tensor, labels: Tensor) -> float:
    """The mean cosine of rows ``(M, D)`` of length 1 over all pairs of different classes.

    Example:
        >>> unrelated_cosine(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]), torch.tensor([0, 0, 1]))
        0.6
    """
    _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = vectors.new_zeros(len(counts), vectors.shape[1]).index_add(0, classes, vectors)
    total = sums.sum(0).square().sum() - sums.square().sum()
    return round(float(total / (len(labels) ** 2 - counts.square().sum())), 6)


def cosine_error(student: Tensor, teacher: Tensor) -> float:
    """The mean absolute difference between the cosines of rows ``(M, D_s)`` and ``(M, D_t)`` of length 1, all pairs."""
    blocks = zip(torch.split(student, ROWS), torch.split(teacher, ROWS), strict=True)
    total = sum((a @ student.T - b @ teacher.T).abs().sum() for a, b in blocks)
    return float(total) / (len(student) * max(len(student) - 1, 1))  # the diagonal is 0


def spearman(cosines: Tensor, scores: Sequence[float]) -> float:
    """The rank correlation of cosines ``(P,)`` and scores.

    Example:
        >>> spearman(torch.tensor([0.9, 0.1, 0.5]), [5.0, 0.0, 2.5])
        1.0
    """
    from scipy.stats import spearmanr  # takes seconds, which only a run needs

    return float(spearmanr(cosines.cpu().numpy(), scores).statistic)
