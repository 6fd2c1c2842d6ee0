"""Models that return embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from torchdistill.models.registry import register_model
from torchvision.ops import DropBlock2d

from rkd_plugin.components.models.networks import headless
from rkd_plugin.components.models.pretrained import Chain, Memory, Normalize, freeze_until


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


@register_model
class BackboneEmbedding(nn.Module):
    """A network up to its pooling, one linear layer, and optional L2 normalisation; it normalises its own input.

    Images have pixels from 0 to 1. Each network subtracts its own mean and divides by its own std, so that a student
    and a teacher from different libraries take the same batch. Modules for hooks: ``backbone`` with the names of its
    library (``backbone.layer2``), and ``linear``.

    Args:
        backbone: an image classification network of torchvision, as in ``torchvision.models.list_models()``, or one of
            timm, ``'timm/vit_small_patch14_dinov2'`` (the extra ``rkd-plugin[timm]``).
        embedding_dim: width of the linear layer; None to return the pooled features.
        l2_normalize: whether the embeddings are scaled to length 1.
        weights: None for random weights; the name of pretrained weights that the library downloads if they are not in
            its cache, such as torchvision's ``'IMAGENET1K_V1'`` or timm's tag ``'lvd142m'``; for timm also the path of
            a file, or ``'package'`` for those of an installed package (`pretrained.PACKAGES`).
        backbone_kwargs: further arguments of the network, such as ``{'zero_init_residual': True}``.
        pool: how a transformer's tokens become one vector: ``'cls'``, ``'mean'`` of the patches, or None for what the
            network does itself.
        frozen_until: path of a module in the backbone: it and all modules before it are not trained, without a
            backward pass through them, and their BatchNorm keeps its statistics.
        frozen_batchnorm: whether all BatchNorm of the backbone keeps its statistics; its scale and shift are trained.
        input_size: side of the images that the network gets, resized from the batch; None to leave them as they are.
        mean: of the network's input, for pixels from 0 to 1; None for the network's own.
        std: the same; a network for pixels from 0 to 255 has a std of 1/255.
        remember: number of images whose output of the frozen modules is kept in memory, and not computed again.
        principal_components: whether the linear layer begins as the PCA of the pooled features of ``images``, and not
            with random weights.
        images: the training images ``(3, H, W)`` with labels, for ``principal_components``.

    Raises:
        ModuleNotFoundError: if timm, or a package of weights, is not installed.
        ValueError: for an unknown network, weights, pool or module, or a network whose head does not consist of linear
            layers.
        ConnectionError: if the weights cannot be downloaded.

    Source: the authors' ``model/embedding.py``.

    Example:
        >>> import torch
        >>> model = BackboneEmbedding("resnet18", embedding_dim=16, l2_normalize=True, weights=None)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        backbone: str,
        embedding_dim: int | None,
        l2_normalize: bool,
        weights: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        pool: str | None = None,
        frozen_until: str | None = None,
        frozen_batchnorm: bool = False,
        input_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        remember: int = 0,
        principal_components: bool = False,
        images: Dataset[tuple[Tensor, int]] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, width, own_mean, own_std = headless(backbone, weights, backbone_kwargs or {}, pool)
        self.prepare = Normalize(mean or own_mean, std or own_std, input_size)
        self.linear = nn.Identity() if embedding_dim is None else nn.Linear(width, embedding_dim)
        self.l2_normalize = l2_normalize
        if frozen_until == ".":
            self.requires_grad_(False)
        elif frozen_until is not None:
            freeze_until(self.backbone, frozen_until)
        self.memory = Memory(remember) if remember else None
        self.chain = Chain(self.backbone, frozen_until) if remember and frozen_until not in (None, ".") else None
        self.kept = [
            name
            for name, module in self.backbone.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and (frozen_batchnorm or not all(parameter.requires_grad for parameter in module.parameters()))
        ]
        if principal_components:
            self._start_with_pca(images)

    @torch.no_grad()
    def _start_with_pca(self, images: Any) -> None:
        if images is None or not isinstance(self.linear, nn.Linear):
            raise ValueError("principal_components: expected images and an embedding_dim, got none; set both")
        self.eval()
        batches = DataLoader(images, batch_size=64)
        features = torch.cat([self.backbone(self.prepare(batch)).flatten(1) for batch, _ in batches]).double()
        mean = features.mean(0)
        components = torch.linalg.eigh((features - mean).T.cov(correction=0)).eigenvectors.flip(1)
        self.linear.weight.copy_(components[:, : self.linear.out_features].T)
        self.linear.bias.copy_(-self.linear.weight.double() @ mean)
        self.train()

    def train(self, mode: bool = True) -> BackboneEmbedding:
        """PyTorch's switch; BatchNorm that keeps its statistics stays in eval mode."""
        super().train(mode)
        for name in self.kept:
            self.backbone.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W) -> (N, embedding_dim)``."""
        if self.memory is None:
            return self._embed(self.backbone(self.prepare(images)))
        if self.chain is None:
            return self.memory(images, self._frozen, lambda new: self._embed(self.backbone(self.prepare(new))))
        chain = self.chain
        return self._embed(chain.rest(self.memory(images, self._frozen, lambda new: chain.first(self.prepare(new)))))

    def _embed(self, features: Tensor) -> Tensor:
        embeddings: Tensor = self.linear(features.flatten(1))
        return normalize(embeddings) if self.l2_normalize else embeddings

    def _frozen(self) -> dict[str, Tensor]:
        """All that the outputs of frozen modules depend on."""
        trained = {name.rpartition(".")[0] for name, value in self.named_parameters() if value.requires_grad}
        weights = {name: value for name, value in self.state_dict().items() if name.rpartition(".")[0] not in trained}
        settings = torch.tensor([self.prepare.size or 0, self.l2_normalize])
        return {**weights, "mean": self.prepare.mean, "std": self.prepare.std, "settings": settings}
