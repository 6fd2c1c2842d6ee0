"""The training loop, one for all tasks, on torchdistill's boxes.

A run is a folder: ``recipe.yaml`` (the resolved recipe), ``last.pt`` and ``best.pt`` (checkpoints), ``result.json`` and
TensorBoard events. The same call on the same folder goes on where a run was stopped, and ends with the same numbers as
a run that never was stopped: every epoch starts from its own random numbers, and a checkpoint is kept after each epoch,
and within one after the step in which SIGINT or SIGTERM came (see `stopping`). Of processes that train together (see
`processes`) rank 0 reads and writes the folder; any number of them may go on after an epoch, and the same number as
before within one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from rkd_plugin import distributed
from rkd_plugin.environment import environment
from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.running.checkpoints import (
    START,
    read_result,
    read_state,
    restore,
    write_checkpoint,
)
from rkd_plugin.experiments.running.evaluation import measured_on
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.experiments.running.metrics import collapsed
from rkd_plugin.experiments.running.ranks import check_equal_start
from rkd_plugin.experiments.running.run_folder import check_recipe, write_recipe
from rkd_plugin.experiments.running.steps import models_of, steps_of
from rkd_plugin.experiments.running.tensor_files import DamagedError
from rkd_plugin.experiments.running.weights import load_weights
from rkd_plugin.experiments.support import processes
from rkd_plugin.experiments.support.files import alone_in, write_json
from rkd_plugin.experiments.support.signals import is_stopping, random_state, stopping
from rkd_plugin.printing import printable, report
from rkd_plugin.teacher_bank.labels import labels_of


def run(recipe: Recipe, folder: Path, label: str = "") -> dict[str, Any]:
    """Train what ``recipe`` describes in ``folder``, or go on with it, or read its result if it has ended.

    Args:
        recipe: the recipe.
        folder: of the run.
        label: of the progress bar; the recipe's name if empty.

    Returns:
        The content of ``result.json``: ``final`` and ``best`` metrics, ``history`` by epoch, seed, environment
        (commit, hardware, versions), number of processes and seconds. ``best`` is chosen on the data it is measured on,
        as in the authors' code; ``final`` is not.

    Raises:
        RecipeError: if the recipe has problems.
        ValueError: if a checkpoint cannot be read, or is of another model; if a label is no class of the model; if the
            ranks of a process group were started with different recipes, code, data or weights.
        FileExistsError: if the folder holds a run of another recipe.
        BlockingIOError: if another run is at work in the folder.
        OSError: if something cannot be written; what was written before is kept.
        FloatingPointError: if the loss is no longer finite; the last checkpoint is kept.
    """
    check_equal_start(recipe)
    result = distributed.broadcast(lambda: _finished(folder, recipe))
    if result is None:
        recipe.validate()
        with ExitStack() as held:
            distributed.broadcast(lambda: held.enter_context(alone_in(folder)))
            # Another run may have ended here meanwhile.
            result = distributed.broadcast(lambda: _finished(folder, recipe))
            if result is None:
                result = _run(recipe, folder, label or recipe.path.stem)
    return result


def _finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The result of a run that has ended, None if there is something left to do."""
    check_recipe(folder, recipe)
    ended = folder / "result.json"
    return read_result(ended) if ended.is_file() else None


def _run(recipe: Recipe, folder: Path, label: str) -> dict[str, Any]:
    experiment = Experiment(recipe)
    box = experiment.box()
    distributed.broadcast(lambda: write_recipe(folder, recipe.resolved()))
    history, part = _resume(folder / "last.pt", experiment, box)
    events = events_in(folder, len(history)) if distributed.rank() == 0 else nullcontext()
    with experiment.threads(box.train_data_loader, *models_of(experiment, box)):
        with stopping() as signals, events as writer:
            _Training(experiment, box, folder, history, part, signals, writer).train(printable(label))

        def finish() -> dict[str, Any]:
            result = _result(recipe, experiment, box.val_data_loader.dataset, history)
            write_json(folder / "result.json", result)
            return result

        return distributed.broadcast(finish)


