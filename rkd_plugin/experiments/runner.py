"""The training loop, one for all tasks, on torchdistill's boxes.

A run is a folder: ``recipe.yaml`` (as it was resolved), ``last.pt`` and ``best.pt`` (checkpoints), ``result.json`` and
TensorBoard events. The same call on the same folder goes on where a run was stopped, and ends with the same numbers as
one that never was: every epoch starts from random numbers of its own, and its end is the only state that is kept.
Of processes that train together (see `processes`) the first reads and writes the folder; any number may go on with it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from rkd_plugin.bench import environment
from rkd_plugin.experiments import processes
from rkd_plugin.experiments.experiment import Experiment
from rkd_plugin.experiments.files import load_weights, read_checkpoint, write_checkpoint, write_json, write_text
from rkd_plugin.experiments.recipe import Recipe


def run(recipe: Recipe, folder: Path, label: str = "") -> dict[str, Any]:
    """Train what ``recipe`` describes in ``folder``, or go on with it, or read its result if it is done.

    Returns:
        What ``result.json`` holds: ``final`` and ``best`` metrics, ``history`` by epoch, seed, environment
        (commit, hardware, versions), number of processes and seconds. ``best`` is chosen on the data it is measured on,
        as the authors do; ``final`` is not.

    Raises:
        RecipeError: if the recipe has problems.
        ValueError: if a checkpoint is none, or of another model, or a label is no class of the model.
        FileExistsError: if the folder holds a run of another recipe.
        FloatingPointError: if the loss is no longer finite; the last checkpoint stays.
    """
    resolved = recipe.resolved()
    result = processes.of_first(lambda: _done(folder, resolved))
    if result is not None:
        return result
    recipe.validate()
    experiment = Experiment(recipe)
    box = experiment.box()
    processes.of_first(lambda: write_text(folder / "recipe.yaml", resolved))
    history = _resume(folder / "last.pt", experiment.student, box)
    with events_in(folder, len(history)) if processes.rank() == 0 else nullcontext() as events:
        _train(experiment, box, history, folder, events, label or recipe.path.stem)

    def finish() -> dict[str, Any]:
        result = _result(recipe, experiment, history)
        write_json(folder / "result.json", result)
        return result

    return processes.of_first(finish)


def _done(folder: Path, resolved: str) -> dict[str, Any] | None:
    """The result of a run that has ended, None if there is something left to do."""
    held = folder / "recipe.yaml"
    if held.is_file() and held.read_text(encoding="utf-8") != resolved:
        raise FileExistsError(
            f"{folder} holds a run of another recipe; give this one another folder, or delete that one"
        )
    ended = folder / "result.json"
    return json.loads(ended.read_text(encoding="utf-8")) if ended.is_file() else None


def _train(
    experiment: Experiment, box: Any, history: list[dict[str, Any]], folder: Path, events: Any, label: str
) -> None:
    steps = len(box.train_data_loader)
    with tqdm(
        total=box.num_epochs * steps, initial=len(history) * steps, desc=label, unit="step", leave=False,
        disable=processes.rank() > 0,
    ) as bar:  # fmt: skip
        for epoch in range(len(history), box.num_epochs):
            if _is_settled(history, experiment.settings.get("patience")):
                break
            started = time.monotonic()
            box.pre_epoch_process(epoch=epoch)
            experiment.seed(epoch + 1)
            processes.as_first(_trained(box))  # a new stage's layers were drawn by each
            losses = []
            for loss in steps_of(experiment, box):
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss became {loss} in epoch {epoch + 1}; nothing was overwritten")
                losses.append(loss)
                bar.update()
            rate = box.optimizer.param_groups[0]["lr"]
            processes.as_first(_trained(box))  # statistics of BatchNorm are of each process's part
            outputs, labels, _ = experiment.embed(experiment.student, box.val_data_loader)
            metrics = experiment.measure(outputs, labels)
            box.post_epoch_process()
            history.append(
                {
                    "epoch": epoch + 1,
                    "loss": sum(losses) / len(losses),
                    "lr": rate,
                    **metrics,
                    "seconds": time.monotonic() - started,
                }
            )
            bar.set_postfix({name: f"{value:.2f}" for name, value in metrics.items()})
            if events is not None:
                for name, value in history[-1].items():
                    events.add_scalar(name, value, epoch + 1)
            if processes.rank() == 0:
                _save(folder, experiment.student, box, history, next(iter(metrics)))


def _metrics(history: list[dict[str, Any]]) -> list[str]:
    """Names of what is measured, the one that `best` goes by first."""
    return [name for name in history[-1] if name not in ("epoch", "loss", "lr", "seconds")]


def _is_settled(history: list[dict[str, Any]], patience: int | None) -> bool:
    """Whether the first metric has not risen for ``patience`` epochs, the end of early stopping."""
    if patience is None or len(history) <= patience:
        return False
    first = _metrics(history)[0]
    values: list[float] = [epoch[first] for epoch in history]
    return max(values[:-patience]) >= max(values[-patience:])


def steps_of(experiment: Experiment, box: Any) -> Iterator[float]:
    """One epoch; the loss of each step, of all processes together, whose update is done unless it is not finite."""
    for batch, targets, supplement in box.train_data_loader:
        box.pre_forward_process()
        with experiment.precision():
            loss = box.forward_process(experiment.place(batch), targets.to(experiment.device), supplement)
        value = processes.mean(loss)
        if math.isfinite(value):
            processes.average_gradients(loss, (p for group in box.optimizer.param_groups for p in group["params"]))
            box.post_forward_process(loss)
        yield value


def _save(folder: Path, student: nn.Module, box: Any, history: list[dict[str, Any]], metric: str) -> None:
    checkpoint = {
        "model": student.state_dict(),
        "trained": _trained(box).state_dict(),
        "optimizer": box.optimizer.state_dict(),
        "lr_scheduler": box.lr_scheduler and box.lr_scheduler.state_dict(),
        "steps": box.stage_grad_count,
        "history": history,
    }
    # `best` first: were it the other way round, a kill between the two would lose the best epoch for good.
    if all(epoch[metric] < history[-1][metric] for epoch in history[:-1]):
        write_checkpoint(folder / "best.pt", checkpoint)
    write_checkpoint(folder / "last.pt", checkpoint)


def _trained(box: Any) -> nn.Module:
    """What the box trains: the student, or what torchdistill wrapped around it for this stage."""
    model: nn.Module = box.student_model if hasattr(box, "student_model") else box.model
    return model


def _resume(path: Path, student: nn.Module, box: Any) -> list[dict[str, Any]]:
    """Bring a new box to the state of a checkpoint, if there is one; the epochs that are done."""
    checkpoint = processes.of_first(lambda: _last(path))
    if checkpoint is None:
        return []
    history: list[dict[str, Any]] = checkpoint["history"]
    # A box of several stages has to reach the stage of the checkpoint before it can take its state.
    while getattr(box, "current_epoch", len(history)) < len(history):
        box.current_epoch += 1
        if box.current_epoch == box.stage_end_epoch and box.current_epoch < box.num_epochs:
            box.advance_to_next_stage()
    for module, part in ((student, "model"), (_trained(box), "trained")):
        load_weights(module, checkpoint[part], path, str(path.with_name("recipe.yaml")))
    box.optimizer.load_state_dict(checkpoint["optimizer"])
    if box.lr_scheduler is not None:
        box.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
    box.stage_grad_count = checkpoint["steps"]
    return history


def _last(path: Path) -> dict[str, Any] | None:
    for stray in path.parent.glob(".*.tmp*"):
        stray.unlink()
    parts = "model", "trained", "optimizer", "lr_scheduler", "steps", "history"
    return read_checkpoint(path, *parts) if path.is_file() else None


def events_in(folder: Path, done: int = 0) -> AbstractContextManager[Any]:
    """A writer of TensorBoard events that goes on after ``done`` epochs; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: rkd-plugin[report]
        return nullcontext()
    return SummaryWriter(str(folder), purge_step=done + 1)


def _result(recipe: Recipe, experiment: Experiment, history: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = _metrics(history)
    best = max(history, key=lambda epoch: float(epoch[metrics[0]]))
    return {
        "recipe": recipe.path.stem,
        "task": experiment.settings["task"],
        "seed": experiment.settings["seed"],
        "final": {name: history[-1][name] for name in metrics},  # of the last epoch, which nobody chose
        "best": {name: best[name] for name in ("epoch", *metrics)},
        "parameters": sum(parameter.numel() for parameter in experiment.student.parameters()),
        "seconds": sum(epoch["seconds"] for epoch in history),
        "processes": processes.count(),
        "environment": environment(experiment.device.type),
        "history": history,
    }
