"""Checks that the ranks of a process group are equal, and the sharing of batches among them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torchdistill.datasets.registry import BATCH_SAMPLER_DICT

from rkd_plugin import distributed
from rkd_plugin.components.samplers import SharedBatchSampler
from rkd_plugin.environment import environment
from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.recipe.schema import stages
from rkd_plugin.experiments.support import processes


def check_equal_start(recipe: Recipe) -> None:
    """Raise ValueError on every rank if some rank has another recipe, code or device; see `processes.check_equal`."""
    if distributed.world_size() > 1:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        digest = hashlib.sha256(recipe.resolved().encode("utf-8", "surrogatepass")).hexdigest()[:12]
        where = environment(device)
        code = {f"version of {name}": where[name] for name in ("torch", "torchdistill")}
        processes.check_equal({"recipe": digest, "commit of rkd_plugin": where["commit"], **code, "device": device})


def check_equal_weights(model: nn.Module, name: str) -> None:
    """Raise ValueError on every rank if some rank has a model with other weights; see `processes.check_equal`."""
    if distributed.world_size() > 1:
        digest = hashlib.sha256()
        for key, tensor in model.state_dict().items():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        processes.check_equal({name: digest.hexdigest()[:12]})


def share_batches(config: dict[str, Any]) -> None:
    """Change a recipe so that torchdistill builds the loaders of this rank, with its share of the batches."""
    for path, stage in stages(config).items():
        for side in ("teacher", "student", "model"):
            if stage.get(side, {}).get("wrapper"):
                raise ValueError(
                    f"{path}.{side}.wrapper: expected none, as `rkd run` averages the gradients of its processes "
                    f"itself, got {stage[side]['wrapper']}; leave it out"
                )
    for part in (*stages(config).values(), config.get("test", {})):
        for name in ("train_data_loader", "val_data_loader", "test_data_loader"):
            if part.get(name):
                part[name] = _shared(part[name], whole=name != "train_data_loader")


def _shared(loader: dict[str, Any], whole: bool) -> dict[str, Any]:
    """The configuration of a loader with the batches of this rank; see `SharedBatches`."""
    options = dict(loader["kwargs"])
    sampler = loader.get("batch_sampler")
    if sampler is None:
        decided = {"batch_size": options.pop("batch_size", 1), "drop_last": options.pop("drop_last", False)}
        sampler = {"key": "BatchSampler", "kwargs": decided}
    kind = BATCH_SAMPLER_DICT.get(sampler["key"])
    if isinstance(kind, type) and issubclass(kind, SharedBatchSampler):
        return loader
    return {
        **loader,
        "kwargs": options,
        "batch_sampler": {"key": "SharedBatches", "kwargs": {"batch_sampler": sampler, "whole": whole}},
    }
