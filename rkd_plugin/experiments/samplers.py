"""Batch samplers of the recipes, and how their data sets are read; torchdistill has them once this file is imported."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import distributed
from torch.utils.data import Sampler
from torchdistill.datasets.registry import register_batch_sampler, register_dataset_wrapper
from torchdistill.datasets.wrapper import BaseDatasetWrapper


@register_batch_sampler
class ClassBalancedBatchSampler(Sampler[list[int]]):
    """Batches of the same number of images of each of some classes, drawn anew for each batch.

    Classes come in random order, each with ``images_per_class`` images at random without repetition (all, if it has
    fewer), until the batch is full; the last class is cut. Under ``torch.distributed`` all processes draw the same
    batches and each yields its own contiguous part, so that together they make one batch of ``batch_size``.

    Args:
        sampler: any sampler over the data set, whose order is not used: torchdistill passes one. The data set has its
            labels in ``targets`` (torchvision) or ``labels`` (pytorch-metric-learning).
        batch_size: images in a batch, of all processes together.
        images_per_class: of each class.
        iterations: batches in an epoch.

    Raises:
        TypeError: if the data set tells no labels.
        ValueError: if a number is not positive, or the classes do not fill a batch.

    Source: the authors' ``metric/batchsampler.py`` (``NPairs``). The random numbers follow PyTorch's global seed.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> from rkd_plugin.experiments.datasets import Digits
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
        rank, processes = _place()
        generator = _generator(processes)
        start, stop = (self.batch_size * part // processes for part in (rank, rank + 1))
        for _ in range(self.iterations):
            batch: list[int] = []
            # Every class brings at least one image, so that no more classes than this are needed.
            for images in generator.sample(self.images, min(self.batch_size, len(self.images))):
                batch += generator.sample(images, min(self.images_per_class, len(images)))
                if len(batch) >= self.batch_size:
                    break
            yield batch[start:stop]


@register_batch_sampler
class EpisodicBatchSampler(Sampler[list[int]]):
    """Episodes of few-shot learning: some classes, and of each some images to learn it from and some to be asked for.

    A batch is one episode, class by class, the ``shot`` images of its support first, then its ``query`` images; no
    class and no image occurs twice in it. Every episode is drawn anew. Under ``torch.distributed`` all processes draw
    the same episodes and take turns with them, so that each has whole episodes and none is seen twice.

    Args:
        sampler: any sampler over the data set, whose order is not used: torchdistill passes one. The data set has its
            labels in ``targets`` (torchvision) or ``labels`` (pytorch-metric-learning).
        way: classes in an episode.
        shot: images of a class that it is learnt from.
        query: further images of the class.
        episodes: in an epoch, of all processes together.

    Raises:
        TypeError: if the data set tells no labels.
        ValueError: if a number is not positive, there are fewer than ``way`` classes, a class has too few images, or
            the processes cannot share the episodes evenly.

    Source: Vinyals et al., "Matching Networks", NeurIPS 2016; Snell et al., "Prototypical Networks", NeurIPS 2017. The
    random numbers follow PyTorch's global seed.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> from rkd_plugin.experiments.datasets import Digits
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
        _, processes = _place()
        if self.episodes % processes:
            raise ValueError(
                f"EpisodicBatchSampler: expected a number of episodes that {processes} processes share evenly, got "
                f"{self.episodes}"
            )
        return self.episodes // processes

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of indices into the data set."""
        rank, processes = _place()
        generator = _generator(processes)
        for number in range(len(self) * processes):
            classes = generator.sample(self.images, self.way)
            episode = [index for images in classes for index in generator.sample(images, self.images_per_class)]
            if number % processes == rank:
                yield episode


@register_dataset_wrapper
class WholeBatches(BaseDatasetWrapper):
    """torchdistill's own wrapper, through which a data set is asked for a whole batch at once, if it can be.

    The host wraps every data set that is trained on, and its wrapper asks for one image after the other.
    """

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, Any, dict[str, Any]]]:
        """PyTorch's hook: the items of a batch, each with the host's empty dictionary."""
        whole = getattr(self.org_dataset, "__getitems__", None)
        items = whole(indices) if whole else [self.org_dataset[index] for index in indices]
        return [(image, label, {}) for image, label in items]


def _check_positive(sampler: object, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{type(sampler).__name__}: {name} must be at least 1, got {value}")


def _place() -> tuple[int, int]:
    """Rank and number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _generator(processes: int) -> random.Random:
    """Random numbers that follow PyTorch's seed, the same on all processes."""
    seed = [int(torch.randint(2**63 - 1, ()))]
    if processes > 1:
        distributed.broadcast_object_list(seed, src=0)
    return random.Random(seed[0])


def _by_class(owner: object, sampler: Any) -> list[list[int]]:
    """The indices of each class's images."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(_labels(owner, getattr(sampler, "data_source", None) or sampler.dataset)):
        by_class[int(label)].append(index)
    return list(by_class.values())


def _labels(owner: object, dataset: Any) -> Any:
    """The labels of a data set, also of one that torchdistill wrapped."""
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return getattr(dataset, name)
    if hasattr(dataset, "org_dataset"):
        return _labels(owner, dataset.org_dataset)
    raise TypeError(
        f"{type(owner).__name__}: expected a data set with its labels in targets or labels, got "
        f"{type(dataset).__name__}, which has neither"
    )
