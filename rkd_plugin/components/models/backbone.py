"""An embedding from a network of torchvision, timm or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from torchdistill.models.registry import register_model

from rkd_plugin.components.models.frozen import Halves, Memory, freeze_until
from rkd_plugin.components.models.networks import headless
from rkd_plugin.components.models.pretrained import Normalize


@register_model
class BackboneEmbedding(nn.Module):
    """A network up to its pooling, one linear layer, and optional L2 normalisation; it normalises its own input.

    Images have pixels from 0 to 1. Each network subtracts its own mean and divides by its own std, so that a student
    and a teacher from different libraries take the same batch. Modules for hooks: ``backbone`` with the names of its
    library (``backbone.layer2``), and ``linear``.

    Args:
        backbone: an image classification network of torchvision, as in ``torchvision.models.list_models()``; one of
            timm, ``'timm/vit_small_patch14_dinov2'``, with the extra ``rkd-plugin[timm]``; or the vision tower of a
            model of transformers, by name or folder, ``'transformers/facebook/dinov2-small'``, with the extra
            ``rkd-plugin[transformers]``.
        embedding_dim: width of the linear layer; None to return the pooled features.
        l2_normalize: whether the embeddings are scaled to length 1.
        weights: None for random weights, or the name of weights that the library downloads if they are not in its
            cache: ``'DEFAULT'``, torchvision's ``'IMAGENET1K_V1'``, or a tag of timm, ``'lvd142m'``. For timm also the
            path of a file, or ``'package'`` for those of an installed package; `pretrained.PACKAGES` lists them.
        backbone_kwargs: further arguments of the network, such as ``{'zero_init_residual': True}``.
        pool: how tokens become one vector: ``'cls'``, ``'mean'`` of the patches, or None for the network's own way.
        frozen_until: module of the backbone, such as ``'layer2'``; it and all modules before it are not trained, need
            no backward pass, and stay in eval mode. ``'.'`` freezes the whole model.
        frozen_batchnorm: whether all BatchNorm of the backbone keeps its statistics; its scale and shift are trained.
        remember: number of images for which the output of the frozen modules is kept; see `Memory`.
        input_size: side to which images are resized for this network; None to leave them.
        mean: of the network's input, of pixels from 0 to 1; None for the network's own.
        std: the same. A network of pixels from 0 to 255 has ``mean / 255`` and ``std / 255``.
        principal_components: whether the linear layer begins as the PCA of the features of ``images``.
        images: training images ``(3, H, W)`` and labels, for ``principal_components``.

    Raises:
        ModuleNotFoundError: if a library, or a package of weights, is not installed.
        ValueError: for an unknown network, weights, pool or module; weights of another network; a network of
            torchvision whose head does not consist of linear layers; or ``remember`` without ``frozen_until``.
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
        remember: int = 0,
        input_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        principal_components: bool = False,
        images: Dataset[tuple[Tensor, int]] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, width, own_mean, own_std = headless(backbone, weights, backbone_kwargs or {}, pool)
        pixels = (*(mean or own_mean),), (*(std or own_std),), input_size
        self.prepare = Normalize(*pixels)
        self.linear = nn.Identity() if embedding_dim is None else nn.Linear(width, embedding_dim)
        self.l2_normalize = l2_normalize
        self.kept: list[str] = []  # modules that stay in eval mode
        if frozen_until == ".":
            self.requires_grad_(False)
            self.kept = [name for name, _ in self.backbone.named_modules()]
        elif frozen_until is not None:
            self.kept = freeze_until(self.backbone, frozen_until)
        elif remember:
            raise ValueError("BackboneEmbedding: expected frozen_until with remember, got none; name a module or '.'")
        if frozen_batchnorm:
            is_norm = nn.modules.batchnorm._BatchNorm
            self.kept += [name for name, module in self.backbone.named_modules() if isinstance(module, is_norm)]
        computed = repr((backbone, backbone_kwargs, pool, frozen_until, l2_normalize, pixels))
        self.memory = Memory(remember, computed) if remember else None
        register: Any = self.register_load_state_dict_post_hook  # which has no types in every version
        register(_forget)
        self.halves = Halves(self.backbone, frozen_until) if remember and frozen_until not in (None, ".") else None
        if principal_components:
            self._start_with_pca(images)

    @torch.no_grad()
    def _start_with_pca(self, images: Any) -> None:
        if images is None or not isinstance(self.linear, nn.Linear):
            raise ValueError("principal_components: expected images and an embedding_dim, got none; set both")
        self.eval()
        batches = DataLoader(images, batch_size=64)
        features = torch.cat([self._features(batch).flatten(1) for batch, _ in batches]).double()
        mean = features.mean(0)
        components = torch.linalg.eigh((features - mean).T.cov(correction=0)).eigenvectors.flip(1)
        self.linear.weight.copy_(components[:, : self.linear.out_features].T)
        self.linear.bias.copy_(-self.linear.weight.double() @ mean)
        self.train()

    def train(self, mode: bool = True) -> BackboneEmbedding:
        """PyTorch's switch; frozen modules, and BatchNorm that keeps its statistics, stay in eval mode."""
        super().train(mode)
        for name in self.kept:
            self.backbone.get_submodule(name).training = False
        return self

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W) -> (N, embedding_dim)``."""
        if self.memory is not None and self.halves is None:
            return self.memory(images, self._frozen, lambda new: self._embed(self._features(new)))
        return self._embed(self._features(images))

    def _features(self, images: Tensor) -> Tensor:
        """The pooled features; the maps of frozen modules are remembered."""
        if self.memory is None or self.halves is None:
            features: Tensor = self.backbone(self.prepare(images))
            return features
        first, second = self.halves.first, self.halves.second
        return second(self.memory(images, self._frozen, lambda new: first(self.prepare(new))))

    def _embed(self, features: Tensor) -> Tensor:
        embeddings: Tensor = self.linear(features.flatten(1))
        return normalize(embeddings) if self.l2_normalize else embeddings

    def _frozen(self) -> dict[str, Tensor]:
        """The weights that the outputs of frozen modules depend on."""
        trained = {name.rpartition(".")[0] for name, value in self.named_parameters() if value.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name.rpartition(".")[0] not in trained}


def _forget(model: BackboneEmbedding, _: Any) -> None:
    """The weights changed."""
    if model.memory is not None:
        model.memory.forget()
