"""Time and peak memory of the kernels, beside torchdistill's own loss on the same data.

Forward, backward and both of RKD-DA are timed through the public function, the contenders taking turns within one loop
so that a noisy machine is noisy for all. Memory is the *growth* of the peak, each measurement in a fresh process on a
CPU. A kernel that disagrees with ``reference`` gets no speed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rkd_plugin.functional import Impl, rkd_da_loss

Loss = Callable[[Tensor, Tensor], Tensor]

PEER = "torchdistill"
TEACHER_WIDTH, STUDENT_WIDTH = 512, 128
REFERENCE_ROWS = 128  # up to here the O(N^2 D + N^3) reference is worth a row
CHECK_ROWS = 64
WARM_UPS = 2
METER = 1e6  # bytes; a growth below this is lost in what the process had spare
# Relative to the largest entry: float32 keeps 6e-8, and the sums of a batch of 64 lose less than two digits more.
AGREEMENT = {torch.float64: 1e-10, torch.float32: 5e-6}


class Row(NamedTuple):
    """One line of the table; ``None`` where nothing was measured."""

    rows: int
    loss: str
    forward_ms: float | None
    backward_ms: float | None
    both_ms: float | None
    spread_ms: float | None
    memory_mb: float
    estimated: bool
    speed_up: float | None
    memory_ratio: float | None


def main(
    sizes: Sequence[int] = (128, 512, 1024),
    repeats: int = 5,
    as_json: bool = False,
    peer_limit_gb: float = 8.0,
    device: str | None = None,
) -> int:
    """Check, measure and print; the exit status.

    Args:
        sizes: numbers of rows N.
        repeats: timed repetitions per size; the median is printed.
        as_json: JSON instead of a Markdown table.
        peer_limit_gb: above this estimate of its memory torchdistill is not run, and the estimate is printed.
        device: ``None`` takes a GPU if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check("chunked", device)
    measured = [row for rows in sizes for row in measure(rows, repeats, peer_limit_gb, device)]
    where = environment(device)
    if as_json:
        print(json.dumps({"environment": where, "results": [row._asdict() for row in measured]}, indent=2))
    else:
        print(table(measured))
        print(", ".join(f"{key} {value}" for key, value in where.items()))
    return 0


def check(impl: Impl, device: str) -> None:
    """Raise unless ``impl`` gives the value and gradient that ``reference`` gives in float64."""
    for dtype, limit in AGREEMENT.items():
        student, teacher = (x.to(dtype) for x in batch(CHECK_ROWS, device))
        truth = _value_and_gradient(_ours("reference"), student.double(), teacher.double())
        ours = _value_and_gradient(_ours(impl), student, teacher)
        for what, x, y in zip(("value", "gradient"), ours, truth, strict=True):
            error = float((x - y).abs().max() / y.abs().max())
            if not error <= limit:
                raise RuntimeError(
                    f"bench: impl {impl!r} must agree with 'reference' to {limit:.0e} before it gets a speed, "
                    f"got a {what} that is off by {error:.1e} in {dtype} at N = {CHECK_ROWS}"
                )


def measure(rows: int, repeats: int, peer_limit_gb: float, device: str) -> list[Row]:
    """One `Row` per contender at ``rows`` rows."""
    if rows < 2 or repeats < 1:
        raise ValueError(f"bench: at least 2 rows and 1 repetition are needed, got {rows} and {repeats}")
    names = ["chunked", *(["reference"] if rows <= REFERENCE_ROWS else [])]
    peer_runs = peer_bytes(rows) <= peer_limit_gb * 1e9
    names += [PEER] if peer_runs else []
    times = _times({name: _contender(name) for name in names}, *batch(rows, device), repeats)
    memory = {PEER: float(peer_bytes(rows))} | {name: float(peak_growth(name, rows, device)) for name in names}

    def row(name: str) -> Row:
        ratio = memory[PEER] / memory[name] if name == PEER or memory[name] >= METER else None
        if name not in times:
            return Row(rows, name, None, None, None, None, memory[name] / 1e6, True, None, ratio)
        low, both, high = (float(q) for q in times[name][:, 2].quantile(torch.tensor([0.25, 0.5, 0.75]).double()))
        forward, backward = (float(t) for t in times[name][:, :2].quantile(0.5, dim=0))
        speed_up = float(times[PEER][:, 2].quantile(0.5)) / both if peer_runs else None
        return Row(rows, name, forward, backward, both, high - low, memory[name] / 1e6, False, speed_up, ratio)

    return [row(name) for name in (names if peer_runs else [*names, PEER])]


