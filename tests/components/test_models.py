"""Embedding models: widths, norms, names of modules, and what cannot be built."""

import itertools
import urllib.error

import pytest
import torch
import torchvision

from rkd_plugin.components.models import BackboneEmbedding, Conv4Embedding, ResNet12Embedding, few_shot_encoder


@pytest.mark.parametrize(
    ("backbone", "pooled", "hooked"),
    [
        ("resnet18", 512, "backbone.layer4"), ("resnet50", 2048, "backbone.layer2"),
        ("googlenet", 1024, "backbone.inception5b"), ("inception_v3", 2048, "backbone.Mixed_7c"),
        ("mobilenet_v3_small", 576, "backbone.features"), ("efficientnet_b0", 1280, "backbone.features"),
        ("convnext_tiny", 768, "backbone.features"), ("densenet121", 1024, "backbone.features"),
        ("shufflenet_v2_x0_5", 1024, "backbone.stage4"), ("vit_b_16", 768, "backbone.encoder"),
        ("swin_t", 768, "backbone.features"), ("vgg11_bn", 25088, "backbone.features"),
    ],
)  # fmt: skip
def test_backbones_up_to_their_pooling(backbone, pooled, hooked):
    side = 299 if backbone == "inception_v3" else 224
    with torch.device("meta"):
        model = BackboneEmbedding(backbone, 16, l2_normalize=True).train()
        features = BackboneEmbedding(backbone, None, l2_normalize=False)
        images = torch.zeros(2, 3, side, side)
    assert model(images).shape == (2, 16)
    assert features(images).shape == (2, pooled)
    assert model.linear.in_features == pooled
    assert hooked in dict(model.named_modules())


@pytest.mark.parametrize("side", [64, 224])
def test_it_is_the_network_of_torchvision(side):
    """The same weights and pooled features, then the linear layer, then the norm, as in the authors' embedding.py."""
    model = BackboneEmbedding("resnet18", 8, l2_normalize=True).eval()
    whole = torchvision.models.resnet18()
    missing = whole.load_state_dict(model.backbone.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert missing.unexpected_keys == []
    whole.fc = torch.nn.Identity()
    images = torch.randn(2, 3, side, side)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    expected = torch.nn.functional.normalize(model.linear(whole.eval()((images - mean) / std)))
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model(images).norm(dim=1), torch.ones(2))
    model.l2_normalize = False
    assert (model(images).norm(dim=1) - 1).abs().min() > 1e-3


def test_weights_by_name(monkeypatch):
    wanted = torchvision.models.resnet18().state_dict()
    requested = []
    monkeypatch.setattr(
        torchvision.models._api.WeightsEnum, "get_state_dict", lambda self, **_: requested.append(self.name) or wanted
    )
    model = BackboneEmbedding("resnet18", 8, l2_normalize=True, weights="IMAGENET1K_V1")
    assert requested == ["IMAGENET1K_V1"]
    assert torch.equal(model.backbone.layer4[1].conv2.weight, wanted["layer4.1.conv2.weight"])


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"a network of torchvision or one of resnet8, .*, got 'resnet19'"):
        BackboneEmbedding("resnet19", 8, l2_normalize=True)
    with pytest.raises(ValueError, match="expected weights that torchvision has for resnet18, got 'IMAGENET'"):
        BackboneEmbedding("resnet18", 8, l2_normalize=True, weights="IMAGENET")
    with pytest.raises(ValueError, match="ends in linear layers, got 'squeezenet1_1'; try 'resnet18'"):
        BackboneEmbedding("squeezenet1_1", 8, l2_normalize=True)

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(ConnectionError, match=r"IMAGENET1K_V1 of resnet18 are not in .*could not be downloaded .*null"):
        BackboneEmbedding("resnet18", 8, l2_normalize=True, weights="IMAGENET1K_V1")


@pytest.mark.parametrize(("side", "flat"), [(28, 64), (84, 1600), (48, 576)])
def test_conv4_is_the_prototypical_encoder(side, flat):
    model = Conv4Embedding([64] * 4, None, l2_normalize=False, image_size=side, in_channels=1)
    assert model(torch.zeros(2, 1, side, side)).shape == (2, flat)
    linear = Conv4Embedding([64] * 4, 5, l2_normalize=True, image_size=side, in_channels=1)
    torch.testing.assert_close(linear(torch.randn(2, 1, side, side)).norm(dim=1), torch.ones(2))
    # Four convolutions with bias and BatchNorm.
    assert sum(p.numel() for p in model.parameters()) == 1 * 64 * 9 + 3 * 64 * 64 * 9 + 4 * (64 + 2 * 64)


def test_relu_after_the_pooling_is_relu_before_it():
    """Values and gradients are those of convolution, BatchNorm, ReLU, pooling, the order of Snell et al."""
    model = Conv4Embedding([4, 4, 4, 4], None, l2_normalize=False, image_size=32, in_channels=1)
    images, weights = torch.rand(8, 1, 32, 32), torch.randn(8, 16)
    (model(images) * weights).sum().backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    maps = images
    for block in (model.block1, model.block2, model.block3, model.block4):
        convolution, norm, pool, relu = block
        maps = pool(relu(norm(convolution(maps))))
    (maps.flatten(1) * weights).sum().backward()
    assert torch.equal(model(images), maps.flatten(1))
    torch.testing.assert_close(got, [parameter.grad for parameter in model.parameters()], rtol=1e-5, atol=1e-7)


def test_resnet12_is_the_usual_one():
    """Three convolutions per block and one in its shortcut, all with BatchNorm; DropBlock in the last two only."""
    with torch.device("meta"):
        model = few_shot_encoder("resnet12", image_size=84, in_channels=3, drop_block=0.1)
        assert model(torch.zeros(2, 3, 84, 84)).shape == (2, 640)
        maps = torch.zeros(2, 3, 84, 84)
        for block, side in zip((model.block1, model.block2, model.block3, model.block4), (42, 21, 10, 5), strict=True):
            maps = block(maps)
            assert maps.shape[2:] == (side, side)
    widths = [3, 64, 160, 320, 640]
    pairs = list(itertools.pairwise(widths))
    weights = sum(9 * (a * b + 2 * b * b) + a * b + 8 * b for a, b in pairs)
    assert sum(parameter.numel() for parameter in model.parameters()) == weights == 12_424_320
    kinds = [type(block.drop).__name__ for block in model.children()]
    assert kinds == ["Identity", "Identity", "DropBlock2d", "DropBlock2d"]


def test_resnet12_by_hand():
    model = ResNet12Embedding([4, 4, 4, 8], in_channels=1).eval()
    maps = images = torch.rand(3, 1, 28, 28)
    for block in (model.block1, model.block2, model.block3, model.block4):
        main, shortcut = maps, block.shortcut(maps)
        for at in (0, 3, 6):
            main = block.main[at + 1](block.main[at](main))
            main = torch.nn.functional.leaky_relu(main + (shortcut if at == 6 else 0), 0.1)
        maps = torch.nn.functional.max_pool2d(main, 2)
    torch.testing.assert_close(model(images), maps.flatten(2).mean(2))


def test_encoders_of_few_shot_learning():
    assert few_shot_encoder("conv4", 28, 1)(torch.zeros(2, 1, 28, 28)).shape == (2, 64)
    with pytest.raises(ValueError, match="network must be 'conv4' or 'resnet12', got 'conv5'"):
        few_shot_encoder("conv5", 28, 1)
