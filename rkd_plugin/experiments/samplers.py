"""Batch samplers of the recipes, registered in torchdistill under their names; import this file to have them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import distributed
from torch.utils.data import Sampler
from torchdistill.datasets.registry import register_batch_sampler


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
        for name, value in {
            "batch_size": batch_size,
            "images_per_class": images_per_class,
            "iterations": iterations,
        }.items():
            if value < 1:
                raise ValueError(f"ClassBalancedBatchSampler: {name} must be at least 1, got {value}")
        self.sampler = sampler  # torchdistill looks for it here
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.iterations = iterations
        by_class: dict[int, list[int]] = defaultdict(list)
        for index, label in enumerate(_labels(getattr(sampler, "data_source", None) or sampler.dataset)):
            by_class[int(label)].append(index)
        self.images = list(by_class.values())
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
        rank, processes, seed = 0, 1, [int(torch.randint(2**63 - 1, ()))]
        if distributed.is_available() and distributed.is_initialized():
            rank, processes = distributed.get_rank(), distributed.get_world_size()
            distributed.broadcast_object_list(seed, src=0)
        generator = random.Random(seed[0])
        start, stop = (self.batch_size * part // processes for part in (rank, rank + 1))
        for _ in range(self.iterations):
            batch: list[int] = []
            # Every class brings at least one image, so that no more classes than this are needed.
            for images in generator.sample(self.images, min(self.batch_size, len(self.images))):
                batch += generator.sample(images, min(self.images_per_class, len(images)))
                if len(batch) >= self.batch_size:
                    break
            yield batch[start:stop]


def _labels(dataset: Any) -> Any:
    """The labels of a data set, also of one that torchdistill wrapped."""
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return getattr(dataset, name)
    if hasattr(dataset, "org_dataset"):
        return _labels(dataset.org_dataset)
    raise TypeError(
        f"ClassBalancedBatchSampler: expected a data set with its labels in targets or labels, got "
        f"{type(dataset).__name__}, which has neither"
    )
