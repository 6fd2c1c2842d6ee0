"""Files of tensors and plain values that any program wrote; reading them runs no code.

Pickles are read with ``weights_only``. What is neither a tensor nor a plain value becomes an `Unread`.
"""

from __future__ import annotations

import errno
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from rkd_plugin.printing import printable

SHOWN = 3  # number of names in a message
LONGEST = 80  # characters of a name in a message
ARCHIVE = b"PK\3\4"  # the first bytes of PyTorch's files
DAMAGED, COPY = "it is truncated or changed", "give an intact copy"
CONVERT = "if you trust the file, load it with its own program and save torch.save(model.state_dict(), NEW)"


class DamagedError(ValueError):
    """A checkpoint that is truncated or changed."""


class Unread:
    """A placeholder for an object that is neither a tensor nor a plain value; it does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Unread:  # noqa: D102
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


def read_file(path: Path) -> Any:
    """The content of a file in the format of PyTorch or of safetensors.

    Args:
        path: of the file; ``~`` is the home folder of the user.

    Raises:
        FileNotFoundError: if there is no file.
        DamagedError: if the file is truncated or changed.
        ValueError: if it is a folder, or cannot be read without running code.
        MemoryError: if it does not fit into memory.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(
            f"expected a file of weights, got the folder {path}; give a file, which for a folder of "
            "torch.distributed.checkpoint `python -m torch.distributed.checkpoint.format_utils dcp_to_torch` writes"
        )
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none; train that model first")
    with _reading(path):
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise errors of the system in one sentence; they do not mean that the file is damaged."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"expected to read {path}, got: {error.strerror or error}; try again") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        size = path.stat().st_size
        raise MemoryError(f"expected memory for {path}, of {size} bytes, got too little; end other programs") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _unreadable(path, DAMAGED, COPY, DamagedError) from error


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        begin = file.read(4)
    others = {"argparse.Namespace"}  # of torchdistill; the names in files of PyTorch before 1.6 cannot be listed
    if begin in (ARCHIVE, b""):
        _check_archive(path)
        with suppress(Exception):  # torch.load raises below for a file that this cannot parse
            others.update(get_unsafe_globals_in_checkpoint(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other kinds, for which the error is enough
            with safe_globals([(type(name, (Unread,), {}), name) for name in others]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of many types, with long messages that advise to execute the file
        if "can't allocate memory" in str(error):
            raise
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        names = [named[1]] if named else sorted(others - {"argparse.Namespace"})
        found = f"it names {listed(names)}, which reading would execute" if names else "it is of another kind"
        raise _unreadable(path, found, CONVERT) from error


def _check_archive(path: Path) -> None:
    """Raise for an archive that is damaged, is a TorchScript program, or has compressed records."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            is_program = any(record.filename.endswith("/constants.pkl") for record in records)
            is_packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
            # PyTorch writes a checksum of each tensor, but does not check it when it reads.
            changed = None if is_program or is_packed else archive.testzip()
    except (OSError, MemoryError) as error:
        if getattr(error, "errno", None) != errno.EINVAL:
            raise
        changed = ""
    except Exception:  # zipfile raises many types for a damaged archive
        changed = ""
    if changed is not None:
        raise _unreadable(path, DAMAGED, COPY, DamagedError)
    if is_program:
        raise _unreadable(
            path, "it is a program of TorchScript", "save torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    # Records can also share their bytes.
    if is_packed or sum(record.file_size for record in records) > path.stat().st_size:
        raise _unreadable(path, "its records are compressed", "unpack it and save it again with torch.save")


def _unreadable(path: Path, found: str, remedy: str, kind: type[ValueError] = ValueError) -> ValueError:
    return kind(f"expected a checkpoint of tensors and plain values at {path}, could not read it, as {found}; {remedy}")


def is_dict(content: Any) -> bool:
    """Whether it is a dictionary with the methods of one: a pickle can replace those of an `OrderedDict`."""
    return isinstance(content, dict) and getattr(content, "__dict__", {}).keys() <= {"_metadata"}


def describe(content: Any) -> str:
    """A short description of the content of a file."""
    if isinstance(content, Unread):
        return f"an object of {printable(type(content).__name__, LONGEST)}"
    if not isinstance(content, dict):
        return type(content).__name__
    names = [
        f"{name} ({describe(value)})" if isinstance(value, Unread) else name for name, value in dict.items(content)
    ]
    return listed(names, "nothing")


def short(name: str) -> str:
    """A name in a message, cut if it is long."""
    return printable(name, LONGEST)


def listed(names: Sequence[Any], none: str = "") -> str:
    """The first names in a message, and how many more there are; ``none`` if there is none."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(short(str(name)) for name in names[:SHOWN]) or none) + more
