"""Batch samplers of the recipes, and a wrapper of data sets; importing this file registers them in torchdistill.

Under ``torch.distributed`` each sampler gives every rank its share of the batches that a single process would get.
torchdistill itself would replace the sampler of the recipe by a ``DistributedSampler``, and lose what it does.
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
    """A batch sampler that gives every rank its share; `SharedBatches` wraps all other batch samplers of a recipe."""


@register_batch_sampler
class SharedBatches(SharedBatchSampler):
    """The batches of any batch sampler, which rank 0 draws and all ranks share.

    Args:
        sampler: passed by torchdistill, over the data set.
        batch_sampler: ``key`` and ``kwargs`` of the batch sampler, such as PyTorch's ``BatchSampler``.
        whole: whether the ranks take turns with whole batches, for evaluation. If not, each rank gets an equal,
            contiguous part of every batch, so that the mean over the ranks is the mean over the batch.

    Raises:
        ValueError: when iterated, if the ranks cannot share a batch evenly. Of a shorter last batch, the images that
            remain are dropped.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> batch_sampler = {"key": "BatchSampler", "kwargs": {"batch_size": 2, "drop_last": False}}
        >>> list(SharedBatches(SequentialSampler("abcde"), batch_sampler))  # in one process
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, sampler: Any, batch_sampler: Mapping[str, Any], whole: bool = False) -> None:
        self.sampler = sampler  # where torchdistill expects it
        self.batches = get_batch_sampler(batch_sampler["key"])(sampler, **batch_sampler["kwargs"])
        self.whole = whole

    def __len__(self) -> int:
        """Number of batches of this rank."""
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
            is_last = number == len(batches) and count <= len(batch) < len(batches[0])
            if not is_last:
                _check_even(len(batch))
        for batch in batches:
            size = len(batch) // count
            yield batch[rank * size : (rank + 1) * size]


@register_batch_sampler
class ClassBalancedBatchSampler(SharedBatchSampler):
    """Batches with the same number of images of each class in them.

    Classes are drawn in random order, each with ``images_per_class`` random images without repetition (all images of a
    smaller class), until the batch is full; the last class is cut. Every batch is drawn independently. Under
    ``torch.distributed`` all ranks draw the same batches, and each rank yields its contiguous part of them.

    Args:
        sampler: any sampler over the data set, passed by torchdistill; its order is not used. The data set may be a
            ``Subset`` or ``ConcatDataset``; `rkd_plugin.teacher_bank.labels` finds its labels.
        batch_size: number of images in a batch of all ranks.
        images_per_class: number of images of each class in a batch.
        iterations: number of batches in an epoch.

    Raises:
        ValueError: if no labels are found, or one is not a whole number; if a number is not positive, or the classes do
            not fill a batch; when iterated, if the ranks cannot share a batch evenly.

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
        self.sampler = sampler  # where torchdistill expects it
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.iterations = iterations
        self.images = _indices_by_class(self, sampler)
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
            # Every class has at least one image, so that no more classes are needed.
            for images in generator.sample(self.images, min(self.batch_size, len(self.images))):
                batch += generator.sample(images, min(self.images_per_class, len(images)))
                if len(batch) >= self.batch_size:
                    break
            yield batch[rank * size : (rank + 1) * size]


@register_batch_sampler
class EpisodicBatchSampler(SharedBatchSampler):
    """Episodes of few-shot learning: some classes, each with a support set and queries.

    A batch is one episode, class by class: the ``shot`` images of the support, then the ``query`` images. No class and
    no image occurs twice. Every episode is drawn independently. Under ``torch.distributed`` all ranks draw the same
    episodes and take turns with them, so that each rank has whole episodes.

    Args:
        sampler: any sampler over the data set, passed by torchdistill; its order is not used. The data set may be a
            ``Subset`` or ``ConcatDataset``; `rkd_plugin.teacher_bank.labels` finds its labels.
        way: number of classes in an episode.
        shot: number of images of each class in the support set.
        query: number of further images of each class, the queries.
        episodes: number of episodes in an epoch of all ranks.

    Raises:
        ValueError: if no labels are found, or one is not a whole number; if a number is not positive, there are fewer
            than ``way`` classes, a class has too few images, or the ranks cannot share the episodes evenly.

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
        self.sampler = sampler  # where torchdistill expects it
        self.way = way
        self.images_per_class = shot + query
        self.episodes = episodes
        self.images = _indices_by_class(self, sampler)
        fewest = min(map(len, self.images), default=0)
        if len(self.images) < way or fewest < self.images_per_class:
            raise ValueError(
                f"EpisodicBatchSampler: expected {way} classes or more with {shot} + {query} images or more each, got "
                f"{len(self.images)} classes, the smallest with {fewest} images; lower way, shot or query, or use "
                "another split"
            )

    def __len__(self) -> int:
        """Number of episodes of this rank."""
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
    """torchdistill's wrapper of a training data set, which reads a whole batch at once if the data set can."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, Any, dict[str, Any]]]:
        """PyTorch's hook: the items of a batch, each with torchdistill's empty dictionary."""
        read_batch = getattr(self.org_dataset, "__getitems__", None)
        items = read_batch(indices) if read_batch else [self.org_dataset[index] for index in indices]
        return [(image, label, {}) for image, label in items]


def _check_even(images: int) -> None:
    if images % distributed.world_size():
        raise ValueError(
            f"expected batches that {distributed.world_size()} processes share evenly, got one of {images} images; "
            "change recipe.batch_size, the number of images of all processes, or set drop_last"
        )


def _check_positive(sampler: object, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{type(sampler).__name__}: {name} must be at least 1, got {value}")


def _generator() -> random.Random:
    """A generator that rank 0 seeds from PyTorch's global one, the same on all ranks."""
    return random.Random(distributed.broadcast(lambda: int(torch.randint(2**63 - 1, ()))))


def _indices_by_class(owner: object, sampler: Any) -> list[list[int]]:
    """The indices of the images of each class."""
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
            f"{name}: expected a data set with labels, got {type(dataset).__name__} without; give it an "
            "attribute targets with the label of each item"
        )
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    return list(by_class.values())
