"""Checkpoints and results: what a run writes and reads again, and weights that other programs saved.

Nothing in a file is executed: pickles are read with ``weights_only``, in which whatever is neither a tensor nor a plain
value becomes an `Unread`.
"""

from __future__ import annotations

import errno
import re
import reprlib
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from rkd_plugin.experiments.support.files import read_json
from rkd_plugin.experiments.support.printing import printable
from rkd_plugin.storage import replacing

SHOWN = 3  # names in a message
LONGEST = 80  # characters of a name in a message
ARCHIVE = b"PK\3\4"  # what PyTorch's files begin with
# Where programs keep the weights of a model: torchdistill and torchvision, Lightning and timm, PyTorch's tutorials,
# DeepSpeed, and further training scripts.
WEIGHTS = "model", "state_dict", "model_state_dict", "module", "net", "network", "weights"
# Parts of names that DataParallel, torch.compile, FSDP and activation checkpointing add.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
CUT, COPY = "it is cut or changed", "give a whole copy of it"
CONVERT = "where you trust the file, load it with its own program and keep torch.save(model.state_dict(), NEW)"

# By example, as `_unlike` compares.
EPOCH = {"epoch": 0, "loss": 0.0, "lr": 0.0, "seconds": 0.0}
START: dict[str, Any] = {"steps": 0, "total": 0.0, "seconds": 0.0, "random": None}  # of an epoch
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
    "parameters": 0,
    "seconds": 0.0,
    "processes": 0,
    "environment": {},
    "history": [],
}


class DamagedError(ValueError):
    """A checkpoint that was one, and is cut or changed."""


class Unread:
    """Replaces an object that is neither a tensor nor a plain value, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Unread:  # noqa: D102
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``path`` in one piece; torchdistill's scripts read the model in it, under the key they expect."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a model, whichever program saved them; nothing in the file is executed.

    The file is one of `rkd run`, one of torchdistill's ``save_ckpt``, or a ``state_dict``, alone or under one of the
    keys `WEIGHTS`, in PyTorch's format or in that of safetensors. What DataParallel, DistributedDataParallel, FSDP and
    ``torch.compile`` add to the names is removed.

    Args:
        path: of the file; ``~`` is the user's folder.

    Raises:
        FileNotFoundError: if there is none.
        DamagedError: if the file is cut or changed.
        ValueError: if it cannot be read without executing what it holds, or holds no weights.
        MemoryError: if it does not fit into memory.

    Example:
        >>> import argparse, tempfile
        >>> saved = {"model": torch.nn.DataParallel(torch.nn.Linear(2, 1)).state_dict(), "args": argparse.Namespace()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(saved, Path(folder, "a.pt"))
        ...     list(read_weights(Path(folder, "a.pt")))
        ['weight', 'bias']
    """
    content = _read(path)
    state = _state_in(content)
    if state is None:
        inner = [key for key in content if _state_in(content[key])] if isinstance(content, dict) else []
        remedy = f"keep the one that you mean: torch.save(torch.load(FILE)[{inner[0]!r}], NEW)" if inner else CONVERT
        raise ValueError(f"expected the weights of a model in {path}, got {_describe(content)}; {printable(remedy)}")
    size = path.expanduser().stat().st_size
    for name, value in state.items():
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.device.type != "cpu"):
            raise ValueError(
                f"expected dense weights in {path}, got {_short(name)} with {value.layout} on {value.device}; {CONVERT}"
            )
        # A view may repeat one number a billion times.
        if isinstance(value, Tensor) and value.numel() * value.element_size() > size:
            raise ValueError(
                f"expected weights that are stored in {path}, of {size} bytes, got {_short(name)} of shape "
                f"{tuple(value.shape)}; save its contiguous() copy"
            )
    return _renamed(state, {} if _collide(state) else {name: _bare(name) for name in state})


