"""Losses of pytorch-metric-learning in a torchdistill experiment."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from rkd_plugin.adapters.torchdistill.hooks import IO, Hooked, find_hooked
from rkd_plugin.adapters.torchdistill.registering import mid_level_loss, model_wrapper

_TRAINED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@model_wrapper
class TrainedWith(AuxiliaryModelWrapper):
    """A model and further modules to train, such as a loss of pytorch-metric-learning with proxies.

    ``train.student.auxiliary_model_wrapper: {key: TrainedWith, kwargs: {modules: {proxies: *loss}}}``, where ``&loss``
    marks the ``!import_call`` of a `PMLLoss`. The paths of the model's modules then start with ``student_model.`` (or
    ``model.`` without a teacher).

    Args:
        modules: name -> module; their parameters go to the optimizer and into the checkpoint.
        student_model: from torchdistill, with a teacher.
        model: from torchdistill, without a teacher.
        kwargs: further arguments of torchdistill for devices.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        student_model: nn.Module | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.path = "student_model" if model is None else "model"
        self.add_module(self.path, student_model if model is None else model)
        self.trained = nn.ModuleDict(modules)
        _TRAINED.update(self.trained.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model."""
        return getattr(self, self.path)(*args, **kwargs)


@mid_level_loss
class PMLLoss(nn.Module):
    """Any loss of pytorch-metric-learning, with or without a miner, as a mid-level loss.

    Args:
        loss: the loss, built in YAML by ``!import_call``, as are its distance, reducer and regularizer.
        miner: the miner, or None.
        student_module_path: the hooked module whose output is the embedding, ``'.'`` for the student's output.
        student_module_io: ``'input'`` or ``'output'`` of that module.

    Raises:
        TypeError: if ``loss`` is not a module.
        ValueError: if ``loss`` has parameters and no `TrainedWith` trains them, or the module is not hooked.
        FloatingPointError: if the loss or the miner fails on embeddings that are NaN or Inf.

    Example:
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> embeddings = torch.tensor([[1., 0.], [0., 1.], [-1., 0.]])
        >>> PMLLoss(ContrastiveLoss())({".": {"output": embeddings}}, {}, torch.tensor([0, 0, 1]))
        tensor(1.4142)
    """

    def __init__(
        self,
        loss: nn.Module,
        miner: nn.Module | None = None,
        student_module_path: str = ".",
        student_module_io: IO = "output",
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"PMLLoss: expected loss to be a module, got {loss!r}; build it with !import_call")
        if loss not in _TRAINED and any(True for _ in loss.parameters()):
            raise ValueError(
                f"PMLLoss: expected a loss without parameters, or one in TrainedWith, got {type(loss).__name__}, whose "
                "parameters torchdistill does not pass to the optimizer; "
                "name it under auxiliary_model_wrapper with the key TrainedWith as well"
            )
        self.loss = loss
        self.miner = miner
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io

    def forward(self, student_io_dict: Hooked, teacher_io_dict: Hooked, targets: Tensor, *_: Any) -> Tensor:
        """The dictionaries of torchdistill and class labels ``(N,)`` -> a scalar."""
        embeddings = find_hooked(student_io_dict, "student", self.student_module_path, self.student_module_io)
        # In half precision PML's distances are inexact, and some of its miners fail.
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            try:
                mined = None if self.miner is None else self.miner(embeddings, targets)
                loss: Tensor = self.loss(embeddings, targets, mined)
            except (RuntimeError, ValueError, IndexError) as error:
                if embeddings.isfinite().all():
                    raise
                raise FloatingPointError("PMLLoss: expected finite embeddings, got NaN or Inf") from error
        return loss
