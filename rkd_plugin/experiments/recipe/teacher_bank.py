"""A recipe that learns from a teacher bank: what it reads of its teacher, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rkd_plugin.experiments.recipe.errors import Problem
from rkd_plugin.experiments.recipe.module_paths import loss_paths
from rkd_plugin.experiments.recipe.schema import has_teacher, mapping, stages
from rkd_plugin.teacher_bank import Bank

SETTING = "recipe.teacher_bank"
_REBUILT = ("sequential", "auxiliary_model_wrapper", "adaptations")  # of train.teacher: modules that it lacks itself


def teacher_reads(data: Mapping[Any, Any]) -> dict[tuple[str, str], set[str | None]]:
    """What the losses of a recipe read of its teacher, module and ``"input"`` or ``"output"``, and how they pool it."""
    found: dict[tuple[str, str], set[str | None]] = {}
    for path, stage in stages(data).items():
        for read in loss_paths(stage, path):
            if read.side == "teacher" and isinstance(read.path, str) and isinstance(read.io, str):
                found.setdefault((read.path, read.io), set()).add(read.pool)
    return found


def problems(data: Mapping[Any, Any]) -> Iterator[Problem]:
    """What keeps a recipe from learning from the bank that it names; of the bank only the header is read."""
    path = mapping(data.get("recipe")).get("teacher_bank")
    if not isinstance(path, str):
        return
    if not has_teacher(data):
        yield SETTING, "there is no teacher that it could replace: `models.teacher_model` is missing"
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
            yield f"{place}.train_data_loader.dataset_wrapper", f"with a teacher bank there can be no {wrapper}"
        if loader.get("collate_fn"):
            message = "with a teacher bank there can be none, as it could change what the teacher saw"
            yield f"{place}.train_data_loader.collate_fn", message


def rebuilt(data: Mapping[Any, Any]) -> list[str]:
    """Places where a recipe gives its teacher modules that the network lacks."""
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
    # What was a vector is not pooled, however a loss would do it; and 'auto' is 'avg' wherever it does not raise.
    missing = [
        read
        for read, pools in reads.items()
        if read not in pooled
        or (pooled[read] and {"avg" if pool == "auto" else pool for pool in pools} != {pooled[read]})
    ]
    if missing:
        yield f"lacks what the losses read of the teacher, {_names(missing)}; write one with `rkd embed`"


def _differences(held: Any, own: Any, path: str) -> Iterator[str]:
    """Where two descriptions of a network differ."""
    if isinstance(held, dict) and isinstance(own, dict):
        for key in {**held, **own}:
            yield from _differences(held.get(key), own.get(key), f"{path}.{key}")
    elif held != own:
        yield f"{path} was {held!r} and is {own!r}"


def _names(reads: Any) -> str:
    return ", ".join(f"the {io} of {path!r}" for path, io in reads) or "nothing"


def identity(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of a network itself, as JSON holds it."""
    known = {"key": model.get("key"), "kwargs": model.get("kwargs"), "repo_or_dir": model.get("repo_or_dir")}
    identified: dict[str, Any] = json.loads(json.dumps(known, sort_keys=True, default=repr))
    return identified
