"""Images that are decoded once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rkd_plugin.printing import printable
from rkd_plugin.storage import allocate, replacing
from rkd_plugin.teacher_bank.fingerprint import digest
from rkd_plugin.teacher_bank.labels import files_of, labels_of, unwrapped

VERSION = 1  # of the cached images; increment it when decoding changes
DIGITS = 16  # of a digest in the name of a file
LARGE = 2000  # images; decoding fewer is not worth starting processes


class Cached(Dataset[tuple[Any, int]]):
    """Images that are decoded once into a memory-mapped file, and transformed at each access.

    The name of the file contains digests of the paths, sizes, times and transform of the data set, so that a change
    leads to a new file. The file is written as a whole or not at all. Processes share its pages in memory.

    Args:
        dataset: its images are uint8 tensors ``(C, H, W)`` of one size, as from Resize to height and width, and
            PILToTensor. `rkd_plugin.teacher_bank.labels` finds their files and labels.
        folder: folder of the file, which needs ``C * H * W`` bytes per image; True for ``.cache`` in the data set's
            ``root``; None or False to decode at each access.
        transform: a transform of a uint8 tensor, such as a random crop.
        batched: whether the transform gets all images of a batch at once, ``(N, C, H, W)``, which is faster; a random
            transform is then the same for all of them.

    Raises:
        ValueError: if no files or labels of the data set are found, a label is not a whole number, the images are not
            uint8 tensors of one size, or the ``repr`` of the data set's transform differs between runs.
        OSError: if the file cannot be written, as to a full disk, or is truncated while it is read.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from rkd_plugin.components.datasets import ClassFolders
        >>> from torchvision.transforms import v2
        >>> small = v2.Compose([v2.Resize((8, 8)), v2.PILToTensor()])
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("auk", "jay"):
        ...         Path(root, name).mkdir()
        ...         Image.new("RGB", (12, 10)).save(Path(root, name, "1.png"))
        ...     data = Cached(ClassFolders(root, "test", transform=small), root, v2.RandomCrop(6))
        ...     image, label = data[0]
        >>> image.shape, image.dtype, label
        (torch.Size([3, 6, 6]), torch.uint8, 1)
    """

    def __init__(
        self,
        dataset: Any,
        folder: str | Path | bool | None,
        transform: Callable[[Tensor], Any] | None = None,
        batched: bool = False,
    ) -> None:
        self.batched = batched
        self.dataset = dataset
        labels = labels_of(dataset, "Cached")
        if labels is None:
            raise ValueError(
                f"Cached: expected a data set with labels, got {type(dataset).__name__} without; give it "
                "an attribute targets with the label of each item"
            )
        self.targets = labels
        self.folder = folder = _folder(dataset, folder)
        self.transform = transform
        self._images: np.ndarray[Any, Any] | None = None
        self.path: Path | None = None
        if folder is not None:
            stem, state = _identify(dataset)
            self.path = Path(folder, f"{stem}-{state}.npy")
            if not _is_whole(self.path, len(dataset)):
                with torch.random.fork_rng(devices=[]):  # random numbers drawn later must not depend on the cache
                    _decode(dataset, self.path)
                for stale in {*Path(folder).glob(f"{stem}-*.npy")} - {self.path}:
                    stale.unlink(missing_ok=True)

    def all_classes(self) -> Cached:
        """The same with the classes of all splits; the data set must have this method too."""
        return Cached(self.dataset.all_classes(), self.folder, self.transform, self.batched)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The transformed image, and its label."""
        if self.batched:
            return self.__getitems__([index])[0]
        image = self._read([index])[0]
        return (self.transform(image) if self.transform else image), self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """PyTorch's hook: the items of a batch."""
        if not self.batched:
            return [self[index] for index in indices]
        images = self._read(indices)
        images = torch.stack(images) if isinstance(images, list) else images
        labels = map(self.targets.__getitem__, indices)
        return list(zip(self.transform(images) if self.transform else images, labels, strict=True))

    def _read(self, indices: Sequence[int]) -> Any:
        """The images as tensors, in the order of the indices."""
        if self.path is None:
            return [self.dataset[index][0] for index in indices]
        # Each process maps the file itself: pickling a map copies all images.
        if self._images is None:
            self._images = np.lib.format.open_memmap(self.path, mode="r")
        images: Any = self._images
        if images.base.size() < images.offset + images.nbytes:  # reading a missing page ends the process
            raise OSError(
                f"Cached: expected {self.path} to keep its size, got it truncated; delete it, and start again"
            )
        return torch.from_numpy(self._images[list(indices)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}


def _folder(dataset: Any, folder: str | Path | bool | None) -> Path | None:
    """The folder of the file; see `Cached`."""
    if folder is None or folder is False:
        return None
    if folder is not True:
        return Path(folder)
    root = next((part.root for part in unwrapped(dataset) if isinstance(getattr(part, "root", None), str | Path)), None)
    if root is None:
        raise ValueError(
            f"Cached: expected a data set with a root for folder=True, got {type(dataset).__name__} without; give the "
            "folder's path"
        )
    return Path(root, ".cache")


def _identify(dataset: Any) -> tuple[str, str]:
    """Two parts of the file's name: one for this data set, one for the state of its files."""
    files = files_of(dataset)
    if not files:
        raise ValueError(
            f"Cached: expected a data set with files in `paths` or `samples`, got {type(dataset).__name__} "
            "without; set folder to None"
        )
    parts = list(unwrapped(dataset))
    transform = "; ".join(repr(part.transform) for part in parts if hasattr(part, "transform"))
    if " at 0x" in transform:
        raise ValueError(
            f"Cached: expected a transform whose repr is the same in each run, got {transform}; use those of "
            "torchvision.transforms.v2, or set folder to None"
        )
    names = [name for part in parts for name in (type(part).__name__, getattr(part, "split", None)) if name]
    # Two Subsets can have the same files: a pickle contains several images.
    chosen = [[*map(int, part.indices)] for part in parts if hasattr(part, "indices")]
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]
    # Not `fingerprint.of_data`, which loads images, and which is equal for copies of the files in other folders.
    identity = digest([VERSION, [*map(str, files)], transform, *chosen])
    return "-".join([*names, identity[:DIGITS]]), digest(stats)[:DIGITS]


