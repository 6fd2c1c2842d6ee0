"""RKD for pytorch-metric-learning (PML): its losses, and two ways to train with them.

* `RKDDistanceLoss`, `RKDAngleLoss`, `RKDDALoss`: PML losses, called with the teacher's embeddings as ``ref_emb``.
* `TeacherStudentTrunk`: for PML's own trainers, which have no place for a teacher: embeddings bring the teacher's, as a
  `TensorWithTeacher`; `from_bank`, if the teacher's embeddings are in a bank.
* `RKDTrainer`: PML's ``MetricLossOnly`` with a teacher and a loss of its own for RKD; `RKDTrainerMixin` adds the same
  to the other trainers of PML.

The formulas are in `rkd_plugin.functional`; these files translate arguments, names and shapes.
"""

from rkd_plugin.adapters.pml.losses import RKDAngleLoss, RKDDALoss, RKDDistanceLoss
from rkd_plugin.adapters.pml.tensors import TensorWithTeacher
from rkd_plugin.adapters.pml.training import RKDTrainer, RKDTrainerMixin, TeacherStudentTrunk, from_bank

__all__ = [
    "RKDAngleLoss",
    "RKDDALoss",
    "RKDDistanceLoss",
    "RKDTrainer",
    "RKDTrainerMixin",
    "TeacherStudentTrunk",
    "TensorWithTeacher",
    "from_bank",
]
