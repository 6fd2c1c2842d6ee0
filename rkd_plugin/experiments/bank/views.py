"""Which view of an image a teacher saw: whether a data set draws random numbers, and drawing the same ones again."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rkd_plugin.teacher_bank.labels import files_of, find_labels, unwrapped

if TYPE_CHECKING:
    from rkd_plugin.experiments.bank.files import Bank

PROBES = 8  # images that tell a data set from another one
CLOSE = 0.01  # of the standard deviation: what another version of a decoder may change in the mean of an image
# Names of transforms that draw random numbers, in torchvision and in libraries that follow its names.
_RANDOM = re.compile(r"Rand|Aug|Jitter|Noise|Blur|Elastic|JPEG|Mix|Drop|Erasing|Shuffle")
_INSIDE = ("transform", "transforms", "dataset", "datasets", "org_dataset")  # where a data set keeps what it applies


class Taught(Dataset[tuple[Any, list[Tensor]]]):
    """A data set whose items come with a teacher's vectors: ``(item, [(D,), ...])``.

    Of a bank with views each access draws one of them, and the item is seen as the teacher saw it.

    Args:
        dataset: items are a tensor or an image, or begin with one.
        bank: of this data set.

    Raises:
        ValueError: if the bank is of another data set: by number of images, labels, names of files, transform, or the
            looks of a few images; or if it does not hold what the data set's random transform draws.
    """

    def __init__(self, dataset: Any, bank: Bank) -> None:
        self.dataset = dataset
        self.bank = bank
        where = f"the teacher bank {bank.path} is of other data"
        if len(dataset) != bank.count:
            raise ValueError(
                f"{where}: it has {bank.count} images, the data set {len(dataset)}; write one of this data"
            )
        if not bank.views and (random := draws(dataset)):
            raise ValueError(
                f"the teacher bank {bank.path} holds one view of each image, as a transform without random numbers "
                f"makes it, but the data set's draws some ({random}); write a bank with `rkd embed --views K`, or take "
                "them out of the transform"
            )
        if bank.header:
            held, found = bank.header["data"], described(dataset, bank.header["seed"])
            if difference := _difference(held, found):
                raise ValueError(f"{where}: {difference}; write one of this data with `rkd embed`")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, list[Tensor]]:
        """One item."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, list[Tensor]]]:
        """PyTorch's hook: the items of a batch."""
        rows = list(indices)
        if self.bank.views:
            drawn = torch.randint(self.bank.views, (len(rows),)).tolist()
            rows = [view * self.bank.count + index for view, index in zip(drawn, rows, strict=True)]
        seen = items(self.dataset, rows, self.bank.views, self.bank.header.get("seed", 0))
        vectors = zip(*self.bank.read(rows), strict=True)
        return [(item, list(row)) for item, row in zip(seen, vectors, strict=True)]


def items(dataset: Any, rows: Sequence[int], views: int, seed: int) -> list[Any]:
    """What the data set gives for rows of a bank; each view of an image draws random numbers of its own."""
    if not views:
        whole = getattr(dataset, "__getitems__", None)
        return list(whole(rows)) if whole else [dataset[index] for index in rows]
    count = len(dataset)
    return [_seen(dataset, row % count, f"{seed} {row // count} {row % count}") for row in rows]


def _seen(dataset: Any, index: int, source: str) -> Any:
    with _drawing(source):
        return dataset[index]


@contextmanager
def _drawing(source: str) -> Iterator[None]:
    """Random numbers that depend on ``source`` alone, in the block; afterwards those before it go on."""
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
    """Why a data set's items are taken to depend on random numbers, as the names of transforms; empty if they do not.

    Transforms are known by the names of their classes, wherever they are inside the data set's; and a few images are
    looked at twice, with other random numbers. What has another name and seldom changes an image is not found.

    Example:
        >>> from torchvision.transforms import v2
        >>> from rkd_plugin.experiments.datasets import Digits
        >>> digits = Digits()
        >>> draws(digits)
        ''
        >>> digits.transform = v2.Compose([v2.RandomApply([v2.GaussianNoise()], p=0.001)])
        >>> draws(digits)
        'GaussianNoise, RandomApply'
    """
    names = sorted({type(part).__name__ for part in _parts(dataset) if _is_random(part)})
    if not names and any(
        not torch.equal(*(image(_seen(dataset, index, source)) for source in ("one", "other")))
        for index in _probed(dataset)
    ):
        return "an image looks otherwise with other random numbers"
    return ", ".join(names)


