"""Relational Knowledge Distillation for torchdistill and pytorch-metric-learning.

The first use of a loss imports torch and no other library. The adapters to the two libraries are separate imports:
``rkd_plugin.adapters.torchdistill`` and ``rkd_plugin.adapters.pml``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rkd_plugin.functional import rkd_angle_loss, rkd_da_loss, rkd_distance_loss
    from rkd_plugin.losses import RelationalLoss, RKDAngleLoss, RKDDALoss, RKDDistanceLoss
    from rkd_plugin.memory import RelationMemory
    from rkd_plugin.relational import relational_loss

__version__ = "0.1.0"

__all__ = [
    "RKDAngleLoss",
    "RKDDALoss",
    "RKDDistanceLoss",
    "RelationMemory",
    "RelationalLoss",
    "relational_loss",
    "rkd_angle_loss",
    "rkd_da_loss",
    "rkd_distance_loss",
]


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562), so that `rkd --help` does not load torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    others = {"RelationMemory": "memory", "relational_loss": "relational"}
    file = others.get(name, "losses" if name.endswith("Loss") else "functional")
    module = import_module(f"{__name__}.{file}")
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
