"""Views of images: whether a data set draws random numbers, and how to draw the same ones again."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROBES = 8  # images of a data set that are tested


def items(dataset: Any, rows: Sequence[int], views: int, seed: int) -> list[Any]:
    """The items of a data set for rows of a bank; each view of an image has its own random numbers."""
    if not views:
        whole = getattr(dataset, "__getitems__", None)
        return list(whole(rows)) if whole else [dataset[index] for index in rows]
    count = len(dataset)
    return [drawn(dataset, row % count, row // count, seed) for row in rows]


def drawn(dataset: Any, index: int, view: int, seed: int) -> Any:
    """One view of an item; its random numbers depend on these arguments only."""
    with _drawing(f"{seed} {view} {index}"):
        return dataset[index]


@contextmanager
def _drawing(source: str) -> Iterator[None]:
    """In the block, random numbers depend on ``source`` only; afterwards the generators are restored."""
    seed = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=4).digest(), "big")
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def draws(dataset: Any) -> str:
    """The reason why the items of a data set depend on random numbers; empty if they do not.

    A few items are loaded twice: they must not change the random number generators of PyTorch, NumPy and Python, and
    must be equal both times.

    Example:
        >>> from torch.utils.data import Dataset
        >>> class Flipped(Dataset):
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         return torch.ones(2) if random.random() < 0.999 else torch.zeros(2)
        >>> draws(Flipped()), draws([torch.ones(2), torch.zeros(2)])
        ("it draws random numbers of Python's random", '')
    """
    for index in probed(dataset):
        seen = []
        for view in range(2):
            with _drawing(f"{view} {index}"):
                before = _states()
                seen.append(image(dataset[index]))
                for library, state in _states().items():
                    if state != before[library]:
                        return f"it draws random numbers of {library}"
        if not torch.equal(*seen):
            return f"image {index} is another one each time"
    return ""


def _states() -> dict[str, Any]:
    return {
        "PyTorch": torch.default_generator.get_state().numpy().tobytes(),
        "NumPy": [part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "Python's random": random.getstate(),
    }


def check_repeats(dataset: Any, seed: int) -> None:
    """Raise ValueError if a view cannot be drawn again, as for a transform with its own random generator."""
    for index in probed(dataset):
        first, again = (image(drawn(dataset, index, 0, seed)) for _ in range(2))
        if not torch.equal(first, again):
            raise ValueError(
                f"expected views that the seed decides, got another image {index} with the same random numbers of "
                "PyTorch, NumPy and Python; use transforms that draw from these"
            )


def image(item: Any) -> Tensor:
    """The image of an item, as a tensor."""
    seen = item[0] if isinstance(item, Sequence) else item
    try:
        return torch.as_tensor(seen if isinstance(seen, Tensor) else np.array(seen))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"expected items that are or begin with an image, got {type(seen).__name__}; give the data set that form"
        ) from error


def probed(dataset: Any) -> Iterable[int]:
    """Indices of a few items, from the first to the last."""
    count = len(dataset)
    return sorted({at * (count - 1) // max(PROBES - 1, 1) for at in range(PROBES)}) if count else ()
