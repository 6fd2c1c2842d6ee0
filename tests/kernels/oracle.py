"""Both losses and their gradients in decimal numbers of 420 digits: slow, and exact at any magnitude."""

from __future__ import annotations

from decimal import Decimal, localcontext
from itertools import product

import torch

STEP = Decimal(10) ** -345  # of finite differences, far below the smallest float64


def dot(x, y):
    return sum((p * q for p, q in zip(x, y, strict=True)), Decimal(0))


def differences(x):
    return [[[q - p for p, q in zip(a, b, strict=True)] for b in x] for a in x]


def distances(x):
    """Rows of entries that the distance loss compares."""
    lengths = [[dot(d, d).sqrt() for d in row] for row in differences(x)]
    mean = sum(map(sum, lengths)) / (len(x) * (len(x) - 1))
    return [[length / mean for length in row] for row in lengths]


def unit(arm):
    length = dot(arm, arm).sqrt()
    return [p / length for p in arm] if length else arm


def cosines(x):
    """The same for the angle loss: a row for each vertex and arm; an arm and itself span no angle."""
    arms = [[unit(d) for d in row] for row in differences(x)]
    return [
        [Decimal(0) if b is c else dot(b, c) for c in at_vertex] for at_vertex in arms for b in at_vertex
    ]  # fmt: skip


def loss(psi, student, teacher):
    """The mean over all entries, with a threshold of 1."""
    total = Decimal(0)
    for ours, theirs in zip(psi(student), psi(teacher), strict=True):
        for s, t in zip(ours, theirs, strict=True):
            z = abs(s - t)
            total += z * z / 2 if z < 1 else z - Decimal("0.5")
    return total / len(student) ** (2 if psi is distances else 3)


def value_and_gradient(psi, student, teacher):
    """A number, and a float64 tensor like ``student``."""
    with localcontext() as context:
        context.prec = 420
        ours, theirs = ([[Decimal(v) for v in row] for row in x.tolist()] for x in (student, teacher))
        value = loss(psi, ours, theirs)
        gradient = torch.zeros(student.shape, dtype=torch.float64)
        for i, d in product(*map(range, student.shape)):
            original = ours[i][d]
            ours[i][d] = original + STEP
            gradient[i, d] = float((loss(psi, ours, theirs) - value) / STEP)
            ours[i][d] = original
        return float(value), gradient