def _is_whole(path: Path, count: int) -> bool:
    try:
        images = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError):  # missing, truncated or of another kind
        return False
    return images.dtype == np.uint8 and images.ndim == 4 and len(images) == count


def _decode(dataset: Any, path: Path) -> None:
    workers = torch.get_num_threads() if len(dataset) > LARGE else 1
    with replacing(path) as temporary:
        loader = DataLoader(_Decoder(dataset, temporary), batch_size=None, num_workers=workers if workers > 1 else 0)
        shape = (len(dataset), *_decoded(dataset, 0).shape)
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            size = file.tell() + math.prod(shape)
        allocate(temporary, size)
        for error in tqdm(loader, desc=printable(f"decoding into {path.parent}"), unit="image", leave=False):
            if error is not None:
                raise error


class _Decoder(Dataset[ValueError | None]):
    """Writes the image of an index into the file, so that no image is sent between processes."""

    def __init__(self, dataset: Any, path: Path) -> None:
        self.dataset = dataset
        self.path = path
        self._images: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> ValueError | None:
        if self._images is None:
            self._images = np.lib.format.open_memmap(self.path, mode="r+")
        try:
            self._images[index] = _decoded(self.dataset, index, self._images.shape[1:])
        except ValueError as error:
            return error  # raised in a worker, its message would contain the traceback
        return None


def _decoded(dataset: Any, index: int, size: tuple[int, ...] | None = None) -> np.ndarray[Any, Any]:
    image = dataset[index][0]
    is_image = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3
    if not is_image or image.shape != (size or image.shape):
        raise ValueError(
            f"Cached: expected uint8 tensors of one size, got {getattr(image, 'dtype', type(image).__name__)} "
            f"{tuple(getattr(image, 'shape', ()))} for image {index}; let the data set's transform end in "
            "Resize to height and width, and PILToTensor"
        )
    return np.asarray(image)
