"""Decorators that register in torchdistill without overwriting a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torchdistill.core.interfaces.registry import (
    FORWARD_PROC_FUNC_DICT,
    PRE_EPOCH_PROC_FUNC_DICT,
    register_forward_proc_func,
    register_pre_epoch_proc_func,
)
from torchdistill.datasets.registry import DATASET_WRAPPER_DICT, register_dataset_wrapper
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, register_mid_level_loss
from torchdistill.models.registry import (
    AUXILIARY_MODEL_WRAPPER_DICT,
    MODEL_DICT,
    register_auxiliary_model_wrapper,
    register_model,
)
from torchdistill.optim.registry import SCHEDULER_DICT, register_scheduler

T = TypeVar("T", bound=Callable[..., Any])


def keeping_others(register: Callable[[T], T], registry: Mapping[str, Any]) -> Callable[[T], T]:
    """A decorator of torchdistill that raises if another component has the name; torchdistill overwrites it."""

    def decorate(component: T) -> T:
        registered = registry.get(component.__name__, component)
        if (registered.__module__, registered.__qualname__) != (component.__module__, component.__qualname__):
            raise ValueError(
                f"torchdistill: expected no other component named {component.__name__!r}, got {registered.__module__}."
                f"{registered.__qualname__}; register that one under another key"
            )
        return register(component)

    return decorate


mid_level_loss = keeping_others(register_mid_level_loss, MIDDLE_LEVEL_LOSS_DICT)
forward_proc = keeping_others(register_forward_proc_func, FORWARD_PROC_FUNC_DICT)
pre_epoch_proc = keeping_others(register_pre_epoch_proc_func, PRE_EPOCH_PROC_FUNC_DICT)
model_wrapper = keeping_others(register_auxiliary_model_wrapper, AUXILIARY_MODEL_WRAPPER_DICT)
model = keeping_others(register_model, MODEL_DICT)
dataset_wrapper = keeping_others(register_dataset_wrapper, DATASET_WRAPPER_DICT)
scheduler = keeping_others(register_scheduler, SCHEDULER_DICT)
