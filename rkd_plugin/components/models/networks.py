"""Networks up to their pooling: those of torchvision by name, and small ones for CIFAR."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torchvision  # before torchdistill, whose registries look for it in sys.modules
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu
from torchdistill.models.classification.resnet import ResNet4Cifar
from torchdistill.models.classification.wide_resnet import WideBasicBlock, WideResNet4Cifar
from torchvision.models import mobilenet_v2, shufflenet_v2_x1_0
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import VGG, make_layers
from torchvision.ops import Conv2dNormActivation

from rkd_plugin.components.models.pretrained import Backbone, from_timm, from_transformers


class WideStemResNet(ResNet4Cifar):
    """torchdistill's ResNet for CIFAR, four times as wide: 32 channels, then 64, 128, 256 (``resnet8x4``)."""

    def __init__(self, layers: list[int], num_classes: int) -> None:
        super().__init__(BasicBlock, layers, num_classes)
        self.inplanes = 32
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = self._make_layer(BasicBlock, 64, layers[0])
        self.layer2 = self._make_layer(BasicBlock, 128, layers[1], stride=2)
        self.layer3 = self._make_layer(BasicBlock, 256, layers[2], stride=2)
        self.fc = nn.Linear(256, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ShuffleUnit(nn.Module):
    """Grouped 1 x 1 convolution, shuffle, depthwise 3 x 3, grouped 1 x 1; the input is added, at stride 2 appended."""

    def __init__(self, before: int, after: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        self.new = after - before if stride == 2 else after  # the pooled input fills the other channels
        narrow = self.new // 4
        self.reduce = nn.Sequential(
            nn.Conv2d(before, narrow, 1, groups=first_groups, bias=False), nn.BatchNorm2d(narrow)
        )
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.expand = nn.Sequential(
            nn.Conv2d(narrow, narrow, 3, stride, 1, groups=narrow, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, self.new, 1, groups=groups, bias=False),
            nn.BatchNorm2d(self.new),
        )
        self.halve = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, maps: Tensor) -> Tensor:
        """``(N, before, H, W) -> (N, after, H / stride, W / stride)``."""
        new = self.expand(self.shuffle(relu(self.reduce(maps))))
        return relu(new + maps if self.halve is None else torch.cat([new, self.halve(maps)], 1))


class ShuffleNetV1(nn.Module):
    """ShuffleNet with 3 groups at width 1, without the early down-sampling: 240, 480, 960 channels.

    Source: Zhang et al., "ShuffleNet", CVPR 2018, Table 1, g = 3; the stem is RepDistiller's, a 1 x 1 convolution.
    """

    def __init__(self, num_classes: int, groups: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        before = 24
        units = []
        for width, depth in ((240, 4), (480, 8), (960, 4)):
            for place in range(depth):
                first_groups = 1 if before == 24 else groups
                units.append(ShuffleUnit(before, width, 2 if place == 0 else 1, groups, first_groups))
                before = width
        self.units = nn.Sequential(*units)
        self.fc = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W) -> (N, num_classes)``."""
        maps = self.units(self.stem(images))
        logits: Tensor = self.fc(adaptive_avg_pool2d(maps, 1).flatten(1))
        return logits


def _resnet(depth: int, **options: Any) -> ResNet4Cifar:
    return ResNet4Cifar(BasicBlock, [(depth - 2) // 6] * 3, **options)


def _wide_resnet(depth: int, factor: int, **options: Any) -> WideResNet4Cifar:
    return WideResNet4Cifar(depth, factor, 0.0, WideBasicBlock, **options)


def _vgg(widths: list[int | str], **options: Any) -> VGG:
    network = VGG(make_layers(widths, batch_norm=True), **options)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Sequential(nn.Linear(512, options["num_classes"]))
    return network


def _half_mobilenet(**options: Any) -> nn.Module:
    # Factor, channels, blocks, stride: half of the down-sampling of the network for ImageNet.
    blocks = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    network: nn.Module = mobilenet_v2(
        width_mult=0.5, round_nearest=1, inverted_residual_setting=blocks, dropout=0.0, **options
    )
    # The first block of RepDistiller has a 1 x 1 convolution although its factor is 1; its activations are all ReLU.
    first = cast(nn.Sequential, cast(nn.Sequential, network.features)[1].conv)
    first.insert(0, Conv2dNormActivation(16, 16, kernel_size=1, activation_layer=nn.ReLU6))
    nn.init.kaiming_normal_(cast(Any, first)[0][0].weight, mode="fan_out")  # as torchvision initialises the others
    return network


def _shufflenet_v2(**options: Any) -> nn.Module:
    network: nn.Module = shufflenet_v2_x1_0(**options)
    cast(nn.Sequential, network.conv1)[0] = nn.Conv2d(3, 24, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


# Name -> network for images of 32 x 32 pixels, which takes `num_classes`. Depths, widths and stems are those of
# RepDistiller (github HobbitLong/RepDistiller, models/), made of parts of torchdistill and torchvision.
SMALL_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(_resnet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(WideStemResNet, [(depth - 2) // 6] * 3) for depth in (8, 32)},
    **{f"wrn_{depth}_{width}": partial(_wide_resnet, depth, width) for depth, width in ((16, 2), (40, 1), (40, 2))},
    "small_vgg8": partial(_vgg, [64, "M", 128, "M", 256, "M", 512, 512]),
    "small_vgg13": partial(_vgg, [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, 512, 512]),
    "small_mobilenet_v2": _half_mobilenet,
    "small_shufflenet_v1": ShuffleNetV1,
    "small_shufflenet_v2": _shufflenet_v2,
}


def _small(name: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    if weights is not None:
        raise ValueError(f"expected no pretrained weights for {name}, which has none, got {weights!r}")
    return SMALL_NETWORKS[name](**{"num_classes": 1, **options})


def pool_globally(network: nn.Module, width: int) -> int:
    """Make the last pooling global, as for a head of one linear layer; return the width after it."""
    pool = getattr(network, "avgpool", None)
    if not isinstance(pool, nn.AdaptiveAvgPool2d):
        return width
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    return width // int(pool(torch.zeros(1, 1, 1, 1)).numel())


def for_small_images(network: nn.Module, name: str) -> None:
    """Replace a ResNet's 7 x 7 convolution of stride 2 by one of 3 x 3 and stride 1, and remove the max-pooling.

    Raises:
        ValueError: for a network that is no ResNet of torchvision.
    """
    convolution = getattr(network, "conv1", None)
    if not isinstance(convolution, nn.Conv2d) or not isinstance(getattr(network, "maxpool", None), nn.MaxPool2d):
        raise ValueError(f"expected a ResNet of torchvision for small images, got {name!r}; set small_images to False")
    network.conv1 = nn.Conv2d(3, convolution.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def headless(name: str, weights: str | None, options: dict[str, Any], pool: str | None = None) -> Backbone:
    """A network up to its last pooling, the width of its output, and the mean and std of its input.

    Args:
        name: as in ``torchvision.models.list_models(torchvision.models)``; ``timm/`` or ``transformers/`` and a name of
            that library; or one of `SMALL_NETWORKS`.
        weights: name of pretrained weights of the library, or None; see `from_timm` and `from_transformers`.
        options: further arguments of the network.
        pool: ``"cls"`` or ``"mean"`` of tokens; None for the network's own.

    Raises:
        ModuleNotFoundError: if the library is not installed.
        ValueError: for an unknown network, weights or pool, or a network whose head does not consist of linear layers.
        ConnectionError: if the weights cannot be downloaded.
    """
    if pool not in (None, "cls", "mean"):
        raise ValueError(f"expected pool to be 'cls', 'mean' or null, got {pool!r}")
    library, _, inside = name.partition("/")
    if library in ("timm", "transformers"):
        return {"timm": from_timm, "transformers": from_transformers}[library](inside, weights, pool, options)
    if pool is not None:
        raise ValueError(f"expected pool null for {name}, which has its own, got {pool!r}; take the network from timm")
    network = _small(name, weights, options) if name in SMALL_NETWORKS else _from_torchvision(name, weights, options)
    return Backbone(network, _cut_head(network, name))


def _from_torchvision(name: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    # Only GoogLeNet and Inception have auxiliary classifiers and dropout after the pooling, which an embedding does not
    # need. They warn if `init_weights` is not set.
    has_auxiliary = name in ("googlenet", "inception_v3")
    auxiliary = {"aux_logits": weights is not None, "init_weights": weights is None} if has_auxiliary else {}
    # Other models are not image classifiers, and some load a backbone with weights that nobody requested.
    if name not in torchvision.models.list_models(torchvision.models):
        raise ValueError(f"expected a network of torchvision or one of {', '.join(SMALL_NETWORKS)}, got {name!r}")
    try:
        network: nn.Module = torchvision.models.get_model(name, weights=weights, **{**auxiliary, **options})
    except KeyError as error:
        raise ValueError(f"expected weights that torchvision has for {name}, got {weights!r}") from error
    except OSError as error:
        raise ConnectionError(
            f"the weights {weights} of {name} are not in {torch.hub.get_dir()}/checkpoints and "
            f"could not be downloaded ({error}); put the file there, or set weights to null"
        ) from error
    if has_auxiliary:
        vars(network)["aux_logits"] = False
        for auxiliary_name in {"aux1", "aux2", "AuxLogits"} & dict(network.named_children()).keys():
            setattr(network, auxiliary_name, None)
        network.dropout = nn.Identity()
    return network


def _cut_head(network: nn.Module, name: str) -> int:
    """Remove the linear layers from the end of a network; return the width of its output."""
    for head_name in ("fc", "classifier", "heads", "head"):
        head = getattr(network, head_name, None)
        if head is None:
            continue
        layers = list(head) if isinstance(head, nn.Sequential) else [head]
        linear = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
        if linear:
            kept = [layer for layer in layers[: linear[0]] if not isinstance(layer, nn.Dropout)]
            setattr(network, head_name, nn.Sequential(*kept))
            return cast(nn.Linear, layers[linear[0]]).in_features
    raise ValueError(f"expected a network that ends in linear layers, got {name!r}; try 'resnet18'")
