"""Reading a bank: by row, or together with the items of its data set."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from rkd_plugin.teacher_bank import fingerprint
from rkd_plugin.teacher_bank.files import (
    Array,
    Layout,
    Rows,
    ShardReader,
    Stored,
    check_regular,
    decoded,
    open_npy,
)
from rkd_plugin.teacher_bank.header import read_header
from rkd_plugin.teacher_bank.views import draws, items

VERIFIED_ROWS = 4096  # at once
_SAFETENSORS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Bank:
    """A teacher's vectors for every item of a data set, read by index: a folder of ``rkd embed``, or an array.

    Each process memory-maps a folder, and an array in ``.npy`` or ``.safetensors``.

    Args:
        source: a folder; or a floating-point array ``(N, D)``, of which only the shape can be checked: a tensor, a
            NumPy array, an ``.npy`` file, or an ``.npz``, ``.safetensors``, ``.pt`` or ``.pth`` file with one array.
            ``~`` is the user's home folder.

    Attributes:
        path: of the folder or file, None for an array in memory.
        count: ``N``, the number of items of the data set.
        views: the number of views of each item; 0 for a transform that draws no random numbers.
        arrays: a `Stored` for each array; None for a single array, which is used for the one module that a loss reads.
        header: the content of ``bank.json``, empty for a single array.

    Raises:
        FileNotFoundError: if there is nothing at ``source``.
        ValueError: if ``source`` is not a bank, or is unfinished, of another version, truncated or changed; rows are
            checked when they are read.
        TypeError: if ``source`` is not a path or an array.

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

    def __init__(self, source: str | Path | Tensor | Array) -> None:
        self._reader: ShardReader | ArrayReader | None = None
        self.path: Path | None = None
        self.arrays: list[Stored] | None = None
        self.header: dict[str, Any] = {}
        self.views = 0
        self._source = source
        if isinstance(source, str | Path):
            self.path = Path(source).expanduser()
            if self.path.is_dir() or (not self.path.exists() and self.path.suffix.lower() not in _ARRAYS):
                self.header = read_header(self.path)
                self.count, self.views = self.header["data"]["count"], self.header["views"]
                self.arrays = [Stored(**array) for array in self.header["arrays"]]
                return
        elif not isinstance(source, Tensor | np.ndarray):
            raise TypeError(f"Bank: expected a path, a tensor or an array, got {type(source).__name__}; give one")
        external = self._opened()
        assert isinstance(external, ArrayReader)  # as there is no header
        self.count = external.count

    def __str__(self) -> str:
        return "in memory" if self.path is None else str(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}  # a pickled memory map would contain all rows

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Rows ``(n, D)`` of every array, in float32; row ``view * count + index``.

        Raises:
            FileNotFoundError: if a file of the bank is missing.
            IndexError: if there is no such row.
            ValueError: if the shard of a row has changed since it was written.
        """
        total = range(max(self.views, 1) * self.count)
        chosen = [total[row] for row in rows]
        reader = self._opened()
        try:
            return [decoded(block) for block in reader.read(chosen)]
        except (ValueError, OSError) as error:
            raise self._unusable(str(error)) from error

    def over(self, dataset: Any) -> DatasetWithTeacher:
        """The data set with the vectors of each item; `DatasetWithTeacher` raises if the bank is of other data."""
        return DatasetWithTeacher(dataset, self)

    def verify(self) -> Iterator[int]:
        """Check every shard; yields the number of rows of each block after it is checked.

        Raises:
            ValueError: if a shard has changed since it was written.
        """
        total = max(self.views, 1) * self.count
        for start in range(0, total, VERIFIED_ROWS):
            stop = min(start + VERIFIED_ROWS, total)
            self.read(range(start, stop))
            yield stop - start

    def _opened(self) -> ShardReader | ArrayReader:
        if self._reader is None:
            try:
                if self.path is None:
                    self._reader = ArrayReader(_checked(self._source))
                elif self.arrays is None:
                    self._reader = _external(self.path)
                else:
                    self._reader = ShardReader(self.path, Layout.of(self.header), self.header["checksums"])
            except ValueError as error:
                raise self._unusable(str(error)) from error
        return self._reader

    def _unusable(self, reason: str) -> ValueError:
        remedy = (
            "delete it and write it again with `rkd embed`"
            if self.arrays
            else 'give the whole file, or convert the array with numpy.save("bank.npy", array.astype("float32"))'
        )
        return ValueError(f"{self} cannot be used as a teacher bank: {reason}; {remedy}")


class ArrayReader:
    """A single array without checksums, with the interface of `ShardReader`."""

    def __init__(self, values: Array | Tensor, path: Path | None = None) -> None:
        self.count = len(values)
        self._rows = Rows(values, path)

    def read(self, rows: Sequence[int]) -> list[Array | Tensor]:
        """Rows ``(n, D)`` of the array."""
        return [self._rows.read(list(rows))]


class DatasetWithTeacher(Dataset[tuple[Any, list[Tensor]]]):
    """A data set whose items come with a teacher's vectors: ``(item, [(D,), ...])``.

    With a bank of several views, each access draws one of them, and the item is the view that the teacher got.

    Args:
        dataset: its items are a tensor or an image, or start with one.
        bank: of this data set.

    Raises:
        ValueError: if the bank is of another data set, by number of images, labels, file names, transform, or the
            statistics of a few images; or if the transform is random and the bank has no views.
    """

    def __init__(self, dataset: Any, bank: Bank) -> None:
        self.dataset = dataset
        self.bank = bank
        where = f"the teacher bank {bank} is of other data"
        if len(dataset) != bank.count:
            raise ValueError(
                f"{where}: it has {bank.count} images, the data set {len(dataset)}; write one of this data"
            )
        if not bank.views and (random := draws(dataset)):
            raise ValueError(
                f"the teacher bank {bank} holds one view of each image, as a transform without random numbers makes "
                f"it, but the data set has others ({random}); write a bank with `rkd embed --views K`, or take them "
                "out of the transform"
            )
        if bank.header:
            found = fingerprint.of_data(dataset, bank.header["seed"])
            if difference := fingerprint.difference(bank.header["data"], found):
                raise ValueError(f"{where}: {difference}; write one of this data with `rkd embed`")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, list[Tensor]]:
        """One item."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, list[Tensor]]]:
        """PyTorch's hook: the items of a batch."""
        rows = [range(len(self))[index] for index in indices]
        if self.bank.views:
            drawn = torch.randint(self.bank.views, (len(rows),)).tolist()
            rows = [view * self.bank.count + index for view, index in zip(drawn, rows, strict=True)]
        seen = items(self.dataset, rows, self.bank.views, self.bank.header.get("seed", 0))
        vectors = zip(*self.bank.read(rows), strict=True)
        return [(item, list(row)) for item, row in zip(seen, vectors, strict=True)]


