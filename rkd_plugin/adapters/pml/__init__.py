"""RKD for pytorch-metric-learning (PML): its losses, and two ways to train with them.

* `RKDDistanceLoss`, `RKDAngleLoss`, `RKDDALoss`, `RelationalLoss`: losses of PML, called with the teacher's embeddings
  as ``ref_emb``.
* `TeacherStudentTrunk`: for PML's own trainers, which have no argument for a teacher: it returns a `TensorWithTeacher`,
  the student's embeddings with the teacher's. `from_bank`: for a teacher whose embeddings are in a bank.
* `RKDTrainer`: PML's ``MetricLossOnly`` with a teacher and a separate RKD loss; `RKDTrainerMixin` adds the same to the
  other trainers of PML.

The formulas are in `rkd_plugin.functional`; these files translate arguments, names and shapes.
"""

from rkd_plugin.adapters.pml.bank import from_bank
from rkd_plugin.adapters.pml.losses import RKDAngleLoss, RKDDALoss, RKDDistanceLoss
from rkd_plugin.adapters.pml.relational import RelationalLoss
from rkd_plugin.adapters.pml.tensors import TensorWithTeacher
from rkd_plugin.adapters.pml.trainers import RKDTrainer, RKDTrainerMixin
from rkd_plugin.adapters.pml.trunk import TeacherStudentTrunk

__all__ = [
    "RKDAngleLoss",
    "RKDDALoss",
    "RKDDistanceLoss",
    "RKDTrainer",
    "RKDTrainerMixin",
    "RelationalLoss",
    "TeacherStudentTrunk",
    "TensorWithTeacher",
    "from_bank",
]
