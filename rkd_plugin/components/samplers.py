"""Batch samplers of the recipes, and a wrapper of data sets; importing this file registers them in torchdistill.

Under ``torch.distributed`` every one of them gives each process a share of its own, the same batches in all as in one
process. torchdistill's own way, a ``DistributedSampler`` in place of the recipe's sampler, would lose what that does.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch.utils.data import Sampler
from torchdistill.datasets.registry import get_batch_sampler, register_batch_sampler, register_dataset_wrapper
from torchdistill.datasets.wrapper import BaseDatasetWrapper

from rkd_plugin import distributed
from rkd_plugin.teacher_bank.labels import labels_of


class SharedBatchSampler(Sampler[list[int]]):
    """A batch sampler that gives every process a share of its own; recipes' others are put into `SharedBatches`."""


@register_batch_sampler
class SharedBatches(SharedBatchSampler):
    """Any batch sampler, whose batches the first process draws and all share.

    Args:
        sampler: given by torchdistill, over the data set.
        of: ``key`` and ``kwargs`` of the batch sampler, such as PyTorch's ``BatchSampler``.
        whole: take turns with whole batches, as fits evaluation; without it each process gets an equal, contiguous part
            of every batch, so that the mean over processes is the mean over the batch.

    Raises:
        ValueError: when iterated, if processes cannot share batches evenly; of a shorter last one so many images are
            left out that they can.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> of = {"key": "BatchSampler", "kwargs": {"batch_size": 2, "drop_last": False}}
        >>> list(SharedBatches(SequentialSampler("abcde"), of))  # in one process
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, sampler: Any, of: Mapping[str, Any], whole: bool = False) -> None:
        self.sampler = sampler  # torchdistill looks for it here
        self.batches = get_batch_sampler(of["key"])(sampler, **of["kwargs"])
        self.whole = whole

    def __len__(self) -> int:
        """Batches of this process."""
        return (
            len(range(distributed.rank(), len(self.batches), distributed.world_size()))
            if self.whole
            else len(self.batches)
        )

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of indices into the data set."""
        rank, count = distributed.rank(), distributed.world_size()
        batches = distributed.broadcast(lambda: list(self.batches))
        if self.whole:
            yield from batches[rank::count]
            return
        for number, batch in enumerate(batches, 1):
            is_rest = number == len(batches) and count <= len(batch) < len(batches[0])
            if not is_rest:
                _check_even(len(batch))
        for batch in batches:
            size = len(batch) // count
            yield batch[rank * size : (rank + 1) * size]