@dataclass
class _Training:
    """The training of one run, from its start or its checkpoint to its end or a signal.

    Attributes:
        experiment: the recipe that was built.
        box: torchdistill's.
        folder: of the run.
        history: of the epochs that are done.
        part: of the next epoch, that is done.
        signals: see `stopping`.
        events: TensorBoard's writer, if there is one.
    """

    experiment: Experiment
    box: Any
    folder: Path
    history: list[dict[str, Any]]
    part: dict[str, Any]
    signals: list[int]
    events: Any
    has_collapsed: bool = False

    def train(self, label: str) -> None:
        steps = len(self.box.train_data_loader)
        with tqdm(
            total=self.box.num_epochs * steps,
            initial=len(self.history) * steps + self.part["steps"],
            desc=label,
            unit="step",
            leave=False,
            disable=distributed.rank() > 0,
        ) as bar:
            for epoch in range(len(self.history), self.box.num_epochs):
                if _is_settled(self.history, self.experiment.settings.get("patience")):
                    break
                started = time.monotonic() - self.part["seconds"]
                self.begin(epoch)
                with self.naming(epoch):
                    if not self.train_epoch(bar):
                        self.keep_part(time.monotonic() - started)
                        return
                    rate = self.box.optimizer.param_groups[0]["lr"]
                    metrics = self.measure(epoch)
                self.box.post_epoch_process()
                loss = self.part["total"] / self.part["steps"]
                seconds = time.monotonic() - started
                self.keep_epoch({"epoch": epoch + 1, "loss": loss, "lr": rate, **metrics, "seconds": seconds})
                bar.set_postfix({name: f"{value:.2f}" for name, value in metrics.items()})
                if is_stopping(self.signals):
                    return

    def begin(self, epoch: int) -> None:
        self.box.pre_epoch_process(epoch=epoch)
        self.experiment.seed(epoch + 1)
        processes.broadcast_weights(_trained(self.box))  # every rank drew a new stage's layers for itself

    def train_epoch(self, bar: Any) -> bool:
        """Train the rest of an epoch; False if a signal stopped it."""
        for loss in steps_of(self.experiment, self.box, self.part):
            self.part = {**self.part, "steps": self.part["steps"] + 1, "total": self.part["total"] + loss}
            bar.update()
            if is_stopping(self.signals):
                return False
        return True

    def measure(self, epoch: int) -> dict[str, Any]:
        """The metrics after an epoch, of the student on all test data."""
        processes.broadcast_weights(_trained(self.box))  # each rank has BatchNorm's statistics of its own part
        outputs, labels, _ = self.experiment.embed(self.experiment.student, self.box.val_data_loader)
        if distributed.rank() == 0 and not self.has_collapsed and collapsed(outputs):
            self.has_collapsed = True
            warnings.warn(
                f"epoch {epoch + 1}: the student has the same output for all {len(outputs)} test images, where RKD "
                "gives it a gradient of exactly 0; start again from other weights, with a smaller learning rate, or "
                "with a further loss that separates them",
                stacklevel=2,
            )
        return self.experiment.measure(outputs, labels)

    @contextmanager
    def naming(self, epoch: int) -> Iterator[None]:
        """Name the epoch in an error about numbers, and what is kept."""
        try:
            yield
        except FloatingPointError as error:
            kept = f"the checkpoint of epoch {epoch} is kept" if epoch else "there is no checkpoint yet"
            raise FloatingPointError(f"epoch {epoch + 1}: {error}; {kept}") from error

    def keep_part(self, seconds: float) -> None:
        random = processes.all_gather(random_state(self.experiment.device))
        part = {**self.part, "seconds": seconds, "random": random}
        state = _state(self.experiment.student, self.box, self.history, part)
        distributed.broadcast(lambda: write_checkpoint(self.folder / "last.pt", state))

    def keep_epoch(self, measured: dict[str, Any]) -> None:
        self.history.append(measured)
        if self.events is not None:
            for name, value in measured.items():
                self.events.add_scalar(name, value, measured["epoch"])
        distributed.broadcast(self._save)
        self.part = START

    def _save(self) -> None:
        checkpoint = _state(self.experiment.student, self.box, self.history, START)
        metric = _metrics(self.history)[0]
        # `best` first: were it the other way round, a kill between the two would lose the best epoch for good.
        if all(epoch[metric] < self.history[-1][metric] for epoch in self.history[:-1]):
            write_checkpoint(self.folder / "best.pt", checkpoint)
        write_checkpoint(self.folder / "last.pt", checkpoint)


def _metrics(history: list[dict[str, Any]]) -> list[str]:
    """Names of the metrics; the first one chooses `best`."""
    return [name for name in history[-1] if name not in ("epoch", "loss", "lr", "seconds")]


