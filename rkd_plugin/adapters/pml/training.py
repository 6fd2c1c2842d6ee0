"""Two ways to train with a teacher in pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn
from torch.utils.data import default_collate

from rkd_plugin.adapters.pml.losses import widen


class TeacherStudentTrunk(nn.Module):
    """A trunk for PML's own trainers that carries the teacher's embeddings to the loss, `FromPacked`.

    In train mode it returns ``[student | teacher]``, shape ``(N, D_s + D_t)``, in the wider of the two dtypes; in eval
    mode the student's embeddings alone, ``(N, D_s)``, so that PML's testers, ``InferenceModel`` and
    ``subset_batch_miner`` see nothing of the teacher. The teacher is frozen: it runs in eval mode without gradient and
    is no part of ``parameters()`` or ``state_dict()``, yet moves with ``.to()`` and its kin, copies and pickles. A PML
    ``embedder`` would meet the packed vectors: put it into the student, ``nn.Sequential(trunk, embedder)``.

    Args:
        student: maps a batch to embeddings ``(N, D_s)``.
        teacher: maps the same batch to embeddings ``(N, D_t)``; put into eval mode here. None: its vectors come with
            the batch, `from_bank`.

    Raises:
        ValueError: when called, if a model does not return ``(N, D)``; or in train mode, if there is neither a teacher
            nor its vectors, or both.

    Example:
        >>> import torch
        >>> trunk = TeacherStudentTrunk(torch.nn.Linear(5, 3), torch.nn.Linear(5, 4))
        >>> trunk(torch.zeros(2, 5)).shape, trunk.eval()(torch.zeros(2, 5)).shape
        (torch.Size([2, 7]), torch.Size([2, 3]))
        >>> list(trunk.state_dict())
        ['student.weight', 'student.bias']
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student
        # Inside a tuple the teacher is no submodule: no optimiser, checkpoint or train() reaches it.
        self._teacher = (teacher.eval() if teacher is not None else None,)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher."""
        return self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TeacherStudentTrunk:
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, data: Any) -> Tensor:
        """A batch -> ``(N, D_s + D_t)`` in train mode, ``(N, D_s)`` in eval mode."""
        data, teacher = data if isinstance(data, _TaughtBatch) else (data, None)
        student: Tensor = self.student(data)
        if not self.training:
            return student
        if self.teacher is not None and teacher is None:
            with torch.no_grad():
                teacher = self.teacher(data)
        elif self.teacher is not None or teacher is None:
            raise ValueError(
                "TeacherStudentTrunk: expected either a teacher or batches with its vectors, got "
                f"{'neither' if teacher is None else 'both'}; give it a teacher, or the trainer **from_bank(...)"
            )
        for side, x in (("student", student), ("teacher", teacher)):
            if x.ndim != 2:
                raise ValueError(
                    f"TeacherStudentTrunk: {side} must return (N, D), got {tuple(x.shape)}; pool or flatten it"
                )
        return torch.cat([widen(student, teacher.dtype), teacher], 1)


class FromPacked(nn.Module):
    """The ``metric_loss`` beside a `TeacherStudentTrunk`: unpacks its vectors, adds RKD and a task loss.

    Args:
        student_dim: ``D_s``, the width of the student's embeddings.
        rkd_loss: a loss of this file, or its ``DistributedLossWrapper``; gets student, labels and the teacher.
        task_loss: any PML loss; gets student, labels and what ``task_miner`` finds.
        task_miner: any PML tuple miner. The trainer's own ``tuple_miner`` would mine packed vectors, and is refused.
        rkd_weight: of ``rkd_loss``.
        task_weight: of ``task_loss``.
        teacher_dim: ``D_t``; if given, the packed width must be exactly ``D_s + D_t``.

    Raises:
        ValueError: when called with tuples, or with vectors too narrow to be packed, as those of a trunk in eval mode.

    Example:
        >>> import torch
        >>> from rkd_plugin.adapters.pml import RKDDALoss
        >>> _ = torch.manual_seed(0)
        >>> trunk = TeacherStudentTrunk(torch.nn.Linear(5, 3), torch.nn.Linear(5, 4))
        >>> loss = FromPacked(3, RKDDALoss())(trunk(torch.randn(8, 5)), torch.arange(8))
        >>> loss.backward()
        >>> trunk.student.weight.grad.shape, trunk.teacher.weight.grad
        (torch.Size([3, 5]), None)
    """

    def __init__(
        self,
        student_dim: int,
        rkd_loss: nn.Module,
        task_loss: nn.Module | None = None,
        task_miner: nn.Module | None = None,
        rkd_weight: float = 1.0,
        task_weight: float = 1.0,
        teacher_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.rkd_loss = rkd_loss
        self.task_loss = task_loss
        self.task_miner = task_miner
        self.rkd_weight = rkd_weight
        self.task_weight = task_weight

    def forward(self, packed: Tensor, labels: Tensor | None = None, indices_tuple: Any = None) -> Tensor:
        """``(N, D_s + D_t)``, labels ``(N,)`` -> a scalar."""
        if indices_tuple is not None:
            raise ValueError(
                "FromPacked: expected no indices_tuple, got one mined from packed vectors; "
                "pass the miner as FromPacked(task_miner=...) instead of the trainer's tuple_miner"
            )
        width = packed.shape[-1] - self.student_dim
        if width < 1 or width != (self.teacher_dim or width):
            raise ValueError(
                f"FromPacked: expected vectors (N, {self.student_dim} + {self.teacher_dim or 'teacher width'}), got "
                f"{tuple(packed.shape)}; check student_dim, and that TeacherStudentTrunk is in train mode"
            )
        student, teacher = packed[:, : self.student_dim], packed[:, self.student_dim :]
        loss: Tensor = self.rkd_weight * self.rkd_loss(student, labels, ref_emb=teacher)
        if self.task_loss is not None:
            mined = self.task_miner(student, labels) if self.task_miner is not None else None
            loss = loss + self.task_weight * self.task_loss(student, labels, mined)
        return loss


class _TaughtBatch(NamedTuple):
    """A batch with the teacher's vectors, which PML's trainers move, cast and mine as they do the tensor ``data``."""

    data: Any
    teacher: Tensor

    @property
    def device(self) -> torch.device:
        device: torch.device = self.data.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.data.dtype
        return dtype

    def to(self, device: torch.device) -> _TaughtBatch:
        return _TaughtBatch(self.data.to(device), self.teacher.to(device))

    def type(self, dtype: torch.dtype) -> _TaughtBatch:
        return _TaughtBatch(self.data.type(dtype), self.teacher.type(dtype))

    def __getitem__(self, rows: Any) -> _TaughtBatch:
        return _TaughtBatch(self.data[rows], self.teacher[rows])


class _CollateTaught:
    """Collates pairs of an item and its vectors; a class, so that processes that load data can be sent it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, batch: list[tuple[Any, list[Tensor]]]) -> tuple[Any, list[Tensor]]:
        items, vectors = zip(*batch, strict=True)
        return self.collate(list(items)), [torch.stack(rows) for rows in zip(*vectors, strict=True)]


