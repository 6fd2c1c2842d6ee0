"""The paper's formulas in their most readable form: the oracle of all tests.

For small batches only, since it needs ``O(N^2 D + N^3)`` memory. It computes in float64 if the device has it, with
differentiable operations of PyTorch only, so that derivatives of every order and the transforms of ``torch.func`` work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rkd_plugin.kernels.pairwise import normalise, rescale, safe_sqrt


def relations(x: Tensor) -> Tensor:
    """``(N, N, D)``: the difference vector from every row to every row."""
    x = rescale(x)
    return x.unsqueeze(0) - x.unsqueeze(1)


def huber(student_psi: Tensor, teacher_psi: Tensor, huber_delta: float) -> Tensor:
    """The Huber loss of each entry; unlike PyTorch's, it has all derivatives, in reverse and forward mode."""
    difference = student_psi - teacher_psi
    slope = difference.clamp(-huber_delta, huber_delta)
    return slope * (difference - slope / 2)


def distance(
    student: Tensor, teacher: Tensor, huber_delta: float, pairs: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Equations 4 to 6: Huber loss between distances divided by their mean."""

    def psi(differences: Tensor) -> Tensor:
        return normalise(safe_sqrt(differences.square().sum(-1)))

    losses = huber(psi(student), psi(teacher), huber_delta)
    if pairs is not None:
        return losses.new_zeros(losses.shape[0]).index_add(0, pairs[0], losses[pairs])
    return losses.sum(1)


def angle(
    student: Tensor,
    teacher: Tensor,
    huber_delta: float,
    triplets: tuple[Tensor, Tensor, Tensor] | None = None,
    vertices: int | None = None,
) -> Tensor:
    """Equations 7 to 9: Huber loss between the cosines of the angles of all triplets."""

    def psi(differences: Tensor) -> Tensor:
        differences = differences[:vertices]
        lengths = safe_sqrt(differences.square().sum(-1, keepdim=True))
        # A division, as the derivative of an inverse length would overflow below 1e-103.
        units = differences / lengths.masked_fill(lengths == 0, torch.inf)
        return units @ units.mT

    losses = huber(psi(student), psi(teacher), huber_delta)
    # An arm and itself span no angle. If it has length 0 on one side only, the formula compares 0 with 1.
    losses = losses.masked_fill(torch.eye(losses.shape[1], dtype=torch.bool, device=losses.device), 0)
    if triplets is not None:
        return losses.new_zeros(losses.shape[0]).index_add(0, triplets[0], losses[triplets])
    return losses.sum((1, 2))
