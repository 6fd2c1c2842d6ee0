"""Parts of a recipe of torchdistill: models, stages, and the registries of their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torchvision  # before torchdistill, whose registries look for it in sys.modules
from torchdistill.core import distillation, training  # noqa: F401  they register the components of torchdistill
from torchdistill.losses import registry as losses
from torchdistill.models import registry as models


def mapping(value: Any) -> Mapping[Any, Any]:
    """The value if it is a mapping, otherwise an empty mapping."""
    return value if isinstance(value, dict) else {}


def model_builders(is_quantized: bool = False) -> Mapping[str, Any]:
    """The models that a key can name, as torchdistill looks them up: those of torchvision, then registered ones."""
    official = vars(torchvision.models.quantization if is_quantized else torchvision.models)
    # Without the functions that look up a model by name: torchdistill would call one, which downloads weights.
    public = {
        name: value
        for name, value in official.items()
        if callable(value) and not name.startswith("_") and value.__module__ != "torchvision.models._api"
    }
    # A module of torchvision, which cannot be called, hides a registered model of the same name.
    return public | {name: model for name, model in models.MODEL_DICT.items() if name not in official}


def mid_level_losses() -> Mapping[str, Any]:
    """The losses that a key can name."""
    return {**losses.LOW_LEVEL_LOSS_DICT, **losses.LOSS_DICT, **losses.MIDDLE_LEVEL_LOSS_DICT}


def has_teacher(data: Mapping[Any, Any]) -> bool:
    """Whether torchdistill builds a teacher, and thus distils."""
    return isinstance(data.get("models"), dict) and data["models"].get("teacher_model") is not None


def stages(data: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """YAML path -> stage of training: ``train`` itself, or its ``stage1``, ``stage2``, ..."""
    train = data.get("train")
    if not isinstance(train, dict):
        return {}
    numbered = {f"train.{key}": value for key, value in train.items() if str(key).startswith("stage")}
    return {path: value for path, value in (numbered or {"train": train}).items() if isinstance(value, dict)}
