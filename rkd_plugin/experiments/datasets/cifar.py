"""CIFAR-100 in torchvision's files, with errors in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from torchvision.datasets.utils import check_integrity

from rkd_plugin.experiments.datasets.downloads import download as fetch
from rkd_plugin.experiments.datasets.downloads import unpack
from rkd_plugin.experiments.datasets.pickles import read_arrays


class CIFAR100(torchvision.datasets.CIFAR100):
    """torchvision's CIFAR-100, ``root/cifar-100-python/{train,test,meta}``: 50,000 + 10,000 images of 32 x 32 pixels.

    Args:
        root: the folder of ``cifar-100-python``.
        train: whether it is the 50,000 or the 10,000.
        transform: of an RGB image.
        download: whether to download and unpack the archive where its folder is missing; it is held against its MD5.
        published: whether the files must be the published ones, byte for byte. If not, they may be anybody's of that
            form; a pickle among them that names anything but arrays is refused before it is read.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not the published one, or not of that form.
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
        self.published = published
        if not published:
            self.meta = dict(torchvision.datasets.CIFAR100.meta, md5=None)
        super().__init__(root, train=train, transform=transform, download=download)

    @property
    def _remedy(self) -> str:
        return (
            f"get {self.filename} from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it in {self.root}, or "
            f"delete any {self.base_folder} there and set download to True"
        )

    def download(self) -> None:
        """The host's hook: what is there already is checked, not replaced."""
        if Path(self.root, self.base_folder).exists():
            return
        archive = Path(self.root, self.filename)
        fetch("CIFAR100", self.url, archive, self.tgz_md5, self._remedy)
        unpack(archive, Path(self.root, self.base_folder))

    def _check_integrity(self) -> bool:
        """The host's hook, before it reads anything."""
        lists = [*self.train_list, *self.test_list, [self.meta["filename"], self.meta["md5"]]]
        for name, md5 in lists:
            path = Path(self.root, self.base_folder, name)
            if not path.is_file():
                raise FileNotFoundError(f"CIFAR100: expected a file {path}, found none; {self._remedy}")
            if self.published and not check_integrity(path, md5):
                raise ValueError(
                    f"CIFAR100: {path} is cut or changed, its MD5 is not {md5}; {self._remedy}; or set published to "
                    "False"
                )
            if not self.published:
                _check_form(path, is_meta=name == self.meta["filename"])
        return True


def _check_form(path: Path, is_meta: bool) -> None:
    content = read_arrays("CIFAR100", path)
    if is_meta:
        names = content.get("fine_label_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"CIFAR100: expected a list fine_label_names in {path}, got {type(names).__name__}")
        return
    images, labels = (content.get(key) for key in ("data", "fine_labels"))
    shape = images.shape if isinstance(images, np.ndarray) and images.dtype == np.uint8 else None
    count = len(labels) if isinstance(labels, list) else None
    if count is None or shape != (count, 3072):
        raise ValueError(
            f"CIFAR100: expected data (N, 3072) of uint8 and N fine_labels in {path}, got {shape} and {count} labels"
        )
