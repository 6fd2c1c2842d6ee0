"""Checks before the first step: data that would end a run later, with an error that does not name them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rkd_plugin.experiments.recipe.schema import stages
from rkd_plugin.experiments.running.episodes import episode_accuracies
from rkd_plugin.experiments.running.metrics import check_classes, in_eval_mode, named_channels
from rkd_plugin.teacher_bank.labels import labels_of

if TYPE_CHECKING:
    from rkd_plugin.experiments.running.experiment import Experiment

PLAIN = {"forward_batch_only", "forward_in_eval_mode"}  # forward processes that give a model the images alone


def check_data(experiment: Experiment) -> None:
    """Raise ValueError for a data set that a loss or a metric cannot handle."""
    for name, dataset, _ in _data(experiment, "train_data_loader", "val_data_loader"):
        if len(dataset) < 2:
            raise ValueError(f"{name}: expected two images or more, got {len(dataset)}; relations are between two")
    for name, _, labels in _data(experiment, "val_data_loader"):
        if experiment.settings["task"] == "metric_learning" and labels and len(set(labels)) == len(labels):
            raise ValueError(
                f"{name}: expected a class with two images or more, as an image is a query for the others, got "
                f"{len(labels)} images of as many classes; test on other data"
            )


@torch.no_grad()
def check_images(experiment: Experiment, teacher: nn.Module | None) -> None:
    """Raise ValueError for images or labels that do not fit a model, from one image of each data set."""
    forwards = {stage.get("teacher", {}).get("forward_proc") for stage in stages(experiment.config).values()}
    models = [experiment.student, *([teacher] if teacher and forwards <= PLAIN else [])]
    with in_eval_mode(*models):
        for name, dataset, labels in _data(experiment, "train_data_loader", "val_data_loader"):
            if not isinstance(image := dataset[0][0], Tensor):
                continue
            images = experiment.place(image[None])
            with named_channels(images, name):
                # Calling a model would compile it (`recipe.compile`), which one image is not worth.
                outputs = [model.forward(images) for model in models]
            if experiment.settings["task"] == "classification" and labels:
                check_classes(outputs[0].shape[1], torch.tensor(sorted(set(labels))), name)


def check_episodes(experiment: Experiment, dataset: Any) -> None:
    """Raise ValueError if a data set has too few classes or images for the test episodes."""
    labels = labels_of(dataset, "val_data_loader")
    if labels is not None:
        classes = torch.tensor(labels)
        options = {name: value for name, value in experiment.settings.items() if name in ("test_tasks", "test_queries")}
        episode_accuracies(classes[:, None], classes, test_episodes=1, **options)


def _data(experiment: Experiment, *loaders: str) -> Iterator[tuple[str, Any, list[int] | None]]:
    """Name, data set and labels (None if unknown) of what the loaders of all stages load."""
    used = [
        stage[name]["dataset_id"] for stage in stages(experiment.config).values() for name in loaders if stage.get(name)
    ]
    for name in dict.fromkeys(used):
        dataset = experiment.config["datasets"][name]
        where = f"datasets.{name}"
        yield where, dataset, labels_of(dataset, where)
