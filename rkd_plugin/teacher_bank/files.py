"""Reading and writing the arrays of a bank, in shards with a checksum each."""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rkd_plugin.storage import allocate
from rkd_plugin.teacher_bank.fingerprint import digest

CHECKSUMS = "checksums.npy"
SHARD = 2**16  # bytes of the widest array; a reader checks a whole shard at once
LARGEST_SHARD = 64  # rows; resuming an unfinished bank computes a whole shard again
WRITTEN = 2**32  # marks a written shard, since a CRC-32 may be 0

Array = np.ndarray[Any, Any]
# NumPy has no bfloat16; PyTorch reinterprets the bits.
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class Stored(NamedTuple):
    """An array of a bank: the module's path, its ``"input"`` or ``"output"``, the pooling or None, and the width."""

    path: str
    io: str
    pool: str | None
    width: int


class Layout(NamedTuple):
    """The layout of the files of a bank."""

    rows: int
    widths: Sequence[int]
    dtype: str
    shard_rows: int

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Layout:
        """The layout that a header describes."""
        rows = max(header["views"], 1) * header["data"]["count"]
        return cls(rows, [array["width"] for array in header["arrays"]], header["dtype"], header["shard_rows"])

    @property
    def shards(self) -> int:
        """The number of shards; the last one may have fewer rows."""
        return -(-self.rows // self.shard_rows)

    def shard(self, number: int) -> slice:
        """The rows of a shard."""
        return slice(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))


