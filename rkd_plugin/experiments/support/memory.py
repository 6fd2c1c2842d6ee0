"""Memory that every step allocates again."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_memory() -> None:
    """Make this process keep freed memory for its next step instead of returning it to the system.

    glibc returns the memory of every large CPU tensor, and the system clears the pages of the tensors of the next step,
    which can take as long as the arithmetic. This has no effect on other allocators.
    """
    # `CDLL(None)`, the process's own symbols, raises on other systems.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
