"""The training loop, one for all tasks, on torchdistill's boxes.

A run is a folder: ``recipe.yaml`` (as it was resolved), ``last.pt`` and ``best.pt`` (checkpoints), ``result.json`` and
TensorBoard events. The same call on the same folder goes on where a run was stopped, and ends with the same numbers as
one that never was: every epoch starts from random numbers of its own, and its end is the only state that is kept.
"""

from __future__ import annotations

import json
import random
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import nn
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.datasets.util import build_data_loader
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model
from tqdm import tqdm

from rkd_plugin.bench import environment
from rkd_plugin.experiments.files import read_checkpoint, write_checkpoint, write_json, write_text
from rkd_plugin.experiments.metrics import EVALUATORS, embed
from rkd_plugin.experiments.recipe import Recipe, read


class Experiment:
    """A recipe, built by torchdistill's own loader, which executes what the recipe names: data sets and models."""

    def __init__(self, folder: Path) -> None:
        self.settings = read(folder / "recipe.yaml").settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.seed(0)
        self.config = yaml_util.load_yaml_file(str(folder / "recipe.yaml"))
        import_dependencies(self.config["dependencies"])
        self.evaluate_outputs = EVALUATORS[self.settings["task"]]
        models = self.config["models"]
        self.student = self._build(models["student_model" if "student_model" in models else "model"])

    def seed(self, epoch: int) -> None:
        """Random numbers that depend on the recipe's seed and the epoch, and on nothing that came before."""
        value = (self.settings["seed"] * 1_000_003 + epoch) % 2**32
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)

    def _build(self, config: dict[str, Any]) -> nn.Module:
        model = get_image_classification_model(config)
        if model is None:
            model = get_model(config["key"], config.get("repo_or_dir"), **config["kwargs"])
        if config.get("src_ckpt"):
            # torchdistill goes on with random weights where this file is missing, and executes what it holds.
            model.load_state_dict(read_checkpoint(Path(config["src_ckpt"]))["model"])
        built: nn.Module = model.to(self.device)
        return built

    def box(self) -> Any:
        """Torchdistill's training or distillation box: models, criterion, optimizer and data loaders of ``train``."""
        common = (self.config["datasets"], self.config["train"], self.device, None, False, 1)
        if "teacher_model" not in self.config["models"]:
            return get_training_box(self.student, *common)
        return get_distillation_box(self._build(self.config["models"]["teacher_model"]), self.student, *common)

    def evaluate(self, loader: Any) -> dict[str, float]:
        """The task's metrics of the student."""
        return self.evaluate_outputs(*embed(self.student, loader, self.device))

    def test_loader(self) -> Any:
        """The loader that ``test`` describes."""
        config = self.config["test"]["test_data_loader"]
        return build_data_loader(self.config["datasets"][config["dataset_id"]], config, False)


def run(recipe: Recipe, folder: Path, label: str = "") -> dict[str, Any]:
    """Train what ``recipe`` describes in ``folder``, or go on with it, or read its result if it is done.

    Returns:
        What ``result.json`` holds: ``final`` and ``best`` metrics, ``history`` by epoch, seed, environment
        (commit, hardware, versions) and seconds. ``best`` is chosen on the data it is measured on, as the authors do;
        ``final`` is not.

    Raises:
        RecipeError: if the recipe has problems.
        FileExistsError: if the folder holds a run of another recipe.
        FloatingPointError: if the loss is no longer finite; the last checkpoint stays.
    """
    resolved = recipe.resolved()
    held = folder / "recipe.yaml"
    if held.is_file() and held.read_text(encoding="utf-8") != resolved:
        raise FileExistsError(
            f"{folder} holds a run of another recipe; give this one another folder, or delete that one"
        )
    if (folder / "result.json").is_file():
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result
    recipe.validate()
    write_text(held, resolved)
    experiment = Experiment(folder)
    box = experiment.box()
    history = _resume(folder / "last.pt", experiment.student, box)
    with _events(folder, purge_step=len(history)) as events:
        _train(experiment, box, history, folder, events, label or recipe.path.stem)
    result = _result(recipe, experiment, history)
    write_json(folder / "result.json", result)
    return result


