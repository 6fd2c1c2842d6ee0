"""The training steps of one epoch on a box of torchdistill, the same for all tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rkd_plugin import distributed
from rkd_plugin.experiments.running.checkpoints import START
from rkd_plugin.experiments.running.experiment import Experiment, batches
from rkd_plugin.experiments.support import processes
from rkd_plugin.experiments.support.signals import set_random_state


def steps_of(experiment: Experiment, box: Any, part: Mapping[str, Any] = START) -> Iterator[float]:
    """Train one epoch, or the rest of it, and yield the loss of each step, the mean over all ranks, after its update.

    Args:
        experiment: the experiment of the box.
        box: after ``pre_epoch_process``, with the seed of the epoch.
        part: the part of the epoch that is done: the number of ``steps``, and the ``random`` states after them.

    Raises:
        FloatingPointError: if a loss is not finite, before the update; the message names the term, and an image that is
            not finite.
        ValueError: if the epoch has no step.
    """
    loader = box.train_data_loader
    if not len(loader):
        raise ValueError(
            f"train.train_data_loader: expected a batch or more in an epoch, got none of {len(loader.dataset)} images; "
            "use a smaller batch"
        )
    loaded = batches(loader)
    if part["steps"]:
        # Load the finished batches again, so that samplers, transforms and workers draw the same random numbers.
        next(islice(loaded, part["steps"] - 1, None))
        set_random_state(part["random"][distributed.rank()], experiment.device)
    with _term_values(box.criterion) as terms:
        for step, (batch, targets, supplement) in enumerate(loaded, part["steps"] + 1):
            terms.update(dict.fromkeys(terms))
            box.pre_forward_process()
            try:
                with experiment.precision():
                    loss = box.forward_process(experiment.place(batch), targets.to(experiment.device), supplement)
            except FloatingPointError:  # from a miner that finds no tuples, as embeddings are not finite
                loss = torch.tensor(math.nan, device=experiment.device)
            value = processes.all_reduce_mean(loss)
            if not math.isfinite(value):
                suspects = range(0 if batch.isfinite().all() else len(loader.dataset))
                missing = [name for name, term in terms.items() if term is None][:1]  # the one that raised
                through = [name for name, term in terms.items() if term is not None and not term.isfinite().all()]
                raise FloatingPointError(
                    f"the loss became {value} in step {step}"
                    + (f" through its term {', '.join(through or missing)}" if through or missing else "")
                    + experiment.not_finite(loader.dataset, suspects)
                )
            processes.average_gradients(loss, (p for group in box.optimizer.param_groups for p in group["params"]))
            box.post_forward_process(loss)
            yield value


@contextmanager
def _term_values(criterion: Any) -> Iterator[dict[str, Tensor | None]]:
    """The last value of each term of torchdistill's criterion, by name; None before a term is computed."""
    values: dict[str, Tensor | None] = {}

    def keep(name: str, *called: Any) -> None:
        values[name] = called[-1].detach()

    hooks = []
    for name, (term, _) in getattr(criterion, "term_dict", {}).items():
        values[name] = None
        hooks.append(term.register_forward_hook(partial(keep, name)))
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()


def models_of(experiment: Experiment, box: Any) -> list[nn.Module]:
    """The student, and the teacher if the box has one."""
    return [model for model in (experiment.student, getattr(box, "teacher_model", None)) if model is not None]