def _is_settled(history: list[dict[str, Any]], patience: int | None) -> bool:
    """Whether the first metric has not risen for ``patience`` epochs, the end of early stopping."""
    if patience is None or len(history) <= patience:
        return False
    first = _metrics(history)[0]
    values: list[float] = [epoch[first] for epoch in history]
    return max(values[:-patience]) >= max(values[-patience:])


def _state(student: nn.Module, box: Any, history: list[dict[str, Any]], part: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint after the epochs of ``history`` and a part of the next one."""
    trained = _trained(box)
    return {
        "model": student.state_dict(),
        "trained": trained.state_dict(),
        "optimizer": box.optimizer.state_dict(),
        "lr_scheduler": box.lr_scheduler and box.lr_scheduler.state_dict(),
        "steps": box.stage_grad_count,
        "gradients": {name: p.grad for name, p in trained.named_parameters() if p.grad is not None},  # accumulated
        "history": history,
        "part": part,
    }


def _trained(box: Any) -> nn.Module:
    """The module that the box trains: the student, or torchdistill's wrapper of it for this stage."""
    model: nn.Module = box.student_model if hasattr(box, "student_model") else box.model
    return model


def _resume(path: Path, experiment: Experiment, box: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Load a checkpoint, if there is one, into a new box; returns the finished epochs, and the part of the next."""
    checkpoint = distributed.broadcast(lambda: _last(path))
    if checkpoint is None:
        return [], START
    history: list[dict[str, Any]] = checkpoint["history"]
    # A box of several stages has to reach the stage of the checkpoint before it can take its state.
    while getattr(box, "current_epoch", len(history)) < len(history):
        box.current_epoch += 1
        if box.current_epoch == box.stage_end_epoch and box.current_epoch < box.num_epochs:
            box.advance_to_next_stage()
    for module, part in ((experiment.student, "model"), (_trained(box), "trained")):
        load_weights(module, checkpoint[part], path, str(path.with_name("recipe.yaml")))
    restore(box, checkpoint, path)
    box.stage_grad_count = checkpoint["steps"]
    begun: dict[str, Any] = checkpoint["part"]
    if begun["steps"] and len(begun["random"]) != distributed.world_size():
        raise ValueError(
            f"{path}: expected the number of processes that were stopped within epoch {len(history) + 1}, "
            f"{len(begun['random'])}, got {distributed.world_size()}; start as many until that epoch has ended"
        )
    if distributed.rank() == 0 and len(history) < box.num_epochs:
        steps = f", step {begun['steps'] + 1} of {len(box.train_data_loader)}" if begun["steps"] else ""
        report(f"{path.parent}: going on from epoch {len(history) + 1} of {box.num_epochs}{steps}")
    return history, begun


def _last(path: Path) -> dict[str, Any] | None:
    """The last checkpoint that can be read, None if there is none at all."""
    if not path.is_file():
        return None
    try:
        return read_state(path)
    except DamagedError as error:
        best = path.with_name("best.pt")
        try:
            checkpoint = read_state(best)
        except (FileNotFoundError, ValueError):
            raise error from None
        # The epochs after it are repeated with the same numbers.
        warnings.warn(f"{error}; going on from {best}, epoch {len(checkpoint['history'])}", stacklevel=2)
        return checkpoint


def events_in(folder: Path, done: int = 0) -> AbstractContextManager[Any]:
    """A writer of TensorBoard events that goes on after ``done`` epochs; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: rkd-plugin[report]
        return nullcontext()
    return SummaryWriter(str(folder), purge_step=done + 1)


def _result(recipe: Recipe, experiment: Experiment, dataset: Any, history: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = _metrics(history)
    best = max(history, key=lambda epoch: float(epoch[metrics[0]]))
    return {
        "recipe": recipe.path.stem,
        "task": experiment.settings["task"],
        "seed": experiment.settings["seed"],
        "final": {name: history[-1][name] for name in metrics},  # of the last epoch, which nobody chose
        "best": {name: best[name] for name in ("epoch", *metrics)},
        "measured_on": measured_on(dataset, labels_of(dataset, "val_data_loader")),
        "parameters": sum(parameter.numel() for parameter in experiment.student.parameters()),
        "seconds": sum(epoch["seconds"] for epoch in history),
        "processes": distributed.world_size(),
        "environment": environment(experiment.device.type),
        "history": history,
    }
