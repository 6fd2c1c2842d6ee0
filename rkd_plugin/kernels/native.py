"""Losses and gradient of all pairs and triplets in C++: one pass over the cosines, which writes only sums to memory.

The first use on a machine compiles ``native.cpp``, which takes a second, with ``$CXX``, ``c++``, ``g++`` or
``clang++``, and stores the library in the user's cache folder. Without a compiler, ``chunked`` uses its strips, without
a warning. Threads end with each call, so that none of them spins on a core that other work needs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rkd_plugin.kernels.pairwise import APART, EQUAL, EVEN

FAILURES: list[Exception] = []  # why the strips are used
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
    "-ffp-contract=off",  # without fused multiplications and additions, both sides round in the same way
)
VECTORS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")}
SHARE = 2**18  # cosines of a thread, at least: they take as long as its start
MOST = 16  # threads, since each has a matrix of its own


def relations(
    squares: Sequence[Tensor],
    huber_delta: float,
    dtype: torch.dtype,
    distance: Tensor | None,
    angle: Tensor | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Both losses from the squared distances, and their gradient.

    Args:
        squares: squared distances ``(N, N)`` of student and teacher, float64.
        huber_delta: of both losses.
        dtype: of the cosines.
        distance: weights ``(N,)`` of the rows at which pairs start; None: no distances.
        angle: weights ``(V,)`` of the first V rows as vertices; None: no angles.
        needs_gradient: whether to compute the gradient.

    Returns:
        Weighted losses ``(N,)`` and ``(V,)``, empty for None, and the gradient ``(N, N)`` of their sum by the student's
        squares. None if this cannot run: without a compiler, on another device than the CPU, or if the law of cosines
        loses digits, see `strips.APART`.
    """
    if squares[0].device.type != "cpu" or (library := _library()) is None:
        return None
    rows, vertices = len(squares[0]), 0 if angle is None else len(angle)
    work = rows * rows * max(vertices, 1)
    threads = max(1, min(torch.get_num_threads(), work // SHARE, rows, MOST))
    sums = squares[0].new_zeros(0 if distance is None else rows), squares[0].new_zeros(vertices)
    gradient = torch.zeros_like(squares[0]) if needs_gradient else None
    inputs = [x if x is None else x.contiguous() for x in (*squares, distance, angle)]
    addresses = [x if x is None else ctypes.c_void_p(x.data_ptr()) for x in (*inputs, *sums, gradient)]
    sizes = map(ctypes.c_int64, (rows, vertices, threads))
    limits = map(ctypes.c_double, (huber_delta, EQUAL[torch.float64], APART[dtype], EVEN))
    failed = library.relations(*sizes, ctypes.c_int(dtype == torch.float32), *limits, *addresses)
    return None if failed else (*sums, gradient)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        FAILURES.append(error)
        return None


def _compiled() -> Path:
    """The compiled library, from the cache if this compiler compiled this source before for this kind of processor."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        raise RuntimeError("expected a C++ compiler, found none")
    command = [compiler, *FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())]
    what = repr((command, platform.machine(), platform.system())).encode() + SOURCE.read_bytes()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rkd_plugin"
    library = folder / f"native-{hashlib.sha256(what).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            subprocess.run([*command, str(SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=60)
            made.replace(library)
    return library
