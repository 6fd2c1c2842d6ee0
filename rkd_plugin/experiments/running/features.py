"""The features of an image classifier that pictures show in addition to its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import nn
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from rkd_plugin.adapters.torchdistill import HookedLoss, RKDDALoss
from rkd_plugin.experiments.recipe.schema import stages
from rkd_plugin.experiments.running.metrics import Layer


def compared(config: Mapping[str, Any], model: nn.Module, side: str) -> Layer | None:
    """The layer that the relational loss of a recipe reads; without one, the ``backbone``.

    Args:
        config: a recipe as torchdistill loads it.
        model: student or teacher of the recipe.
        side: ``"student"`` or ``"teacher"``.

    Returns:
        The layer, pooled and L2-normalised as in the last relational loss of the recipe, so that pictures show what the
        loss compares; maps of a backbone are averaged. None stands for the outputs of the model, as for other tasks.
    """
    if config["recipe"]["task"] != "classification":
        return None
    modules = {**dict(model.named_modules()), ".": model}
    for loss in _relational(config):
        path = loss.paths[side]
        of_sets = loss.pools[side] in ("tokens", "channels")  # without one vector for an example
        if (
            path in modules and not of_sets
        ):  # a loss can also read a wrapper of the model, which exists in training only
            return Layer(modules[path], loss.ios[side], partial(loss.embeddings, side))
    return (
        Layer(modules["backbone"], "output", partial(RKDDALoss().embeddings, side)) if "backbone" in modules else None
    )


def _relational(config: Mapping[str, Any]) -> Iterator[HookedLoss]:
    for stage in reversed(stages(config).values()):
        for term in stage["criterion"].get("kwargs", {}).get("sub_terms", {}).values():
            loss = MIDDLE_LEVEL_LOSS_DICT.get(term["criterion"]["key"])
            if isinstance(loss, type) and issubclass(loss, HookedLoss):
                yield loss(**term["criterion"]["kwargs"])
