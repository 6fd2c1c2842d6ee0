"""Data sets of the recipes: what torchvision and pytorch-metric-learning lack, and theirs with errors in words."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_metric_learning import datasets as pml
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.utils import download_url
from tqdm import tqdm

VERSION = 1  # of cached images: to be raised when what is decoded changes
LARGE = 2000  # images, from which on decoding them is worth starting processes


class Digits(Dataset[tuple[Tensor, int]]):
    """Handwritten digits that come with scikit-learn: 1797 grey images of 8 x 8 pixels, nothing to download.

    Items are ``(image (1, 8, 8) in [0, 1], digit)``. ``classes`` selects the digits, so that a metric can be tested on
    digits that it was not trained on.

    Example:
        >>> image, digit = Digits(classes=[5, 6])[0]
        >>> image.shape, digit
        (torch.Size([1, 8, 8]), 5)
    """

    def __init__(self, classes: Sequence[int] = tuple(range(10))) -> None:
        unknown = [digit for digit in classes if digit not in range(10)]
        if unknown or not classes:
            raise ValueError(f"Digits: classes must name digits from 0 to 9, got {list(classes)}")
        digits = load_digits()
        targets = torch.as_tensor(digits.target)
        chosen = torch.isin(targets, torch.tensor(list(classes)))
        images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        self.images = images[chosen]
        self.targets: list[int] = targets[chosen].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image and its digit."""
        return self.images[index], self.targets[index]


def _open(path: str | Path) -> Image.Image:
    """An RGB image; some of every data set are grey."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises half a dozen kinds for a file that is broken
        raise ValueError(f"expected an image in {path}, could not read it: {error}") from error


class Listed(pml.BaseDataset):
    """A data set of pytorch-metric-learning whose files are looked for before anything is trained on them.

    Items are ``(image, label)``; ``targets`` are the labels of all of them, ``paths`` their files.

    Args:
        root: the folder that the archive was unpacked in.
        split: ``"train"`` or ``"test"``, of other classes, as in the paper; or ``"train+test"``.
        transform: of an RGB image.
        target_transform: of a label.
        download: whether to download and unpack the archive where its folder is missing.

    Raises:
        FileNotFoundError: if a list or an image that it names is missing.
        ValueError: if a line of a list is malformed, an image cannot be decoded, a download is not what was
            published, or no checksum of it is.
        ConnectionError: if the download fails.
    """

    FOLDER = ""  # that the archive makes
    LISTS: tuple[tuple[str, str], ...] = ()  # files, and what each line of them must match
    MD5: str | None = None  # of the archive
    HOME = ""  # where people get it today

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
        """The host's hook: paths and labels of the split."""
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

    @property
    def _remedy(self) -> str:
        return f"{self.HOME}, or delete any {self.FOLDER} and set download to True" if self.MD5 else self.HOME

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image and its label."""
        image, label = _open(self.paths[index]), self.labels[index]
        return (
            self.transform(image) if self.transform else image,
            self.target_transform(label) if self.target_transform else label,
        )

    def _download(self) -> None:
        """Nothing is unpacked that is not the published archive, and nothing stays that was unpacked in part."""
        name = type(self).__name__
        if self.MD5 is None:
            raise ValueError(f"{name}: no checksum is published that a download could be held against; {self.HOME}")
        Path(self.root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=self.root) as folder:
            archive = Path(folder, f"{name} archive")
            try:
                download_url(self.DOWNLOAD_URL, folder, archive.name, self.MD5)
            except (OSError, HTTPException) as error:
                raise ConnectionError(f"{name}: {self.DOWNLOAD_URL} failed ({error}); {self.HOME}") from error
            except RuntimeError as error:
                raise ValueError(
                    f"{name}: {self.DOWNLOAD_URL} gave an archive whose MD5 is not {self.MD5}; {self.HOME}"
                ) from error
            unpack(archive, Path(folder, "unpacked"))
            Path(folder, "unpacked", self.FOLDER).rename(Path(self.root, self.FOLDER))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar or zip archive, which cannot write anywhere else.

    Raises:
        ValueError: if it tries, or is no such archive.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(folder)
        else:
            with tarfile.open(archive) as tarred:
                tarred.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"expected an archive that stays in its folder in {archive.name}, refused it: {error}"
        ) from error


class CUB(Listed, pml.CUB):
    """CUB-200-2011, ``root/CUB_200_2011/images.txt`` and so on: classes 1 to 100 train, 101 to 200 test.

    Arguments and errors: see `Listed`.
    """

    FOLDER = "CUB_200_2011"
    LISTS = (("CUB_200_2011/images.txt", r"\d+ \S+"), ("CUB_200_2011/image_class_labels.txt", r"\d+ \d+"))
    MD5 = "97eceeb196236b17998738112f37df78"
    HOME = "get CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 and unpack it in that folder"


class Cars196(Listed, pml.Cars196):
    """Cars196, ``root/names.csv``, ``root/car_data`` and so on: classes 1 to 98 train, 99 to 196 test.

    Arguments and errors: see `Listed`; there is no download.
    """

    FOLDER = "car_data"
    LISTS = (("names.csv", r".*"), ("anno_train.csv", r".+,\d+"), ("anno_test.csv", r".+,\d+"))
    HOME = (
        "get https://www.kaggle.com/datasets/jutrera/stanford-car-dataset-by-classes-folder and unpack it so that "
        "names.csv, anno_train.csv, anno_test.csv and car_data lie in that folder"
    )

    def generate_split(self) -> None:
        """The host's hook: paths and labels of the split."""
        try:
            super().generate_split()
        except IndexError as error:
            raise ValueError(
                f"Cars196: expected a name for each class in {self.root}/names.csv, got fewer; {self.HOME}"
            ) from error


