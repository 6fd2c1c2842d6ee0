"""A folder of images per class, and how an image is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS


def open_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """An image in one of Pillow's modes; some of every data set are in another one."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except Exception as error:  # PIL raises half a dozen kinds for a file that is broken
        raise ValueError(f"expected an image in {path}, could not read it: {error}") from error


def files_of(dataset: Any) -> list[Any]:
    """The files of a data set's images, which are in ``paths`` or ``samples``; none if it does not tell."""
    return list(getattr(dataset, "paths", None) or [path for path, _ in getattr(dataset, "samples", ())])


class ClassFolders(ImageFolder):
    """A folder of images per class, ``root/<class>/<image>``, split by class: trained on some, tested on others.

    Args:
        root: the folder of the class folders.
        split: ``"train"``, the first classes by name, ``"test"``, the others, or ``"train+test"``.
        train_classes: how many are the first; half of them, rounded down, if not given.
        transform: of an RGB image.
        target_transform: of a label, which counts all classes of the folder.
        download: must be False; recipes pass it to every data set.

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
        download: bool = False,
    ) -> None:
        if download:
            raise ValueError("ClassFolders: expected download=False, as the images are your own, got True")
        self.split = split
        self.train_classes = train_classes
        super().__init__(str(root), transform, target_transform, loader=open_image, allow_empty=True)
        filled = set(self.targets)
        empty = [name for name in self.classes if self.class_to_idx[name] not in filled]
        if empty:
            raise FileNotFoundError(
                f"ClassFolders: expected an image or more in {Path(root, empty[0])}, found none of the kinds "
                f"{', '.join(IMG_EXTENSIONS)}; add some, or remove that folder"
            )

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
