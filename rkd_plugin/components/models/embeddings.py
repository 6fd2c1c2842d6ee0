"""Models that return embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchdistill.models.registry import register_model
from torchvision.ops import DropBlock2d


@register_model
class ConvEmbedding(nn.Sequential):
    """Three 3 x 3 convolutions with BatchNorm and ReLU, max-pooling to 2 x 2, one linear layer.

    Args:
        width: channels of the first convolution; the other two have twice as many.
        embedding_dim: width of the embedding.
        l2_normalize: whether the embeddings are scaled to length 1.
        in_channels: number of channels of the images.

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


@register_model
class Conv4Embedding(nn.Module):
    """Four blocks of 3 x 3 convolution, BatchNorm, ReLU and 2 x 2 max-pooling, then flattened.

    Modules for hooks: ``block1`` to ``block4``, and ``linear``.

    Args:
        widths: numbers of channels of the four blocks.
        embedding_dim: width of a linear layer at the end; None to return the flattened maps.
        l2_normalize: whether the embeddings are scaled to length 1.
        image_size: side of the images in pixels, which the linear layer depends on.
        in_channels: number of channels of the images.

    Source: the encoder of Snell et al., "Prototypical Networks", NeurIPS 2017, whose widths are all 64.

    Example:
        >>> import torch
        >>> model = Conv4Embedding([8, 8, 8, 8], embedding_dim=4, l2_normalize=True, image_size=32)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        widths: Sequence[int],
        embedding_dim: int | None,
        l2_normalize: bool,
        image_size: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        first, second, third, fourth = (
            # ReLU after the pooling gives the same result, for a quarter of the cost.
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.MaxPool2d(2), nn.ReLU())
            for a, b in pairwise([in_channels, *widths])
        )
        self.block1, self.block2, self.block3, self.block4 = first, second, third, fourth
        flat = widths[-1] * (image_size // 16) ** 2
        self.linear = nn.Identity() if embedding_dim is None else nn.Linear(flat, embedding_dim)
        self.l2_normalize = l2_normalize

    def forward(self, images: Tensor) -> Tensor:
        """``(N, in_channels, image_size, image_size) -> (N, embedding_dim)``."""
        maps = self.block4(self.block3(self.block2(self.block1(images))))
        embeddings: Tensor = self.linear(maps.flatten(1))
        return normalize(embeddings) if self.l2_normalize else embeddings


@register_model
class ResNet12Embedding(nn.Module):
    """Four residual blocks of three 3 x 3 convolutions and 2 x 2 max-pooling, then the mean over positions.

    Modules for hooks: ``block1`` to ``block4``.

    Args:
        widths: numbers of channels of the four blocks; the last one is the width of the embedding.
        drop_block: share of positions that DropBlock (5 x 5) drops after the last two blocks in training; 0 for none.
        in_channels: number of channels of the images.

    Source: the ResNet-12 of Lee et al., "Meta-Learning with Differentiable Convex Optimization", CVPR 2019, whose
    widths are 64, 160, 320, 640. They increase ``drop_block`` to 0.1 during training; here it is constant.

    Example:
        >>> import torch
        >>> ResNet12Embedding([8, 8, 8, 16], in_channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 16])
    """

    def __init__(self, widths: Sequence[int], drop_block: float = 0.0, in_channels: int = 3) -> None:
        super().__init__()
        rates = [0.0, 0.0, drop_block, drop_block]
        blocks = [_Residual(a, b, rate) for (a, b), rate in zip(pairwise([in_channels, *widths]), rates, strict=True)]
        self.block1, self.block2, self.block3, self.block4 = blocks

    def forward(self, images: Tensor) -> Tensor:
        """``(N, in_channels, H, W) -> (N, widths[-1])``."""
        maps: Tensor = self.block4(self.block3(self.block2(self.block1(images))))
        return maps.mean((2, 3))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, drop_block: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a in (before, after, after):
            layers += [nn.Conv2d(a, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.1)]
        self.main = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
        self.end = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))
        self.drop = DropBlock2d(drop_block, 5) if drop_block else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        dropped: Tensor = self.drop(self.end(self.main(maps) + self.shortcut(maps)))
        return dropped


@register_model  # type: ignore[untyped-decorator]
def few_shot_encoder(network: str, image_size: int, in_channels: int, drop_block: float = 0.0) -> nn.Module:
    """An encoder of few-shot learning: ``"conv4"`` with 64 channels in each block, or ``"resnet12"``.

    Args:
        network: ``"conv4"`` or ``"resnet12"``.
        image_size: side of the images in pixels.
        in_channels: number of channels of the images.
        drop_block: argument of `ResNet12Embedding`; not used by ``"conv4"``.

    Raises:
        ValueError: for another network.

    Example:
        >>> import torch
        >>> few_shot_encoder("conv4", image_size=84, in_channels=3)(torch.zeros(1, 3, 84, 84)).shape
        torch.Size([1, 1600])
    """
    if network == "conv4":
        return Conv4Embedding([64] * 4, None, l2_normalize=False, image_size=image_size, in_channels=in_channels)
    if network == "resnet12":
        return ResNet12Embedding([64, 160, 320, 640], drop_block, in_channels)
    raise ValueError(f"few_shot_encoder: network must be 'conv4' or 'resnet12', got {network!r}")