@register_batch_sampler
class ClassBalancedBatchSampler(SharedBatchSampler):
    """Batches of the same number of images of each of some classes, drawn anew for each batch.

    Classes come in random order, each with ``images_per_class`` images at random without repetition (all, if it has
    fewer), until the batch is full; the last class is cut. Under ``torch.distributed`` all processes draw the same
    batches and each yields its own contiguous part, so that together they make one batch of ``batch_size``.

    Args:
        sampler: any sampler over the data set, whose order is not used: torchdistill passes one. How the labels of the
            data set are found: see `rkd_plugin.teacher_bank.labels`; it may be a ``Subset`` or ``ConcatDataset``.
        batch_size: images in a batch, of all processes together.
        images_per_class: of each class.
        iterations: batches in an epoch.

    Raises:
        ValueError: if no labels are found, or one is not a whole number; if a number is not positive, or the classes do
            not fill a batch; when iterated, if the processes cannot share it evenly.

    Source: the authors' ``metric/batchsampler.py`` (``NPairs``). The random numbers follow PyTorch's global seed.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> from rkd_plugin.components.datasets import Digits
        >>> digits = Digits(classes=[2, 5, 7])
        >>> batches = ClassBalancedBatchSampler(SequentialSampler(digits), 5, images_per_class=2, iterations=3)
        >>> for batch in batches:
        ...     a, b, c, d, e = (digits[index][1] for index in batch)
        ...     assert a == b != c == d != e
    """

    def __init__(self, sampler: Any, batch_size: int, images_per_class: int, iterations: int) -> None:
        _check_positive(self, batch_size=batch_size, images_per_class=images_per_class, iterations=iterations)
        self.sampler = sampler  # torchdistill looks for it here
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.iterations = iterations
        self.images = _by_class(self, sampler)
        available = sum(min(images_per_class, len(images)) for images in self.images)
        if available < batch_size:
            raise ValueError(
                f"ClassBalancedBatchSampler: expected images for a batch of {batch_size}, got {available} from "
                f"{len(self.images)} classes with at most {images_per_class} each; use a smaller batch"
            )

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of indices into the data set."""
        rank, generator = distributed.rank(), _generator()
        _check_even(self.batch_size)
        size = self.batch_size // distributed.world_size()
        for _ in range(self.iterations):
            batch: list[int] = []
            # Every class brings at least one image, so that no more classes than this are needed.
            for images in generator.sample(self.images, min(self.batch_size, len(self.images))):
                batch += generator.sample(images, min(self.images_per_class, len(images)))
                if len(batch) >= self.batch_size:
                    break
            yield batch[rank * size : (rank + 1) * size]


@register_batch_sampler
class EpisodicBatchSampler(SharedBatchSampler):
    """Episodes of few-shot learning: some classes, each with a support set and queries.

    A batch is one episode, class by class, the ``shot`` images of its support first, then its ``query`` images; no
    class and no image occurs twice in it. Every episode is drawn anew. Under ``torch.distributed`` all processes draw
    the same episodes and take turns with them, so that each has whole episodes and none is seen twice.

    Args:
        sampler: any sampler over the data set, whose order is not used: torchdistill passes one. How the labels of the
            data set are found: see `rkd_plugin.teacher_bank.labels`; it may be a ``Subset`` or ``ConcatDataset``.
        way: classes in an episode.
        shot: images of a class in the support set.
        query: further images of the class, the queries.
        episodes: in an epoch, of all processes together.

    Raises:
        ValueError: if no labels are found, or one is not a whole number; if a number is not positive, there are fewer
            than ``way`` classes, a class has too few images, or the processes cannot share the episodes evenly.

    Source: Vinyals et al., "Matching Networks", NeurIPS 2016; Snell et al., "Prototypical Networks", NeurIPS 2017. The
    random numbers follow PyTorch's global seed.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> from rkd_plugin.components.datasets import Digits
        >>> digits = Digits(classes=[2, 5, 7])
        >>> for episode in EpisodicBatchSampler(SequentialSampler(digits), way=2, shot=1, query=2, episodes=3):
        ...     a, b, c, d, e, f = (digits[index][1] for index in episode)
        ...     assert a == b == c != d == e == f
    """

    def __init__(self, sampler: Any, way: int, shot: int, query: int, episodes: int) -> None:
        _check_positive(self, way=way, shot=shot, query=query, episodes=episodes)
        self.sampler = sampler  # torchdistill looks for it here
        self.way = way
        self.images_per_class = shot + query
        self.episodes = episodes
        self.images = _by_class(self, sampler)
        fewest = min(map(len, self.images), default=0)
        if len(self.images) < way or fewest < self.images_per_class:
            raise ValueError(
                f"EpisodicBatchSampler: expected {way} classes or more with {shot} + {query} images or more each, got "
                f"{len(self.images)} classes, the smallest with {fewest} images; ask for less, or use another split"
            )

    def __len__(self) -> int:
        """Episodes of one process."""
        if self.episodes % distributed.world_size():
            raise ValueError(
                f"EpisodicBatchSampler: expected a number of episodes that {distributed.world_size()} processes share "
                f"evenly, got {self.episodes}"
            )
        return self.episodes // distributed.world_size()

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of indices into the data set."""
        rank, generator = distributed.rank(), _generator()
        for number in range(len(self) * distributed.world_size()):
            classes = generator.sample(self.images, self.way)
            episode = [index for images in classes for index in generator.sample(images, self.images_per_class)]
            if number % distributed.world_size() == rank:
                yield episode


@register_dataset_wrapper
class WholeBatches(BaseDatasetWrapper):
    """torchdistill's own wrapper, which reads a whole batch of a data set at once where that is possible.

    The host wraps every training data set, and its own wrapper reads one image after the other.
    """

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, Any, dict[str, Any]]]:
        """PyTorch's hook: the items of a batch, each with the host's empty dictionary."""
        whole = getattr(self.org_dataset, "__getitems__", None)
        items = whole(indices) if whole else [self.org_dataset[index] for index in indices]
        return [(image, label, {}) for image, label in items]


def _check_even(images: int) -> None:
    if images % distributed.world_size():
        raise ValueError(
            f"expected batches that {distributed.world_size()} processes share evenly, got one of {images} images; "
            "change recipe.batch_size, which counts the images of all processes together, or set drop_last"
        )


def _check_positive(sampler: object, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{type(sampler).__name__}: {name} must be at least 1, got {value}")


def _generator() -> random.Random:
    """Random numbers that follow the first process's seed, the same on all processes."""
    return random.Random(distributed.broadcast(lambda: int(torch.randint(2**63 - 1, ()))))


def _by_class(owner: object, sampler: Any) -> list[list[int]]:
    """The indices of each class's images."""
    name = type(owner).__name__
    dataset = getattr(sampler, "data_source", None)
    if dataset is None and (dataset := getattr(sampler, "dataset", None)) is None:  # DistributedSampler
        raise ValueError(
            f"{name}: expected a sampler with its data set in data_source or dataset, got {type(sampler).__name__}; "
            "use SequentialSampler, and torch.utils.data.Subset for a part of the data"
        )
    labels = labels_of(dataset, name)
    if labels is None:
        raise ValueError(
            f"{name}: expected a data set with labels, got {type(dataset).__name__}, in which none are found; give it "
            "an attribute targets with the label of each item"
        )
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    return list(by_class.values())
