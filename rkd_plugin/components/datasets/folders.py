"""A data set of one folder per class; listing folders and opening images."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

SHOWN = 3  # number of names in a message
SPLITS = {"train", "val", "valid", "validation", "test"}
# Entries that operating systems, archive programs and network drives add; hidden entries begin with a dot.
SYSTEM = {
    "__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "#recycle",
    "@recycle", "system volume information", "lost+found", "network trash folder", "temporary items",
}  # fmt: skip


def open_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Open an image and convert it to a mode of Pillow; every data set has some images in another mode.

    Raises:
        ValueError: if the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except Exception as error:  # Pillow raises many types for a damaged file
        raise ValueError(f"expected an image in {path}, could not read it: {error}") from error


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name, without hidden and system entries such as ``.ipynb_checkpoints``."""
    with os.scandir(folder) as found:
        kept = [
            entry
            for entry in found
            if not entry.name.startswith((".", "@ea", "@syno")) and entry.name.lower() not in SYSTEM
        ]
    return sorted(kept, key=lambda entry: entry.name)


def class_folders(root: str | Path) -> list[str]:
    """The names of the folders in a folder; see `entries`."""
    return [entry.name for entry in entries(root) if entry.is_dir()]


def list_images(owner: str, folders: Iterable[Path]) -> list[list[str]]:
    """The image files of each folder, sorted by name; a warning counts the other entries, which are skipped.

    Args:
        owner: name of the data set, for messages.
        folders: folders that contain images.

    Raises:
        FileNotFoundError: if a folder has no image.
        ValueError: if a folder has folders instead of images.
    """
    images, skipped = [], Counter[str]()
    for folder in folders:
        paths: list[str] = []
        inside: list[str] = []
        others: list[str] = []
        for entry in entries(folder):
            suffix = os.path.splitext(entry.name)[1].lower()
            (inside if entry.is_dir() else paths if suffix in IMG_EXTENSIONS else others).append(entry.path)
        if not paths and inside:
            raise ValueError(
                f"{owner}: expected images in {folder}, which is taken for a class, got folders, {_names(inside)}; if "
                f"they are the classes, set root (recipe.data_root) to {folder}, otherwise move their images up"
            )
        if not paths:
            raise FileNotFoundError(
                f"{owner}: expected an image or more in {folder}, found {_names(others) or 'nothing'}, none of the "
                f"kinds {', '.join(IMG_EXTENSIONS)}; add some, or remove that folder"
            )
        images.append(paths)
        skipped.update(["folders"] * len(inside))
        skipped.update(os.path.splitext(path)[1].lower() or "files without a suffix" for path in others)
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
        warnings.warn(
            f"{owner}: {skipped.total()} entries among the images in {Path(images[0][0]).parent.parent} are skipped "
            f"({kinds}), as only {', '.join(IMG_EXTENSIONS)} are read; convert those that are images",
            stacklevel=2,
        )
    return images


def _names(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(map(os.path.basename, paths[:SHOWN])) + more


class ClassFolders(ImageFolder):
    """One folder of images per class, ``root/<class>/<image>``; training and test classes are disjoint.

    Hidden and system entries are skipped; a warning counts other files that are not images. ``class_count`` is the
    number of classes of all splits.

    Args:
        root: folder that contains the class folders.
        split: ``"train"`` for the first classes by name, ``"test"`` for the others, or ``"train+test"``.
        train_classes: number of training classes; None for half of the classes, rounded down.
        transform: transform of an RGB image.
        target_transform: transform of a label; labels number all classes of the folder.
        download: must be False; recipes pass it to every data set.

    Raises:
        FileNotFoundError: if the folder is missing, or a class has no image.
        ValueError: if a class has folders instead of images, a split would be empty or is unknown, or an image cannot
            be decoded.

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
        download: bool = False,
    ) -> None:
        if download:
            raise ValueError("ClassFolders: expected download=False, as the images are your own, got True")
        self.split = split
        self.train_classes = train_classes
        super().__init__(str(root), transform, target_transform, loader=open_image)

    def all_classes(self) -> ClassFolders:
        """The same with the classes of all splits."""
        return ClassFolders(self.root, "train+test", self.train_classes, self.transform, self.target_transform)

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:
        """Hook of torchvision: file and label of each image."""
        images = list_images("ClassFolders", (Path(directory, name) for name in class_to_idx))
        return [(path, label) for paths, label in zip(images, class_to_idx.values(), strict=True) for path in paths]

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Hook of torchvision: the names and labels of the classes of the split."""
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"ClassFolders: expected a folder per class in {directory}, found no such folder")
        names = class_folders(directory)
        if names and SPLITS.issuperset(map(str.lower, names)):
            first = next((name for name in names if name.lower() == "train"), names[0])
            raise ValueError(
                f"ClassFolders: expected a folder per class in {directory}, got {', '.join(names)}, which are splits; "
                f"set root (recipe.data_root) to one of them, such as {Path(directory, first)}"
            )
        self.class_count = len(names)
        count = len(names) // 2 if self.train_classes is None else self.train_classes
        parts = {"train": slice(0, count), "test": slice(count, None), "train+test": slice(None)}
        if self.split not in parts:
            raise ValueError(f"ClassFolders: split must be one of {', '.join(parts)}, got {self.split!r}")
        if not names or (self.split != "train+test" and not 0 < count < len(names)):
            raise ValueError(
                f"ClassFolders: expected at least one class to train and one to test, got {count} of the {len(names)} "
                f"folders in {directory} to train; change train_classes, or add classes"
            )
        chosen = names[parts[self.split]]
        return chosen, {name: names.index(name) for name in chosen}
