"""Models that return logits."""

from __future__ import annotations

from typing import Any

import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import Tensor, nn
from torchdistill.models.registry import register_model

from rkd_plugin.components.models.networks import for_small_images, headless, pool_globally


@register_model
class ImageClassifier(nn.Module):
    """A network up to its last pooling, which is global, and one linear layer for the classes.

    Modules for hooks: ``backbone``, whose output is the pooled features, with the names of its library
    (``backbone.layer2``), and ``linear``.

    Args:
        network: name of an image classification network, as ``torchvision.models.list_models()`` shows them, or of a
            network for 32 x 32 pixels (`networks.SMALL_NETWORKS`), such as ``resnet20``, ``wrn_40_2``, ``small_vgg8``.
        num_classes: number of classes.
        small_images: whether a ResNet of torchvision begins with a 3 x 3 convolution of stride 1 and without pooling,
            for images of 32 x 32 pixels.
        weights: name of pretrained weights such as ``'IMAGENET1K_V1'``; None for random weights.
        network_kwargs: further arguments of the network.

    Raises:
        ValueError: for an unknown network or unknown weights, a head that does not consist of linear layers, or
            ``small_images`` with a network that is no ResNet of torchvision.
        ConnectionError: if the weights cannot be downloaded.

    Source: the authors' branch ``classification``, ``model/``: ResNet-50 has 23,705,252 parameters there for 100
    classes and small images, VGG11-BN 9,277,284, as here.

    Example:
        >>> import torch
        >>> model = ImageClassifier("resnet20", num_classes=100)
        >>> model(torch.zeros(2, 3, 32, 32)).shape, model.backbone(torch.zeros(2, 3, 32, 32)).shape
        (torch.Size([2, 100]), torch.Size([2, 64]))
    """

    def __init__(
        self,
        network: str,
        num_classes: int,
        small_images: bool = False,
        weights: str | None = None,
        network_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, width, *_ = headless(network, weights, network_kwargs or {})
        width = pool_globally(self.backbone, width)
        if small_images:
            for_small_images(self.backbone, network)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W) -> (N, num_classes)``."""
        scores: Tensor = self.linear(self.backbone(images).flatten(1))
        return scores