class StanfordOnlineProducts(Listed, pml.StanfordOnlineProducts):
    """Stanford Online Products, ``root/Stanford_Online_Products/Ebay_train.txt`` and so on: that list's classes train.

    Arguments and errors: see `Listed`.
    """

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


class ClassFolders(ImageFolder):
    """A folder of images per class, ``root/<class>/<image>``, split by class: trained on some, tested on others.

    Args:
        root: the folder of the class folders.
        split: ``"train"``, the first classes by name, ``"test"``, the others, or ``"train+test"``.
        train_classes: how many are the first; half of them, rounded down, if not given.
        transform: of an RGB image.
        target_transform: of a label, which counts all classes of the folder.

    Raises:
        FileNotFoundError: if the folder is missing, or a class has no image.
        ValueError: if a split would be empty or is unknown, or an image cannot be decoded.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("auk", "jay", "owl"):
        ...         Path(root, name).mkdir()
        ...         Image.new("L", (12, 10)).save(Path(root, name, "1.png"))
        ...     train, test = ClassFolders(root, "train"), ClassFolders(root, "test")
        ...     image, label = test[0]
        >>> train.classes, test.classes, test.targets
        (['auk'], ['jay', 'owl'], [1, 2])
        >>> image.mode, label
        ('RGB', 1)
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        train_classes: int | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        self.split = split
        self.train_classes = train_classes
        super().__init__(str(root), transform, target_transform, loader=_open)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The host's hook: the names and labels of the split's classes."""
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"ClassFolders: expected a folder per class in {directory}, which is not there")
        names = sorted(entry.name for entry in Path(directory).iterdir() if entry.is_dir())
        count = len(names) // 2 if self.train_classes is None else self.train_classes
        parts = {"train": slice(0, count), "test": slice(count, None), "train+test": slice(None)}
        if self.split not in parts:
            raise ValueError(f"ClassFolders: split must be one of {', '.join(parts)}, got {self.split!r}")
        if not 0 < count < len(names):
            raise ValueError(
                f"ClassFolders: expected at least one class to train and one to test, got {count} of the {len(names)} "
                f"folders in {directory} to train"
            )
        chosen = names[parts[self.split]]
        return chosen, {name: names.index(name) for name in chosen}


