"""Time, memory and error of the kernels, compared with torchdistill's own loss on the same data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rkd_plugin.bench.measuring import PEER, Case, Row, batch, check, measure, peak_growth, peer_bytes
from rkd_plugin.bench.showing import picture, table
from rkd_plugin.environment import environment

__all__ = ["PEER", "Case", "batch", "check", "main", "measure", "peak_growth", "peer_bytes", "read", "show"]


def main(
    sizes: Sequence[int] = (128, 512, 1024),
    impls: Sequence[str] = (),
    student_dim: int = 128,
    teacher_dim: int = 512,
    dtype: str = "float32",
    device: str | None = None,
    repeats: int = 5,
    peer_limit_gb: float = 8.0,
) -> dict[str, Any]:
    """Check and measure forward and backward of RKD-DA, and of other relations.

    Args:
        sizes: numbers of rows N.
        impls: kernels of RKD-DA, or names of `RELATIONS`; if empty, all that can run here, ``reference`` up to N = 128.
        student_dim: width of the student's embeddings.
        teacher_dim: width of the teacher's embeddings.
        dtype: of both, such as ``"bfloat16"``.
        device: ``None`` takes a GPU if there is one.
        repeats: timed repetitions per size; the result is their median.
        peer_limit_gb: torchdistill's loss does not run if it needs more memory than this, in GB; its row then has an
            estimate of the memory, and no times.

    Returns:
        ``environment`` and ``results``, as ``--json`` prints them.

    Raises:
        ValueError: if a dtype, a size or the number of repetitions cannot be measured.
        RuntimeError: if a kernel cannot run here, or disagrees with ``reference``.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"bench: expected dtype to be a floating-point dtype of torch, got {dtype!r}")
    cases = [Case(rows, student_dim, teacher_dim, kind, device) for rows in sizes]
    chosen = list(impls) or ["chunked", "reference"]
    if not impls and device.startswith("cuda") and find_spec("triton") is not None:
        chosen.insert(0, "fused")
    for impl in chosen:
        check(impl, device)
    results = [row for case in cases for row in measure(case, chosen, bool(impls), repeats, peer_limit_gb)]
    return {"environment": environment(device), "results": [row._asdict() for row in results]}


def read(path: Path) -> dict[str, Any]:
    """The result of `main`, from a file with the output of ``--json``.

    Raises:
        OSError: if there is no such file.
        ValueError: if it has other content.
    """
    try:
        measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = "environment" in measured and all({*row} >= {*Row._fields} for row in measured["results"])
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: expected what `rkd bench --json` printed, got something else; measure it again")
    return measured


def show(measured: dict[str, Any], as_json: bool = False, path: Path | None = None) -> str:
    """The result of `main` as Markdown or JSON; also drawn into the file ``path``, if given."""
    if path is not None:
        picture(measured, path)
    return json.dumps(measured, indent=2) if as_json else table(measured)
