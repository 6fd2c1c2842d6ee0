"""The weights of a model: read from a file of any program, and loaded into a module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rkd_plugin import distributed
from rkd_plugin.experiments.recipe import configs_root
from rkd_plugin.experiments.running.tensor_files import CONVERT, LONGEST, describe, is_dict, listed, read_file, short
from rkd_plugin.printing import printable, report

# Keys under which programs save the weights of a model: torchdistill and torchvision, Lightning and timm, the tutorials
# of PyTorch, DeepSpeed, and other training scripts.
WEIGHTS = "model", "state_dict", "model_state_dict", "module", "net", "network", "weights"
# Parts that DataParallel, torch.compile, FSDP and activation checkpointing add to names.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of a model that any program saved; nothing in the file is executed.

    The file is a checkpoint of `rkd run` or of torchdistill's ``save_ckpt``, or a ``state_dict``, alone or under one of
    the keys `WEIGHTS`, in the format of PyTorch or of safetensors. What DataParallel, DistributedDataParallel, FSDP and
    ``torch.compile`` add to the names is removed.

    Args:
        path: of the file; ``~`` is the home folder of the user.

    Returns:
        A ``state_dict``.

    Raises:
        FileNotFoundError: if there is no file.
        DamagedError: if the file is truncated or changed.
        ValueError: if it cannot be read without running code, or holds no weights.
        MemoryError: if it does not fit into memory.

    Example:
        >>> import argparse, tempfile
        >>> saved = {"model": torch.nn.DataParallel(torch.nn.Linear(2, 1)).state_dict(), "args": argparse.Namespace()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(saved, Path(folder, "a.pt"))
        ...     list(read_weights(Path(folder, "a.pt")))
        ['weight', 'bias']
    """
    content = read_file(path)
    state = _state_in(content)
    if state is None:
        inner = [key for key in content if _state_in(content[key])] if isinstance(content, dict) else []
        remedy = f"save one of them: torch.save(torch.load(FILE)[{inner[0]!r}], NEW)" if inner else CONVERT
        raise ValueError(f"expected the weights of a model in {path}, got {describe(content)}; {printable(remedy)}")
    size = path.expanduser().stat().st_size
    for name, value in state.items():
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.device.type != "cpu"):
            raise ValueError(
                f"expected dense weights in {path}, got {short(name)} with {value.layout} on {value.device}; {CONVERT}"
            )
        # A view can repeat one number a billion times.
        if isinstance(value, Tensor) and value.numel() * value.element_size() > size:
            raise ValueError(
                f"expected weights that are stored in {path}, of {size} bytes, got {short(name)} of shape "
                f"{tuple(value.shape)}; save its contiguous() copy"
            )
    return _renamed(state, {} if _collide(state) else {name: _plain_name(name) for name in state})


def read_named_weights(path: Path, option: str) -> dict[str, Any]:
    """`read_weights` of a file that a recipe or an option names; if it is missing, the error names the command to run.

    Args:
        path: of the file.
        option: the part of a command line that names the file, for the message.
    """
    try:
        return read_weights(path)
    except FileNotFoundError as error:
        folder, root = path.parent, configs_root()
        recipes = [file for file in root.rglob(f"{folder.name}.yaml") if file.parent.name == folder.parent.name]
        recipe = recipes[0].relative_to(root).with_suffix("").as_posix() if recipes else "RECIPE"
        is_default = recipes and folder == Path("runs", folder.parent.name, folder.name)
        command = f"rkd run {recipe}" if is_default else f"rkd run {recipe} --out {folder}"
        # `rkd reproduce` names folders after row and seed.
        others = sorted(folder.parent.glob(f"{folder.name}-seed*/{path.name}"))
        instead = f", or give {option}{others[0]}, which exists" if others else ""
        raise FileNotFoundError(
            f"expected a checkpoint at {path}, found none; train that model first with `{command}`{instead}"
        ) from error


