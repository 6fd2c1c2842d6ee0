"""The files of a bank, and of arrays that others made: opened, held against their checksums, read row by row."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from rkd_plugin.experiments.bank.views import Taught

FORMAT = "rkd_plugin teacher bank"
VERSION = 1  # to be raised when the files, or the meaning of what is in them, change
HEADER, UNFINISHED = "bank.json", "unfinished.json"
BLOCK = 4096  # rows that are verified at once

Array = np.ndarray[Any, Any]
# NumPy has no bfloat16; PyTorch looks at the same bits as such.
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Stored(NamedTuple):
    """An array of a bank: whose ``"input"`` or ``"output"`` it was, how maps were pooled (None: there were none)."""

    path: str
    io: str
    pool: str | None
    width: int


class Bank:
    """A teacher's vectors on disk, memory-mapped: a folder of ``rkd embed``, or an array that others made.

    Opening a folder reads its header alone; its arrays are opened when a row is read first, in each process anew.

    Args:
        path: a folder; or an ``.npy`` file ``(N, D)`` or a ``.safetensors`` file with one such tensor, floating point,
            which has no checksums and says nothing of data and teacher but its shape.

    Attributes:
        count: ``N``, the images of the data set.
        views: how many views of each image it holds, 0 for the one of a transform that draws no random numbers.
        arrays: a `Stored` for each array; None for one that others made, which serves whatever is read.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if it is no bank, unfinished, of another version, cut or changed; of rows when they are read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "dino.npy")
        ...     np.save(path, np.arange(12, dtype=np.float16).reshape(4, 3))
        ...     bank = Bank(path)
        ...     bank.count, bank.read([2, 0])
        (4, [tensor([[6., 7., 8.],
                [0., 1., 2.]])])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._opened: list[tuple[Array, Array | None]] | None = None
        self.arrays: list[Stored] | None = None
        self.header: dict[str, Any] = {}
        self.views = 0
        if self.path.suffix in (".npy", ".safetensors"):
            self.count = len(self._maps()[0][0])
            return
        self.header = read_header(self.path)
        self.count, self.views = self.header["data"]["count"], self.header["views"]
        self.arrays = [Stored(**array) for array in self.header["arrays"]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # a pickled map would carry all rows

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Rows ``(n, D)`` of every array, in float32; row ``view * count + index``.

        Raises:
            ValueError: if a row is not the one that was written.
        """
        chosen = list(rows)
        tensors = []
        for number, (vectors, sums) in enumerate(self._maps()):
            block = vectors[chosen]
            if sums is not None and len(bad := np.flatnonzero(checksums(block) != sums[chosen])):
                raise self._refused(f"row {chosen[bad[0]]} of {number}.npy is not the one that was written")
            tensors.append(decoded(block).float())
        return tensors

    def over(self, dataset: Any) -> Taught:
        """The data set, each item with its vectors; see `Taught`, which raises if the bank is of other data."""
        return Taught(dataset, self)

    def verify(self) -> Iterator[int]:
        """Hold every row against its checksum; yields the number of rows done, block by block.

        Raises:
            ValueError: if a row is not the one that was written.
        """
        total = len(self._maps()[0][0])
        for start in range(0, total, BLOCK):
            stop = min(start + BLOCK, total)
            self.read(range(start, stop))
            yield stop - start

    def _maps(self) -> list[tuple[Array, Array | None]]:
        """Each array, and the checksums of its rows."""
        if self._opened is None:
            try:
                self._opened = list(self._open())
            except FileNotFoundError as error:
                raise FileNotFoundError(f"expected a file {error.filename} of a teacher bank, found none") from error
            except (ValueError, KeyError, TypeError) as error:  # for a file that is cut or of another kind
                raise self._refused(" ".join(str(error).split())) from error
        return self._opened

    def _open(self) -> Iterator[tuple[Array, Array | None]]:
        if self.arrays is None:
            is_npy = self.path.suffix == ".npy"
            array = open_memmap(self.path, mode="r") if is_npy else _safetensors(self.path)
            if array.ndim != 2 or array.dtype not in (
                np.float16,
                np.float32,
                np.float64,
                *([] if is_npy else [np.uint16]),
            ):
                raise ValueError(f"an array (N, D) of floats was expected, got {array.shape} {array.dtype}")
            yield array, None
            return
        rows = max(self.views, 1) * self.count
        for number, stored in enumerate(self.arrays):
            vectors, sums = maps(self.path, number)
            shapes = ((vectors, (rows, stored.width), DTYPES[self.header["dtype"]]), (sums, (rows,), np.uint32))
            for array, shape, dtype in shapes:
                if array.shape != shape or array.dtype != dtype:
                    raise ValueError(
                        f"{number}.npy or its checksums are {array.shape} {array.dtype}, not {shape} {np.dtype(dtype)}"
                    )
            if digest(sums) != self.header["sums"][number]:
                raise ValueError(f"{number}.crc.npy is cut or changed")
            yield vectors, sums

    def _refused(self, reason: str) -> ValueError:
        remedy = "delete it and write it again with `rkd embed`" if self.arrays else "give the file that was made"
        return ValueError(f"{self.path} cannot be used as a teacher bank: {reason}; {remedy}")


def maps(folder: Path, number: int, mode: Any = "r", **new: Any) -> tuple[Array, Array]:
    """Maps of an array and of its checksums; for mode ``"w+"``, ``dtype`` and ``shape`` of the array."""
    made = {"dtype": np.uint32, "shape": new["shape"][:1]} if new else {}
    return (
        open_memmap(folder / f"{number}.npy", mode=mode, **new),
        open_memmap(folder / f"{number}.crc.npy", mode=mode, **made),
    )


def checksums(rows: Array) -> Array:
    """The CRC-32 of each row, which is 0 for none of zeros: what was never written is never taken for written."""
    return np.fromiter(map(zlib.crc32, np.ascontiguousarray(rows)), np.uint32, len(rows))


def encoded(tensor: Tensor, dtype: str) -> Array:
    """A tensor as the array that is written."""
    narrow = tensor.cpu().to(getattr(torch, dtype))
    return (narrow.view(torch.uint16) if dtype == "bfloat16" else narrow).numpy()


def decoded(array: Array) -> Tensor:
    """The tensor of an array that was written."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def digest(content: Any) -> str:
    """SHA-256 of an array, or of anything that JSON can hold."""
    if not isinstance(content, np.ndarray):
        content = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def read_header(folder: Path) -> dict[str, Any]:
    """What ``bank.json`` says, once it is known to be whole.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the bank is unfinished, of another version, or its header is cut or changed.
    """
    if not (folder / HEADER).is_file():
        if (folder / UNFINISHED).is_file():
            raise ValueError(f"the teacher bank {folder} is unfinished; the same `rkd embed` goes on with it")
        raise FileNotFoundError(
            f"expected a teacher bank at {folder}, found none; write it with `rkd embed RECIPE --out {folder}`"
        )
    refused = f"{folder / HEADER} cannot be used: "
    again = "; delete the bank and write it again with `rkd embed`"
    try:
        header: Any = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{refused}it is cut or changed, no JSON{again}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{refused}it is no header of a teacher bank{again}")
    if header.get("version") != VERSION:
        raise ValueError(f"{refused}its version is {header.get('version')}, this package reads {VERSION}{again}")
    if header.pop("checksum", None) != digest(header):
        raise ValueError(f"{refused}it is cut or changed, its checksum differs{again}")
    return header


def _safetensors(path: Path) -> Array:
    """The one tensor of a file: eight bytes for the length of a JSON header, which is followed by the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size - 8:
            raise ValueError("it is cut, or no file of safetensors")
        header = json.loads(file.read(length))
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    if len(tensors) != 1:
        raise ValueError(f"one tensor was expected, got {', '.join(sorted(tensors)) or 'none'}: save that one alone")
    (tensor,) = tensors.values()
    if tensor["dtype"] not in _SAFETENSORS:
        raise ValueError(f"a tensor of floats was expected, got {tensor['dtype']}")
    start, _ = tensor["data_offsets"]
    return np.memmap(path, _SAFETENSORS[tensor["dtype"]], "r", 8 + length + start, tuple(tensor["shape"]))
