"""Recipes with a teacher bank: what their losses read of the teacher, and what does not fit the bank."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rkd_plugin.experiments.recipe.errors import Problem
from rkd_plugin.experiments.recipe.module_paths import loss_paths
from rkd_plugin.experiments.recipe.schema import has_teacher, mapping, stages
from rkd_plugin.teacher_bank import Bank

SETTING = "recipe.teacher_bank"
_REBUILT = (
    "sequential",
    "auxiliary_model_wrapper",
    "adaptations",
)  # keys of train.teacher that add modules to the network


def teacher_reads(data: Mapping[Any, Any]) -> dict[tuple[str, str], set[str | None]]:
    """(Module path, ``"input"`` or ``"output"``) of the teacher that the losses of a recipe read -> their pools."""
    found: dict[tuple[str, str], set[str | None]] = {}
    for path, stage in stages(data).items():
        for read in loss_paths(stage, path):
            if read.side == "teacher" and isinstance(read.path, str) and isinstance(read.io, str):
                found.setdefault((read.path, read.io), set()).add(read.pool)
    return found


def problems(data: Mapping[Any, Any]) -> Iterator[Problem]:
    """Problems of a recipe with the bank that it names, of which only the header is read."""
    path = mapping(data.get("recipe")).get("teacher_bank")
    if not isinstance(path, str):
        return
    if not has_teacher(data):
        yield SETTING, "expected a teacher that it replaces, found none; add `models.teacher_model`"
        return
    try:
        bank = Bank(path)
    except (OSError, ValueError) as error:
        yield SETTING, str(error)
    else:
        yield from ((SETTING, f"the teacher bank {path} {words}") for words in _misfits(bank, data))
    for place, stage in stages(data).items():
        loader = mapping(stage.get("train_data_loader"))
        wrapper = mapping(loader.get("dataset_wrapper")).get("key", "WholeBatches")
        if wrapper != "WholeBatches":
            yield (
                f"{place}.train_data_loader.dataset_wrapper",
                f"expected none with a teacher bank, got {wrapper}; leave it out",
            )
        if loader.get("collate_fn"):
            message = "expected none with a teacher bank, as it could change the images of the teacher; leave it out"
            yield f"{place}.train_data_loader.collate_fn", message


def rebuilt(data: Mapping[Any, Any]) -> list[str]:
    """YAML paths at which a recipe adds modules to the network of its teacher."""
    return [
        f"{path}.teacher.{name}"
        for path, stage in stages(data).items()
        for name in _REBUILT
        if mapping(stage.get("teacher")).get(name)
    ]


def _misfits(bank: Bank, data: Mapping[Any, Any]) -> Iterator[str]:
    reads = teacher_reads(data)
    if bank.arrays is None:
        if len(reads) != 1:
            yield f"is one array, but the losses read {_names(reads)} of the teacher; write a bank with `rkd embed`"
        return
    held, own = bank.header["teacher"]["model"], identity(mapping(data["models"]["teacher_model"]))
    if held != own:
        differing = "; ".join(_differences(held, own, "models.teacher_model"))
        yield f"is of another teacher: {differing}; write one of this teacher with `rkd embed`"
    pooled = {(array.path, array.io): array.pool for array in bank.arrays}
    # Vectors are not pooled, whatever pool a loss has; and 'auto' is 'avg' unless it raises.
    missing = [
        read
        for read, pools in reads.items()
        if read not in pooled
        or (pooled[read] and {"avg" if pool == "auto" else pool for pool in pools} != {pooled[read]})
    ]
    if missing:
        yield f"lacks what the losses read of the teacher, {_names(missing)}; write one with `rkd embed`"


def _differences(held: Any, own: Any, path: str) -> Iterator[str]:
    """The differences between two descriptions of a network."""
    if isinstance(held, dict) and isinstance(own, dict):
        for key in {**held, **own}:
            yield from _differences(held.get(key), own.get(key), f"{path}.{key}")
    elif held != own:
        yield f"{path} was {held!r} and is {own!r}"


def _names(reads: Any) -> str:
    return ", ".join(f"the {io} of {path!r}" for path, io in reads) or "nothing"


def identity(model: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a network in a recipe, as JSON can contain it."""
    known = {"key": model.get("key"), "kwargs": model.get("kwargs"), "repo_or_dir": model.get("repo_or_dir")}
    identified: dict[str, Any] = json.loads(json.dumps(known, sort_keys=True, default=repr))
    return identified
