"""Files that are whole or absent, folders that one run has to itself, and weights that fit or are refused."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

SHOWN = 3  # names of tensors in a message
ARCHIVE = b"PK\3\4"  # what PyTorch's files begin with
PATIENCE = 1.0  # seconds until a process that a run forked just when it was killed has surely let go of its lock
_LOCKS: set[int] = set()  # descriptors of folders


def _let_go() -> None:
    while _LOCKS:
        os.close(_LOCKS.pop())


if hasattr(os, "register_at_fork"):
    # A loader's process may outlive the run that was killed, and must not hold its lock on.
    os.register_at_fork(after_in_child=_let_go)


class DamagedError(ValueError):
    """A checkpoint that was one, and is cut or changed."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for the block, and make it if need be; it goes again if nothing came of the block.

    The lock is on the folder itself, so that it leaves no file, and ends with the process, however that ends. Where the
    system or the file system knows no such lock, nobody is refused.

    Raises:
        BlockingIOError: if another run holds it.
    """
    made = not folder.exists()
    with _in_words(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if held is not None:
            _LOCKS.add(held)
            _lock(held, folder)
        yield
    finally:
        if made:
            with suppress(OSError):  # it holds something
                folder.rmdir()
        if held is not None:
            _LOCKS.discard(held)
            os.close(held)


def _lock(held: int, folder: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise BlockingIOError(
                    f"{folder} is in use by another run; wait for that one to end, or give this one another folder"
                ) from error
        except OSError:  # a file system without locks
            return
        time.sleep(PATIENCE / 20)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` once the block ends well; a kill leaves the old file whole.

    It has the process's number: of two that write the same at the same time, the last one's file stays.

    Raises:
        OSError: of the kind that writing raised, in one sentence.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}{path.suffix}")
    with _in_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
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


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``path`` in one piece; torchdistill's scripts read the model in it, under the key they expect."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def read_checkpoint(path: Path, *parts: str) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint; nothing in it is executed.

    Args:
        path: of the file.
        parts: what it must hold, such as ``"model"``.

    Raises:
        FileNotFoundError: if there is none.
        DamagedError: if the file is cut or changed.
        ValueError: if it is none that can be read without executing what it holds, or lacks a part.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none; train that model first")
    try:
        _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other kinds, which the error tells as well
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for a file that is not its own
        # Its own words fill a page and advise to execute the file.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        is_damaged = not refused and _begin(path) in (ARCHIVE, b"")
        found = (
            f"it names {refused[1]}, which would be executed" if refused
            else "it is cut or changed" if is_damaged
            else "it is of another kind"
        )  # fmt: skip
        raise (DamagedError if is_damaged else ValueError)(
            f"expected a checkpoint of tensors and plain values at {path}, could not read it, as {found}; give a file "
            "that `rkd run` wrote"
        ) from error
    held = list(content) if isinstance(content, dict) else []
    if not isinstance(content, dict) or any(part not in content for part in parts):
        raise ValueError(
            f"expected a checkpoint with {', '.join(parts) or 'its parts by name'} at {path}, got "
            f"{_first(held, 'nothing') if isinstance(content, dict) else type(content).__name__}; give a file that "
            "`rkd run` wrote, or save the weights as {'model': state_dict}"
        )
    return content


def _begin(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _check_sums(path: Path) -> None:
    """PyTorch writes a checksum beside each tensor, and looks at none when it reads."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
        if changed is not None:
            raise zipfile.BadZipFile(changed)


def load_weights(module: nn.Module, weights: Any, path: Path, source: str) -> None:
    """Load weights into a module, which they must fit.

    Args:
        module: what they are loaded into.
        weights: its ``state_dict``, as a checkpoint holds it.
        path: of that checkpoint, for the message.
        source: what describes the module, for the message, such as the path of a recipe.

    Raises:
        ValueError: if the weights are of another module: how many outputs both have, if only the last layer differs,
            else the first tensors that differ in name or shape.
    """
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:  # a line for each tensor
        given = weights if isinstance(weights, dict) else {}
        raise ValueError(
            f"{path} holds another model than {source} describes, {type(module).__name__}: "
            + _difference(
                *({name: _shape(value) for name, value in state.items()} for state in (given, module.state_dict()))
            )
        ) from error


def _difference(got: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Of two models, by the shapes of their tensors, and what to do."""
    missing, unknown = [name for name in wanted if name not in got], [name for name in got if name not in wanted]
    reshaped = [name for name in wanted if name in got and got[name] != wanted[name]]
    last = next(reversed(wanted), "").rpartition(".")[0]
    is_width = [
        name.startswith(f"{last}.") and len(got[name]) == len(wanted[name]) > 0 and got[name][1:] == wanted[name][1:]
        for name in reshaped
    ]
    if reshaped and not missing and not unknown and all(is_width):
        count, due = got[reshaped[0]][0], wanted[reshaped[0]][0]
        return (
            f"its last layer, {last}, has {count} outputs, where {due} were expected; set num_classes (or the width of "
            f"the embedding) to {count}, or give a checkpoint of {due}"
        )
    shapes = [f"{name} is {got[name]} instead of {wanted[name]}" for name in reshaped]
    found = {"it lacks ": missing, "it has also ": unknown, "": shapes}
    differences = "; ".join(f"{what}{_first(which)}" for what, which in found.items() if which)
    return f"{differences}; give the checkpoint of that model, or change the recipe's model"


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _first(names: Sequence[Any], none: str = "") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(map(str, names[:SHOWN])) or none) + more
