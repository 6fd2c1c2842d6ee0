"""Files that are whole or absent, and that have their disk space before they are mapped into memory."""

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
OLD = 24 * 3600.0  # seconds after which no process is still writing a temporary file


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` once the block ends well; after a kill the old file is still whole.

    Its name holds the host and the process: of two processes that write the same path at the same time, the last one's
    file stays. Temporary files of killed processes in the same folder are deleted.

    Raises:
        OSError: of the kind that writing raised, in one sentence.
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
    """Delete the temporary files of killed processes: regular files with a name that `replacing` gives.

    Args:
        folder: where they are.
        is_alone: nobody else writes there, so that all of them are left over.
    """
    for path in folder.glob(".*.rkd-tmp-*"):
        named = TEMPORARY.fullmatch(path.name)
        with suppress(OSError):
            is_file = named and path.is_file() and not path.is_symlink()
            if named and is_file and (is_alone or not _may_be_written(path, named["host"], int(named["process"]))):
                path.unlink()


def _may_be_written(path: Path, host: str, process: int) -> bool:
    if host == _host() and os.name == "posix":  # elsewhere asking for a process may end it
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:  # it is another user's
            pass
    return time.time() - path.stat().st_mtime < OLD


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """Turn what writing ``path`` raises, and what PyTorch makes of it, into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch has its own error for a file that cannot be written, raised while it handles the system's.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise type(cause)(
            f"expected to write {path}, got: {cause.strerror or cause}; what was there before is as it was: make room, "
            "or give another folder"
        ) from error
