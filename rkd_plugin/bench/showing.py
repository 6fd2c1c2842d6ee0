"""The results as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rkd_plugin import markdown
from rkd_plugin.bench.measuring import RELATIONS

Result = Mapping[str, Any]
SMALLEST_MB = 1.0  # a smaller growth may fit into free memory of the process, unseen
LARGE = 256  # rows from which the leading power of N dominates
HEADS = {
    "rows": "N",
    "loss": "loss",
    "forward_ms": "forward ms",
    "backward_ms": "backward ms",
    "both_ms": "both ms",
    "spread_ms": "IQR ms",
    "memory_mb": "peak growth MB",
    "saved_mb": "saved for backward MB",
    "gradient_error": "gradient's error",
    "speed_up": "times faster than torchdistill",
    "memory_ratio": "times less memory",
}


def table(measured: Mapping[str, Any]) -> str:
    """Markdown; "~" marks an estimate, "-" a missing measurement, "<1" a growth below the resolution."""
    results: Sequence[Result] = measured["results"]
    cases = {(row["student_dim"], row["teacher_dim"], row["dtype"]) for row in results}
    sizes = "; ".join(f"student {student}-d, teacher {teacher}-d, {dtype}" for student, teacher, dtype in sorted(cases))
    growth = [
        f"{loss}: time ~ N^{time:.2f}, memory ~ N^{memory:.2f}"
        for loss in dict.fromkeys(row["loss"] for row in results)
        for time, memory in [(exponent(results, loss, "both_ms"), exponent(results, loss, "memory_mb"))]
        if time is not None and memory is not None
    ]
    text = [markdown.table(list(HEADS.values()), [[_cell(row, name) for name in HEADS] for row in results])]
    others = [name for name in RELATIONS if any(row["loss"] == name for row in results)]
    what = f"RKD-DA beside {', '.join(others)}" if others else "RKD-DA"
    text += ["", f"{what}, {sizes}. " + "; ".join(growth) + (f" (fitted from N = {LARGE} on)." if growth else "")]
    text += ["Measured with " + ", ".join(f"{key} {value}" for key, value in measured["environment"].items()) + "."]
    return "\n".join(line.rstrip() for line in text)


def exponent(results: Sequence[Result], loss: str, what: str) -> float | None:
    """The exponent of N in a power law, fitted to the large batches; None with fewer than three of them."""
    rows = [row for row in results if row["loss"] == loss and row["rows"] >= LARGE]
    points = [(math.log(row["rows"]), math.log(row[what])) for row in rows if row[what] and not row["estimated"]]
    if len({x for x, _ in points}) < 3:
        return None
    x_mean, y_mean = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    slope: float = sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
    return slope


def _cell(row: Result, name: str) -> str:
    value = row[name]
    if isinstance(value, str):
        return value
    if value is None:
        return "-"
    if name == "rows":
        return str(value)
    if name == "gradient_error":
        return f"{value:.0e}"
    if name == "memory_mb" and value < SMALLEST_MB and not row["estimated"]:
        return "<1"
    text = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    mark = "~" if name == "memory_mb" and row["estimated"] else ""
    return mark + text + ("x" if name in ("speed_up", "memory_ratio") else "")


def picture(measured: Mapping[str, Any], path: Path) -> None:
    """Time and memory over N as PNG, all axes logarithmic; estimates are dashed.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("expected matplotlib for a picture, found none; install rkd-plugin[report]")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = {"both_ms": "forward and backward (ms)", "memory_mb": "growth of the peak memory (MB)"}
    for axes, (what, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number, loss in enumerate(dict.fromkeys(row["loss"] for row in measured["results"])):
            rows = [row for row in measured["results"] if row["loss"] == loss and row[what]]
            drawn = [row for row in rows if what != "memory_mb" or row["estimated"] or row[what] >= SMALLEST_MB]
            solid = [row for row in drawn if not row["estimated"]]
            for part, style in ((drawn, "--"), (solid, "o-")):
                power = exponent(measured["results"], loss, what)
                name = loss if power is None else f"{loss}, N^{power:.1f}"
                points = [[row[key] for row in part] for key in ("rows", what)]
                axes.plot(*points, style, color=f"C{number}", label=name if part is solid and solid else None)
        axes.set(xscale="log", yscale="log", xlabel="N, rows of the batch", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(f"RKD-DA on {measured['environment']['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
