"""Checkpoints and results of a run: what it writes, and reads again. `weights` reads the files of any program."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rkd_plugin.experiments.running.tensor_files import describe, is_dict, listed, read_file, short
from rkd_plugin.experiments.running.weights import shape_of
from rkd_plugin.experiments.support.files import read_json
from rkd_plugin.printing import printable
from rkd_plugin.storage import replacing

# Examples of the values in these files, for `_unlike`.
EPOCH = {"epoch": 0, "loss": 0.0, "lr": 0.0, "seconds": 0.0}
# Of an epoch before its first step.
START: dict[str, Any] = {"steps": 0, "total": 0.0, "seconds": 0.0, "random": None}
STATE: dict[str, Any] = {
    "model": {},
    "trained": {},
    "optimizer": {"state": {}, "param_groups": []},
    "lr_scheduler": None,
    "steps": 0,
    "history": [],
}
RANDOM = {"python": (), "numpy": (), "torch": torch.get_rng_state()}
RESULT: dict[str, Any] = {
    "recipe": "",
    "task": "",
    "seed": 0,
    "final": {},
    "best": {"epoch": 0},
    "measured_on": "",
    "parameters": 0,
    "seconds": 0.0,
    "processes": 0,
    "environment": {},
    "history": [],
}


def trained_module(box: Any) -> nn.Module:
    """The module that the box trains: the student, or its wrapper of this stage."""
    model: nn.Module = box.student_model if hasattr(box, "student_model") else box.model
    return model


def checkpoint_of(student: nn.Module, box: Any, history: list[dict[str, Any]], part: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint after the epochs of ``history`` and a part of the next epoch."""
    trained = trained_module(box)
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


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, as a whole or not at all; the scripts of torchdistill find the model under its key."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def read_checkpoint(path: Path, *parts: str) -> dict[str, Any]:
    """Read tensors and plain values of a checkpoint; nothing in the file is executed.

    Args:
        path: of the file.
        parts: keys that it must have, such as ``"model"``.

    Raises:
        FileNotFoundError: if there is no file.
        DamagedError: if the file is truncated or changed.
        ValueError: if it cannot be read without running code, or lacks a part.
        MemoryError: if it does not fit into memory.
    """
    content: dict[str, Any] = read_file(path)
    if not is_dict(content) or any(part not in content for part in parts):
        raise ValueError(
            f"expected a checkpoint with {', '.join(parts) or 'its parts by name'} at {path}, got "
            f"{describe(content)}; give a file that `rkd run` wrote"
        )
    return content


def read_state(path: Path) -> dict[str, Any]:
    """Read the checkpoint of a run, and check the types of all its parts.

    Raises:
        FileNotFoundError: if there is no file.
        DamagedError: if the file is truncated or changed.
        ValueError: if it is not the checkpoint of a run, or was edited.
        MemoryError: if it does not fit into memory.
    """
    state = read_checkpoint(path, *STATE)
    state = {"gradients": {}, "part": START} | state
    wrong = _unlike(state, STATE | {"gradients": {}, "part": START, "history": [_epoch_like(state["history"])]})
    if not wrong and state["part"]["steps"]:
        wrong = _unlike(state["part"]["random"], [RANDOM], "part.random")
    if wrong:
        raise _edited(path, wrong)
    return state


def read_result(path: Path) -> dict[str, Any]:
    """Read ``result.json`` of a run.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not the result of a run, or was edited.
    """
    again = "delete that file, and the same `rkd run` writes it again from last.pt"
    try:
        result = read_json(path)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('; delete that file')}; {again}") from error
    epoch = _epoch_like(result.get("history"))
    metrics = {name: value for name, value in epoch.items() if name not in EPOCH}
    # Whatever else they hold is printed as a number as well.
    final, best = (
        dict.fromkeys(held if isinstance(held := result.get(when), dict) else (), 0.0) for when in ("final", "best")
    )
    example = {"history": [epoch], "final": final | metrics, "best": best | {"epoch": 0} | metrics}
    wrong = _unlike(result, RESULT | example) or (None if metrics else "expected an epoch in history, found none")
    if wrong:
        raise ValueError(f"{path}: {wrong}; {again}")
    return result