def read_checkpoint(path: Path, *parts: str) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint; nothing in it is executed.

    Args:
        path: of the file.
        parts: what it must hold, such as ``"model"``.

    Raises:
        FileNotFoundError: if there is none.
        DamagedError: if the file is cut or changed.
        ValueError: if it cannot be read without executing what it holds, or lacks a part.
        MemoryError: if it does not fit into memory.
    """
    content: dict[str, Any] = _read(path)
    if not _is_dict(content) or any(part not in content for part in parts):
        raise ValueError(
            f"expected a checkpoint with {', '.join(parts) or 'its parts by name'} at {path}, got "
            f"{_describe(content)}; give a file that `rkd run` wrote"
        )
    return content


def read_state(path: Path) -> dict[str, Any]:
    """The checkpoint of a run, with every part of the kind that `rkd run` writes.

    Raises:
        FileNotFoundError: if there is none.
        DamagedError: if the file is cut or changed.
        ValueError: if it is no checkpoint of a run, or was edited.
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
    """What ``result.json`` of a run holds.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no result of a run, or was edited.
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
    """What was measured before, None if that is missing, was described otherwise, or was edited: it is measured again.

    Args:
        path: of the JSON file.
        described: what it must hold under ``"described"``.
        example: of its other parts.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return None if found.get("described") != described or _unlike(found, example) else found


def restore(box: Any, state: Mapping[str, Any], path: Path) -> None:
    """Give optimizer, schedule and accumulated gradients of a box the state of a checkpoint.

    Args:
        box: of torchdistill, in the stage of the checkpoint, its models with the checkpoint's weights.
        state: as `read_state` gives it.
        path: of the checkpoint, for the message.

    Raises:
        ValueError: if the state is of another optimizer or schedule, or was edited.
    """
    trained = box.student_model if hasattr(box, "student_model") else box.model
    parameters = dict(trained.named_parameters())
    for name, gradient in state["gradients"].items():
        if name not in parameters or _shape(gradient) != _shape(parameters[name]):
            raise _edited(path, f"gradients.{_short(name)} is of no parameter")
        parameters[name].grad = gradient.to(parameters[name])
    optimizer, scheduler = state["optimizer"], state["lr_scheduler"]
    # Other versions of PyTorch have other switches, and more or fewer values whose names begin with _.
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


