"""How each task is measured: the only thing in which the tasks differ once a recipe is built."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor, nn
from torch.utils.data import DataLoader


@torch.no_grad()
def embed(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Outputs ``(M, D)`` of ``model`` in eval mode, and labels ``(M,)``, for everything in ``loader``."""
    training = model.training
    model.eval()
    batches = [(model(images.to(device)), labels.to(device)) for images, labels, *_ in loader]
    model.train(training)
    outputs, labels = zip(*batches, strict=True)
    return torch.cat(outputs), torch.cat(labels)


def retrieval(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Recall@1 in percent: how often the nearest other row, by Euclidean distance, has the same label.

    Example:
        >>> retrieval(torch.tensor([[0.], [1.], [5.], [1.6]]), torch.tensor([0, 0, 1, 1]))
        {'recall_at_1': 50.0}
    """
    # A k-nearest-neighbour search of our choice: pytorch-metric-learning's default needs faiss and fails without it.
    nearest = CustomKNN(LpDistance(normalize_embeddings=False), batch_size=1024)
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, knn_func=nearest, device=outputs.device)
    return {"recall_at_1": 100 * calculator.get_accuracy(outputs, labels)["precision_at_1"]}


Evaluator = Callable[[Tensor, Tensor], dict[str, float]]

# Task -> what it measures; the first metric is the one that a better model has higher, and that `best` goes by.
EVALUATORS: dict[str, Evaluator] = {"metric_learning": retrieval}
