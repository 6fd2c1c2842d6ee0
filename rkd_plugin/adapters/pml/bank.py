"""The teacher's embeddings from a bank, in the batches of PML's trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from rkd_plugin.adapters.pml.tensors import TensorWithTeacher
from rkd_plugin.teacher_bank import Bank


class _CollateWithTeacher:
    """Collates pairs of an item and its vectors; a class, since worker processes need to unpickle it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, batch: list[tuple[Any, list[Tensor]]]) -> tuple[Any, list[Tensor]]:
        items, vectors = zip(*batch, strict=True)
        return self.collate(list(items)), [torch.stack(rows) for rows in zip(*vectors, strict=True)]


def from_bank(
    teacher_bank: Bank,
    dataset: Any,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    data_and_label_getter: Callable[[Any], tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """Arguments of PML's trainers with which each batch contains the teacher's embeddings from a bank.

    They are the embeddings of the images that the sampler of the trainer draws, by their index in ``dataset``.

    Args:
        teacher_bank: a `Bank` of one module or array, such as ``rkd_plugin.teacher_bank.Bank("dino.npy")``.
        dataset: the trainer's data set; testers and hooks still get this one.
        collate_fn: the trainer's.
        data_and_label_getter: the trainer's.

    Returns:
        ``dataset``, ``collate_fn`` and ``data_and_label_getter``.

    Raises:
        TypeError: if ``teacher_bank`` is not a `Bank`, for example its path; for a batch, if its data is not a tensor.
        ValueError: if the bank is of another data set; for a batch, if the bank is of several modules, or if an item is
            not one image and one label, as for ``TwoStreamMetricLoss``, whose second images have no row in a bank.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from pytorch_metric_learning.trainers import MetricLossOnly
        >>> from pytorch_metric_learning.utils.common_functions import EmbeddingDataset
        >>> from rkd_plugin.adapters.pml import RKDDALoss, TeacherStudentTrunk
        >>> from rkd_plugin.teacher_bank import Bank
        >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        ...     np.save(file.name, np.random.randn(16, 4).astype(np.float32))
        ...     student = torch.nn.Linear(5, 3)
        ...     trainer = MetricLossOnly(
        ...         models={"trunk": TeacherStudentTrunk(student)},
        ...         optimizers={"trunk_optimizer": torch.optim.Adam(student.parameters())},
        ...         batch_size=8,
        ...         loss_funcs={"metric_loss": RKDDALoss()},
        ...         **from_bank(Bank(file.name), EmbeddingDataset(torch.randn(16, 5), torch.arange(16))),
        ...         dataloader_num_workers=0,
        ...         data_device="cpu",
        ...     )
        ...     trainer.train(num_epochs=1)
    """
    if not isinstance(teacher_bank, Bank):
        raise TypeError(
            f"from_bank: expected a teacher_bank such as Bank('dino.npy'), got {type(teacher_bank).__name__}; open it "
            "with rkd_plugin.teacher_bank.Bank"
        )

    def getter(batch: tuple[Any, list[Tensor]]) -> tuple[Any, Any]:
        items, vectors = batch
        if len(vectors) != 1:
            raise ValueError(
                f"from_bank: expected a teacher_bank of one module, got {len(vectors)}; write a bank of one module"
            )
        parts = data_and_label_getter(items) if data_and_label_getter else items
        if len(parts) != 2:
            raise ValueError(
                f"from_bank: expected items of one image and its label, got {len(parts)} parts, and a bank has one "
                "row per item; give a teacher instead of a bank"
            )
        data, labels = parts
        if not isinstance(data, Tensor):
            raise TypeError(
                f"from_bank: expected a batch of images as one tensor, got {type(data).__name__}; choose it in "
                "data_and_label_getter"
            )
        return TensorWithTeacher.of(data, vectors[0]), labels

    return {
        "dataset": teacher_bank.over(dataset),
        "collate_fn": _CollateWithTeacher(collate_fn or default_collate),
        "data_and_label_getter": getter,
    }