def load_weights(
    module: nn.Module, weights: Any, path: Path, source: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Load weights into a module, which they must fit in names, shapes and kind of number.

    Args:
        module: what they are loaded into.
        weights: its ``state_dict``, as `read_weights` gives it or as a checkpoint holds it.
        path: of that checkpoint, for the message.
        source: what describes the module, for the message, such as the path of a recipe.
        settings: by override, such as ``models.model.kwargs.embedding_dim``, the value that the module was built with,
            for the message.

    Raises:
        ValueError: if the weights are of another module: how many outputs both have, if only the last layer differs,
            else the first tensors that differ in name or shape; or if they are integers or complex numbers where the
            module has floating-point numbers.
    """
    expected = module.state_dict()
    given = weights if _is_dict(weights) else {}
    by_bare = {} if _collide(expected) else {_bare(name): name for name in expected}
    given = _renamed(given, {name: name if name in expected else by_bare.get(name, name) for name in given})
    for name, value in given.items():
        own = expected.get(name)
        if isinstance(own, Tensor) and isinstance(value, Tensor) and _numbers(own) != _numbers(value):
            raise ValueError(
                f"{path}: expected {_numbers(own)} for {_short(name)} of {type(module).__name__}, got {value.dtype}; "
                "give the weights in a type of the model's kind, such as before they were quantized"
            )
    try:
        module.load_state_dict(given)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # a line for each tensor
        got, wanted = ({name: _shape(value) for name, value in state.items()} for state in (given, expected))
        raise ValueError(
            f"{path} holds another model than {source} describes, {type(module).__name__}: "
            + (_difference(got, wanted, settings or {}) if got != wanted else printable(str(error), 4 * LONGEST))
        ) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the system raises, in one sentence; it says nothing about the file."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"expected to read {path}, got: {error.strerror or error}; try again") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        size = path.stat().st_size
        raise MemoryError(f"expected memory for {path}, of {size} bytes, got too little; end other programs") from error


def _read(path: Path) -> Any:
    """What is in the file, in PyTorch's format or in that of safetensors."""
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(
            f"expected a file of weights, got the folder {path}; give a file, which for a folder of "
            "torch.distributed.checkpoint `python -m torch.distributed.checkpoint.format_utils dcp_to_torch` writes"
        )
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none; train that model first")
    with _reading(path):
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _refused(path, CUT, COPY, DamagedError) from error


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        begin = file.read(4)
    others = {"argparse.Namespace"}  # torchdistill's; those of files before PyTorch 1.6 cannot be listed
    if begin in (ARCHIVE, b""):
        _check_archive(path)
        with suppress(Exception):  # what it cannot parse, torch.load refuses below
            others.update(get_unsafe_globals_in_checkpoint(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other kinds, which the error reports as well
            with safe_globals([(type(name, (Unread,), {}), name) for name in others]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # half a dozen kinds, in words that fill a page and advise to execute the file
        if "can't allocate memory" in str(error):
            raise
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        names = [named[1]] if named else sorted(others - {"argparse.Namespace"})
        found = f"it names {_first(names)}, which would be executed" if names else "it is of another kind"
        raise _refused(path, found, CONVERT) from error


def _check_archive(path: Path) -> None:
    """Refuse an archive that is damaged, a program, or larger than its file."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            is_program = any(record.filename.endswith("/constants.pkl") for record in records)
            is_packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
            # PyTorch writes a checksum beside each tensor, and looks at none when it reads.
            changed = None if is_program or is_packed else archive.testzip()
    except (OSError, MemoryError) as error:
        if getattr(error, "errno", None) != errno.EINVAL:
            raise
        changed = ""
    except Exception:  # what zipfile raises for a file that is no archive all through
        changed = ""
    if changed is not None:
        raise _refused(path, CUT, COPY, DamagedError)
    if is_program:
        raise _refused(
            path, "it is a program of TorchScript", "keep torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    # Records may also share their bytes.
    if is_packed or sum(record.file_size for record in records) > path.stat().st_size:
        raise _refused(path, "its records are compressed", "unpack it and save it again with torch.save")


def _refused(path: Path, found: str, remedy: str, kind: type[ValueError] = ValueError) -> ValueError:
    return kind(f"expected a checkpoint of tensors and plain values at {path}, could not read it, as {found}; {remedy}")


def _state_in(content: Any) -> dict[str, Any] | None:
    """The ``state_dict`` that a checkpoint is or holds, None if it holds none."""
    if not _is_dict(content) or not all(isinstance(name, str) for name in content):
        return None
    inner = next((state for key in WEIGHTS if (state := _state_in(content.get(key))) is not None), None)
    return content if inner is None and any(isinstance(value, Tensor) for value in content.values()) else inner


def _is_dict(content: Any) -> bool:
    """Whether it is a dictionary and works as one: a pickle may replace the methods of an `OrderedDict`."""
    return isinstance(content, dict) and getattr(content, "__dict__", {}).keys() <= {"_metadata"}


def _bare(name: str) -> str:
    """The name of a tensor in the model itself.

    Example:
        >>> _bare("module._orig_mod.layer1._fsdp_wrapped_module.0.weight")
        'layer1.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _collide(names: Iterable[str]) -> bool:
    """Whether two tensors would have the same bare name."""
    bare = [_bare(name) for name in names]
    return len(set(bare)) < len(bare)


def _renamed(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A ``state_dict`` of other names, with the versions of its modules, which `load_state_dict` looks at."""
    if all(names.get(name, name) == name for name in state):
        return state
    renamed = OrderedDict((names.get(name, name), value) for name, value in state.items())
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, dict):
        renamed._metadata = {_bare(str(name)): version for name, version in dict.items(versions)}  # type: ignore[attr-defined]
    return renamed


def _unlike(got: Any, example: Any, where: str = "", whole: bool = True) -> str | None:
    """How a value differs in kind from an example of it, at the first place where it does.

    0 is an example of the whole numbers from 0 on (of all numbers, if ``whole`` is False), 0.0 of all numbers, None of
    anything; a list of one value of any number of such values, an empty one of any list; a dictionary of those that
    have its names.

    Example:
        >>> _unlike({"history": [{"loss": 0.5}, {"loss": "NaN"}]}, {"history": [{"loss": 0.0}]})
        "expected a number for history.1.loss, got 'NaN'"
        >>> _unlike({"steps": 3, "more": None}, {"steps": 0})
    """
    kinds: list[tuple[Any, Any, str]] = [
        (Tensor, Tensor, "a tensor"),
        (bool, bool, "True or False"),
        (int, int, "a whole number from 0 on") if whole else (int, (int, float), "a number"),
        (float, (int, float), "a number"),
        (str, str, "a text"),
        (Mapping, dict, "a dictionary"),
        ((list, tuple), (list, tuple), "a list"),
    ]
    for kind, allowed, words in kinds:
        if isinstance(example, kind):
            is_negative = kind is allowed is int and isinstance(got, int) and got < 0
            is_wrong = not _is_dict(got) if kind is Mapping else not isinstance(got, allowed)
            is_larger = kind is float and isinstance(got, int) and abs(got) > sys.float_info.max  # than any float
            if is_wrong or is_negative or is_larger or (isinstance(got, bool) and kind is not bool):
                return f"expected {words} for {_short(where) or 'all of it'}, got {_value(got)}"
            break
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(example, Mapping):
        missing = [name for name in example if name not in got]
        if missing:
            return f"expected {_first(missing)} in {_short(where) or 'it'}, found none"
        inner = example.items()
    elif isinstance(example, (list, tuple)) and example:
        inner = enumerate(example * len(got) if len(example) == 1 else example)
        if len(example) not in (1, len(got)):
            return f"expected {len(example)} values for {_short(where)}, got {len(got)}"
    found = (_unlike(got[key], part, f"{where}.{key}".lstrip("."), whole) for key, part in inner)
    return next((words for words in found if words), None)


def _epoch_like(history: Any) -> dict[str, Any]:
    """The example of an epoch: what the first one measured, all of them did."""
    first = history[0] if isinstance(history, list) and history and isinstance(history[0], dict) else {}
    return dict.fromkeys(first, 0.0) | EPOCH


def _edited(path: Path, wrong: str) -> ValueError:
    return ValueError(
        f"{path}: {wrong}; the file was changed since `rkd run` wrote it: restore it, or copy best.pt to its place"
    )


def _difference(got: dict[str, Any], wanted: dict[str, Any], settings: Mapping[str, Any]) -> str:
    """Of two models, by the shapes of their tensors, and what to do."""
    missing, unknown = [name for name in wanted if name not in got], [name for name in got if name not in wanted]
    reshaped = [name for name in wanted if name in got and got[name] != wanted[name]]
    overrides = [] if missing or unknown else _overrides([(got[name], wanted[name]) for name in reshaped], settings)
    remedy = f"give {' or '.join(overrides)}" if overrides else ""
    last = next(reversed(wanted), "").rpartition(".")[0]
    is_width = [
        name.startswith(f"{last}.") and len(got[name]) == len(wanted[name]) > 0 and got[name][1:] == wanted[name][1:]
        for name in reshaped
    ]
    if reshaped and not missing and not unknown and all(is_width):
        count, due = got[reshaped[0]][0], wanted[reshaped[0]][0]
        return (
            f"its last layer, {last}, has {count} outputs, where {due} were expected; "
            f"{remedy or f'set num_classes (or the width of the embedding) to {count}'}, or give a checkpoint of {due}"
        )
    shapes = [f"{_short(name)} is {got[name]} instead of {wanted[name]}" for name in reshaped]
    found = {"it lacks ": missing, "it has also ": unknown, "": shapes}
    differences = "; ".join(f"{what}{_first(which)}" for what, which in found.items() if which)
    return f"{differences}; {remedy or 'give the checkpoint of that model'}, or change the recipe's model"


def _overrides(shapes: Sequence[tuple[Any, Any]], settings: Mapping[str, Any]) -> list[str]:
    """The settings that would scale the wanted shapes to those that were got."""
    if any(isinstance(got, str) or len(got) != len(wanted) for got, wanted in shapes):
        return []
    pairs = {pair for shape in shapes for pair in zip(*shape, strict=True) if pair[0] != pair[1]}
    found = []
    for name, value in settings.items():
        if isinstance(value, int) and not isinstance(value, bool) and any(due == value for _, due in pairs):
            scaled = {Fraction(value * count, due) for count, due in pairs}
            if len(scaled) == 1 and (only := scaled.pop()).denominator == 1:
                found.append(f"{name}={only}")
    return found


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _numbers(value: Tensor) -> str:
    """The kind of a tensor's numbers, between which loading would convert without a word."""
    if value.is_quantized:
        return "quantized numbers"
    return (
        "floating-point numbers"
        if value.is_floating_point()
        else "complex numbers"
        if value.is_complex()
        else "integers"
    )


def _value(value: Any) -> str:
    is_plain = value is None or isinstance(value, (str, int, float))
    return printable(reprlib.repr(value)) if is_plain else _describe(value)


def _describe(content: Any) -> str:
    """What a file holds, in short."""
    if isinstance(content, Unread):
        return f"an object of {printable(type(content).__name__, LONGEST)}"
    if not isinstance(content, dict):
        return type(content).__name__
    names = [
        f"{name} ({_describe(value)})" if isinstance(value, Unread) else name for name, value in dict.items(content)
    ]
    return _first(names, "nothing")


def _short(name: str) -> str:
    return printable(name, LONGEST)


def _first(names: Sequence[Any], none: str = "") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(_short(str(name)) for name in names[:SHOWN]) or none) + more