def read_measured(path: Path, described: Any, example: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read measurements that were saved before; None if they are missing, of something else, or edited.

    Args:
        path: of the JSON file.
        described: what was measured, which the file must have under ``"described"``.
        example: an example of its other parts.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return None if found.get("described") != described or _unlike(found, example) else found


def restore(box: Any, state: Mapping[str, Any], path: Path) -> None:
    """Restore optimizer, scheduler and accumulated gradients of a box from a checkpoint.

    Args:
        box: torchdistill's, in the stage of the checkpoint, with the weights of the checkpoint.
        state: from `read_state`.
        path: of the checkpoint, for the message.

    Raises:
        ValueError: if the state is of another optimizer or scheduler, or was edited.
    """
    parameters = dict(trained_module(box).named_parameters())
    for name, gradient in state["gradients"].items():
        if name not in parameters or shape_of(gradient) != shape_of(parameters[name]):
            raise _edited(path, f"gradients.{short(name)} belongs to no parameter")
        parameters[name].grad = gradient.to(parameters[name])
    optimizer, scheduler = state["optimizer"], state["lr_scheduler"]
    # Versions of PyTorch differ in flags, and in values whose names begin with _.
    groups = [
        {name: value for name, value in group.items() if not (value is None or isinstance(value, bool))}
        for group in box.optimizer.state_dict()["param_groups"]
    ]
    fresh = box.lr_scheduler.state_dict() if box.lr_scheduler is not None else {}
    due = {name: value for name, value in fresh.items() if name[0] != "_" or name in (scheduler or ())}
    if len(optimizer["param_groups"]) == len(groups):
        wrong = _unlike(optimizer["param_groups"], groups, "optimizer.param_groups", whole=False)
        wrong = wrong or (_unlike(scheduler, due, "lr_scheduler", whole=False) if fresh else None)
        if wrong:
            raise _edited(path, wrong)
    try:
        box.optimizer.load_state_dict(optimizer)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} holds the state of another optimizer than {path.with_name('recipe.yaml')} describes; delete the "
            "folder, or give the run another one with --out"
        ) from error
    if fresh:
        box.lr_scheduler.load_state_dict({name: scheduler[name] for name in due})


def _unlike(got: Any, example: Any, where: str = "", whole: bool = True) -> str | None:
    """The first place at which a value differs from an example in its type; None if there is none.

    The example 0 stands for whole numbers from 0 (for any number if ``whole`` is False), 0.0 for any number, None for
    anything. A list with one value stands for a list of any length of such values, an empty list for any list, and a
    dictionary for dictionaries that have its keys.

    Example:
        >>> _unlike({"history": [{"loss": 0.5}, {"loss": "NaN"}]}, {"history": [{"loss": 0.0}]})
        "expected a number for history.1.loss, got 'NaN'"
        >>> _unlike({"steps": 3, "more": None}, {"steps": 0})
    """
    kinds: list[tuple[Any, Any, str]] = [
        (Tensor, Tensor, "a tensor"),
        (bool, bool, "True or False"),
        (int, int, "a whole number from 0") if whole else (int, (int, float), "a number"),
        (float, (int, float), "a number"),
        (str, str, "a string"),
        (Mapping, dict, "a dictionary"),
        ((list, tuple), (list, tuple), "a list"),
    ]
    for kind, allowed, words in kinds:
        if isinstance(example, kind):
            is_negative = kind is allowed is int and isinstance(got, int) and got < 0
            is_wrong = not is_dict(got) if kind is Mapping else not isinstance(got, allowed)
            is_larger = kind is float and isinstance(got, int) and abs(got) > sys.float_info.max  # than any float
            if is_wrong or is_negative or is_larger or (isinstance(got, bool) and kind is not bool):
                return f"expected {words} for {short(where) or 'all of it'}, got {_value(got)}"
            break
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(example, Mapping):
        missing = [name for name in example if name not in got]
        if missing:
            return f"expected {listed(missing)} in {short(where) or 'it'}, found none"
        inner = example.items()
    elif isinstance(example, (list, tuple)) and example:
        inner = enumerate(example * len(got) if len(example) == 1 else example)
        if len(example) not in (1, len(got)):
            return f"expected {len(example)} values for {short(where)}, got {len(got)}"
    found = (_unlike(got[key], part, f"{where}.{key}".lstrip("."), whole) for key, part in inner)
    return next((words for words in found if words), None)


def _epoch_like(history: Any) -> dict[str, Any]:
    """An example of an epoch: all epochs have the metrics of the first one."""
    first = history[0] if isinstance(history, list) and history and isinstance(history[0], dict) else {}
    return dict.fromkeys(first, 0.0) | EPOCH


def _edited(path: Path, wrong: str) -> ValueError:
    return ValueError(
        f"{path}: {wrong}; the file was changed after `rkd run` wrote it: restore it, or copy best.pt to its place"
    )


def _value(value: Any) -> str:
    is_plain = value is None or isinstance(value, (str, int, float))
    return printable(reprlib.repr(value)) if is_plain else describe(value)
