"""Models of the recipes, registered in torchdistill under their names; import this file to have them."""

from __future__ import annotations

from itertools import pairwise

import torchvision  # noqa: F401  torchdistill's registries read it from sys.modules
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchdistill.models.registry import register_model


@register_model
class ConvEmbedding(nn.Sequential):
    """Three 3 x 3 convolutions with BatchNorm and ReLU, max-pooling to 2 x 2, one linear layer.

    Args:
        width: channels of the first convolution; the other two have twice as many.
        embedding_dim: width of the embedding.
        l2_normalize: whether embeddings are scaled to length 1.
        in_channels: of the images.

    Example:
        >>> import torch
        >>> ConvEmbedding(width=8, embedding_dim=4, l2_normalize=False)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, width: int, embedding_dim: int, l2_normalize: bool, in_channels: int = 1) -> None:
        widths = [in_channels, width, 2 * width, 2 * width]
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in pairwise(widths)
        ]
        super().__init__(
            *blocks[:2],
            nn.MaxPool2d(2),
            blocks[2],
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * widths[-1], embedding_dim),
        )
        self.l2_normalize = l2_normalize

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, embedding_dim)``."""
        embeddings: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        return normalize(embeddings) if self.l2_normalize else embeddings
