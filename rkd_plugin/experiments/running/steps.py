"""The steps of one epoch on torchdistill's boxes, the same for all tasks."""

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
    """Train one epoch, or the rest of it, and yield the loss of each step after its update, the mean over all ranks.

    Args:
        experiment: of the box.
        box: after ``pre_epoch_process``, seeded for the epoch.
        part: of the epoch, that is done: its ``steps``, and where the ``random`` numbers were after them.

    Raises:
        FloatingPointError: if a loss is not finite, before the update; it names the term, and an image if one is why.
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
        # Load the batches that are done again: only so samplers, transforms and the loader's processes draw as before.
        next(islice(loaded, part["steps"] - 1, None))
        set_random_state(part["random"][distributed.rank()], experiment.device)
    with _terms(box.criterion) as terms:
        for step, (batch, targets, supplement) in enumerate(loaded, part["steps"] + 1):
            terms.update(dict.fromkeys(terms))
            box.pre_forward_process()
            try:
                with experiment.precision():
                    loss = box.forward_process(experiment.place(batch), targets.to(experiment.device), supplement)
            except FloatingPointError:  # of a miner, which embeddings that are not finite leave without tuples
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
def _terms(criterion: Any) -> Iterator[dict[str, Tensor | None]]:
    """The last value of each term of torchdistill's sum, by name."""
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
    """The student, and the box's teacher if there is one."""
    return [model for model in (experiment.student, getattr(box, "teacher_model", None)) if model is not None]
