"""Forward and backward of RKD-DA and of other relations: time, memory and error.

The losses alternate in one loop, so that noise of the machine affects all of them. Every call gets a new teacher
tensor, as in a training step. Memory is the *growth* of the peak; on a CPU, each measurement has a new process. A
kernel that disagrees with ``reference`` raises before it is timed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rkd_plugin.functional import rkd_da_loss
from rkd_plugin.options import Impl
from rkd_plugin.relational import relational_loss

Loss = Callable[[Tensor, Tensor], Tensor]

PEER = "torchdistill"
RELATIONS: dict[str, dict[str, Any]] = {  # the options of `relational_loss`, by the name of a contender
    "distance_16": {"potential": "distance", "neighbours": 16},
    "angle_16": {"potential": "angle", "neighbours": 16},
    "softmax": {"potential": "cosine", "penalty": "kl", "scale": "softmax", "temperature": 0.1},
}
REFERENCE_ROWS = 128  # up to here the O(N^2 D + N^3) reference has a row even if it is not requested
TRUTH_ROWS = 2048  # up to here the error is measured, against float64
# Rows, and anchors of a batch that is larger than a tile, since ``reference`` cannot compute all of them.
CHECKED = (64, None), (700, 8)
WARM_UPS = 2
STEADY_ROWS = 256  # a batch with half of them is timed four times as often, at most 64 times
SMALLEST_GROWTH = 1e6  # bytes; less may fit into free memory of the process, unseen
# Relative to the largest entry: float32 rounds by 6e-8, and the sums of a batch of 64 lose less than two digits more.
AGREEMENT = {torch.float64: 1e-10, torch.float32: 5e-6}


class Case(NamedTuple):
    """A batch: rows, widths, dtype and device."""

    rows: int
    student_dim: int = 128
    teacher_dim: int = 512
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


class Row(NamedTuple):
    """One line of the table; ``None`` where nothing was measured."""

    rows: int
    student_dim: int
    teacher_dim: int
    dtype: str
    loss: str
    forward_ms: float | None
    backward_ms: float | None
    both_ms: float | None
    spread_ms: float | None  # between the quartiles
    memory_mb: float
    estimated: bool  # the memory
    saved_mb: float | None  # for backward, beyond the inputs
    value_error: float | None  # relative, against float64
    gradient_error: float | None  # relative to the largest entry
    speed_up: float | None
    memory_ratio: float | None


def check(impl: str, device: str) -> None:
    """Raise unless ``impl`` gives the value and gradient that ``reference`` gives in float64.

    Args:
        impl: the kernel, or a name of `RELATIONS`.
        device: where it runs.

    Raises:
        RuntimeError: if it disagrees.
    """
    for dtype, limit in AGREEMENT.items():
        for rows, anchors in CHECKED:
            case = Case(rows, 8 if anchors else 128, 8 if anchors else 512, dtype, device)
            truth = _contender(impl if impl in RELATIONS else "reference", anchors, "reference")
            errors = _errors(_contender(impl, anchors), truth, *batch(case))
            for what, error in zip(("value", "gradient"), errors, strict=True):
                if not error <= limit:
                    raise RuntimeError(
                        f"bench: expected impl {impl!r} to agree with 'reference' to {limit:.0e} before it is "
                        f"timed, got a {what} with an error of {error:.1e} in {dtype} at N = {case.rows}"
                    )


def measure(case: Case, impls: Sequence[str], all_of_them: bool, repeats: int, peer_limit_gb: float) -> list[Row]:
    """One `Row` per contender; ``reference`` only for small batches, unless ``all_of_them``."""
    if case.rows < 2 or repeats < 1:
        raise ValueError(f"bench: expected at least 2 rows and 1 repetition, got {case.rows} and {repeats}")
    names = [name for name in impls if name != "reference" or all_of_them or case.rows <= REFERENCE_ROWS]
    peer_runs = peer_bytes(case) <= peer_limit_gb * 1e9
    names += [PEER] if peer_runs else []
    times = _times({name: _contender(name) for name in names}, *batch(case), repeats)
    memory = {PEER: float(peer_bytes(case))} | {name: float(peak_growth(name, case)) for name in names}

    def row(name: str) -> Row:
        dtype = str(case.dtype).removeprefix("torch.")
        what = (case.rows, case.student_dim, case.teacher_dim, dtype, name)
        comparable = name not in RELATIONS  # with torchdistill's loss
        seen = name == PEER or memory[name] >= SMALLEST_GROWTH
        ratio = memory[PEER] / memory[name] if seen and comparable else None
        if name not in times:
            return Row(*what, None, None, None, None, memory[name] / 1e6, True, None, None, None, None, ratio)
        low, both, high = (float(q) for q in times[name][:, 2].quantile(torch.tensor([0.25, 0.5, 0.75]).double()))
        forward, backward = (float(t) for t in times[name][:, :2].quantile(0.5, dim=0))
        speed_up = float(times[PEER][:, 2].quantile(0.5)) / both if peer_runs and comparable else None
        saved = _saved_bytes(_contender(name), *batch(case)) / 1e6
        known = case.rows <= TRUTH_ROWS
        truth = _contender(name if name in RELATIONS else "chunked")
        value, gradient = _errors(_contender(name), truth, *batch(case)) if known else (None, None)
        growth = memory[name] / 1e6
        return Row(*what, forward, backward, both, high - low, growth, False, saved, value, gradient, speed_up, ratio)

    return [row(name) for name in (names if peer_runs else [*names, PEER])]


def peer_bytes(case: Case) -> int:
    """The peak memory of torchdistill's loss, forward and backward, in bytes; within 1 % from N = 256 on."""
    widths = case.teacher_dim + case.student_dim
    return case.dtype.itemsize * (3 * case.rows**3 + 2 * case.rows**2 * widths)


