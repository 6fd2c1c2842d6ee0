"""CIFAR-100 in torchvision's files, with errors in words."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

# What a pickle of numpy arrays names, in the versions of numpy that are about; nothing else is called.
ARRAYS = {
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


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
        try:
            download_and_extract_archive(self.url, self.root, filename=self.filename, md5=self.tgz_md5)
        except (OSError, HTTPException) as error:
            raise ConnectionError(f"CIFAR100: {self.url} failed ({error}); {self._remedy}") from error
        except RuntimeError as error:
            raise ValueError(
                f"CIFAR100: {self.url} gave an archive whose MD5 is not {self.tgz_md5}; {self._remedy}"
            ) from error

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


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _check_form(path: Path, is_meta: bool) -> None:
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle raises about anything
        raise ValueError(f"CIFAR100: expected a pickle of arrays in {path}, could not read it: {error}") from error
    if is_meta:
        names = content.get("fine_label_names") if isinstance(content, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"CIFAR100: expected a list fine_label_names in {path}, got {type(names).__name__}")
        return
    images, labels = (content.get(key) if isinstance(content, dict) else None for key in ("data", "fine_labels"))
    shape = images.shape if isinstance(images, np.ndarray) and images.dtype == np.uint8 else None
    count = len(labels) if isinstance(labels, list) else None
    if count is None or shape != (count, 3072):
        raise ValueError(
            f"CIFAR100: expected data (N, 3072) of uint8 and N fine_labels in {path}, got {shape} and {count} labels"
        )
