"""Published data sets with lists of their images, which are checked before training."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from pytorch_metric_learning import datasets as pml

from rkd_plugin.components.datasets.downloads import download as fetch
from rkd_plugin.components.datasets.downloads import unpack
from rkd_plugin.components.datasets.folders import open_image


class Listed(pml.BaseDataset):
    """A data set of pytorch-metric-learning whose files are checked before training.

    Items are ``(image, label)``; ``targets`` are all labels, ``paths`` all files.

    Args:
        root: folder in which the archive was unpacked.
        split: ``"train"``, ``"test"`` (other classes, as in the paper) or ``"train+test"``.
        transform: transform of an RGB image.
        target_transform: transform of a label.
        download: whether to download and unpack the archive if its folder is missing.

    Raises:
        FileNotFoundError: if a list or an image that it names is missing.
        ValueError: if a line of a list is malformed, an image cannot be decoded, a download is not the published
            file, or no checksum of it is published.
        ConnectionError: if the download fails.
    """

    class_count = 0  # number of classes of all splits
    FOLDER = ""  # folder in the archive
    LISTS: tuple[tuple[str, str], ...] = ()  # files, each with the pattern of its lines
    MD5: str | None = None  # of the archive
    HOME = ""  # where to get the archive

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        download: bool = False,
    ) -> None:
        self.root = str(root)
        if download and not Path(root, self.FOLDER).is_dir():
            self._download()
        elif not Path(root).is_dir():
            raise FileNotFoundError(f"{type(self).__name__}: expected a folder {root}, found none; {self._remedy}")
        super().__init__(self.root, split, transform, target_transform)
        self.targets: list[int] = self.labels

    def generate_split(self) -> None:
        """PML's hook: paths and labels of the split."""
        name = type(self).__name__
        for file, pattern in self.LISTS:
            path = Path(self.root, file)
            if not path.is_file():
                raise FileNotFoundError(f"{name}: expected a file {path}, found none; {self._remedy}")
            with path.open(errors="replace") as lines:
                for number, line in enumerate(lines, 1):
                    if not re.fullmatch(pattern, line.strip()):
                        raise ValueError(f"{name}: line {number} of {path} is malformed, {line!r}; {self._remedy}")
        super().generate_split()
        missing = [path for path in self.paths if not os.path.isfile(path)]
        if missing:
            raise FileNotFoundError(
                f"{name}: {len(missing)} of {len(self.paths)} images are missing, the first one is {missing[0]}; "
                f"{self._remedy}"
            )
        if not self.paths:
            raise ValueError(f"{name}: the lists in {self.root} name no image of split {self.split!r}; {self._remedy}")

    def all_classes(self) -> Listed:
        """The same with the classes of all splits."""
        return type(self)(self.root, "train+test", self.transform, self.target_transform)

    @property
    def _remedy(self) -> str:
        return f"{self.HOME}, or delete any {self.FOLDER} and set download to True" if self.MD5 else self.HOME

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image and its label."""
        image, label = open_image(self.paths[index]), self.labels[index]
        return (
            self.transform(image) if self.transform else image,
            self.target_transform(label) if self.target_transform else label,
        )

    def _download(self) -> None:
        """Unpack the published archive as a whole, or leave nothing."""
        name = type(self).__name__
        if self.MD5 is None:
            raise ValueError(f"{name}: no checksum is published to check a download against; {self.HOME}")
        Path(self.root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=self.root) as folder:
            archive = Path(folder, f"{name} archive")
            fetch(name, self.DOWNLOAD_URL, archive, self.MD5, self.HOME)
            unpack(archive, Path(self.root, self.FOLDER))


class CUB(Listed, pml.CUB):
    """CUB-200-2011, ``root/CUB_200_2011/images.txt`` and so on: training classes 1 to 100, test classes 101 to 200.

    Arguments and errors: see `Listed`.
    """

    class_count = 200
    FOLDER = "CUB_200_2011"
    LISTS = (("CUB_200_2011/images.txt", r"\d+ \S+"), ("CUB_200_2011/image_class_labels.txt", r"\d+ \d+"))
    MD5 = "97eceeb196236b17998738112f37df78"
    HOME = "get CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 and unpack it in that folder"


class Cars196(Listed, pml.Cars196):
    """Cars196, ``root/names.csv``, ``root/car_data`` and so on: training classes 1 to 98, test classes 99 to 196.

    Arguments and errors: see `Listed`; there is no download.
    """

    class_count = 196
    FOLDER = "car_data"
    LISTS = (("names.csv", r".*"), ("anno_train.csv", r".+,\d+"), ("anno_test.csv", r".+,\d+"))
    HOME = (
        "get https://www.kaggle.com/datasets/jutrera/stanford-car-dataset-by-classes-folder and unpack it so that "
        "names.csv, anno_train.csv, anno_test.csv and car_data are in that folder"
    )

    def generate_split(self) -> None:
        """PML's hook: paths and labels of the split."""
        try:
            super().generate_split()
        except IndexError as error:
            raise ValueError(
                f"Cars196: expected a name for each class in {self.root}/names.csv, got fewer; {self.HOME}"
            ) from error


class StanfordOnlineProducts(Listed, pml.StanfordOnlineProducts):
    """Stanford Online Products, ``root/Stanford_Online_Products/Ebay_train.txt`` (the training classes) and so on.

    Arguments and errors: see `Listed`.
    """

    class_count = 22_634
    FOLDER = "Stanford_Online_Products"
    LISTS = (
        ("Stanford_Online_Products/Ebay_train.txt", r"(\d+ \d+ \d+|image_id class_id super_class_id) \S+"),
        ("Stanford_Online_Products/Ebay_test.txt", r"(\d+ \d+ \d+|image_id class_id super_class_id) \S+"),
    )
    MD5 = "7f73d41a2f44250d4779881525aea32e"
    HOME = (
        "get Stanford_Online_Products.zip as https://github.com/rksltnl/Deep-Metric-Learning-CVPR16 says and unpack it "
        "in that folder"
    )