def batch(case: Case) -> tuple[Tensor, Tensor]:
    """The same student and teacher for every contender and device, since they are drawn on the CPU."""
    generator = torch.Generator().manual_seed(0)
    widths = (case.student_dim, case.teacher_dim)
    student, teacher = (torch.randn(case.rows, width, generator=generator) for width in widths)
    return student.to(case.device, case.dtype), teacher.to(case.device, case.dtype)


def growth_here(name: str, case: Case) -> int:
    """Bytes by which forward and backward raise the peak memory of this process, or of the GPU."""
    loss = _contender(name)
    student, teacher = batch(case)
    # The memory of loading and compiling in the first call is not part of the growth.
    _value_and_gradient(loss, *batch(case._replace(rows=8)))
    if case.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _value_and_gradient(loss, student, teacher)
        return torch.cuda.max_memory_allocated() - before
    reset_peak()
    before = peak()
    _value_and_gradient(loss, student, teacher)
    return peak() - before


def peak_growth(name: str, case: Case) -> int:
    """Bytes by which forward and backward raise the peak memory; on a CPU, in a new process."""
    if case.device.startswith("cuda"):
        return growth_here(name, case)
    what = f"*{case[:3]!r}, {case.dtype}, {case.device!r}"
    code = f"import torch; from rkd_plugin.bench.measuring import *; print(growth_here({name!r}, Case({what})))"
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    # glibc returns larger blocks to the system when they are freed, so that the peak has no unused memory.
    # One thread, since the number of threads changes no allocation, and threads wait for each other on a busy machine.
    env = os.environ | {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def reset_peak() -> None:
    """Set the peak memory of this process to its current memory."""
    # On other systems than Linux the earlier peak stays: the growth may be too small, never too large.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The peak memory of this process, in bytes."""
    # Not ru_maxrss on Linux, where it survives exec and starts at the peak of the parent process.
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _contender(name: str, anchors: int | None = None, impl: Impl = "auto") -> Loss:
    if name in RELATIONS:
        return lambda student, teacher: relational_loss(student, teacher, **RELATIONS[name], impl=impl, anchors=anchors)
    if name != PEER:
        return lambda student, teacher: rkd_da_loss(student, teacher, impl=cast(Impl, name), anchors=anchors)
    import torchvision  # noqa: F401  # before torchdistill, whose registries look for it in sys.modules
    from torchdistill.losses.mid_level import RKDLoss

    rkd = RKDLoss("out", "out", dist_factor=1.0, angle_factor=2.0, reduction="mean")

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        value: Tensor = rkd({"out": {"output": student}}, {"out": {"output": teacher}})
        return value

    return loss


def _value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    with torch.random.fork_rng([student.device] if student.is_cuda else []):
        torch.manual_seed(0)  # every loss draws the same anchors
        value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def _errors(loss: Loss, truth: Loss, student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """The errors of value and gradient, each relative to its largest entry, compared with ``truth`` in float64."""
    pairs = zip(
        _value_and_gradient(loss, student, teacher),
        _value_and_gradient(truth, student.double(), teacher.to(torch.float64, copy=True)),
        strict=True,
    )
    value, gradient = (float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
    return value, gradient


def _saved_bytes(loss: Loss, student: Tensor, teacher: Tensor) -> int:
    """Bytes that autograd saves for the backward pass, without the storages of the inputs."""
    inputs = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage  # a reference, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(student.requires_grad_(), teacher)
    del value
    return sum(int(storage.nbytes()) for storage in kept.values())


def _times(contenders: dict[str, Loss], student: Tensor, teacher: Tensor, repeats: int) -> dict[str, Tensor]:
    """Milliseconds ``(repeats, 3)`` of forward, backward and both, for every loss."""
    student = student.requires_grad_()

    def now() -> float:
        if student.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    # More of small batches, whose time varies most and costs least.
    repeats *= min(max(STEADY_ROWS // len(student), 1), 8) ** 2
    for step in range(WARM_UPS + repeats):
        for name, loss in contenders.items():
            # An untimed call first, since the first call after another loss finds other data in the caches.
            torch.autograd.grad(loss(student, teacher.roll(2 * step, 0)), student)
            # Each training step has new teacher embeddings: other values in another tensor. The same for every loss.
            new_teacher = teacher.roll(2 * step + 1, 0)
            start = now()
            value = loss(student, new_teacher)
            middle = now()
            torch.autograd.grad(value, student)
            end = now()
            samples[name].append([middle - start, end - middle, end - start])
            del value  # frees the graph before the next loss starts
    return {name: torch.tensor(rows[WARM_UPS:], dtype=torch.float64) * 1000 for name, rows in samples.items()}
