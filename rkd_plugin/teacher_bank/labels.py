"""Labels, files and class names of a data set, also of one that wraps, splits or joins others.

Data sets have attributes of various names for these. `torch.utils.data.Subset`, ``random_split``, ``ConcatDataset`` and
torchdistill's wrappers hide the attributes of the data set inside. All other code finds them with this file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from numbers import Integral
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import TensorDataset


def labels_of(dataset: Any, where: str) -> list[int] | None:
    """The label of each item as a whole number from 0, after the data set's ``target_transform``; None if unknown.

    They are read from ``targets`` (torchvision), ``labels`` (pytorch-metric-learning), the pairs of ``samples`` or
    ``imgs``, or the second of two tensors of a ``TensorDataset``.

    Args:
        dataset: a data set that has the labels, or wraps one that has them.
        where: the start of an error message, such as the name of the data set.

    Raises:
        ValueError: if a label is not a whole number from 0; see `check_labels`.

    Example:
        >>> import torch
        >>> from torch.utils.data import ConcatDataset, Subset, TensorDataset
        >>> data = TensorDataset(torch.randn(3, 2), torch.tensor([5, 6, 7]))
        >>> labels_of(ConcatDataset([Subset(data, [2, 0]), data]), "data")
        [7, 5, 5, 6, 7]
    """
    labels = find_labels(dataset)
    return None if labels is None else check_labels(labels, where, lambda index: item_name(dataset, index))


def check_labels(labels: Any, where: str, item: Callable[[int], str] = "item {}".format) -> list[int]:
    """Labels as a list of whole numbers from 0.

    Args:
        labels: a sequence, an array or a tensor on any device.
        where: the start of an error message.
        item: gives the name of an item by its index, for an error message.

    Raises:
        ValueError: if a label is fractional, negative, a bool, a string or a vector; nothing is converted.

    Example:
        >>> check_labels(np.array([1, 0]), "data")
        [1, 0]
        >>> check_labels([1, 0.5], "data")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: data: expected labels that are whole numbers, got 0.5, a float, for item 1; number the classes ...
    """
    values = _plain(labels)
    for index, label in enumerate(values):
        if isinstance(label, bool) or not isinstance(label, Integral) or label < 0:
            expected = "from 0" if isinstance(label, Integral) and not isinstance(label, bool) else "whole numbers"
            is_vector = isinstance(label, list) and len(label) > 1  # of one entry, the argmax would always be 0
            remedy = "give the argmax of one-hot vectors" if is_vector else "number the classes from 0"
            raise ValueError(
                f"{where}: expected labels that are {expected}, got {reprlib.repr(label)}, a {type(label).__name__}, "
                f"for {item(index)}; {remedy}"
            )
    return values


def find_labels(dataset: Any) -> list[Any] | None:
    """The label of each item, unchecked; None if unknown. See `labels_of`."""
    return _of_each(dataset, _labels)


def files_of(dataset: Any) -> list[Any]:
    """The file of each item, from ``paths`` or the pairs of ``samples`` or ``imgs``; empty if unknown."""
    return _of_each(dataset, _files) or []


def class_names(dataset: Any) -> dict[int, str]:
    """Label -> name, from ``class_to_idx`` or ``classes``; empty if unknown, or if joined data sets contradict."""
    for part in unwrapped(dataset):
        # A data set of some of the classes keeps the labels of all.
        if isinstance(labels := getattr(part, "class_to_idx", None), dict) and labels:
            return {label: name for name, label in labels.items()}
        if isinstance(names := getattr(part, "classes", None), list | tuple):
            return dict(enumerate(names))
        if len(inner := wrapped(part)) > 1:
            merged: dict[int, str] = {}
            for joined in inner:
                if any(merged.setdefault(label, name) != name for label, name in class_names(joined).items()):
                    return {}
            return merged
    return {}


def item_name(dataset: Any, index: int) -> str:
    """The name of an item in an error message: its index, and its file if known."""
    files = files_of(dataset)
    return f"image {index}" + (f", {files[index]}," if files else "")


def wrapped(dataset: Any) -> list[Any]:
    """The data sets that a data set wraps or joins directly."""
    if isinstance(joined := getattr(dataset, "datasets", None), list | tuple):  # ConcatDataset
        return list(joined)
    # torchdistill's wrappers; Subset and many others
    inner = [getattr(dataset, name, None) for name in ("org_dataset", "dataset")]
    return [part for part in inner if hasattr(part, "__getitem__") and not isinstance(part, str)][:1]


def unwrapped(dataset: Any) -> Iterator[Any]:
    """A data set, and all data sets that it wraps or joins, from outside to inside."""
    yield dataset
    for part in wrapped(dataset):
        yield from unwrapped(part)


def _of_each(dataset: Any, read: Callable[[Any], list[Any] | None]) -> list[Any] | None:
    """The result of ``read`` for each item, from a data set or the one inside; None unless there is one per item."""
    size = len(dataset) if hasattr(dataset, "__len__") else None
    own = read(dataset)
    if own is not None and len(own) == size:
        return own
    parts = [_of_each(part, read) for part in wrapped(dataset)]
    found: list[Any] = []
    for part in parts:
        if part is None:
            return None
        found += part
    indices = getattr(dataset, "indices", None)  # Subset
    if parts and indices is not None:
        found = [found[index] for index in indices]
    return found if parts and len(found) == size else None


def _labels(dataset: Any) -> list[Any] | None:
    for name in ("targets", "labels"):
        if (labels := getattr(dataset, name, None)) is not None and hasattr(labels, "__len__"):
            break
    else:
        tensors = dataset.tensors if isinstance(dataset, TensorDataset) else ()
        pairs = _pairs(dataset)
        labels = tensors[1] if len(tensors) == 2 else pairs and [label for _, label in pairs]
    if labels is None:
        return None
    values = _plain(labels)
    transform = getattr(dataset, "target_transform", None)
    return values if transform is None else list(map(transform, values))


def _plain(labels: Any) -> list[Any]:
    """Labels as Python's own numbers, strings and lists."""
    if hasattr(labels, "tolist"):
        return list(labels.tolist())
    return [label.tolist() if isinstance(label, Tensor | np.ndarray | np.generic) else label for label in labels]


def _files(dataset: Any) -> list[Any] | None:
    if isinstance(paths := getattr(dataset, "paths", None), list | tuple):
        return list(paths)
    pairs = _pairs(dataset)
    return pairs and [path for path, _ in pairs]


def _pairs(dataset: Any) -> list[Any] | None:
    """``(file, label)`` of each item, as in torchvision's ``ImageFolder``."""
    for name in ("samples", "imgs"):
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list | tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str | PathLike) for pair in pairs
        ):
            return list(pairs)
    return None
