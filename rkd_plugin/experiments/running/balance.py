"""The gradient of each loss term of a recipe, where the terms meet in the student, and weights that equalise them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkd_plugin import losses, markdown
from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.running.experiment import Experiment, batches
from rkd_plugin.experiments.running.steps import models_of

HEADS = "weight of", "is", "gradient", "ratio", "is equal with"
PARTS = "distance_weight", "angle_weight"


class Place(NamedTuple):
    """A module of the student, and ``"input"`` or ``"output"``."""

    path: str
    io: str


class Weight(NamedTuple):
    """A weight in a recipe's sum of losses, its value, and the weight of the term that it is a part of, or 1."""

    name: str
    value: float
    outer: float = 1.0


def balance(recipe: Recipe, count: int, at: str | None = None) -> str:
    """A Markdown table: the norm of each term's gradient, over the first batches of training, without training.

    The gradients are those of the untrained student, with respect to what one of its hooked modules returns: the last
    one that all terms depend on. For losses of the embedding, that is the embedding. A term without a gradient, such as
    an accuracy, is left out. `RKDDALoss` counts as two terms. The weights of the last column give all terms the
    gradient of the first one.

    Args:
        recipe: with a criterion of several terms; of several stages, the first is measured. No file of a run is
            written.
        count: number of batches.
        at: path of the hooked module, ``"."`` for the student itself; None for the last one that all terms depend on.

    Raises:
        RecipeError: if the recipe has problems.
        ValueError: if there are fewer than two terms with a gradient, no hooked module that all of them depend on, or
            no weight other than 0.
        FloatingPointError: if a gradient is not finite.
    """
    if count < 1:
        raise ValueError(f"balance: expected 1 batch or more, got {count}; set --batches")
    recipe.validate()
    experiment = Experiment(recipe)
    box = experiment.box()
    criterion, box.criterion = box.criterion, lambda *called: called
    weights = _weights(criterion)
    norms: dict[str, list[float]] = {}
    place: Place | None = None
    with experiment.threads(box.train_data_loader, *models_of(experiment, box)):
        box.pre_epoch_process(epoch=0)
        experiment.seed(1)
        for batch, targets, supplement in islice(batches(box.train_data_loader), count):
            box.pre_forward_process()
            with experiment.precision():
                modules, _, *called = box.forward_process(
                    experiment.place(batch), targets.to(experiment.device), supplement
                )
                values = _values(criterion, modules["student"], modules["teacher"], *called)
            tensors = _tensors(modules["student"])
            gradients = {name: found for name, value in values.items() if (found := _gradients(value, tensors))}
            place = place or _meeting(gradients, tensors, at)
            for name, found in gradients.items():
                norm = float(torch.linalg.vector_norm(found[place].double()))
                if not math.isfinite(norm):
                    raise FloatingPointError(f"balance: the gradient of {name} is {norm}; check that term and its data")
                norms.setdefault(name, []).append(norm)
    if place is None:
        raise ValueError("balance: expected a batch or more in an epoch, got none; use a smaller batch")
    return _table(weights, norms, place)


def _weights(criterion: Any) -> list[Weight]:
    """The weights of torchdistill's criterion, those of an `RKDDALoss` in place of its own."""
    found = []
    for name, (term, weight) in getattr(criterion, "term_dict", {}).items():
        inner = _parts(term)
        parts = [Weight(f"{name}.{part}", getattr(inner, part), weight) for part in PARTS] if inner else []
        found += parts or [Weight(f"{name}.weight", weight)]
    return found


def _parts(term: torch.nn.Module) -> losses.RKDDALoss | None:
    """The only `RKDDALoss` of a term; None if there is none or several."""
    found = [module for module in term.modules() if isinstance(module, losses.RKDDALoss)]
    return found[0] if len(found) == 1 else None


def _values(criterion: Any, *called: Any) -> dict[str, Tensor]:
    """Each term with a weight of 1, by the names of `_weights`."""
    values = {}
    for name, (term, _) in criterion.term_dict.items():
        inner = _parts(term)
        if inner is None:
            values[f"{name}.weight"] = term(*called)
            continue
        before = {part: getattr(inner, part) for part in PARTS}
        for part in PARTS:
            for other in PARTS:
                setattr(inner, other, float(other == part))
            values[f"{name}.{part}"] = term(*called)
        for part, value in before.items():
            setattr(inner, part, value)
    return values


def _tensors(student: Mapping[str, Mapping[str, Any]]) -> dict[Place, Tensor]:
    """What the hooks of the student kept and a gradient reaches."""
    return {
        Place(path, io): value
        for path, kinds in student.items()
        for io, value in kinds.items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }


def _gradients(value: Tensor, tensors: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    """The gradients of a term with respect to the tensors on which it depends."""
    if not isinstance(value, Tensor) or not value.requires_grad or not tensors:
        return {}
    found = torch.autograd.grad(value, list(tensors.values()), retain_graph=True, allow_unused=True)
    return {place: gradient for place, gradient in zip(tensors, found, strict=True) if gradient is not None}


def _meeting(gradients: Mapping[str, Mapping[Place, Tensor]], tensors: Mapping[Place, Tensor], at: str | None) -> Place:
    """The last hooked tensor on which all terms depend, or the output of the module ``at``."""
    if len(gradients) < 2:
        raise ValueError(
            f"balance: expected two terms or more with a gradient, got {', '.join(gradients) or 'none'}; a recipe has "
            "them under train.criterion.kwargs.sub_terms"
        )
    common = [place for place in tensors if all(place in found for found in gradients.values())]
    if at is not None:
        common = [place for place in common if place.path == at]
    if not common:
        reach = "; ".join(f"{name}: {', '.join(sorted({p.path for p in found}))}" for name, found in gradients.items())
        raise ValueError(
            f"balance: expected {'a module' if at is None else repr(at)} on which all terms depend, got only {reach}; "
            "list an earlier module in train.student.forward_hook.output, or name another with --at"
        )
    # Autograd numbers operations in the order in which they ran.
    return max(common, key=lambda place: tensors[place].grad_fn._sequence_nr())  # type: ignore[union-attr]


def _table(weights: list[Weight], norms: Mapping[str, list[float]], place: Place) -> str:
    means = {weight: statistics.fmean(norms[weight.name]) for weight in weights if weight.name in norms}
    sizes = {weight: abs(weight.outer * weight.value) * mean for weight, mean in means.items()}
    first = next((size for size in sizes.values() if size), None)
    if first is None:
        raise ValueError("balance: expected a weight and a gradient other than 0, got none; set a weight")
    rows = []
    for weight, mean in means.items():
        spread = abs(weight.outer * weight.value) * statistics.pstdev(norms[weight.name])
        scale = abs(weight.outer) * mean
        rows.append(
            [
                weight.name,
                f"{weight.value:.4g}",
                f"{sizes[weight]:.3g} +- {spread:.1g}",
                f"{sizes[weight] / first:.3g}",
                f"{first / scale:.3g}" if scale else "",
            ]
        )
    count = max(map(len, norms.values()))
    where = "the student's output" if place.path == "." else f"the {place.io} of {place.path!r}"
    return f"{markdown.table(HEADS, rows)}\n\ngradients with respect to {where}, mean and deviation of {count} batches"
