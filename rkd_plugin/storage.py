"""Atomic writes, and disk space that is allocated before a file is memory-mapped."""

from __future__ import annotations

import errno
import os
import platform
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ZEROS = bytes(2**20)
TEMPORARY = re.compile(r"\..+\.rkd-tmp-(?P<host>[0-9a-f]{8})-(?P<process>\d+)(\.\w+)?")
OLD = 24 * 3600.0  # seconds; no process still writes an older temporary file


def allocate(path: Path, size: int) -> None:
    r"""Allocate ``size`` bytes on disk for a file, which is created if it is missing; its content stays.

    Without this, the disk allocates a page of a memory map at its first write, and a full disk ends the process with
    SIGBUS.

    Raises:
        OSError: if the disk is full; the file may have grown by then.

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
            except OSError as error:  # the file system cannot, and the C library does not write zeros instead
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        left = size - file.tell()
        while left > 0:
            left -= file.write(_ZEROS[:left])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` if the block succeeds; after a kill the old file is complete.

    Its name contains the host and the process: if two processes write the same path at the same time, the file of the
    last one stays. Temporary files of killed processes in the same folder are deleted.

    Raises:
        OSError: of the type that writing raised, in one sentence.
    """
    temporary = path.with_name(f".{path.name}.rkd-tmp-{_host()}-{os.getpid()}{path.suffix}")
    with one_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def sweep(folder: Path, is_alone: bool = False) -> None:
    """Delete the temporary files of killed processes: regular files with a name of `replacing`.

    Args:
        folder: the folder of the files.
        is_alone: whether no other process writes there, so that all temporary files are left over.
    """
    for path in folder.glob(".*.rkd-tmp-*"):
        named = TEMPORARY.fullmatch(path.name)
        with suppress(OSError):
            is_file = named and path.is_file() and not path.is_symlink()
            if named and is_file and (is_alone or not _may_be_written(path, named["host"], int(named["process"]))):
                path.unlink()


def _may_be_written(path: Path, host: str, process: int) -> bool:
    if host == _host() and os.name == "posix":  # on other systems os.kill may end the process
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:  # a process of another user
            pass
    return time.time() - path.stat().st_mtime < OLD


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """Turn an error of writing ``path``, also PyTorch's, into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch raises its own error while it handles the system's.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise type(cause)(
            f"expected to write {path}, got: {cause.strerror or cause}; what was there before is as it was: make room, "
            "or give another folder"
        ) from error