def load_weights(
    module: nn.Module, weights: Any, path: Path, source: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Load weights into a module with the same names, shapes and kinds of numbers.

    If the names fit the module only without a prefix, such as the ``model.`` of PyTorch Lightning, the weights with
    this prefix are loaded, and a sentence about it is printed.

    Args:
        module: the module that gets the weights.
        weights: a ``state_dict``, from `read_weights` or from a checkpoint.
        path: of the file of the weights, for the message.
        source: what describes the module, such as the path of a recipe, for the message.
        settings: override such as ``models.model.kwargs.embedding_dim`` -> the value with which the module was built,
            for the message.

    Raises:
        ValueError: if the weights are of another module (the message has the numbers of outputs if only the last layer
            differs, otherwise the first tensors that differ), are integers or complex numbers where the module has
            floating-point numbers, or fit with several prefixes.
    """
    expected = module.state_dict()
    by_plain_name = {} if _collide(expected) else {_plain_name(name): name for name in expected}
    given = _without_prefix(weights if is_dict(weights) else {}, by_plain_name or expected, path)
    given = _renamed(given, {name: name if name in expected else by_plain_name.get(name, name) for name in given})
    for name, value in given.items():
        own = expected.get(name)
        if isinstance(own, Tensor) and isinstance(value, Tensor) and _numbers(own) != _numbers(value):
            raise ValueError(
                f"{path}: expected {_numbers(own)} for {short(name)} of {type(module).__name__}, got {value.dtype}; "
                "give weights of the model's kind, such as those before quantization"
            )
    try:
        module.load_state_dict(given)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # with a line for each tensor
        got, wanted = ({name: shape_of(value) for name, value in state.items()} for state in (given, expected))
        raise ValueError(
            f"{path} holds another model than {source} describes, {type(module).__name__}: "
            + (_difference(got, wanted, settings or {}) if got != wanted else printable(str(error), 4 * LONGEST))
        ) from error


def _state_in(content: Any) -> dict[str, Any] | None:
    """The ``state_dict`` that a checkpoint is or contains, None if there is none."""
    if not is_dict(content) or not all(isinstance(name, str) for name in content):
        return None
    inner = next((state for key in WEIGHTS if (state := _state_in(content.get(key))) is not None), None)
    return content if inner is None and any(isinstance(value, Tensor) for value in content.values()) else inner


def _plain_name(name: str) -> str:
    """The name of a tensor in the model without wrappers.

    Example:
        >>> _plain_name("module._orig_mod.layer1._fsdp_wrapped_module.0.weight")
        'layer1.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _collide(names: Iterable[str]) -> bool:
    """Whether two tensors have the same plain name."""
    plain = [_plain_name(name) for name in names]
    return len(set(plain)) < len(plain)


def _without_prefix(state: dict[str, Any], expected: Iterable[str], path: Path) -> dict[str, Any]:
    """The weights under the only prefix without which their names are the expected ones; all if there is none."""
    names = set(expected)
    first = min(names, default="")
    if not names.isdisjoint(state):
        return state
    prefixes = [name.removesuffix(first) for name in state if name.endswith(f".{first}")]
    fitting = [
        prefix
        for prefix in prefixes
        if all(prefix + name in state for name in names)
        and len(names) == sum(name.startswith(prefix) for name in state)
    ]
    if len(fitting) > 1:
        raise ValueError(
            f"{path}: expected one prefix without which the names fit, got {listed(fitting)}; save one part: "
            f"torch.save({{name.removeprefix(P): w for name, w in state_dict.items() if name.startswith(P)}}, NEW)"
        )
    if not fitting:
        return state
    (prefix,) = fitting
    if distributed.rank() == 0:
        left = f", and leaving out {len(state) - len(names)} others" if len(state) > len(names) else ""
        report(f"{path}: reading the weights with the prefix {short(prefix)!r}, which is removed{left}")
    return _renamed(state, {prefix + name: name for name in names}, prefix)


def _renamed(state: dict[str, Any], names: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """A ``state_dict`` with other names; it keeps the versions of its modules, which `load_state_dict` reads.

    Args:
        state: the ``state_dict``.
        names: name -> new name.
        prefix: what has another prefix is left out.
    """
    if all(names.get(name, name) == name for name in state):
        return state
    renamed = OrderedDict((names.get(name, name), value) for name, value in state.items() if name.startswith(prefix))
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, dict):
        plain = {f"{_plain_name(str(name))}.": version for name, version in dict.items(versions)}
        renamed._metadata = {name.removeprefix(prefix)[:-1]: version for name, version in plain.items()}  # type: ignore[attr-defined]
    return renamed


def _difference(got: dict[str, Any], wanted: dict[str, Any], settings: Mapping[str, Any]) -> str:
    """The difference between two models, given the shapes of their tensors, and what to do."""
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
            f"its last layer, {last}, has {count} outputs instead of {due}; "
            f"{remedy or f'set num_classes (or the width of the embedding) to {count}'}, or use a checkpoint of {due}"
        )
    shapes = [f"{short(name)} is {got[name]} instead of {wanted[name]}" for name in reshaped]
    found = {"it lacks ": missing, "it has in addition ": unknown, "": shapes}
    differences = "; ".join(f"{what}{listed(which)}" for what, which in found.items() if which)
    return f"{differences}; {remedy or 'give the checkpoint of that model'}, or change the recipe's model"


def _overrides(shapes: Sequence[tuple[Any, Any]], settings: Mapping[str, Any]) -> list[str]:
    """Overrides of the settings with which the model would have the shapes of the checkpoint."""
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


def shape_of(value: Any) -> Any:
    """The shape of a tensor; of anything else the name of its type."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _numbers(value: Tensor) -> str:
    """The kind of a tensor's numbers; loading converts silently between kinds."""
    if value.is_quantized:
        return "quantized numbers"
    return (
        "floating-point numbers"
        if value.is_floating_point()
        else "complex numbers"
        if value.is_complex()
        else "integers"
    )
