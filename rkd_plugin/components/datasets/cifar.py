"""CIFAR-100 in its published files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from torchvision.datasets.utils import check_integrity

from rkd_plugin.components.datasets.downloads import download as fetch
from rkd_plugin.components.datasets.downloads import unpack
from rkd_plugin.components.datasets.pickles import read_arrays
from rkd_plugin.teacher_bank.labels import check_labels


class CIFAR100(torchvision.datasets.CIFAR100):
    """CIFAR-100, ``root/cifar-100-python/{train,test,meta}``: 50,000 + 10,000 images of 32 x 32 pixels.

    Items, ``data``, ``targets`` and ``classes`` are those of torchvision. The files are pickles; reading them runs no
    code.

    Args:
        root: folder that contains ``cifar-100-python``.
        train: whether to read the 50,000 training images, or the 10,000 test images.
        transform: transform of an RGB image.
        download: whether to download and unpack the archive if its folder is missing; its MD5 is checked.
        published: whether the files must be the published ones, byte for byte; if not, other files of that form are
            read.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not the published one, or has another form.
        ConnectionError: if the download fails.
    """

    def __init__(
        self,
        root: str | Path,
        train: bool = True,
        transform: Callable[[Any], Any] | None = None,
        download: bool = False,
        published: bool = True,
    ) -> None:
        # Not torchvision's, which executes the pickles.
        torchvision.datasets.VisionDataset.__init__(self, root, transform=transform)
        self.train = train
        if download:
            self.download()
        paths = {name: self._checked(name, md5, published) for name, md5 in self._files()}
        self.classes = _class_names(paths[self.meta["filename"]])
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        parts = [_images(paths[name]) for name, _ in (self.train_list if train else self.test_list)]
        self.data = np.concatenate([images for images, _ in parts])
        self.targets = [label for _, labels in parts for label in labels]

    @property
    def _remedy(self) -> str:
        return (
            f"get {self.filename} from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it in {self.root}, or "
            f"delete any {self.base_folder} there and set download to True"
        )

    def download(self) -> None:
        """Download and unpack the archive if its folder is missing."""
        if Path(self.root, self.base_folder).exists():
            return
        archive = Path(self.root, self.filename)
        fetch("CIFAR100", self.url, archive, self.tgz_md5, self._remedy)
        unpack(archive, Path(self.root, self.base_folder))

    def _files(self) -> list[tuple[str, str]]:
        return [*map(tuple, self.train_list), *map(tuple, self.test_list), (self.meta["filename"], self.meta["md5"])]

    def _checked(self, name: str, md5: str, published: bool) -> Path:
        path = Path(self.root, self.base_folder, name)
        if not path.is_file():
            raise FileNotFoundError(f"CIFAR100: expected a file {path}, found none; {self._remedy}")
        if published and not check_integrity(path, md5):
            raise ValueError(
                f"CIFAR100: {path} is truncated or changed, its MD5 is not {md5}; {self._remedy}; or set published to "
                "False"
            )
        return path


def _class_names(path: Path) -> list[str]:
    names = read_arrays("CIFAR100", path).get("fine_label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"CIFAR100: expected a list fine_label_names in {path}, got {type(names).__name__}")
    return names


def _images(path: Path) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Images ``(N, 32, 32, 3)`` and their labels."""
    content = read_arrays("CIFAR100", path)
    images, labels = (content.get(key) for key in ("data", "fine_labels"))
    shape = images.shape if isinstance(images, np.ndarray) and images.dtype == np.uint8 else None
    count = len(labels) if isinstance(labels, list) else None
    if images is None or count is None or shape != (count, 3072):
        raise ValueError(
            f"CIFAR100: expected data (N, 3072) of uint8 and N fine_labels in {path}, got {shape} and {count} labels"
        )
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), check_labels(labels, f"CIFAR100: {path}")
