"""Components for torchdistill's YAML files that list ``dependencies: ['rkd_plugin.adapters.torchdistill']``.

Losses (mid-level): ``RKDDistanceLoss``, ``RKDAngleLoss``, ``RKDDALoss`` and ``RelationalLoss`` on any pair of hooked
modules, and ``PMLLoss``, any loss of pytorch-metric-learning. Model wrapper: ``TrainedWith``, for a loss with
parameters. Forward processes for teachers: ``forward_in_eval_mode``, and ``no_forward`` for a stage without a teacher.
Pre-epoch process: ``seeded_epoch``. Scheduler: ``MultiStepFractionLR``. For the precomputed outputs of a teacher bank:
``BankTeacher`` and ``WithTeacherBank``. torchdistill's own ``RKDLoss`` is unchanged.
"""

import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules

from rkd_plugin.adapters.torchdistill.bank import BankTeacher, WithTeacherBank
from rkd_plugin.adapters.torchdistill.hooks import (
    IO,
    Hooked,
    Pool,
    find_hooked,
    is_channels_last,
    pooled,
    pooling,
    reading,
)
from rkd_plugin.adapters.torchdistill.losses import (
    HookedLoss,
    RelationalLoss,
    RKDAngleLoss,
    RKDDALoss,
    RKDDistanceLoss,
)
from rkd_plugin.adapters.torchdistill.pml import PMLLoss, TrainedWith
from rkd_plugin.adapters.torchdistill.processes import (
    MultiStepFractionLR,
    forward_in_eval_mode,
    no_forward,
    seed_epoch,
    seeded_epoch,
)
from rkd_plugin.adapters.torchdistill.registering import mid_level_loss

__all__ = [
    "IO",
    "BankTeacher",
    "Hooked",
    "HookedLoss",
    "MultiStepFractionLR",
    "PMLLoss",
    "Pool",
    "RKDAngleLoss",
    "RKDDALoss",
    "RKDDistanceLoss",
    "RelationalLoss",
    "TrainedWith",
    "WithTeacherBank",
    "find_hooked",
    "forward_in_eval_mode",
    "is_channels_last",
    "mid_level_loss",
    "no_forward",
    "pooled",
    "pooling",
    "reading",
    "seed_epoch",
    "seeded_epoch",
]
