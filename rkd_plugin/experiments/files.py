"""Files that are whole or absent, folders that one run has to itself, and how text from a file is printed."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".rkd.lock"  # in a folder while a run is at work there
PATIENCE = 1.0  # seconds until a process that a run forked just when it was killed has surely released its lock
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system without locks
TEMPORARY = re.compile(r"\..+\.rkd-tmp-(?P<host>[0-9a-f]{8})-(?P<process>\d+)(\.\w+)?")
OLD = 24 * 3600.0  # seconds after which no process is still writing a temporary file


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for the block, and create it if needed; it is removed again if it stays empty.

    The lock ends with the process, however that ends. Temporary files of a killed run are deleted. On a file system
    without locks, no run is refused.

    Raises:
        BlockingIOError: if another run holds the lock.
        OSError: if the folder cannot be created or written.
    """
    made = not folder.exists()
    with _one_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        _acquire(lock, folder)
        _sweep(folder, is_alone=lock.is_locked)
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                (folder / LOCK).unlink()  # before the release: who waits for this file sees that it is gone
            lock.release()
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _acquire(lock: FileLock, folder: Path) -> None:
    with _one_sentence(folder):
        try:
            lock.acquire(timeout=PATIENCE)
            return
        except Timeout:
            pass
        except NotImplementedError:
            return
        except OSError as error:
            if error.errno in NO_LOCKS:
                return
            raise
    raise BlockingIOError(
        f"{folder} is in use by another run; wait for that one to end, or give this one another folder"
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` once the block ends well; after a kill the old file is still whole.

    Its name holds the host and the process: of two processes that write the same path at the same time, the last one's
    file stays. Temporary files of killed processes in the same folder are deleted.

    Raises:
        OSError: of the kind that writing raised, in one sentence.
    """
    temporary = path.with_name(f".{path.name}.rkd-tmp-{_host()}-{os.getpid()}{path.suffix}")
    with _one_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _sweep(folder: Path, is_alone: bool = False) -> None:
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
def _one_sentence(path: Path) -> Iterator[None]:
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


def write_text(path: Path, text: str) -> None:
    """Write ``path`` in one piece."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write ``path`` in one piece."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of this package holds.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is cut or changed, so that it is no JSON object.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object in {path}, which is cut or changed; delete that file") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(content).__name__}; delete that file")
    return content