def shard_rows(widths: Sequence[int], dtype: str) -> int:
    """The number of rows of a shard."""
    row = max(widths) * np.dtype(DTYPES[dtype]).itemsize
    return int(min(max(SHARD // row, 1), LARGEST_SHARD))


def check_regular(path: Path) -> None:
    """Raise if ``path`` is not a regular file; opening a pipe or a device may block for ever.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if there is something else.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FileNotFoundError(f"expected a file {path} of a teacher bank, found none; give another path") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"expected a regular file {path} of a teacher bank, found something else; give another path")


class Rows:
    """Rows of an array, in memory or in a file that is memory-mapped.

    Args:
        values: ``(N, D)``, floating point, or bfloat16 as uint16.
        path: of the file that is memory-mapped.

    Raises:
        ValueError: when read, if the file was truncated: reading the map would end the process.
    """

    def __init__(self, values: Array | Tensor, path: Path | None = None) -> None:
        self.values = values
        self.path = path
        self.size = 0 if path is None else path.stat().st_size

    def read(self, rows: Any) -> Any:
        """The rows of a slice or a list, as they are stored."""
        if self.path is not None and self.path.stat().st_size < self.size:
            raise ValueError(f"{self.path.name} was cut while it was read")
        return self.values[rows]


def open_npy(path: Path) -> Array:
    """An ``.npy`` file, memory-mapped.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not one, is truncated, or contains Python objects.
    """
    check_regular(path)
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy raises many types for a wrong header
        raise ValueError(f"{path.name} could not be read: {' '.join(str(error).split())}") from error


def mapped(path: Path, shape: tuple[int, ...], dtype: Any) -> Rows:
    """An array of a bank, memory-mapped.

    Raises:
        ValueError: if the file has another array.
    """
    array = open_npy(path)
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path.name} is {array.shape} {array.dtype}, not {shape} {np.dtype(dtype)}")
    return Rows(array, path)


def checksum(block: Array) -> int:
    """The checksum of the rows of a shard, never 0, which marks rows that were not written."""
    return WRITTEN | zlib.crc32(np.ascontiguousarray(block).data)


class ShardReader:
    """The memory-mapped arrays and checksums of a bank; each shard is checked once, when a row of it is first read.

    Args:
        folder: of the bank.
        layout: of its files.
        checksums: the SHA-256 of all checksums in the header; None for an unfinished bank.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file does not have the layout, or the checksums differ.
    """

    def __init__(self, folder: Path, layout: Layout, checksums: str | None = None) -> None:
        self.layout = layout
        self.sums = np.array(
            mapped(folder / CHECKSUMS, (layout.shards, len(layout.widths)), np.uint64).read(slice(None))
        )
        if checksums is not None and digest(self.sums) != checksums:
            raise ValueError(f"{CHECKSUMS} is cut or changed")
        self.arrays = [
            mapped(folder / f"{number}.npy", (layout.rows, width), DTYPES[layout.dtype])
            for number, width in enumerate(layout.widths)
        ]
        self.checked = np.zeros(layout.shards, bool)

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is written and has not changed since."""
        return bool(self.sums[shard].all()) and self._damaged(shard) is None

    def _damaged(self, shard: int) -> int | None:
        """The number of the first array whose rows of a shard have changed; None if there is none."""
        rows = self.layout.shard(shard)
        wrong = (n for n, array in enumerate(self.arrays) if checksum(array.read(rows)) != self.sums[shard, n])
        return next(wrong, None)

    def read(self, rows: Sequence[int]) -> list[Array]:
        """Rows ``(n, D)`` of every array.

        Raises:
            ValueError: if a shard has changed since it was written.
        """
        for shard in np.unique(np.asarray(rows, np.int64) // self.layout.shard_rows):
            if not self.checked[shard]:
                if (number := self._damaged(shard)) is not None:
                    part = self.layout.shard(int(shard))
                    raise ValueError(f"rows {part.start} to {part.stop - 1} of {number}.npy are not what was written")
                self.checked[shard] = True
        return [array.read(list(rows)) for array in self.arrays]


class ShardWriter:
    """Writes shards of a bank, in any order and from several processes; the disk space is allocated at the start.

    Rows are written before their checksums, so that a shard with a matching checksum is complete.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout

    def allocate(self) -> None:
        """Create the files, filled with zeros, unless they exist with the right size.

        Raises:
            OSError: if the disk has no space for them.
        """
        layout = self.layout
        files = {f"{n}.npy": ((layout.rows, width), DTYPES[layout.dtype]) for n, width in enumerate(layout.widths)}
        files[CHECKSUMS] = ((layout.shards, len(layout.widths)), np.uint64)
        for name, (shape, dtype) in files.items():
            path = self.folder / name
            described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            start = io.BytesIO()
            np.lib.format.write_array_header_1_0(start, described)
            size = start.tell() + int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
            try:
                if not path.exists() or path.stat().st_size != size:
                    path.write_bytes(start.getvalue())
                    allocate(path, size)
            except OSError as error:
                path.unlink(missing_ok=True)  # an incomplete file would use disk space
                raise type(error)(
                    f"expected room for {size} bytes in {path}, got: {error.strerror or error}; make room, or give "
                    "another folder"
                ) from error

    def write(self, first: int, blocks: Sequence[Array]) -> None:
        """Write rows of every array, whole shards from row ``first``."""
        layout = self.layout
        for number, block in enumerate(blocks):
            self._put(f"{number}.npy", first * block.shape[1] * block.itemsize, block)
        starts = range(0, len(blocks[0]), layout.shard_rows)
        sums = [[checksum(block[start : start + layout.shard_rows]) for block in blocks] for start in starts]
        self._put(CHECKSUMS, first // layout.shard_rows * len(blocks) * 8, np.array(sums, np.uint64))

    def flush(self) -> None:
        """Flush all files to disk, also the writes of other processes."""
        for path in self.folder.glob("*.npy"):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _put(self, name: str, place: int, block: Array) -> None:
        with (self.folder / name).open("r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(place, 1)
            file.write(np.ascontiguousarray(block).data)


def encoded(tensor: Tensor, dtype: str) -> Array:
    """A tensor as an array of a bank."""
    narrow = tensor.cpu().to(getattr(torch, dtype))
    return (narrow.view(torch.uint16) if dtype == "bfloat16" else narrow).numpy()


def decoded(values: Array | Tensor) -> Tensor:
    """An array of a bank as a tensor in float32."""
    if isinstance(values, Tensor):
        return values.float()
    if values.dtype == np.uint16:
        return torch.from_numpy(np.ascontiguousarray(values)).view(torch.bfloat16).float()
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
