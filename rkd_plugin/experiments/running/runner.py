"""The training loop of all tasks, on the boxes of torchdistill.

A run is a folder: ``recipe.yaml`` (the resolved recipe), ``last.pt`` and ``best.pt`` (checkpoints), ``result.json`` and
TensorBoard events. The same call on the same folder continues a run that was stopped, and ends with the same numbers as
a run that was not stopped: every epoch has its own seed, and a checkpoint is saved after each epoch, and after the step
in which SIGINT or SIGTERM came (see `stopping`). With several processes (see `processes`), rank 0 reads and writes the
folder. A run can continue with another number of processes after an epoch, but not within one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rkd_plugin import distributed
from rkd_plugin.environment import environment
from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.running.checkpoints import (
    START,
    checkpoint_of,
    read_result,
    read_state,
    restore,
    trained_module,
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
    """Train a recipe in ``folder``, or continue its run, or read its result if it has ended.

    Args:
        recipe: the recipe.
        folder: folder of the run.
        label: label of the progress bar; if empty, the name of the recipe.

    Returns:
        The content of ``result.json``: ``final`` and ``best`` metrics, what they were measured on, ``history`` by
        epoch, seed, environment (commit, hardware, versions), number of processes, and seconds. ``best`` is chosen on
        the data on which it is measured, as in the authors' code; ``final`` is not chosen.

    Raises:
        RecipeError: if the recipe has problems.
        ValueError: if a checkpoint cannot be read or is of another model, a label is no class of the model, or the
            ranks of a process group have different recipes, code, data or weights.
        FileExistsError: if the folder holds a run of another recipe.
        BlockingIOError: if another run uses the folder.
        OSError: if a file cannot be written; earlier files are kept.
        FloatingPointError: if the loss is not finite; the last checkpoint is kept.
    """
    check_equal_start(recipe)
    result = distributed.broadcast(lambda: _finished(folder, recipe))
    if result is None:
        recipe.validate()
        with ExitStack() as held:
            distributed.broadcast(lambda: held.enter_context(alone_in(folder)))
            # Another run can have ended here in the meantime.
            result = distributed.broadcast(lambda: _finished(folder, recipe))
            if result is None:
                result = _run(recipe, folder, label or recipe.path.stem)
    return result


def _finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The result of a run that has ended; None for other runs."""
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
        experiment: data and models of the recipe.
        box: torchdistill's box.
        folder: folder of the run.
        history: the metrics of the finished epochs.
        part: the finished part of the next epoch.
        signals: see `stopping`.
        events: the writer of TensorBoard events, or None.
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
                if _stops_early(self.history, self.experiment.settings.get("patience")):
                    break
                started = time.monotonic() - self.part["seconds"]
                self.begin(epoch)
                with self.name_in_errors(epoch):
                    if not self.train_epoch(bar):
                        self.save_part(time.monotonic() - started)
                        return
                    rate = self.box.optimizer.param_groups[0]["lr"]
                    metrics = self.measure(epoch)
                self.box.post_epoch_process()
                loss = self.part["total"] / self.part["steps"]
                seconds = time.monotonic() - started
                self.save_epoch({"epoch": epoch + 1, "loss": loss, "lr": rate, **metrics, "seconds": seconds})
                bar.set_postfix({name: f"{value:.2f}" for name, value in metrics.items()})
                if is_stopping(self.signals):
                    return

    def begin(self, epoch: int) -> None:
        self.box.pre_epoch_process(epoch=epoch)
        self.experiment.seed(epoch + 1)
        processes.broadcast_weights(trained_module(self.box))  # each rank drew the layers of a new stage itself

    def train_epoch(self, bar: Any) -> bool:
        """Train the rest of an epoch; return False if a signal stopped it."""
        for loss in steps_of(self.experiment, self.box, self.part):
            self.part = {**self.part, "steps": self.part["steps"] + 1, "total": self.part["total"] + loss}
            bar.update()
            if is_stopping(self.signals):
                return False
        return True

    def measure(self, epoch: int) -> dict[str, Any]:
        """The metrics of the student on all test data after an epoch."""
        processes.broadcast_weights(
            trained_module(self.box)
        )  # each rank has BatchNorm statistics of its part of the data
        outputs, labels, _ = self.experiment.embed(self.experiment.student, self.box.val_data_loader)
        if distributed.rank() == 0 and not self.has_collapsed and collapsed(outputs):
            self.has_collapsed = True
            warnings.warn(
                f"epoch {epoch + 1}: the student has the same output for all {len(outputs)} test images, for which "
                "the gradient of RKD is exactly 0; start again with other weights, a smaller learning rate, or a "
                "further loss that separates them",
                stacklevel=2,
            )
        return self.experiment.measure(outputs, labels, self.box.val_data_loader.dataset)

    @contextmanager
    def name_in_errors(self, epoch: int) -> Iterator[None]:
        """Add the epoch, and the checkpoint that is kept, to a FloatingPointError."""
        try:
            yield
        except FloatingPointError as error:
            kept = f"the checkpoint of epoch {epoch} is kept" if epoch else "there is no checkpoint yet"
            raise FloatingPointError(f"epoch {epoch + 1}: {error}; {kept}") from error

    def save_part(self, seconds: float) -> None:
        random = processes.all_gather(random_state(self.experiment.device))
        part = {**self.part, "seconds": seconds, "random": random}
        state = checkpoint_of(self.experiment.student, self.box, self.history, part)
        distributed.broadcast(lambda: write_checkpoint(self.folder / "last.pt", state))

    def save_epoch(self, measured: dict[str, Any]) -> None:
        self.history.append(measured)
        if self.events is not None:
            for name, value in measured.items():
                self.events.add_scalar(name, value, measured["epoch"])
        distributed.broadcast(self._write_checkpoints)
        self.part = START

    def _write_checkpoints(self) -> None:
        checkpoint = checkpoint_of(self.experiment.student, self.box, self.history, START)
        metric = _metric_names(self.history)[0]
        # `best` first: in the other order, a kill between the two would lose the best epoch.
        if all(epoch[metric] < self.history[-1][metric] for epoch in self.history[:-1]):
            write_checkpoint(self.folder / "best.pt", checkpoint)
        write_checkpoint(self.folder / "last.pt", checkpoint)


