"""Memory that is asked for again at every step."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
GLIBC = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65536}  # its own values
KEPT = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0}


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """On a CPU, keep freed memory for the next step instead of giving it back to the system.

    glibc returns every large tensor that is freed, and the system clears the pages that the next step asks for, which
    may take as long as the arithmetic. With another allocator, or on a GPU, this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if device.type == "cpu" else None
    _set(mallopt, KEPT)
    try:
        yield
    finally:
        _set(mallopt, GLIBC)


def _set(mallopt: object, values: dict[int, int]) -> None:
    """Call glibc's ``mallopt`` for each value, if there is one."""
    for option, value in values.items():
        if callable(mallopt):
            mallopt(option, value)
