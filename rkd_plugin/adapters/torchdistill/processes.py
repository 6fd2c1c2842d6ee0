"""How a teacher runs, what an epoch begins with, and when the learning rate falls."""

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
    """``train.teacher.forward_proc`` of every recipe here: a teacher whose BatchNorm and dropout stand still.

    torchdistill leaves the teacher in training mode, so that its running statistics drift with every batch and dropout
    blurs what it teaches. To have it that way, name ``'forward_batch_only'`` instead.
    """
    if any(module.training for module in model.modules()):
        model.eval()
    return model(sample_batch)


@forward_proc
def no_forward(model: nn.Module, *_: Any, **__: Any) -> None:
    """``train.stage2.teacher.forward_proc`` where the student goes on alone: the teacher costs nothing."""


@scheduler
class MultiStepFractionLR(torch.optim.lr_scheduler.MultiStepLR):
    """PyTorch's ``MultiStepLR`` with milestones as fractions, so that they follow the number of epochs.

    Args:
        optimizer: given by torchdistill.
        num_epochs: of the training, at least 1.
        milestones: fractions of ``num_epochs``, above 0 and up to 1; each is rounded to a whole epoch, the first at
            the earliest. After each of them the learning rate is multiplied by ``gamma``.
        gamma: the factor.
        last_epoch: as PyTorch's.

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
    """Random numbers for an epoch, from 1, or for building the models, 0; they depend on nothing that came before."""
    set_seed((seed * 1_000_003 + epoch) % 2**32 if epoch else seed)


@pre_epoch_proc
def seeded_epoch(self: Any, epoch: int = 0, **kwargs: Any) -> None:
    """``train.pre_epoch_process``: the host's own, then `seed_epoch` from the seed that the script was started with.

    So torchdistill's scripts with ``--seed S`` draw the random numbers of ``rkd run`` with ``recipe.seed=S``.
    """
    if hasattr(self, "teacher_model"):
        default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    else:
        default_pre_epoch_process_without_teacher(self, epoch=epoch, **kwargs)
    if not hasattr(self, "seed"):
        self.seed = torch.initial_seed()
    seed_epoch(self.seed, epoch + 1)