def table(measured: Sequence[Row]) -> str:
    """Markdown; "~" marks an estimate and "-" what was not measured."""

    def cell(value: float | None, unit: str = "") -> str:
        return "-" if value is None else f"{value:.3g}{unit}" if value < 1000 else f"{value:,.0f}{unit}"

    head = (
        "N", "loss", "forward ms", "backward ms", "both ms", "IQR ms", "peak growth MB",
        f"times faster than {PEER}", "times less memory",
    )  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for r in measured:
        times = (cell(t) for t in (r.forward_ms, r.backward_ms, r.both_ms, r.spread_ms))
        measured_mb = "<1" if r.memory_mb * 1e6 < METER else cell(r.memory_mb)
        memory = f"~{cell(r.memory_mb)}" if r.estimated else measured_mb
        lines.append((str(r.rows), r.loss, *times, memory, cell(r.speed_up, "x"), cell(r.memory_ratio, "x")))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def environment(device: str) -> dict[str, str]:
    """Where the numbers come from: commit, hardware, versions."""
    from importlib.metadata import version

    import rkd_plugin

    # Only a checkout of this project has its commit; an installed package may lie inside somebody else's repository.
    checkout = Path(__file__).parents[1]
    commit = f"v{rkd_plugin.__version__}"
    if (checkout / ".git").exists():
        git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "commit": commit,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        PEER: version(PEER),
    }


def peer_bytes(rows: int) -> int:
    """Peak memory that the N^3 form needs for forward and backward in float32, within 1 % from N = 256 on."""
    return 4 * (3 * rows**3 + 2 * rows**2 * (TEACHER_WIDTH + STUDENT_WIDTH))


def batch(rows: int, device: str) -> tuple[Tensor, Tensor]:
    """The same student and teacher for every contender; drawn on the CPU, whose numbers do not depend on the device."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, width, generator=generator) for width in (STUDENT_WIDTH, TEACHER_WIDTH))
    return student.to(device), teacher.to(device)


def _growth_here(name: str, rows: int, device: str) -> int:
    loss = _contender(name)
    student, teacher = batch(rows, device)
    _value_and_gradient(loss, *batch(8, device))  # what the first call loads is not the batch's
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _value_and_gradient(loss, student, teacher)
        return torch.cuda.max_memory_allocated() - before
    _forget_peak()
    before = _peak()
    _value_and_gradient(loss, student, teacher)
    return _peak() - before


def peak_growth(name: str, rows: int, device: str) -> int:
    """Bytes by which forward and backward raise the peak memory; on a CPU that of a fresh process."""
    if device.startswith("cuda"):
        return _growth_here(name, rows, device)
    code = f"from rkd_plugin.bench import _growth_here; print(_growth_here({name!r}, {rows}, {device!r}))"
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    # glibc gives blocks above this back as soon as they are freed, so that the peak is of live memory, not of its gaps.
    # One thread, since their number changes no allocation and on a busy machine they wait for each other.
    env = os.environ | {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def _forget_peak() -> None:
    # Without Linux the peak of what came before stays: the growth may then read too small, never too large.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    # Not ru_maxrss where it can be helped: on Linux that survives exec, so it would start at the parent's peak.
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _ours(impl: Impl) -> Loss:
    return lambda student, teacher: rkd_da_loss(student, teacher, impl=impl)


def _peer() -> Loss:
    import torchvision  # noqa: F401  # before torchdistill, whose registries look for it in sys.modules
    from torchdistill.losses.mid_level import RKDLoss

    rkd = RKDLoss("out", "out", dist_factor=1.0, angle_factor=2.0, reduction="mean")

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        value: Tensor = rkd({"out": {"output": student}}, {"out": {"output": teacher}})
        return value

    return loss


def _contender(name: str) -> Loss:
    if name == PEER:
        return _peer()
    impl: Impl = "reference" if name == "reference" else "chunked"
    return _ours(impl)


def _value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def _times(contenders: dict[str, Loss], student: Tensor, teacher: Tensor, repeats: int) -> dict[str, Tensor]:
    """Milliseconds ``(repeats, 3)`` of forward, backward and both, for every contender."""
    student = student.requires_grad_()

    def now() -> float:
        if student.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(WARM_UPS + repeats):
        for name, loss in contenders.items():
            # An untimed call first, since the one after another contender pays for what that one did to the memory.
            torch.autograd.grad(loss(student, teacher), student)
            start = now()
            value = loss(student, teacher)
            middle = now()
            torch.autograd.grad(value, student)
            end = now()
            samples[name].append([middle - start, end - middle, end - start])
            del value  # frees what the graph kept, before the next contender starts
    return {name: torch.tensor(rows[WARM_UPS:], dtype=torch.float64) * 1000 for name, rows in samples.items()}
