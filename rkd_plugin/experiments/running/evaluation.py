"""Test data measured with the model of a recipe, without training."""

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
    """How much of a data set was measured, such as "200 images of 2 of 4 classes"; see ``class_count`` of data sets.

    Args:
        dataset: of the test data.
        labels: of the images that were measured; None if they are unknown.
    """
    if labels is None:
        return f"{len(dataset)} images"
    counts = [part.class_count for part in unwrapped(dataset) if hasattr(part, "class_count")]
    known = counts[0] if len(counts) == 1 else len(class_names(dataset))
    return f"{len(labels)} images of {len(set(labels))} " + (f"of {known} classes" if known else "classes")


class Evaluation(NamedTuple):
    """Test data as a model sees it: metrics, outputs ``(M, D)``, labels ``(M,)``, and where they came from.

    ``measured_on`` is the number of images and classes, and of how many classes of the data set, as text.
    ``features`` ``(M, E)`` are what RKD compares: of an image classifier see `compared`, else the outputs.
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
        recipe: whose model it is, and whose precision.
        checkpoint: of `run`; None for the model as the recipe builds it, such as with pretrained weights alone.
        data: a recipe whose test data and metrics are taken instead of the first one's own.
        all_classes: measure all classes of the data set, not those of its test split alone.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the checkpoint is none, or of another model; if ``data`` is of another task; if the data set is
            not split by class, and so has no other classes than its own.
    """
    for described in (recipe, *([data] if data else [])):
        described.validate()
    if data and data.settings["task"] != recipe.settings["task"]:
        raise ValueError(
            f"expected test data of the model's task, {recipe.settings['task']}, got {data.settings['task']} in "
            f"{data.path}; name a recipe of that task with --data"
        )
    # Read before any data is.
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
    return Evaluation(source.measure(outputs, labels), measured, outputs, labels, features, loader, experiment)
