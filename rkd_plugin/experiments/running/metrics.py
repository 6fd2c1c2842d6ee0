"""The metrics of each task, and the embedding of test data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rkd_plugin.experiments.running.cosines import cosine_error, spearman, unrelated_cosine
from rkd_plugin.experiments.running.episodes import few_shot
from rkd_plugin.experiments.support.processes import all_gather_in_turn
from rkd_plugin.kernels.pairwise import rescale
from rkd_plugin.teacher_bank import Bank
from rkd_plugin.teacher_bank.labels import check_labels

DISTANCES_AT_ONCE = 2**24  # 128 MiB in float64
# Squared distances from the Gram matrix have errors in proportion to the squared norms. The largest measured errors are
# 24 machine epsilons for 512 dimensions and 92 for 8192; a comparison has two such errors.
TIE = 256


_CHANNELS = re.compile(r"to have (\d+) channels, but got (\d+) channels")


class Layer(NamedTuple):
    """A module of a model, its ``"input"`` or ``"output"``, and the function that makes features ``(N, E)`` of it."""

    module: nn.Module
    io: str
    rows: Callable[[Tensor], Tensor]


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Set models to eval mode in the block; restore the mode of each module afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def named_channels(images: Any, where: str) -> Iterator[None]:
    """Raise ValueError in the block if images ``(N, C, H, W)`` have another number of channels than the model takes."""
    try:
        yield
    except RuntimeError as error:
        found = _CHANNELS.search(str(error))
        if found is None or int(found[2]) != images.shape[1]:
            raise
        remedy = {"1": "Grayscale()", "3": "RGB()"}.get(found[1])
        raise ValueError(
            f"{where}: expected images of {found[1]} channels, as the model takes, got {found[2]}; "
            + (f"add torchvision.transforms.v2.{remedy} to the data set's transform, or " if remedy else "")
            + "change the model"
        ) from error


@torch.no_grad()
def embed(
    model: nn.Module, batches: Iterable[Sequence[Any]], device: torch.device, layer: Layer | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the outputs of ``model`` in eval mode for all batches of images and labels, in one pass.

    The ranks of a process group take turns with whole batches, as in `SharedBatches`, so that the results are those of
    a single process. All ranks have the result.

    Returns:
        Outputs ``(M, D)``, labels ``(M,)``, and features ``(M, E)`` of ``layer``; without a layer, the outputs again.

    Raises:
        ValueError: if labels are not whole numbers, or images have another number of channels than the model takes.
    """
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen["features"] = layer.rows(inputs[0] if layer.io == "input" else output) if layer else output

    embedded = []
    with in_eval_mode(model), layer.module.register_forward_hook(keep) if layer else nullcontext():
        for images, labels, *_ in batches:
            if not isinstance(labels, Tensor):
                check_labels(labels, "test data")
                labels = torch.as_tensor(labels)
            with named_channels(images, "test data"):
                outputs = model(images.to(device))
            embedded.append((outputs, labels.to(device), seen.pop("features") if layer else outputs))
    outputs, labels, features = zip(*all_gather_in_turn(embedded, device), strict=True)
    whole = torch.cat(outputs)
    return whole, torch.cat(labels), torch.cat(features) if layer else whole


