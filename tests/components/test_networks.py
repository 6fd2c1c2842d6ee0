"""Networks for image classification: the published sizes, and the modules for hooks."""

import pytest
import torch
import torchvision

from rkd_plugin.components.models import ImageClassifier
from rkd_plugin.components.models.networks import SMALL_NETWORKS


def shapes_of(model, names, images):
    """Shapes of the outputs of modules, as a recipe hooks them."""
    shapes = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *io, name=name: shapes.update({name: (*io[2].shape,)}))
    model(images)
    return [shapes[name] for name in names]


# Parameters for 100 classes, counted from RepDistiller's models (github HobbitLong/RepDistiller, models/ @eedab9d,
# mobilenetv2.py @b13aecc), layer by layer; width of the pooled features; the last module that a recipe may hook, and
# the side of its maps of 32 x 32 pixels, as RepDistiller's strides and pooling make them.
SIZES = {
    "resnet8": (83_892, 64, "layer3", 8), "resnet14": (181_108, 64, "layer3", 8),
    "resnet20": (278_324, 64, "layer3", 8), "resnet32": (472_756, 64, "layer3", 8),
    "resnet44": (667_188, 64, "layer3", 8), "resnet56": (861_620, 64, "layer3", 8),
    "resnet110": (1_736_564, 64, "layer3", 8), "resnet8x4": (1_233_540, 256, "layer3", 8),
    "resnet32x4": (7_433_860, 256, "layer3", 8), "wrn_16_2": (703_284, 128, "layer3", 8),
    "wrn_40_1": (569_780, 64, "layer3", 8), "wrn_40_2": (2_255_156, 128, "layer3", 8),
    "small_vgg8": (3_965_028, 512, "features", 4), "small_vgg13": (9_462_180, 512, "features", 4),
    "small_mobilenet_v2": (812_836, 1280, "features", 2), "small_shufflenet_v1": (949_258, 960, "units", 4),
    "small_shufflenet_v2": (1_355_528, 1024, "conv5", 4),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_small_networks_have_the_published_sizes(name):
    count, width, hooked, side = SIZES[name]
    with torch.device("meta"):
        model = ImageClassifier(name, 100)
        images = torch.zeros(2, 3, 32, 32)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert shapes_of(model, [f"backbone.{hooked}"], images) == [(2, width, side, side)]
    assert model.backbone(images).flatten(1).shape == (2, width)
    assert model(images).shape == (2, 100)


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_every_small_network_learns_from_every_parameter(name):
    model = ImageClassifier(name, 10)
    scores = model(torch.randn(4, 3, 32, 32))
    scores.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert scores.isfinite().all()
    assert scores.std(0).min() > 0.01  # the scores of the images differ
    evaluated = model.eval()(torch.randn(1, 3, 32, 32))
    assert evaluated.shape == (1, 10)
    assert evaluated.isfinite().all()


# For CIFAR-100 as in the authors' branch `classification`, model/backbone/classification/: ResNet-50 is torchvision's
# 25,557,032 with another head and, in its first convolution, 9 weights in place of 49; VGG11-BN has the 9,220,480 of
# eight 3 x 3 convolutions with bias, 2 x 2,752 of their BatchNorm, and one linear layer. For Tiny ImageNet,
# torchvision's counts (their weights' `num_params`) with another head.
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


# Channels and side of what the recipes hook. Strides and pooling are the authors': VGG11 is pooled before each of these
# and once behind the last, a ResNet for CIFAR goes from 32 to 4 pixels, and torchvision's stem takes 64 pixels to 16.
MAPS = {
    ("vgg11_bn", False, 32): {"features.6": (128, 16), "features.13": (256, 8), "features.20": (512, 4)},
    ("resnet50", True, 32): {f"layer{i}": (128 * 2**i, 64 // 2**i) for i in (1, 2, 3, 4)},
    ("resnet101", False, 64): {f"layer{i}": (128 * 2**i, 32 // 2**i) for i in (1, 2, 3, 4)},
    ("resnet18", False, 64): {f"layer{i}": (32 * 2**i, 32 // 2**i) for i in (1, 2, 3, 4)},
    ("resnet20", False, 32): {f"layer{i}": (8 * 2**i, 64 // 2**i) for i in (1, 2, 3)},
    ("resnet8x4", False, 32): {f"layer{i}": (32 * 2**i, 64 // 2**i) for i in (1, 2, 3)},
    ("wrn_40_2", False, 32): {f"layer{i}": (16 * 2**i, 64 // 2**i) for i in (1, 2, 3)},
}


@pytest.mark.parametrize(("network", "small_images", "side"), MAPS)
def test_maps_that_recipes_hook(network, small_images, side):
    with torch.device("meta"):
        model = ImageClassifier(network, 100, small_images=small_images)
        images = torch.zeros(2, 3, side, side)
    maps = MAPS[network, small_images, side]
    shapes = [(2, channels, side, side) for channels, side in maps.values()]
    assert shapes_of(model, [f"backbone.{name}" for name in maps], images) == shapes


@pytest.mark.parametrize("small_images", [False, True])
def test_weights_by_name_are_those_of_the_backbone(small_images, monkeypatch):
    whole = torchvision.models.resnet18().eval()
    requested = []
    monkeypatch.setattr(
        torchvision.models._api.WeightsEnum,
        "get_state_dict",
        lambda self, **_: requested.append(self.name) or whole.state_dict(),
    )
    model = ImageClassifier("resnet18", 200, small_images=small_images, weights="IMAGENET1K_V1").eval()
    assert requested == ["IMAGENET1K_V1"]
    if small_images:  # without the stem, for which torchvision has no weights
        assert model.backbone.conv1.weight.shape == (64, 3, 3, 3)
        whole.conv1, whole.maxpool = model.backbone.conv1, torch.nn.Identity()
    whole.fc = model.linear
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 200)
    torch.testing.assert_close(model(images), whole(images))


def test_weights_that_do_not_exist():
    with pytest.raises(ValueError, match="expected no pretrained weights for wrn_16_2, which has none, got 'IMAGENET1"):
        ImageClassifier("wrn_16_2", 100, weights="IMAGENET1K_V1")
    with pytest.raises(ValueError, match="expected weights that torchvision has for resnet18, got 'CIFAR100'"):
        ImageClassifier("resnet18", 100, weights="CIFAR100")


def test_small_images_need_a_stem_that_can_be_smaller():
    with pytest.raises(
        ValueError, match="a ResNet of torchvision for small images, got 'vgg11_bn'; set small_images to"
    ):
        ImageClassifier("vgg11_bn", 100, small_images=True)
    with pytest.raises(ValueError, match="expected a ResNet of torchvision for small images, got 'resnet20'"):
        ImageClassifier("resnet20", 100, small_images=True)
    with pytest.raises(ValueError, match=r"expected a network of torchvision or one of resnet8, .*, got 'resnet21'"):
        ImageClassifier("resnet21", 100)