def check_repeats(dataset: Any, seed: int) -> None:
    """Raise ValueError if a view cannot be drawn again, as of a transform with random numbers of its own."""
    for index in _probed(dataset):
        first, again = (image(_seen(dataset, index, f"{seed} 0 {index}")) for _ in range(2))
        if not torch.equal(first, again):
            raise ValueError(
                f"expected views that the seed decides, got another image {index} with the same random numbers of "
                "PyTorch, NumPy and Python; use transforms that draw from these"
            )


def _parts(dataset: Any) -> Iterator[Any]:
    """Everything inside the transforms of a data set, and of those that it wraps."""
    todo, seen = [getattr(dataset, name, None) for name in _INSIDE], set()
    while todo:
        part = todo.pop()
        if id(part) in seen or part is None or isinstance(part, Tensor | np.ndarray | str | bytes | type):
            continue
        seen.add(id(part))
        if isinstance(part, Dataset) or (
            hasattr(part, "__getitem__") and hasattr(part, "__dict__") and not callable(part)
        ):
            todo += [getattr(part, name, None) for name in _INSIDE]
            continue
        yield part
        if isinstance(part, Mapping):
            todo += part.values()
        elif isinstance(part, list | tuple | set):
            todo += part
        elif not isinstance(part, type(re)):
            todo += getattr(part, "__dict__", {}).values()


def _is_random(part: Any) -> bool:
    return any(_RANDOM.search(kind.__name__) for kind in type(part).__mro__)


def described(dataset: Any, seed: int) -> dict[str, Any]:
    """What tells a data set from others, as JSON can hold it."""
    transforms = [repr(getattr(part, "transform", None)) for part in unwrapped(dataset)]
    # Names of files with their folder's, as the rest of a path is another one on another machine.
    files = ["/".join(Path(path).parts[-2:]) for path in files_of(dataset)]
    return {
        "count": len(dataset),
        "labels": _hash(find_labels(dataset)),
        "files": _hash(files or None),
        # Without addresses, which are others in each run.
        "transform": re.sub(r" at 0x\w+", "", "; ".join(text for text in transforms if text != "None")),
        "images": [_look(image(_seen(dataset, index, f"{seed} 0 {index}")), index) for index in _probed(dataset)],
    }


def _difference(held: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What a bank's data and a data set differ in, in words; empty if in nothing that is known."""
    for what, words in (("labels", "its labels differ"), ("files", "its files, or their order, differ")):
        if held[what] != found[what]:
            return words
    if held["transform"] != found["transform"]:
        return f"its transform was {held['transform'] or 'none'}, the data set's is {found['transform'] or 'none'}"
    for was, now in zip(held["images"], found["images"], strict=True):
        if was["shape"] != now["shape"]:
            return f"image {was['index']} was {tuple(was['shape'])} and is {tuple(now['shape'])}"
        allowed = CLOSE * was["std"]
        if abs(was["mean"] - now["mean"]) > allowed or abs(was["std"] - now["std"]) > allowed:
            return f"image {was['index']} looks otherwise"
    return ""


def image(item: Any) -> Tensor:
    """The image of an item, as a tensor."""
    seen = item[0] if isinstance(item, Sequence) else item
    try:
        return torch.as_tensor(seen if isinstance(seen, Tensor) else np.array(seen))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"expected items that are or begin with an image, got {type(seen).__name__}; give the data set that form"
        ) from error


def _look(seen: Tensor, index: int) -> dict[str, Any]:
    values = seen.double()
    return {
        "index": index,
        "shape": list(seen.shape),
        # Of more digits the last ones could be others, and the number the same.
        "mean": round(float(values.mean()), 6),
        "std": round(float(values.std(correction=0)), 6),
    }


def _probed(dataset: Any) -> Iterable[int]:
    count = len(dataset)
    return sorted({at * (count - 1) // max(PROBES - 1, 1) for at in range(PROBES)}) if count else ()


def _hash(told: list[Any] | None) -> str | None:
    return None if told is None else hashlib.sha256(repr(told).encode()).hexdigest()
