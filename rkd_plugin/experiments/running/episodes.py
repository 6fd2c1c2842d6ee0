"""The test of few-shot models: episodes that are equal for all models, accuracies and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from rkd_plugin.components.few_shot import is_right, squared_distances
from rkd_plugin.teacher_bank.labels import check_labels

NUMBERS_AT_ONCE = 2**24  # 128 MiB in float64
Z_95 = 1.96  # standard errors of half of a 95 % confidence interval


@torch.no_grad()
def episode_accuracies(
    outputs: Tensor,
    labels: Tensor,
    seed: int = 0,
    test_tasks: Sequence[Sequence[int]] = ((5, 1),),
    test_queries: int = 15,
    test_episodes: int = 1000,
) -> dict[str, Tensor]:
    """The percentage of queries that are nearest to their own prototype, for each episode.

    The episodes depend only on the seed, the labels and the task, so that two models are tested on the same episodes.

    Args:
        outputs: embeddings ``(M, D)``.
        labels: classes ``(M,)``.
        seed: seed of the episodes.
        test_tasks: pairs of way and shot.
        test_queries: number of queries of each class.
        test_episodes: number of episodes.

    Returns:
        ``<way>way_<shot>shot`` -> ``(test_episodes,)`` in float64, for each task.

    Raises:
        ValueError: if the shapes do not fit, a label is not a whole number from 0, or there are too few classes with
            enough rows.
    """
    if outputs.ndim != 2 or labels.shape != outputs.shape[:1] or not len(labels):
        raise ValueError(
            f"few_shot: expected outputs (M, D) and labels (M,), got {tuple(outputs.shape)} and {tuple(labels.shape)}"
        )
    check_labels(labels, "few_shot")
    rows = outputs.double()
    accuracies = {}
    for way, shot in test_tasks:
        blocks = []
        episodes = _episodes(labels.cpu(), seed, way, shot, test_queries, test_episodes)
        for block in torch.split(episodes, max(NUMBERS_AT_ONCE // (episodes[0].numel() * rows.shape[1]), 1)):
            drawn = rows[block.to(rows.device)]
            prototypes, queries = drawn[:, :, :shot].mean(2), drawn[:, :, shot:].flatten(1, 2)
            own = torch.arange(way, device=rows.device).repeat_interleave(test_queries).expand(len(drawn), -1)
            blocks.append(100 * is_right(squared_distances(queries, prototypes), own).double().mean(1).cpu())
        accuracies[f"{way}way_{shot}shot"] = torch.cat(blocks)
    return accuracies


@wraps(episode_accuracies, assigned=())  # its signature, which `Experiment.measure` reads
def few_shot(*args: Any, **kwargs: Any) -> dict[str, float]:
    """The mean accuracy over episodes in percent, and half of its 95 % confidence interval.

    Arguments and errors: see `episode_accuracies`.

    Returns:
        ``<way>way_<shot>shot`` and ``<way>way_<shot>shot_ci95`` for each task.

    Example:
        >>> embeddings = torch.tensor([[0.], [1.], [5.], [6.]])
        >>> few_shot(embeddings, torch.tensor([0, 0, 1, 1]), test_tasks=[(2, 1)], test_queries=1, test_episodes=10)
        {'2way_1shot': 100.0, '2way_1shot_ci95': 0.0}
    """
    metrics = {}
    for name, values in episode_accuracies(*args, **kwargs).items():
        metrics[name], metrics[f"{name}_ci95"] = interval(values)
    return metrics


def interval(values: Tensor) -> tuple[float, float]:
    """The mean of independent values ``(E,)``, such as those of episodes, and half of its 95 % confidence interval.

    For the differences of two models on the same episodes it is the paired interval.
    """
    spread = float(values.std()) if len(values) > 1 else math.nan
    return float(values.mean()), Z_95 * spread / math.sqrt(len(values))


def _episodes(labels: Tensor, seed: int, way: int, shot: int, queries: int, episodes: int) -> Tensor:
    """``(episodes, way, shot + queries)``: indices of rows; those along the last dimension have one class."""
    size = shot + queries
    order = labels.argsort(stable=True)
    _, counts = torch.unique_consecutive(labels[order], return_counts=True)
    first = counts.cumsum(0) - counts
    enough = counts >= size
    if int(enough.sum()) < way or min(way, shot, queries, episodes) < 1:
        raise ValueError(
            f"few_shot: expected {way} classes or more with {shot} + {queries} rows or more each, and a positive "
            f"number of episodes, got {int(enough.sum())} such classes of {len(counts)}, and {episodes} episodes; "
            "change test_tasks, test_queries or test_episodes"
        )
    first, counts = first[enough], counts[enough]
    generator = torch.Generator().manual_seed(seed)
    # The positions of the largest of independent random numbers are a draw without repetition.
    classes = torch.rand(episodes, len(first), generator=generator).topk(way).indices
    draws = torch.rand(episodes, way, int(counts.max()), generator=generator)
    is_row = torch.arange(draws.shape[2]) < counts[classes][..., None]
    places = draws.masked_fill(~is_row, -1.0).topk(size).indices
    return order[first[classes][..., None] + places]