def _metric_names(history: list[dict[str, Any]]) -> list[str]:
    """The names of the metrics; the first one chooses `best`."""
    return [name for name in history[-1] if name not in ("epoch", "loss", "lr", "seconds")]


def _stops_early(history: list[dict[str, Any]], patience: int | None) -> bool:
    """Whether the first metric has not increased for ``patience`` epochs, for early stopping."""
    if patience is None or len(history) <= patience:
        return False
    first = _metric_names(history)[0]
    values: list[float] = [epoch[first] for epoch in history]
    return max(values[:-patience]) >= max(values[-patience:])


def _resume(path: Path, experiment: Experiment, box: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Load the last checkpoint into a new box; return the finished epochs and the finished part of the next one."""
    checkpoint = distributed.broadcast(lambda: _read_last(path))
    if checkpoint is None:
        return [], START
    history: list[dict[str, Any]] = checkpoint["history"]
    # A box with several stages must reach the stage of the checkpoint before its state is loaded.
    while getattr(box, "current_epoch", len(history)) < len(history):
        box.current_epoch += 1
        if box.current_epoch == box.stage_end_epoch and box.current_epoch < box.num_epochs:
            box.advance_to_next_stage()
    for module, part in ((experiment.student, "model"), (trained_module(box), "trained")):
        load_weights(module, checkpoint[part], path, str(path.with_name("recipe.yaml")))
    restore(box, checkpoint, path)
    box.stage_grad_count = checkpoint["steps"]
    begun: dict[str, Any] = checkpoint["part"]
    if begun["steps"] and len(begun["random"]) != distributed.world_size():
        raise ValueError(
            f"{path}: expected the number of processes that were stopped within epoch {len(history) + 1}, "
            f"{len(begun['random'])}, got {distributed.world_size()}; start that number until the epoch has ended"
        )
    if distributed.rank() == 0 and len(history) < box.num_epochs:
        steps = f", step {begun['steps'] + 1} of {len(box.train_data_loader)}" if begun["steps"] else ""
        report(f"{path.parent}: continuing with epoch {len(history) + 1} of {box.num_epochs}{steps}")
    return history, begun


def _read_last(path: Path) -> dict[str, Any] | None:
    """The last checkpoint that can be read; None if there is no checkpoint."""
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
        # The epochs after the best one are repeated with the same numbers.
        warnings.warn(f"{error}; continuing after {best}, epoch {len(checkpoint['history'])}", stacklevel=2)
        return checkpoint


def events_in(folder: Path, done: int = 0) -> AbstractContextManager[Any]:
    """A writer of TensorBoard events that continues after ``done`` epochs; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: rkd-plugin[report]
        return nullcontext()
    return SummaryWriter(str(folder), purge_step=done + 1)


def _result(recipe: Recipe, experiment: Experiment, dataset: Any, history: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = _metric_names(history)
    best = max(history, key=lambda epoch: float(epoch[metrics[0]]))
    return {
        "recipe": recipe.path.stem,
        "task": experiment.settings["task"],
        "seed": experiment.settings["seed"],
        "final": {name: history[-1][name] for name in metrics},  # of the last epoch, without a choice
        "best": {name: best[name] for name in ("epoch", *metrics)},
        "measured_on": measured_on(dataset, labels_of(dataset, "val_data_loader")),
        "parameters": sum(parameter.numel() for parameter in experiment.student.parameters()),
        "seconds": sum(epoch["seconds"] for epoch in history),
        "processes": distributed.world_size(),
        "environment": environment(experiment.device.type),
        "history": history,
    }