def from_bank(
    teacher_bank: Any,
    dataset: Any,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    data_and_label_getter: Callable[[Any], tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """Arguments of PML's ``MetricLossOnly`` with which its batches bring a `TeacherStudentTrunk` the teacher's vectors.

    They are those of the images that the host's sampler draws, by their index in ``dataset``.

    Args:
        teacher_bank: such as ``rkd_plugin.experiments.bank.Bank("dino.npy")``, whose ``over(dataset)`` is a data set of
            pairs of the item and a list of one vector.
        dataset: as the trainer would be given it; testers and hooks still take it so.
        collate_fn: as the trainer would be given it.
        data_and_label_getter: as the trainer would be given it.

    Returns:
        ``dataset``, ``collate_fn`` and ``data_and_label_getter``.

    Raises:
        TypeError: if that is no bank, such as the path of one.
        ValueError: if the bank is of another data set; of a batch, if it is of several modules.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from pytorch_metric_learning.utils.common_functions import EmbeddingDataset
        >>> from rkd_plugin.adapters.pml import RKDDALoss
        >>> from rkd_plugin.experiments.bank import Bank
        >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        ...     np.save(file.name, np.random.randn(16, 4).astype(np.float32))
        ...     student = torch.nn.Linear(5, 3)
        ...     trainer = MetricLossOnly(
        ...         models={"trunk": TeacherStudentTrunk(student)},
        ...         optimizers={"trunk_optimizer": torch.optim.Adam(student.parameters())},
        ...         batch_size=8,
        ...         loss_funcs={"metric_loss": FromPacked(3, RKDDALoss())},
        ...         **from_bank(Bank(file.name), EmbeddingDataset(torch.randn(16, 5), torch.arange(16))),
        ...         dataloader_num_workers=0,
        ...         data_device="cpu",
        ...     )
        ...     trainer.train(num_epochs=1)
    """
    if not hasattr(teacher_bank, "over"):
        raise TypeError(
            f"from_bank: expected a teacher_bank such as Bank('dino.npy'), got {type(teacher_bank).__name__}; open it "
            "with rkd_plugin.experiments.bank.Bank"
        )

    def getter(batch: tuple[Any, list[Tensor]]) -> tuple[Any, Any]:
        items, vectors = batch
        if len(vectors) != 1:
            raise ValueError(
                f"from_bank: expected a teacher_bank of one module, got {len(vectors)}; write one of that alone"
            )
        data, labels = data_and_label_getter(items) if data_and_label_getter else items
        return _TaughtBatch(data, vectors[0]), labels

    return {
        "dataset": teacher_bank.over(dataset),
        "collate_fn": _CollateTaught(collate_fn or default_collate),
        "data_and_label_getter": getter,
    }


class RKDTrainer(MetricLossOnly):
    """PML's ``MetricLossOnly`` with a frozen ``teacher`` among the models and an ``rkd_loss`` among the losses.

    ``models={"trunk": ..., "teacher": ...}``, an ``embedder`` if wanted; ``loss_funcs={"rkd_loss": RKDDALoss()}``, a
    ``metric_loss`` if wanted; ``loss_weights`` for each. The teacher sees the same batches. ``tuple_miner`` mines the
    student's embeddings for ``metric_loss``; ``rkd_loss`` always takes the whole batch. Other arguments are the host's.

    The teacher is put into eval mode, needs no gradient and no optimiser, and is kept as ``trainer.teacher``, outside
    ``trainer.models``, whose members the host sets to train mode, optimises and writes to disk.

    With ``teacher_bank``, such as ``rkd_plugin.experiments.bank.Bank("dino.npy")``, there is no teacher among the
    models: its vectors are read, of the images that the host's sampler draws by their index in ``dataset``.

    Args:
        args: the host's.
        teacher_bank: see `from_bank`.
        kwargs: the host's.

    Raises:
        AssertionError: from the host, if a model or loss is missing or unknown.
        TypeError: if the bank is none, such as the path of one.
        ValueError: if the teacher is given an optimiser; if there are a bank and a teacher; if the bank is of another
            data set, or of several modules.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.utils.common_functions import EmbeddingDataset
        >>> from rkd_plugin.adapters.pml import RKDDALoss
        >>> student, teacher = torch.nn.Linear(5, 3), torch.nn.Linear(5, 4)
        >>> trainer = RKDTrainer(
        ...     models={"trunk": student, "teacher": teacher},
        ...     optimizers={"trunk_optimizer": torch.optim.Adam(student.parameters())},
        ...     batch_size=8,
        ...     loss_funcs={"rkd_loss": RKDDALoss()},
        ...     dataset=EmbeddingDataset(torch.randn(16, 5), torch.arange(16)),
        ...     dataloader_num_workers=0,
        ...     data_device="cpu",
        ... )
        >>> trainer.train(num_epochs=1)
        >>> student.training, teacher.training
        (True, False)
    """

    models: dict[str, nn.Module]
    dataset: Any
    collate_fn: Any
    data_and_label_getter: Any

    def __init__(self, *args: Any, teacher_bank: Any = None, **kwargs: Any) -> None:
        self.teacher_bank = teacher_bank
        super().__init__(*args, **kwargs)

    def custom_setup(self) -> None:
        """Have the batches bring the bank's vectors."""
        super().custom_setup()
        if self.teacher_bank is None:
            return
        if "teacher" in self.models:
            raise ValueError("RKDTrainer: expected no teacher beside a teacher_bank, got one; leave one of them out")
        for name, value in from_bank(
            self.teacher_bank, self.dataset, self.collate_fn, self.data_and_label_getter
        ).items():
            setattr(self, name, value)

    def modify_schema(self) -> None:
        """Add the teacher and its loss to what the host accepts and requires."""
        if "teacher_optimizer" in self.optimizers:
            raise ValueError("RKDTrainer: the teacher is frozen, got a teacher_optimizer; remove it from optimizers")
        if self.teacher_bank is None:
            self.schema["models"].keys += ["teacher"]
            self.schema["models"].essential += ["teacher"]
        self.schema["loss_funcs"].keys += ["rkd_loss"]
        self.schema["loss_funcs"].essential += ["rkd_loss"]
        self.schema["loss_funcs"].important = []  # metric_loss is a choice here, and missing without a warning
        self.schema["optimizers"].important = [f"{name}_optimizer" for name in self.models if name != "teacher"]

    def initialize_models(self) -> None:
        """Freeze the teacher and take it out of the host's hands."""
        # A bank's vectors come with the batch.
        teacher = self.models["teacher"] if self.teacher_bank is None else nn.Identity()
        self.teacher = teacher.eval().requires_grad_(False)
        self.models = {name: model for name, model in self.models.items() if name != "teacher"}
        super().initialize_models()

    def calculate_loss(self, curr_batch: tuple[Any, Tensor]) -> None:
        """Fill ``self.losses`` for one batch."""
        data, labels = curr_batch
        embeddings = self.compute_embeddings(data)
        if "metric_loss" in self.loss_funcs:
            indices_tuple = self.maybe_mine_embeddings(embeddings, labels)
            self.losses["metric_loss"] = self.maybe_get_metric_loss(embeddings, labels, indices_tuple)
        if self.loss_weights["rkd_loss"] > 0:
            known = data if self.teacher_bank is None else data.teacher
            teacher = self.teacher(c_f.to_device(known, device=self.data_device, dtype=self.dtype))
            self.losses["rkd_loss"] = self.loss_funcs["rkd_loss"](embeddings, labels, ref_emb=teacher)

    def get_trunk_output(self, data: Any) -> Tensor:
        """What the student's trunk says of a batch."""
        output: Tensor = super().get_trunk_output(data if self.teacher_bank is None else data.data)
        return output
