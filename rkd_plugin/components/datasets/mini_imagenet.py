"""miniImageNet in the forms in which it is distributed."""

from __future__ import annotations

import csv
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torchvision.datasets import VisionDataset

from rkd_plugin.components.datasets.folders import class_folders, list_images, open_image
from rkd_plugin.components.datasets.pickles import read_arrays
from rkd_plugin.teacher_bank.labels import check_labels

LISTS = "https://github.com/twitter-research/meta-learning-lstm/tree/master/data/miniImagenet"
IMAGES = 600  # per class


class MiniImageNet(VisionDataset):
    """miniImageNet: 100 classes of ImageNet with 600 images each, split 64 / 16 / 20 as by Ravi and Larochelle.

    The first of these forms that is in ``root`` is read:

    - ``{train,val,test}.csv``, lines ``filename,label`` below a header, and ``images/<filename>``: the published lists,
      with an archive such as ``mini-imagenet.zip`` unpacked beside them;
    - ``mini-imagenet-cache-{train,val,test}.pkl``, pickles of ``image_data`` ``(N, H, W, 3)`` and ``class_dict``;
    - ``miniImageNet_category_split_{train_phase_train,val,test}.pickle``, pickles of ``data`` and ``labels``;
    - ``{train,val,test}/<class>/<image>``.

    Reading the pickles runs no code. Items are ``(image, label)``; ``paths`` are all files, ``targets`` all labels,
    numbered from 0 in the order of ``classes``.

    Args:
        root: folder of one of these forms.
        split: ``"train"``, ``"val"``, ``"test"``, or ``"trainval"``, the first two together.
        transform: transform of an RGB image, which has the size of its file.
        published: whether a split must have its published number of classes, of 600 images each.

    Raises:
        FileNotFoundError: if a split is in none of these forms, or an image of a list is missing.
        ValueError: if a list or a pickle is malformed or has another size than the published one, or an image cannot be
            decoded.

    Source: Vinyals et al., "Matching Networks", NeurIPS 2016; Ravi and Larochelle, "Optimization as a Model for
    Few-shot Learning", ICLR 2017, whose lists have other classes.
    """

    CLASSES: ClassVar = {"train": 64, "val": 16, "test": 20}

    def __init__(
        self,
        root: str | Path,
        split: str = "trainval",
        transform: Callable[[Image.Image], Any] | None = None,
        published: bool = True,
    ) -> None:
        super().__init__(root, transform=transform)
        splits = {**{name: [name] for name in self.CLASSES}, "trainval": ["train", "val"]}
        if split not in splits:
            raise ValueError(f"MiniImageNet: split must be one of {', '.join(splits)}, got {split!r}")
        self.split = split
        self.folder = Path(root)
        self.paths: list[str] = []
        self._pixels: list[np.ndarray[Any, Any] | None] = []  # of the images of pickles
        names: list[str] = []
        for part in splits[split]:
            found = self._find(part)
            self._check_counts(part, found, published)
            names += [name for name, _, _ in found]
            self.paths += [path for _, path, _ in found]
            self._pixels += [pixels for _, _, pixels in found]
        self.classes = list(dict.fromkeys(names))
        labels = {name: label for label, name in enumerate(self.classes)}
        self.targets = [labels[name] for name in names]

    def _find(self, part: str) -> list[tuple[str, str, Any]]:
        """Class, file and pixels (None if the file is an image) of each image."""
        phase = "train_phase_train" if part == "train" else part
        forms: dict[Path, Callable[[Path], Iterable[tuple[str, str, Any]]]] = {
            self.folder / f"{part}.csv": self._from_list,
            self.folder / f"mini-imagenet-cache-{part}.pkl": self._from_cache,
            self.folder / f"miniImageNet_category_split_{phase}.pickle": self._from_labels,
            self.folder / part: self._from_folders,
        }
        for path, read in forms.items():
            if path.exists():
                return list(read(path))
        raise FileNotFoundError(
            f"MiniImageNet: expected one of {', '.join(path.name for path in forms)} in {self.folder}, found none; get "
            f"the lists from {LISTS} and the images that they name into {self.folder / 'images'}, or one of the others"
        )

    def _from_list(self, path: Path) -> Iterable[tuple[str, str, Any]]:
        images = self.folder / "images"
        there = {str(file.relative_to(images)) for file in images.rglob("*")}
        with path.open(newline="", encoding="utf-8") as file:
            for number, line in enumerate(csv.reader(file), 1):
                if len(line) != 2 or not all(line):
                    raise ValueError(
                        f"MiniImageNet: line {number} of {path} is malformed, expected filename,label, got {line}"
                    )
                if number == 1 and line == ["filename", "label"]:
                    continue
                if line[0] not in there:
                    raise FileNotFoundError(
                        f"MiniImageNet: line {number} of {path} names the image {images / line[0]}, which is missing; "
                        "unpack the archive of the images there"
                    )
                yield line[1], str(images / line[0]), None

    def _from_cache(self, path: Path) -> Iterable[tuple[str, str, Any]]:
        content = read_arrays("MiniImageNet", path)
        images, rows = self._images(path, content.get("image_data")), content.get("class_dict")
        expected = f"MiniImageNet: expected a class_dict in {path} that names each row of image_data once"
        # All classes can share one list of any length, so that the lengths are compared before the content.
        is_dict = isinstance(rows, dict) and all(isinstance(own, list | np.ndarray) for own in rows.values())
        if not isinstance(rows, dict) or not is_dict or sum(map(len, rows.values())) != len(images):
            raise ValueError(expected)
        by_class = {name: check_labels(own, f"{expected}; of class {name!r:.40}") for name, own in rows.items()}
        if {row for own in by_class.values() for row in own} != {*range(len(images))}:
            raise ValueError(expected)
        return ((_name(path, name), str(path), images[row]) for name, own in by_class.items() for row in own)

    def _from_labels(self, path: Path) -> Iterable[tuple[str, str, Any]]:
        content = read_arrays("MiniImageNet", path)
        images, labels = self._images(path, content.get("data")), content.get("labels")
        if not isinstance(labels, list | tuple | np.ndarray) or len(labels) != len(images):
            raise ValueError(f"MiniImageNet: expected labels in {path}, one for each row of data")
        return ((_name(path, label), str(path), pixels) for label, pixels in zip(labels, images, strict=True))

    @staticmethod
    def _images(path: Path, images: Any) -> np.ndarray[Any, Any]:
        shape = images.shape if isinstance(images, np.ndarray) and images.dtype == np.uint8 else None
        if shape is None or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"MiniImageNet: expected images (N, H, W, 3) of uint8 in {path}, got {shape}")
        checked: np.ndarray[Any, Any] = images
        return checked

    def _from_folders(self, path: Path) -> Iterable[tuple[str, str, Any]]:
        names = class_folders(path)
        for name, images in zip(names, list_images("MiniImageNet", [path / name for name in names]), strict=True):
            yield from ((name, image, None) for image in images)

    def _check_counts(self, part: str, found: list[tuple[str, str, Any]], published: bool) -> None:
        counts = Counter(name for name, _, _ in found)
        if not counts or (published and (len(counts) != self.CLASSES[part] or set(counts.values()) != {IMAGES})):
            sizes = sorted(set(counts.values()))
            raise ValueError(
                f"MiniImageNet: expected {self.CLASSES[part]} classes of {IMAGES} images in split {part} of "
                f"{self.folder}, got {len(counts)} of {sizes}; complete them, or set published to False"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image and its label."""
        pixels = self._pixels[index]
        image = open_image(self.paths[index]) if pixels is None else Image.fromarray(pixels)
        return (self.transform(image) if self.transform else image), self.targets[index]


def _name(path: Path, label: Any) -> str:
    """The name of a class in a pickle."""
    if not isinstance(label, str | int | np.integer):
        raise ValueError(
            f"MiniImageNet: expected names or numbers as labels in {path}, got {reprlib.repr(label)}, a "
            f"{type(label).__name__}; number the classes"
        )
    return str(label)
