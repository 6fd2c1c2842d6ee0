"""Measuring the model of a recipe on test data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.experiments.running.features import compared
from rkd_plugin.experiments.running.ranks import check_equal_weights
from rkd_plugin.experiments.running.weights import read_named_weights
from rkd_plugin.teacher_bank.labels import class_names, unwrapped


def measured_on(dataset: Any, labels: Sequence[int] | None) -> str:
    """The measured part of a data set, such as "200 images of 2 of 4 classes".

    Args:
        dataset: the test data; its attribute ``class_count`` is the number of all classes.
        labels: labels of the measured images; None if they are unknown.
    """
    if labels is None:
        return f"{len(dataset)} images"
    counts = [part.class_count for part in unwrapped(dataset) if hasattr(part, "class_count")]
    known = counts[0] if len(counts) == 1 else len(class_names(dataset))
    return f"{len(labels)} images of {len(set(labels))} " + (f"of {known} classes" if known else "classes")


class Evaluation(NamedTuple):
    """Metrics of a model on test data, with its outputs ``(M, D)`` and their labels ``(M,)``.

    ``measured_on`` is the result of the function of that name. ``features`` ``(M, E)`` are what RKD compares: the
    outputs, or, for an image classifier, what `compared` finds.
    """

    metrics: dict[str, float]
    measured_on: str
    outputs: Tensor
    labels: Tensor
    features: Tensor
    loader: Any
    experiment: Experiment


def evaluate(
    recipe: Recipe, checkpoint: Path | None = None, data: Recipe | None = None, all_classes: bool = False
) -> Evaluation:
    """Embed and measure test data with a recipe's student.

    Args:
        recipe: describes the model and its precision.
        checkpoint: weights of the model; None for the model without training, such as with pretrained weights.
        data: a recipe with other test data and metrics; None for those of ``recipe``.
        all_classes: whether to measure all classes of the data set, and not only those of its test split.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the checkpoint cannot be read or is of another model, if ``data`` has another task, or if
            ``all_classes`` is True and the data set is not split by class.
    """
    for described in (recipe, *([data] if data else [])):
        described.validate()
    if data and data.settings["task"] != recipe.settings["task"]:
        raise ValueError(
            f"expected test data of the model's task, {recipe.settings['task']}, got {data.settings['task']} in "
            f"{data.path}; name a recipe of that task with --data"
        )
    # First, as loading data can take long.
    weights = None if checkpoint is None else read_named_weights(checkpoint, "--checkpoint ")
    experiment = Experiment(recipe)
    if checkpoint is not None and weights is not None:
        models = experiment.config["models"]
        config = models.get("student_model") or models["model"]
        experiment.load(experiment.student, config, weights, checkpoint)
        check_equal_weights(experiment.student, f"weights in {checkpoint}")
    source = Experiment(data) if data else experiment
    loader = source.test_loader(all_classes)
    layer = compared(experiment.config, experiment.student, "student")
    outputs, labels, features = experiment.embed(experiment.student, loader, layer)
    measured = measured_on(loader.dataset, labels.tolist())
    metrics = source.measure(outputs, labels, loader.dataset)
    return Evaluation(metrics, measured, outputs, labels, features, loader, experiment)
