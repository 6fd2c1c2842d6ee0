"""Few-shot learning with prototypes: the loss and the accuracy; importing this file registers them in torchdistill.

Source: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS 2017. The prototype
of a class is the mean embedding of its support; a query belongs to the class of the nearest prototype, in squared
Euclidean distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchdistill.losses.registry import get_mid_level_loss

from rkd_plugin.adapters.torchdistill import IO, Hooked, find_hooked, mid_level_loss

Part = Literal["all", "support", "query"]


def squared_distances(queries: Tensor, prototypes: Tensor) -> Tensor:
    """``(..., Q, D), (..., way, D) -> (..., Q, way)``: squared Euclidean distances, computed from differences."""
    return torch.cdist(queries, prototypes, compute_mode="donot_use_mm_for_euclid_dist").square()


def is_right(distances: Tensor, own: Tensor) -> Tensor:
    """Which queries are nearest to their own prototype; a query with two equal smallest distances is wrong.

    Args:
        distances: ``(..., Q, way)``.
        own: the class of each query, ``(..., Q)``.
    """
    nearest = distances.gather(-1, own[..., None])
    # Comparisons with NaN are False; such a query is wrong.
    return ((nearest < distances).sum(-1) == distances.shape[-1] - 1) & nearest[..., 0].isfinite()


def split_episode(rows: Tensor, targets: Tensor, shot: int) -> tuple[Tensor, Tensor]:
    """Split an episode of `EpisodicBatchSampler` into support ``(way, shot, ...)`` and queries ``(way, query, ...)``.

    Raises:
        ValueError: if ``targets`` ``(N,)`` are not sorted into classes of equal size, larger than ``shot``.
    """
    classes, counts = torch.unique_consecutive(targets, return_counts=True)
    size = int(counts[0]) if len(counts) else 0
    if len(rows) != len(targets) or len(classes.unique()) < len(classes) or size <= shot or (counts != size).any():
        raise ValueError(
            f"expected an episode: class after class, each with the same number of rows, more than {shot} of support, "
            f"got {len(rows)} rows and {len(targets)} labels in runs of {sorted(set(counts.tolist()))}; use the batch "
            "sampler EpisodicBatchSampler with the same shot"
        )
    by_class = rows.reshape(len(classes), size, *rows.shape[1:])
    return by_class[:, :shot], by_class[:, shot:]


class _EpisodeTerm(nn.Module):
    """A scalar that is computed from the distances of an episode's queries to the prototypes."""

    def __init__(self, shot: int, student_module_path: str = ".", student_module_io: IO = "output") -> None:
        super().__init__()
        if shot < 1:
            raise ValueError(f"{type(self).__name__}: shot must be at least 1, got {shot}")
        self.shot = shot
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io

    def forward(self, student_io_dict: Hooked, teacher_io_dict: Hooked, targets: Tensor, *_: Any) -> Tensor:
        """The host's dictionaries and class labels ``(N,)`` -> a scalar."""
        rows = find_hooked(student_io_dict, "student", self.student_module_path, self.student_module_io)
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.flatten(1).to(torch.promote_types(rows.dtype, torch.float32))
            support, queries = split_episode(rows, targets, self.shot)
            own = torch.arange(len(queries), device=rows.device).repeat_interleave(queries.shape[1])
            return self.value(squared_distances(queries.flatten(0, 1), support.mean(1)), own)

    def value(self, distances: Tensor, own: Tensor) -> Tensor:
        """Squared distances ``(Q, way)`` and the class of each query ``(Q,)`` -> a scalar."""
        raise NotImplementedError


