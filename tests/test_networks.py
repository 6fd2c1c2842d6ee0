"""Networks for image classification: the sizes that their authors publish, and what can be hooked."""

import pytest
import torch

from rkd_plugin.experiments.models import ImageClassifier
from rkd_plugin.experiments.models.networks import SMALL_NETWORKS

# Parameters for 100 classes, counted from RepDistiller's models (github HobbitLong/RepDistiller, models/), layer by
# layer; width of the pooled features; a module that a recipe may hook.
SIZES = {
    "resnet20": (278_324, 64, "layer3"), "resnet32": (472_756, 64, "layer3"), "resnet56": (861_620, 64, "layer3"),
    "resnet110": (1_736_564, 64, "layer3"), "resnet8x4": (1_233_540, 256, "layer3"),
    "resnet32x4": (7_433_860, 256, "layer3"), "wrn_16_2": (703_284, 128, "layer3"),
    "wrn_40_1": (569_780, 64, "layer3"), "wrn_40_2": (2_255_156, 128, "layer3"),
    "small_vgg8": (3_965_028, 512, "features"),
    "small_vgg13": (9_462_180, 512, "features"), "small_mobilenet_v2": (812_836, 1280, "features"),
    "small_shufflenet_v1": (949_258, 960, "units"), "small_shufflenet_v2": (1_355_528, 1024, "stage4"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_small_networks_have_the_published_sizes(name):
    count, width, hooked = SIZES[name]
    with torch.device("meta"):
        model = ImageClassifier(name, 100)
        images = torch.zeros(2, 3, 32, 32)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.backbone(images).flatten(1).shape == (2, width)
    assert model(images).shape == (2, 100)
    assert hooked in dict(model.backbone.named_modules())


def test_every_small_network_learns_from_every_parameter():
    for name in SMALL_NETWORKS.keys() - {"resnet110", "resnet56", "resnet44", "resnet32x4"}:
        model = ImageClassifier(name, 10)
        scores = model(torch.randn(4, 3, 32, 32))
        assert scores.isfinite().all(), name
        scores.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters()), name


# The authors' branch `classification` for CIFAR-100; torchvision's own networks with another head for Tiny ImageNet.
@pytest.mark.parametrize(
    ("network", "classes", "small_images", "count", "width"),
    [
        ("resnet50", 100, True, 23_705_252, 2048), ("vgg11_bn", 100, False, 9_277_284, 512),
        ("resnet101", 200, False, 44_549_160 - 2049 * 1000 + 2049 * 200, 2048),
        ("resnet18", 200, False, 11_689_512 - 513 * 1000 + 513 * 200, 512),
    ],
)  # fmt: skip
def test_the_papers_networks(network, classes, small_images, count, width):
    with torch.device("meta"):
        model = ImageClassifier(network, classes, small_images=small_images)
        images = torch.zeros(2, 3, 32 if classes == 100 else 64, 32 if classes == 100 else 64)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.backbone(images).flatten(1).shape == (2, width)
    # The maps of a CIFAR ResNet are as large as the authors': 32, 16, 8 and 4 pixels a side.
    sides = []
    if small_images:
        for block in (1, 2, 3, 4):
            getattr(model.backbone, f"layer{block}").register_forward_hook(lambda *io: sides.append(io[2].shape[-1]))
        model(images)
        assert sides == [32, 16, 8, 4]


def test_small_images_need_a_stem_that_can_be_smaller():
    with pytest.raises(ValueError, match="expected a ResNet of torchvision for small images, got 'vgg11_bn'"):
        ImageClassifier("vgg11_bn", 100, small_images=True)
    with pytest.raises(ValueError, match="expected a ResNet of torchvision for small images, got 'resnet20'"):
        ImageClassifier("resnet20", 100, small_images=True)
    with pytest.raises(ValueError, match="got 'resnet21'"):
        ImageClassifier("resnet21", 100)