def _train(
    experiment: Experiment, box: Any, history: list[dict[str, Any]], folder: Path, events: Any, label: str
) -> None:
    steps = len(box.train_data_loader)
    with tqdm(total=box.num_epochs * steps, initial=len(history) * steps, desc=label, unit="step", leave=False) as bar:
        for epoch in range(len(history), box.num_epochs):
            started = time.monotonic()
            experiment.seed(epoch + 1)
            box.pre_epoch_process(epoch=epoch)
            total = 0.0
            for batch, targets, supplement in box.train_data_loader:
                box.pre_forward_process()
                loss = box.forward_process(batch.to(experiment.device), targets.to(experiment.device), supplement)
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss became {loss.item()} in epoch {epoch + 1}; nothing was overwritten"
                    )
                total += loss.item()
                box.post_forward_process(loss)
                bar.update()
            rate = box.optimizer.param_groups[0]["lr"]
            metrics = experiment.evaluate(box.val_data_loader)
            box.post_epoch_process()
            history.append(
                {
                    "epoch": epoch + 1,
                    "loss": total / steps,
                    "lr": rate,
                    **metrics,
                    "seconds": time.monotonic() - started,
                }
            )
            bar.set_postfix({name: f"{value:.2f}" for name, value in metrics.items()})
            if events is not None:
                for name, value in history[-1].items():
                    events.add_scalar(name, value, epoch + 1)
            _save(folder, experiment.student, box, history, next(iter(metrics)))


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
    for stray in path.parent.glob(".*.tmp*"):
        stray.unlink()
    if not path.is_file():
        return []
    checkpoint = read_checkpoint(path)
    history: list[dict[str, Any]] = checkpoint["history"]
    # A box of several stages has to reach the stage of the checkpoint before it can take its state.
    while getattr(box, "current_epoch", len(history)) < len(history):
        box.current_epoch += 1
        if box.current_epoch == box.stage_end_epoch and box.current_epoch < box.num_epochs:
            box.advance_to_next_stage()
    student.load_state_dict(checkpoint["model"])
    _trained(box).load_state_dict(checkpoint["trained"])
    box.optimizer.load_state_dict(checkpoint["optimizer"])
    if box.lr_scheduler is not None:
        box.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
    box.stage_grad_count = checkpoint["steps"]
    return history


def _events(folder: Path, purge_step: int) -> AbstractContextManager[Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: rkd-plugin[report]
        return nullcontext()
    return SummaryWriter(str(folder), purge_step=purge_step + 1)


def _result(recipe: Recipe, experiment: Experiment, history: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = [name for name in history[-1] if name not in ("epoch", "loss", "lr", "seconds")]
    best = max(history, key=lambda epoch: float(epoch[metrics[0]]))
    return {
        "recipe": recipe.path.stem,
        "task": experiment.settings["task"],
        "seed": experiment.settings["seed"],
        "final": {name: history[-1][name] for name in metrics},
        "best": {name: best[name] for name in ("epoch", *metrics)},
        "parameters": sum(parameter.numel() for parameter in experiment.student.parameters()),
        "seconds": sum(epoch["seconds"] for epoch in history),
        "environment": environment(experiment.device.type),
        "history": history,
    }


def evaluate(folder: Path, checkpoint: str = "last") -> dict[str, float]:
    """The metrics of a run's ``last`` or ``best`` checkpoint on its test data.

    Raises:
        FileNotFoundError: if the folder holds no run, or no such checkpoint.
    """
    if not (folder / "recipe.yaml").is_file():
        raise FileNotFoundError(f"expected a folder of `rkd run` with recipe.yaml, found none in {folder}")
    experiment = load(folder, checkpoint)
    return experiment.evaluate(experiment.test_loader())


def load(folder: Path, checkpoint: str = "last") -> Experiment:
    """A run's experiment with its student as the checkpoint has it."""
    weights = read_checkpoint(folder / f"{checkpoint}.pt")["model"]
    experiment = Experiment(folder)
    experiment.student.load_state_dict(weights)
    return experiment