def _external(path: Path) -> ArrayReader:
    """The array of a file that another program wrote."""
    check_regular(path)
    suffix = path.suffix.lower()
    if suffix not in _ARRAYS:
        raise ValueError(f"expected a folder or a file of the kinds {', '.join(_ARRAYS)}, got {suffix or 'no suffix'}")
    try:
        values = _ARRAYS[suffix](path)
    except ValueError:
        raise
    except MemoryError as error:
        raise ValueError(f"{path.name} describes an array that does not fit into memory") from error
    except Exception as error:  # the libraries raise many types for a truncated or wrong file
        raise ValueError(f"{path.name} could not be read: {' '.join(str(error).split())[:200]}") from error
    return ArrayReader(_checked(values, is_bfloat16=suffix == ".safetensors"), path)


def _checked(values: Any, is_bfloat16: bool = False) -> Any:
    """The array, if it can be a bank.

    Args:
        values: a tensor or an array.
        is_bfloat16: whether uint16 holds the bits of bfloat16.
    """
    if isinstance(values, Tensor):
        values = values.detach()
        is_float = values.is_floating_point() and values.layout is torch.strided and not values.is_meta
        values = values.cpu() if is_float else values
    else:
        is_float = values.dtype.kind == "f" or (is_bfloat16 and values.dtype == np.uint16)
    if values.ndim != 2 or not values.shape[1] or not is_float:
        raise ValueError(f"an array (N, D) of floats was expected, got {tuple(values.shape)} {values.dtype}")
    return values


def _safetensors(path: Path) -> Array:
    with safe_open(path, framework="numpy") as file:
        name = _only(file.keys())
        described = file.get_slice(name)
        shape, kind = tuple(described.get_shape()), described.get_dtype()
    if kind not in _SAFETENSORS:
        raise ValueError(f"a tensor of floats was expected, got {kind}")
    # The library has checked that the tensor ends at the end of the file.
    size = int(np.prod(shape, dtype=object)) * np.dtype(_SAFETENSORS[kind]).itemsize
    return np.memmap(path, _SAFETENSORS[kind], "r", path.stat().st_size - size, shape)


def _npz(path: Path) -> Any:
    _check_stored(path)
    with np.load(path, allow_pickle=False) as content:
        values = content[_only(content.files)]
    if not isinstance(values, np.ndarray):  # the file is not NumPy's
        raise ValueError(f"one array was expected, got {type(values).__name__}")
    return values


def _pytorch(path: Path) -> Any:
    _check_stored(path)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    content = content[_only(content)] if isinstance(content, dict) else content
    if not isinstance(content, Tensor):
        raise ValueError(f"one tensor was expected, got {type(content).__name__}")
    return content


def _only(names: Iterable[Any]) -> Any:
    found = list(names)
    if len(found) != 1:
        raise ValueError(f"one array was expected, got {', '.join(sorted(map(repr, found))[:5]) or 'none'}")
    return found[0]


def _check_stored(path: Path) -> None:
    """Raise if an archive has compressed entries, which may unpack to any size."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("an archive without compression was expected")


_ARRAYS: dict[str, Callable[[Path], Any]] = {
    ".npy": open_npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _pytorch,
    ".pth": _pytorch,
}