@mid_level_loss
class PrototypicalLoss(_EpisodeTerm):
    """Mean cross-entropy of the queries' classes under ``softmax(-squared distance to the prototypes)``.

    Batches are episodes of `EpisodicBatchSampler`.

    Args:
        shot: rows of support in each class, which come first.
        student_module_path: the hooked module whose output is the embedding, ``'.'`` for the model's output.
        student_module_io: ``'input'`` or ``'output'`` of that module.

    Raises:
        ValueError: if ``shot`` is not positive, the module is not hooked, or a batch is not an episode.

    Example:
        >>> embeddings = torch.tensor([[0., 0.], [1., 0.], [2., 0.], [2., 1.]])  # class 3: 0 and 1, class 7: 2 and 3
        >>> PrototypicalLoss(shot=1)({".": {"output": embeddings}}, {}, torch.tensor([3, 3, 7, 7]))
        tensor(0.3556)
    """

    def value(self, distances: Tensor, own: Tensor) -> Tensor:
        """Squared distances ``(Q, way)`` and the class of each query ``(Q,)`` -> a scalar."""
        return cross_entropy(-distances, own)


@mid_level_loss
class PrototypicalAccuracy(_EpisodeTerm):
    """Percentage of queries that are nearest to their own prototype; it has no gradient.

    Arguments are those of `PrototypicalLoss`. A criterion contains it with a weight of 0, so that it is not trained.

    Example:
        >>> embeddings = torch.tensor([[0., 0.], [1., 0.], [2., 0.], [2., 1.]])
        >>> PrototypicalAccuracy(shot=1)({".": {"output": embeddings}}, {}, torch.tensor([3, 3, 7, 7]))
        tensor(50.)
    """

    def value(self, distances: Tensor, own: Tensor) -> Tensor:
        """Squared distances ``(Q, way)`` and the class of each query ``(Q,)`` -> a scalar."""
        return 100 * is_right(distances.detach(), own).float().mean()


@mid_level_loss
class OnEpisodePart(nn.Module):
    """A mid-level loss on a part of an episode: the support, the queries, or all rows.

    Args:
        part: ``'support'``, ``'query'``, or ``'all'`` of the episode's rows.
        shot: rows of support in each class, which come first.
        criterion: ``key`` and ``kwargs`` of the loss, such as ``{key: RKDDALoss, kwargs: {...}}``.
        criterion_wrapper: ``key`` and ``kwargs`` of a wrapper that the loss needs, such as ``SimpleLossWrapper``.

    Raises:
        ValueError: if the part is unknown, or a batch is not an episode.

    Example:
        >>> loss = OnEpisodePart("query", 1, {"key": "PrototypicalAccuracy", "kwargs": {"shot": 1}})
        >>> rows = torch.tensor([[9.], [0.], [1.], [-9.], [4.], [5.]])  # the first of each class is its support
        >>> loss({".": {"output": rows}}, {}, torch.tensor([0, 0, 0, 1, 1, 1]))
        tensor(100.)
    """

    def __init__(
        self,
        part: Part,
        shot: int,
        criterion: Mapping[str, Any],
        criterion_wrapper: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if part not in get_args(Part):
            raise ValueError(f"OnEpisodePart: part must be one of {get_args(Part)}, got {part!r}")
        self.part = part
        self.shot = shot
        self.criterion = get_mid_level_loss(criterion, criterion_wrapper)

    def forward(self, student_io_dict: Hooked, teacher_io_dict: Hooked, targets: Tensor, *rest: Any) -> Any:
        """The host's dictionaries and class labels ``(N,)`` -> the loss of the rows of the part."""
        if self.part == "all":
            return self.criterion(student_io_dict, teacher_io_dict, targets, *rest)
        support, queries = split_episode(torch.arange(len(targets), device=targets.device), targets, self.shot)
        rows = (support if self.part == "support" else queries).flatten()
        student, teacher = (
            {
                path: {io: value[rows] if isinstance(value, Tensor) else value for io, value in kinds.items()}
                for path, kinds in side.items()
            }
            for side in (student_io_dict, teacher_io_dict)
        )
        return self.criterion(student, teacher, targets[rows], *rest)
