"""Forward processes of teachers, the start of an epoch, and a schedule of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchdistill.common.main_util import set_seed
from torchdistill.core.interfaces.pre_epoch_proc import (
    default_pre_epoch_process_with_teacher,
    default_pre_epoch_process_without_teacher,
)

from rkd_plugin.adapters.torchdistill.registering import forward_proc, pre_epoch_proc, scheduler


@forward_proc
def forward_in_eval_mode(model: nn.Module, sample_batch: Any, *_: Any, **__: Any) -> Any:
    """``train.teacher.forward_proc`` of every recipe here: the teacher in eval mode.

    torchdistill leaves the teacher in training mode, where each batch changes the running statistics of BatchNorm, and
    dropout is active. ``'forward_batch_only'`` gives torchdistill's behaviour.
    """
    if any(module.training for module in model.modules()):
        model.eval()
    return model(sample_batch)


@forward_proc
def no_forward(model: nn.Module, *_: Any, **__: Any) -> None:
    """``train.stage2.teacher.forward_proc`` of a stage without distillation: skip the teacher's forward pass."""


@scheduler
class MultiStepFractionLR(torch.optim.lr_scheduler.MultiStepLR):
    """PyTorch's ``MultiStepLR`` with milestones as fractions of the number of epochs.

    Args:
        optimizer: from torchdistill.
        num_epochs: of the training, at least 1.
        milestones: fractions of ``num_epochs``, above 0 and up to 1, after which the learning rate is multiplied by
            ``gamma``; each is rounded to a whole epoch, at least 1.
        gamma: the factor.
        last_epoch: as in ``MultiStepLR``.

    Raises:
        ValueError: if a milestone is not above 0 and up to 1.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> sorted(MultiStepFractionLR(optimizer, num_epochs=200, milestones=[0.3, 0.6, 0.8]).milestones)
        [60, 120, 160]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_epochs: int,
        milestones: Sequence[float],
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        if not all(0 < milestone <= 1 for milestone in milestones):
            raise ValueError(
                f"MultiStepFractionLR: expected milestones as fractions of num_epochs, above 0 and up to 1, got "
                f"{list(milestones)}; write 0.3 for epoch 60 of 200"
            )
        epochs = [max(round(milestone * num_epochs), 1) for milestone in milestones]
        super().__init__(optimizer, epochs, gamma, last_epoch)


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed the generators for an epoch, counted from 1, or, with 0, for building the models."""
    set_seed((seed * 1_000_003 + epoch) % 2**32 if epoch else seed)


@pre_epoch_proc
def seeded_epoch(self: Any, epoch: int = 0, **kwargs: Any) -> None:
    """``train.pre_epoch_process``: torchdistill's default one, then `seed_epoch` with the seed of the script.

    Then torchdistill's scripts with ``--seed S`` draw the same random numbers as ``rkd run`` with ``recipe.seed=S``.
    """
    if hasattr(self, "teacher_model"):
        default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    else:
        default_pre_epoch_process_without_teacher(self, epoch=epoch, **kwargs)
    if not hasattr(self, "seed"):
        self.seed = torch.initial_seed()
    seed_epoch(self.seed, epoch + 1)
