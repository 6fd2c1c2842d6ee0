"""Write rkd.json: the losses as the authors' code defines them, in plain Python floats (float64), one term at a time.

It imports nothing of this project, so that the values are independent. Run ``python tests/golden/make_golden.py``.
"""

from __future__ import annotations

import json
import math
import platform
import random
from itertools import product
from pathlib import Path

Rows = list[list[float]]

PROVENANCE = {
    "definition": "distance: Euclidean distances of all N x N pairs, each side divided by the mean of its positive "
    "entries; angle: cosines between unit difference vectors of all N x N x N triples, 0 for a vector of length 0; "
    "both: smooth L1 with delta 1, mean over all entries, degenerate ones included",
    "source": "github.com/lenscloth/RKD, master @0a6c3c0 (definition only)",
    "arithmetic": f"float64, Python {platform.python_version()}, math.fsum; neither numpy nor torch",
}


def smooth_l1(x: float, y: float) -> float:
    error = abs(x - y)
    return error * error / 2 if error < 1 else error - 0.5


def difference(x: Rows, i: int, j: int) -> list[float]:
    return [p - q for p, q in zip(x[i], x[j], strict=True)]


def normalised_distances(x: Rows) -> list[float]:
    distances = [math.hypot(*difference(x, i, j)) for i, j in product(range(len(x)), repeat=2)]
    positive = [d for d in distances if d > 0]
    return [d / (math.fsum(positive) / len(positive)) for d in distances]


def unit(v: list[float]) -> list[float]:
    length = math.hypot(*v)
    return [c / length for c in v] if length else v


def cosines(x: Rows) -> list[float]:
    """At vertex j, between the arms to i and k."""
    units = {(i, j): unit(difference(x, i, j)) for i, j in product(range(len(x)), repeat=2)}
    return [
        math.fsum(p * q for p, q in zip(units[i, j], units[k, j], strict=True))
        for j, i, k in product(range(len(x)), repeat=3)
    ]


def mean_loss(student: list[float], teacher: list[float]) -> float:
    return math.fsum(map(smooth_l1, student, teacher)) / len(student)


def main() -> None:
    draw = random.Random(0)
    cases = []
    # The rows of the last case are so unevenly spread that some errors are in the linear part of the loss.
    for rows, student_width, teacher_width, power in (
        (2, 2, 3, 1),
        (3, 1, 2, 1),
        (5, 3, 4, 1),
        (9, 4, 2, 1),
        (12, 2, 3, 5),
    ):
        student, teacher = (
            [[round(draw.gauss(0, 1), 3) ** power for _ in range(width)] for _ in range(rows)]
            for width in (student_width, teacher_width)
        )
        distance = mean_loss(normalised_distances(student), normalised_distances(teacher))
        angle = mean_loss(cosines(student), cosines(teacher))
        cases.append({"student": student, "teacher": teacher, "distance": distance, "angle": angle})
    path = Path(__file__).with_name("rkd.json")
    path.write_text(json.dumps({"provenance": PROVENANCE, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