@torch.no_grad()
def retrieval(outputs: Tensor, labels: Tensor, recall_at: Sequence[int] = (1,)) -> dict[str, float]:
    """Recall@K and MAP@R in percent; every row is a query, and all other rows are the gallery.

    Recall@K is the share of queries with a row of their class among the K nearest. MAP@R is the mean over queries of
    ``1/R sum over i = 1..R of P(i)``, where R is the number of further rows of the class, and P(i) is the precision
    among the i nearest if the i-th row has the class, and 0 otherwise (Musgrave, Belongie, Lim, "A Metric Learning
    Reality Check", ECCV 2020).

    The result is exact: Euclidean distances in float64, in blocks of queries without an ``(M, M)`` matrix. Of two rows
    at equal distances, the row of another class counts as nearer, so that a collapsed model gets 0. Squared distances
    are equal if they differ by rounding only: about 1e-13 of their size and of the squared distance of the query from
    the mean row. A row without a further row of its class is no query, but is in the gallery.

    Args:
        outputs: embeddings ``(M, D)``, floating point.
        labels: classes ``(M,)``, whole numbers from 0.
        recall_at: the values of K; values above M have the effect of M.

    Returns:
        ``recall_at_<K>`` for each K in this order, then ``map_at_r``; in percent.

    Raises:
        ValueError: if the shapes do not fit, a label is not a whole number from 0, a K is below 1, an output is not
            finite, or every class has one row only.

    Example:
        >>> retrieval(torch.tensor([[0.], [1.], [5.], [1.6]]), torch.tensor([0, 0, 1, 1]), recall_at=[1, 2])
        {'recall_at_1': 50.0, 'recall_at_2': 75.0, 'map_at_r': 50.0}
    """
    _check_retrieval(outputs, labels, recall_at)
    labels = labels.to(outputs.device)
    # Sorted by class, the rows of a class are adjacent.
    order = labels.argsort(stable=True)
    _, counts = torch.unique_consecutive(labels[order], return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    size = counts.repeat_interleave(counts)
    queries = (size > 1).nonzero().squeeze(1)
    if not len(queries):
        raise ValueError(
            f"retrieval: expected a class with two rows or more, got {len(labels)} rows of as many classes"
        )
    rows = rescale(outputs[order])
    rows -= rows.mean(0)
    norms = rows.square().sum(1)
    tie = TIE * torch.finfo(rows.dtype).eps
    nearer = torch.empty(len(queries), dtype=torch.long, device=rows.device)
    average_precision = 0.0
    for part in torch.split(torch.arange(len(queries), device=rows.device), max(DISTANCES_AT_ONCE // len(rows), 1)):
        block = queries[part]
        squares = torch.addmm(norms, rows[block], rows.T, alpha=-2).add_(norms[block, None])
        # The positions of the query's class, padded with the first one to the size of the largest class of the block.
        offsets = torch.arange(int(size[block].max()), device=rows.device)
        is_class = offsets < size[block, None]
        places = first[block, None] + offsets * is_class
        own = squares.gather(1, places).masked_fill(~is_class | (places == block[:, None]), torch.inf).sort(1).values
        squares.scatter_(1, places, torch.inf)
        own, relevant = own[:, :-1], size[block] - 1
        own = own + tie * (own + norms[block, None])
        nearer[part] = (squares <= own[:, :1]).sum(1)
        others = squares.topk(min(own.shape[1], len(rows)), largest=False).values
        found = torch.arange(1, own.shape[1] + 1, dtype=rows.dtype, device=rows.device)
        place = torch.searchsorted(others, own, right=True) + found
        precision = (found / place).where(place <= relevant[:, None], 0.0).sum(1) / relevant
        average_precision += float(precision.sum())
    recalls = {f"recall_at_{k}": 100 * int((nearer < k).sum()) / len(queries) for k in recall_at}
    return {**recalls, "map_at_r": 100 * average_precision / len(queries)}


def _check_retrieval(outputs: Tensor, labels: Tensor, recall_at: Sequence[int]) -> None:
    if outputs.ndim != 2 or not outputs.is_floating_point():
        raise ValueError(
            f"retrieval: outputs must be (M, D) and floating point, got {tuple(outputs.shape)} {outputs.dtype}"
        )
    if labels.shape != outputs.shape[:1] or len(labels) < 2:
        raise ValueError(
            f"retrieval: labels must be (M,), for M of at least 2, got {tuple(labels.shape)} for {len(outputs)} outputs"
        )
    check_labels(labels, "retrieval")
    if min(recall_at, default=1) < 1:
        raise ValueError(f"retrieval: every K of recall_at must be at least 1, got {list(recall_at)}")
    bad = int((~outputs.isfinite().all(1)).sum())
    if bad:
        raise ValueError(f"retrieval: outputs must be finite, got NaN or Inf in {bad} of {len(outputs)} rows")


def collapsed(outputs: Tensor) -> bool:
    """Whether all rows of ``(M, D)`` are equal within rounding.

    Example:
        >>> collapsed(torch.ones(3, 2) / 3), collapsed(torch.tensor([[1.0], [1.001]]))
        (True, False)
    """
    spread, largest = (outputs - outputs[:1]).abs().max(), outputs.abs().max()
    return len(outputs) > 1 and bool(spread <= 16 * torch.finfo(outputs.dtype).eps * largest)


@torch.no_grad()
def classification(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent.

    Args:
        outputs: logits ``(M, C)``; a class with the same logit as the label counts as higher.
        labels: classes ``(M,)``, from 0 to C - 1.

    Raises:
        ValueError: if the shapes do not fit, or a label is not a whole number from 0 to C - 1.

    Example:
        >>> classification(torch.tensor([[0., 1.], [1., 0.]]), torch.tensor([1, 1]))
        {'top1': 50.0, 'top5': 100.0}
    """
    if outputs.ndim != 2 or labels.shape != outputs.shape[:1] or not len(labels):
        raise ValueError(
            f"classification: expected outputs (M, C) and labels (M,), got {tuple(outputs.shape)} and "
            f"{tuple(labels.shape)}"
        )
    check_classes(outputs.shape[1], labels)
    own = outputs.gather(1, labels[:, None])
    # Comparisons with NaN are False; such a row is wrong.
    place = outputs.shape[1] - (outputs < own).sum(1)
    return {f"top{k}": 100 * int((place <= k).sum()) / len(labels) for k in (1, 5)}


def check_classes(count: int, labels: Tensor, where: str = "classification") -> None:
    """Raise ValueError if a label is not one of ``count`` classes; the message begins with ``where``."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        check_labels(labels, where)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < count:
        raise ValueError(
            f"{where}: expected labels from 0 to {count - 1}, as the model has {count} outputs, got "
            f"{int(labels.min())} to {int(labels.max())}; set num_classes to the number of classes of the data"
        )


@torch.no_grad()
def texts(
    outputs: Tensor, labels: Tensor, dataset: Any, recall_at: Sequence[int] = (1,), test_bank: str | None = None
) -> dict[str, float]:
    """Metrics by the cosine of embeddings.

    Args:
        outputs: embeddings ``(M, D)`` of all items of the data set.
        labels: classes ``(M,)``.
        dataset: texts with classes, or a ``ConcatDataset`` of such and `ScoredPairs`.
        recall_at: the values of K.
        test_bank: a teacher bank of the data set.

    Returns:
        * of the texts with classes, `retrieval`, and ``unrelated_cosine``, the mean cosine of two classes;
        * with a bank, ``cosine_error``: the mean absolute difference to the teacher's cosine over all pairs of them;
        * ``spearman`` of scored pairs: the rank correlation of cosine and score, in percent.

    Raises:
        ValueError: as `retrieval`; if the bank is of other data.
    """
    metrics: dict[str, float] = {}
    teacher = Bank(test_bank).over(dataset).bank if test_bank else None
    outputs, start = normalize(outputs.double()), 0
    for part in getattr(dataset, "datasets", [dataset]):
        rows = range(start, start := start + len(part))
        vectors = outputs[rows.start : rows.stop]
        if hasattr(part, "scores"):
            metrics["spearman"] = 100 * spearman((vectors[::2] * vectors[1::2]).sum(1), part.scores)
            continue
        classes = labels[rows.start : rows.stop]
        metrics |= retrieval(vectors, classes, recall_at)
        metrics["unrelated_cosine"] = unrelated_cosine(vectors, classes)
        if teacher is not None:
            metrics["cosine_error"] = cosine_error(vectors, normalize(teacher.read(rows)[0].to(vectors)))
    return metrics


Evaluator = Callable[..., dict[str, float]]

# Task -> function of its metrics; the first metric is higher for a better model, and chooses `best`.
EVALUATORS: dict[str, Evaluator] = {
    "metric_learning": retrieval,
    "classification": classification,
    "few_shot": few_shot,
    "text": texts,
}
