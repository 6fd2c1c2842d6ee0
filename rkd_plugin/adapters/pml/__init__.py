"""RKD for pytorch-metric-learning (PML): its losses, and two ways to train with them.

* `RKDDistanceLoss`, `RKDAngleLoss`, `RKDDALoss`: PML losses, called with the teacher's embeddings as ``ref_emb``.
* `TeacherStudentTrunk` and `FromPacked`: for PML's own ``trainers.MetricLossOnly``, which has no place for a teacher;
  `from_bank`, if its vectors are in a bank.
* `RKDTrainer`: that trainer with a teacher and a loss of its own for RKD.

The formulas are in `rkd_plugin.functional`; these files translate arguments, names and shapes.
"""

from rkd_plugin.adapters.pml.losses import RKDAngleLoss, RKDDALoss, RKDDistanceLoss
from rkd_plugin.adapters.pml.training import FromPacked, RKDTrainer, TeacherStudentTrunk, from_bank

__all__ = [
    "FromPacked",
    "RKDAngleLoss",
    "RKDDALoss",
    "RKDDistanceLoss",
    "RKDTrainer",
    "TeacherStudentTrunk",
    "from_bank",
]
