"""Relational Knowledge Distillation for torchdistill and pytorch-metric-learning.

The losses are here; importing this package loads torch and nothing else. The hosts' forms are opt-in imports:
``rkd_plugin.adapters.torchdistill`` and ``rkd_plugin.adapters.pml``.
"""

from rkd_plugin.functional import rkd_angle_loss, rkd_da_loss, rkd_distance_loss
from rkd_plugin.losses import RKDAngleLoss, RKDDALoss, RKDDistanceLoss

__version__ = "0.1.0"

__all__ = [
    "RKDAngleLoss",
    "RKDDALoss",
    "RKDDistanceLoss",
    "rkd_angle_loss",
    "rkd_da_loss",
    "rkd_distance_loss",
]
