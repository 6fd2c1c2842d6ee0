"""Frozen modules: what trains and what does not, and outputs that are kept give the numbers of a new computation."""

import pytest
import torch

from rkd_plugin.components.models import BackboneEmbedding
from rkd_plugin.components.models.frozen import Memory

timm = pytest.importorskip("timm")


def built(backbone="timm/test_efficientnet", **options):
    torch.manual_seed(0)
    return BackboneEmbedding(backbone, 4, l2_normalize=False, **options).train()


@pytest.mark.parametrize(
    ("backbone", "until", "frozen"),
    [
        ("resnet18", "layer2", {"conv1", "bn1", "layer1", "layer2"}),
        ("timm/resnet18", "layer1", {"conv1", "bn1", "layer1"}),
        ("timm/test_vit", "patch_embed", {"cls_token", "pos_embed", "patch_embed"}),
    ],
)
def test_what_comes_before_a_module_is_frozen_too(backbone, until, frozen):
    model = built(backbone, frozen_until=until)
    still = {name.partition(".")[0] for name, value in model.backbone.named_parameters() if not value.requires_grad}
    assert still == frozen
    assert all(parameter.requires_grad for parameter in model.linear.parameters())


def test_a_module_that_is_not_there():
    with pytest.raises(ValueError, match=r"frozen_until: expected a module of the network, got 'layer9'.*conv_stem"):
        built(frozen_until="layer9")


@pytest.mark.parametrize("all_of_them", [False, True])
def test_batchnorm_that_is_frozen_keeps_its_statistics(all_of_them):
    model = built(frozen_until="blocks.0", frozen_batchnorm=all_of_them)
    before = {name: value.clone() for name, value in model.backbone.named_buffers() if "running" in name}
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    same = {
        name for name, value in model.backbone.named_buffers() if name in before and torch.equal(value, before[name])
    }
    assert same == {name for name in before if all_of_them or name.startswith(("bn1.", "blocks.0."))}
    assert model.backbone.bn2.weight.grad is not None
    assert model.backbone.bn1.weight.grad is None
    assert not model.eval().training
    assert model.train().linear.training


@pytest.mark.parametrize("until", [".", "blocks.2"])
def test_what_is_frozen_drops_nothing(until):
    model = built("timm/test_efficientnet", frozen_until=until, backbone_kwargs={"drop_path_rate": 0.9})
    block = model.backbone.blocks[2]
    assert any(type(module).__name__ == "DropPath" for module in block.modules())
    images = torch.rand(8, 3, 32, 32)
    maps = [], []
    for kept, mode in zip(maps, (True, False), strict=True):
        block.register_forward_hook(lambda *called, kept=kept: kept.append(called[-1]))
        model.train(mode)(images)
    torch.testing.assert_close(maps[0][0], maps[1][-1])
    assert model.train().linear.training


def test_without_a_frozen_module_all_trains():
    model = built()
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("until", "batchnorm"), [("blocks.1", True), ("conv_stem", False), (".", True)])
def test_kept_outputs_change_no_number(until, batchnorm):
    first, second = torch.rand(5, 3, 32, 32), torch.rand(5, 3, 32, 32)
    batches = [first, second, torch.cat([first[:2], second[:1], first[:1]])]
    results = []
    for remember in (0, 100):
        model = built(frozen_until=until, frozen_batchnorm=batchnorm, remember=remember)
        outputs = [model(images) for images in batches]
        if until != ".":
            torch.cat(outputs).square().sum().backward()
        gradients = {name: value.grad for name, value in model.named_parameters()}
        results.append((outputs, {name: grad for name, grad in gradients.items() if grad is not None}))
    torch.testing.assert_close(results[0], results[1])
    assert (results[0][1] == {}) == (until == ".")


def test_an_image_is_computed_once_until_the_memory_is_full():
    seen = []

    def compute(images):
        seen.append(len(images))
        return images.sum((1, 2, 3))

    images = torch.rand(6, 1, 2, 2)
    memory = Memory(4, "sum")
    for _ in range(2):
        torch.testing.assert_close(memory(images, lambda: {"a": torch.ones(1)}, compute), images.sum((1, 2, 3)))
    assert seen == [6, 2]
    again = Memory(4, "sum")  # a network of the same weights
    again(images[:4], lambda: {"a": torch.ones(1)}, compute)
    assert seen == [6, 2]
    Memory(4, "sum")(images[:4], lambda: {"a": torch.zeros(1)}, compute)
    assert seen == [6, 2, 4]


@pytest.mark.parametrize(
    "changed",
    [
        {"mean": [0.1] * 3},
        {"std": [0.1] * 3},
        {"input_size": 16},
        {"l2_normalize": True},
        {"seed": 1},
        {"pool": "mean"},
    ],
    ids=str,
)
def test_networks_that_differ_share_nothing(changed):
    options = {"seed": 0, "l2_normalize": False, "backbone_kwargs": {"dynamic_img_size": True}, "frozen_until": "."}
    images, outputs = torch.rand(2, 3, 32, 32), []
    for remember in (100, 0):
        for chosen in (options, {**options, **changed}):
            seed = chosen["seed"]
            torch.manual_seed(seed)
            kwargs = {key: value for key, value in chosen.items() if key != "seed"}
            outputs.append(BackboneEmbedding("timm/test_vit", 4, remember=remember, **kwargs).eval()(images))
    torch.testing.assert_close(outputs[:2], outputs[2:])
    assert not torch.equal(outputs[0], outputs[1])


def test_weights_that_are_loaded_later_are_used():
    images = torch.rand(2, 3, 32, 32)
    model = built(frozen_until=".", remember=100)
    before = model(images)
    state = {name: value + 0.1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert not torch.allclose(model(images), before)


def test_a_network_that_is_no_chain_is_noticed():
    with pytest.raises(ValueError, match="remember: expected a network that passes images from module to module"):
        built("timm/test_vit", frozen_until="blocks.1", remember=10, backbone_kwargs={"img_size": 32})(
            torch.rand(2, 3, 32, 32)
        )
    with pytest.raises(ValueError, match=r"expected frozen_until with remember, got none; name a module or '\.'"):
        built(remember=10)


def test_a_linear_layer_that_begins_as_a_pca():
    images = torch.utils.data.TensorDataset(torch.rand(12, 3, 32, 32), torch.arange(12))
    model = built(principal_components=True, images=images).eval()
    features = model.backbone(model.prepare(images.tensors[0])).detach().double()
    rows = features - features.mean(0)
    _, spread, directions = torch.linalg.svd(rows, full_matrices=False)
    outputs = model(images.tensors[0]).detach().double()
    torch.testing.assert_close(outputs.abs(), (rows @ directions[:4].T).abs(), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(outputs.norm(dim=0), spread[:4], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="principal_components: expected images and an embedding_dim"):
        built(principal_components=True)
