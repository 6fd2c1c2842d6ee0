"""Precomputed teacher outputs: a teacher bank instead of a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchdistill.datasets.wrapper import BaseDatasetWrapper
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from rkd_plugin.adapters.torchdistill.hooks import IO
from rkd_plugin.adapters.torchdistill.registering import dataset_wrapper, model
from rkd_plugin.teacher_bank import Bank

_VECTORS = "teacher_bank"  # the key of the vectors in torchdistill's supplementary dictionary


@dataset_wrapper
class WithTeacherBank(BaseDatasetWrapper):
    """A wrapper of the training data set that adds a bank's vectors for `BankTeacher`.

    ``rkd run`` sets both if ``recipe.teacher_bank`` is set; a YAML for torchdistill's own scripts names them::

        models.teacher_model:     {key: BankTeacher, kwargs: {bank: PATH}}
        train.teacher:            {forward_proc: forward_batch_supp_dict, requires_grad: False}
        train.train_data_loader:  dataset_wrapper: {key: WithTeacherBank, kwargs: {bank: PATH}}

    Args:
        org_dataset: given by torchdistill.
        bank: path of a `Bank`.

    Raises:
        FileNotFoundError: if there is no bank.
        ValueError: if it is of other data; see `Bank.over`.
    """

    def __init__(self, org_dataset: Any, bank: str | Path) -> None:
        super().__init__(org_dataset)
        self.with_teacher = Bank(bank).over(org_dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, dict[str, Any]]:
        """Image, label, and torchdistill's supplementary dictionary with the vectors."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any, dict[str, Any]]]:
        """PyTorch's hook: the items of a batch."""
        return [(*item, {_VECTORS: vectors}) for item, vectors in self.with_teacher.__getitems__(indices)]


@model
class BankTeacher(AuxiliaryModelWrapper):
    """A teacher model whose modules' inputs and outputs come from a bank; see `WithTeacherBank`.

    Args:
        bank: path of a `Bank`.
        module_path: for a single array, the module of the teacher whose input or output it contains.
        module_io: for a single array, ``"input"`` or ``"output"``.
    """

    def __init__(self, bank: str | Path, module_path: str = ".", module_io: IO = "output") -> None:
        super().__init__()
        arrays = Bank(bank).arrays
        self.places = [(array.path, array.io) for array in arrays] if arrays else [(module_path, module_io)]
        self.vectors: Sequence[Tensor] = ()

    def forward(self, sample_batch: Tensor, supplement: Mapping[str, Any]) -> Tensor | None:
        """The teacher's output ``(N, D)``, None if the bank has other modules only."""
        if _VECTORS not in supplement:
            raise ValueError("BankTeacher: expected a data set wrapped in WithTeacherBank; name it as dataset_wrapper")
        self.vectors = [vectors.to(sample_batch.device, non_blocking=True) for vectors in supplement[_VECTORS]]
        return dict(zip(self.places, self.vectors, strict=True)).get((".", "output"))

    def secondary_forward(self, io_dict: dict[str, dict[str, Any]]) -> None:
        """The hook of torchdistill: store the vectors where its forward hooks store those of a network."""
        # There are no vectors if the forward process of the stage is `no_forward`.
        for (path, io), vectors in zip(self.places, self.vectors, strict=False):
            io_dict.setdefault(path, {})[io] = vectors

    def compile(self, *_: Any, **__: Any) -> None:
        """Do nothing: there is nothing to compile."""
