"""Memory that is allocated again at every step."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_memory() -> None:
    """From now on this process keeps freed memory for its next step instead of giving it back to the system.

    glibc returns every large tensor of the CPU that is freed, and the system clears the pages of the next step's
    tensors, which may take as long as the arithmetic. With another allocator this does nothing.
    """
    # `CDLL(None)`, the process's own symbols, raises on other systems.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
