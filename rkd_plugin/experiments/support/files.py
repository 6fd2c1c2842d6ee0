"""Folders that only one run uses at a time, and small files that are written as a whole."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rkd_plugin.storage import one_sentence, replacing, sweep

LOCK = ".rkd.lock"  # in a folder that a run uses
PATIENCE = 1.0  # seconds after which a worker of a killed run has released its lock
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # on a file system without locks


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock ``folder`` in the block; a folder that is created for it, and stays empty, is removed.

    The lock ends with the process, also if that is killed. Temporary files of a killed run are deleted. A file system
    without locks allows every run.

    Raises:
        BlockingIOError: if another run holds the lock.
        OSError: if the folder cannot be created or written.
    """
    made = not folder.exists()
    with one_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        _acquire(lock, folder)
        sweep(folder, is_alone=lock.is_locked)
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                (
                    folder / LOCK
                ).unlink()  # before the release: a process that waits for this file sees that it is deleted
            lock.release()
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _acquire(lock: FileLock, folder: Path) -> None:
    with one_sentence(folder):
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
        f"{folder} is in use by another run; wait until that one ends, or give this one another folder"
    )


def write_text(path: Path, text: str) -> None:
    """Write a text to ``path``, as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON to ``path``, as a whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of this package.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is cut or changed, so that it is no JSON object.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected a JSON object in {path}, got a truncated or changed file; delete that file"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(content).__name__}; delete that file")
    return content
