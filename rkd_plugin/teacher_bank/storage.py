"""Files that are written and read through memory maps, where a full disk or a cut file would end the process."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_ZEROS = bytes(2**20)


def allocate(path: Path, size: int) -> None:
    r"""Have the disk hold ``size`` bytes for a file, which is made if it is missing; what it holds already stays.

    A file that only has the size gets its blocks when a page of its map is written first, and a disk that is full then
    ends the process with SIGBUS.

    Raises:
        OSError: if the disk is too small or full; the file may have grown until then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     allocate(Path(folder, "new"), 3)
        ...     Path(folder, "new").read_bytes()
        b'\x00\x00\x00'
    """
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:  # a file system that cannot, where the C library does not write zeros itself
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        left = size - file.tell()
        while left > 0:
            left -= file.write(_ZEROS[:left])