class Cached(Dataset[tuple[Any, int]]):
    """Images decoded once into a memory-mapped file, of which an access is a copy; transformed at each access.

    The file's name tells the data set's paths, sizes, times and transform by hashes, so that another file is written
    when any of them changes; it is written whole or not at all. Processes share what the system keeps of it in memory.

    Args:
        dataset: its images are uint8 tensors ``(C, H, W)`` of one size, as PILToTensor makes them after a Resize to
            height and width; their files are in ``paths`` or ``samples``, and the labels, used as they are, in
            ``targets``.
        folder: of the file, ``C * H * W`` bytes an image; None to decode each image each time.
        transform: of a uint8 tensor, such as a random crop.

    Raises:
        TypeError: if the data set does not tell its files.
        ValueError: if the images are not uint8 tensors of one size, or the data set's transform cannot be told from
            another one by its ``repr``.

    Example:
        >>> import tempfile, torch
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
        self, dataset: Any, folder: str | Path | None, transform: Callable[[Tensor], Any] | None = None
    ) -> None:
        self.dataset = dataset
        self.targets: list[int] = dataset.targets
        self.transform = transform
        self.path = None if folder is None else Path(folder, f"{_stem(dataset)}-{_stats(dataset)}.npy")
        self._images: np.ndarray[Any, Any] | None = None
        if self.path is not None and not _is_whole(self.path, len(dataset)):
            _decode(dataset, self.path)
            # The same files as they were before: nothing will ask for that again.
            for stale in self.path.parent.glob(f"{_stem(dataset)}-*.npy"):
                if stale != self.path:
                    stale.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The transformed image, and its label."""
        if self.path is None:
            image = self.dataset[index][0]
        else:
            # Each process maps the file itself: a pickled map would carry all images.
            if self._images is None:
                self._images = np.lib.format.open_memmap(self.path, mode="r")
            image = torch.from_numpy(self._images[index].copy())
        return (self.transform(image) if self.transform else image), self.targets[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}


def _files(dataset: Any) -> list[str]:
    paths = getattr(dataset, "paths", None) or [path for path, _ in getattr(dataset, "samples", ())]
    if not paths:
        raise TypeError(
            f"Cached: expected a data set whose `paths` or `samples` name its files, got {type(dataset).__name__}; set "
            "folder to None"
        )
    return [str(path) for path in paths]


def _stem(dataset: Any) -> str:
    """Tells data sets apart that can be in use side by side."""
    transform = repr(dataset.transform)
    if " at 0x" in transform:
        raise ValueError(
            f"Cached: expected a transform whose repr is the same in each run, got {transform}; use those of "
            "torchvision.transforms.v2, or set folder to None"
        )
    names = [type(dataset).__name__, *([dataset.split] if hasattr(dataset, "split") else [])]
    return "-".join([*names, _hash((VERSION, _files(dataset), transform))])


def _stats(dataset: Any) -> str:
    """Tells a file from what it was before."""
    stats = map(os.stat, _files(dataset))
    return _hash([(stat.st_size, stat.st_mtime_ns) for stat in stats])


def _hash(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _is_whole(path: Path, count: int) -> bool:
    try:
        images = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError):  # missing, cut or foreign
        return False
    return images.dtype == np.uint8 and images.ndim == 4 and len(images) == count


def _decode(dataset: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No collation: images of different sizes get our sentence, and not torch's.
    workers = torch.get_num_threads() if len(dataset) > LARGE else 0
    loader = DataLoader(_Images(dataset), batch_size=None, num_workers=workers)
    # With the process's number: of two that decode at the same time, the last one's file stays, and it is the same.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    size: torch.Size | None = None
    try:
        for index, image in enumerate(tqdm(loader, desc=f"decoding into {path.parent}", unit="image", leave=False)):
            if isinstance(image, ValueError):
                raise image
            is_image = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3
            if not is_image or image.shape != (size or image.shape):
                raise ValueError(
                    f"Cached: expected uint8 tensors of one size, got {getattr(image, 'dtype', type(image).__name__)} "
                    f"{tuple(getattr(image, 'shape', ()))} for image {index}; let the data set's transform end in "
                    "Resize to height and width, and PILToTensor"
                )
            if size is None:
                size = image.shape
                images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(len(dataset), *size))
            images[index] = image.numpy()
        images.flush()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _Images(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index][0]
        except ValueError as error:
            return error  # raised in a process, it would come with its traceback as text
