"""Tiny ImageNet, read from its folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import VisionDataset

from rkd_plugin.components.datasets.folders import list_images, open_image

HOME = "get http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it in that folder"


class TinyImageNet(VisionDataset):
    """Tiny ImageNet, ``root/tiny-imagenet-200``: 200 classes, 100,000 + 10,000 images of 64 x 64 pixels.

    Training images are ``train/<class>/images/*.JPEG``; test images are ``val/images``, with their classes in
    ``val/val_annotations.txt`` (the labels of ``test`` are not published). The label of a class is its line in
    ``wnids.txt``. Items are ``(image, label)``; ``samples`` are all files and labels, ``targets`` all labels.

    Args:
        root: folder that contains ``tiny-imagenet-200``.
        split: ``"train"`` or ``"val"``.
        transform: transform of an RGB image.
        target_transform: transform of a label.

    Raises:
        FileNotFoundError: if a list, a class's folder or an image is missing.
        ValueError: if a list is empty, a line of it is malformed or names no class, an image cannot be decoded, or the
            split is unknown.
    """

    FOLDER = "tiny-imagenet-200"

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        super().__init__(root, transform=transform, target_transform=target_transform)
        self.split = split
        self.folder = Path(root, self.FOLDER)
        self.classes = self._lines("wnids.txt")
        labels = {name: label for label, name in enumerate(self.classes)}
        if split not in ("train", "val"):
            raise ValueError(f"TinyImageNet: split must be 'train' or 'val', got {split!r}")
        self.samples: list[tuple[str, int]] = (
            self._from_folders(labels) if split == "train" else self._from_annotations(labels)
        )
        self.targets = [label for _, label in self.samples]

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"TinyImageNet: expected a file {path}, found none; {HOME}")
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"TinyImageNet: expected lines in {path}, found none; {HOME}")
        return lines

    def _from_folders(self, labels: dict[str, int]) -> list[tuple[str, int]]:
        folders = [self.folder / "train" / name / "images" for name in labels]
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise FileNotFoundError(f"TinyImageNet: expected a folder {missing[0]}, found none; {HOME}")
        images = list_images("TinyImageNet", folders)
        return [(path, label) for paths, label in zip(images, labels.values(), strict=True) for path in paths]

    def _from_annotations(self, labels: dict[str, int]) -> list[tuple[str, int]]:
        name = "val/val_annotations.txt"
        there = {path.name for path in (self.folder / "val" / "images").glob("*")}
        samples = []
        for number, line in enumerate(self._lines(name), 1):
            file, _, rest = line.partition("\t")
            wnid = rest.partition("\t")[0]
            if wnid not in labels:
                raise ValueError(
                    f"TinyImageNet: line {number} of {self.folder / name} names no class of wnids.txt, {line!r}; {HOME}"
                )
            path = self.folder / "val" / "images" / file
            if file not in there:
                raise FileNotFoundError(
                    f"TinyImageNet: line {number} of {self.folder / name} names the image {path}, which is missing; "
                    f"{HOME}"
                )
            samples.append((str(path), labels[wnid]))
        return samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The image and its label."""
        path, label = self.samples[index]
        image = open_image(path)
        return (
            self.transform(image) if self.transform else image,
            self.target_transform(label) if self.target_transform else label,
        )
