"""Omniglot for few-shot learning: rotated characters are classes, and the lists of Vinyals are the splits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torchvision
from PIL import Image
from torchvision.datasets import VisionDataset
from torchvision.datasets.utils import check_integrity

from rkd_plugin.components.datasets.downloads import download as fetch
from rkd_plugin.components.datasets.downloads import unpack
from rkd_plugin.components.datasets.folders import list_images, open_image

LISTS = "https://raw.githubusercontent.com/jakesnell/prototypical-networks/master/data/omniglot/splits/vinyals"


class Omniglot(VisionDataset):
    """Omniglot: 1,623 characters of 50 alphabets, 20 drawings each; each character makes four classes by rotation.

    Images are those of torchvision's Omniglot, ``root/omniglot-py/images_{background,evaluation}/<alphabet>/
    character<NN>/*.png``; the classes of a split are in ``root/omniglot-splits/vinyals/<split>.txt``, a line
    ``<alphabet>/character<NN>/rot<angle>`` each. Items are ``(image, label)``; ``paths`` are all files, ``targets`` all
    labels, ``classes`` the lines.

    Args:
        root: folder that contains ``omniglot-py``.
        split: name of a list: ``"train"`` (1,028 characters), ``"val"`` (172), ``"trainval"`` or ``"test"`` (423).
        transform: transform of a grey image, black on white, 105 x 105 pixels, after its rotation.
        download: whether to download images and lists if they are missing; their MD5 is checked.
        published: whether the lists must be the published ones; if not, other lists of that form are read.

    Raises:
        FileNotFoundError: if a list, a character's folder or its images are missing.
        ValueError: if a list is not the published one, or malformed; if an image cannot be decoded.
        ConnectionError: if the download fails.

    Source: Lake et al., Science 2015; classes and lists of Vinyals et al., "Matching Networks", NeurIPS 2016, as Snell
    et al. published them.
    """

    FOLDER = "omniglot-py"
    PARTS = torchvision.datasets.Omniglot.zips_md5
    SPLITS: ClassVar = {
        "train": "433d1fcc2b20dcee2983ceb524586f7f",
        "val": "78c535fa427b12b6596908376a0b3f34",
        "trainval": "888433268015439fd05fb6e9006ead50",
        "test": "43534e6d5f9e74acbb7de1b4874abad8",
    }

    def __init__(
        self,
        root: str | Path,
        split: str = "trainval",
        transform: Callable[[Image.Image], Any] | None = None,
        download: bool = False,
        published: bool = True,
    ) -> None:
        super().__init__(root, transform=transform)
        if split not in self.SPLITS:
            raise ValueError(f"Omniglot: split must be one of {', '.join(self.SPLITS)}, got {split!r}")
        self.split = split
        self.list = Path(root, "omniglot-splits", "vinyals", f"{split}.txt")
        if download:
            self._download()
        self.classes = self._lines(published)
        self.paths: list[str] = []
        self.targets: list[int] = []
        self._angles: list[int] = []
        images: dict[str, list[str]] = {}  # by character, for its four classes
        for label, line in enumerate(self.classes):
            character, _, angle = line.rpartition("/rot")
            if character not in images:
                images[character] = self._images(character)
            self.paths += images[character]
            self.targets += [label] * len(images[character])
            self._angles += [int(angle)] * len(images[character])

    @property
    def _remedy(self) -> str:
        home = torchvision.datasets.Omniglot.download_url_prefix
        return (
            f"get {' and '.join(f'{part}.zip' for part in self.PARTS)} from {home} and unpack them in "
            f"{Path(self.root, self.FOLDER)}, get {', '.join(self.SPLITS)}.txt from {LISTS} into {self.list.parent}, "
            "or set download to True"
        )

    def _download(self) -> None:
        for part, md5 in self.PARTS.items():
            folder = Path(self.root, self.FOLDER)
            if not (folder / part).is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                archive = folder / f"{part}.zip"
                url = f"{torchvision.datasets.Omniglot.download_url_prefix}/{archive.name}"
                fetch("Omniglot", url, archive, md5, self._remedy)
                unpack(archive, folder / part)
        if not self.list.is_file():
            self.list.parent.mkdir(parents=True, exist_ok=True)
            fetch("Omniglot", f"{LISTS}/{self.list.name}", self.list, self.SPLITS[self.split], self._remedy)

    def _lines(self, published: bool) -> list[str]:
        if not self.list.is_file():
            raise FileNotFoundError(f"Omniglot: expected a list {self.list}, found none; {self._remedy}")
        md5 = self.SPLITS[self.split]
        if published and not check_integrity(self.list, md5):
            raise ValueError(
                f"Omniglot: {self.list} is truncated or changed, its MD5 is not {md5}; {self._remedy}; or set "
                "published to False"
            )
        lines = self.list.read_text(encoding="utf-8").split()
        for number, line in enumerate(lines, 1):
            if not re.fullmatch(r"[^/]+/[^/]+/rot(000|090|180|270)", line) or ".." in line:
                raise ValueError(
                    f"Omniglot: line {number} of {self.list} is malformed, {line!r}; expected alphabet/character/rot090"
                )
        if not lines or len(set(lines)) < len(lines):
            raise ValueError(
                f"Omniglot: expected distinct lines in {self.list}, got {len(set(lines))} distinct of {len(lines)}; "
                f"{self._remedy}"
            )
        return lines

    def _images(self, character: str) -> list[str]:
        folders = [Path(self.root, self.FOLDER, part, character) for part in self.PARTS]
        existing = [folder for folder in folders if folder.is_dir()]
        if not existing:
            raise FileNotFoundError(
                f"Omniglot: {self.list} names {character}, expected a folder {folders[0]} or {folders[1]} with its "
                f"images, found none; {self._remedy}"
            )
        return [path for paths in list_images("Omniglot", existing) for path in paths]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image, rotated counter-clockwise, and its label."""
        image = open_image(self.paths[index], "L").rotate(self._angles[index])
        return (self.transform(image) if self.transform else image), self.targets[index]
