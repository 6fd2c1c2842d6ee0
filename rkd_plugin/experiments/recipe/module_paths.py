"""Checks of module paths: that models have the modules, and that hooks keep what losses read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rkd_plugin.experiments.recipe.building import built_model
from rkd_plugin.experiments.recipe.errors import suggest
from rkd_plugin.experiments.recipe.schema import has_teacher, mapping, mid_level_losses, stages
from rkd_plugin.experiments.recipe.signatures import arguments
from rkd_plugin.experiments.recipe.specs import Walk

_SIDED = re.compile(r"(student|teacher)_.*path")
# Losses of torchdistill that take axis 1 for the channels, without a check.
_ON_MAPS = {"AffinityLoss", "ATLoss", "ChSimLoss", "FSPLoss"}


def check_module_paths(walk: Walk) -> None:
    """Report module paths that a model does not have, and losses that read what no hook keeps."""
    teacher, student = (built_model(walk, name) for name in ("teacher_model", "student_model"))
    if student is None and "student_model" not in mapping(walk.data.get("models")):
        student = built_model(walk, "model")
    for path, stage in stages(walk.data).items():
        if has_teacher(walk.data):
            sides = {"teacher": ("teacher", teacher), "student": ("student", student)}
        else:
            sides = {"student": ("model", student)}
        for name, model in sides.values():
            _check_side(walk, mapping(stage.get(name)), f"{path}.{name}", model)
        reads = list(loss_paths(stage, path))
        for place, side, module_path, io, _ in reads:
            if side not in sides:
                walk.report(place, "expected a teacher, found none; add `models.teacher_model`")
                continue
            name = sides[side][0]
            _check_hooked(walk, place, module_path, io, mapping(stage.get(name)), f"{path}.{name}")
        for side, (name, model) in sides.items():
            config = mapping(stage.get(name))
            # Wrappers and `sequential` add modules, or rename them.
            if model is not None and not config.get("auxiliary_model_wrapper") and not config.get("sequential"):
                _check_pools(walk, model, [read for read in reads if read.side == side])
        for place, group in _mappings(mapping(stage.get("optimizer")), f"{path}.optimizer"):
            if "module" in group:
                name, model = sides["teacher" if group.get("is_teacher") and "teacher" in sides else "student"]
                # A wrapper adds modules that are unknown here.
                has_wrapper = bool(mapping(stage.get(name)).get("auxiliary_model_wrapper"))
                _check_path(walk, f"{place}.module", group["module"], None if has_wrapper else model)


def _mappings(value: Any, path: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All mappings in a value, with their paths."""
    if isinstance(value, dict):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _mappings(item, f"{path}.{key}")


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    for index, item in enumerate(value if isinstance(value, list) else ()):
        if isinstance(item, str):
            yield f"{path}.{index}", item


def _check_side(walk: Walk, config: Mapping[Any, Any], path: str, model: nn.Module | None) -> None:
    wrapper = mapping(config.get("auxiliary_model_wrapper"))
    added = {name.removeprefix("+") for _, name in _texts(config.get("sequential"), "")}
    # A wrapper adds modules that are unknown here.
    tree = None if wrapper else model
    hooks = mapping(config.get("forward_hook"))
    for io in ("input", "output"):
        for place, name in _texts(hooks.get(io), f"{path}.forward_hook.{io}"):
            if name.startswith("+"):
                if not any(name[1:] == item or item.startswith(f"{name[1:]}.") for item in added) and not wrapper:
                    walk.report(place, f"{name[1:]!r} is not in {path}.sequential")
            else:
                _check_path(walk, place, name, tree)
    for owner, place in ((config, path), (wrapper, f"{path}.auxiliary_model_wrapper")):
        for inner, name in _texts(owner.get("sequential"), f"{place}.sequential"):
            if not name.startswith("+"):
                _check_path(walk, inner, name, model if owner is wrapper else tree)
            elif name[1:] not in mapping(owner.get("adaptations")):
                walk.report(inner, f"{name[1:]!r} is not in {place}.adaptations")
        for inner, name in _texts(owner.get("frozen_modules"), f"{place}.frozen_modules"):
            kind = re.fullmatch(r"instance\((.*)\)", name)
            if kind and not hasattr(nn, kind[1]):
                walk.report(inner, f"torch.nn has no {kind[1]!r}{suggest(kind[1], dir(nn))}")
            elif not kind and name not in added:
                _check_path(walk, inner, name, model if owner is wrapper else tree)


def _check_path(walk: Walk, place: str, name: Any, model: nn.Module | None) -> None:
    if model is None or not isinstance(name, str) or _reaches(model, name):
        return
    known = [module for module, _ in model.named_modules() if module]
    walk.report(place, f"{type(model).__name__} has no module {name!r}{suggest(name, known)}")


def _reaches(module: Any, path: str) -> bool:
    """Whether torchdistill's ``get_module`` finds a path: by attribute, in containers also by a negative index."""
    for name in path.split("."):
        if hasattr(module, name):
            module = getattr(module, name)
        elif isinstance(module, nn.Sequential | nn.ModuleList) and re.fullmatch(r"-?\d{1,9}", name):
            if not -len(module) <= int(name) < len(module):
                return False
            module = module[int(name)]
        else:
            return False
    return True


class Read(NamedTuple):
    """What a loss reads: its place in the recipe, the side, the module path, input or output, and the pooling.

    ``pool`` is ``"map"`` for a loss that needs ``(N, C, H, W)``, and None for other losses that do not pool.
    """

    place: str
    side: str
    path: Any
    io: Any
    pool: Any = None


def loss_paths(stage: Mapping[Any, Any], path: str) -> Iterator[Read]:
    """All inputs and outputs of modules that the losses of a stage read."""
    terms = mapping(mapping(mapping(stage.get("criterion")).get("kwargs")).get("sub_terms"))
    for name, term in terms.items():
        yield from _term_paths(mapping(term), f"{path}.criterion.kwargs.sub_terms.{name}")


def _term_paths(term: Mapping[Any, Any], place: str) -> Iterator[Read]:
    criterion, wrapper = mapping(term.get("criterion")), mapping(term.get("criterion_wrapper"))
    if wrapper:
        yield from _wrapper_paths(mapping(wrapper.get("kwargs")), f"{place}.criterion_wrapper.kwargs")
        return
    kwargs, place = mapping(criterion.get("kwargs")), f"{place}.criterion.kwargs"
    loss = mid_level_losses().get(str(criterion.get("key")))
    known = arguments(loss).named if loss else {}
    default_pool = known["pool"].default if "pool" in known else None
    pool = kwargs.get("pool", default_pool) if "pool" in known else None
    pool = "map" if str(criterion.get("key")) in _ON_MAPS else pool

    def pool_of(side: str) -> Any:
        return pool.get(side, default_pool) if isinstance(pool, dict) else pool

    for key in sorted({*kwargs, *known}, key=str):
        if not (match := _SIDED.fullmatch(str(key))):
            continue
        io = str(key).removesuffix("path") + "io"
        default_io = known[io].default if io in known and not known[io].required else "output"
        if key in kwargs:
            yield Read(f"{place}.{key}", match[1], kwargs[key], kwargs.get(io, default_io), pool_of(match[1]))
        elif not known[key].required and known[key].default is None:
            yield Read(f"{place}.{key}", match[1], None, "output", pool_of(match[1]))
    yield from _pair_paths(kwargs, place, pool)
    if "criterion" in kwargs:  # a loss that wraps another one
        yield from _term_paths(kwargs, place)


def _wrapper_paths(kwargs: Mapping[Any, Any], path: str) -> Iterator[Read]:
    for name in ("input", "target"):
        config = mapping(kwargs.get(name))
        if "module_path" in config or name == "input":
            side = "teacher" if config.get("is_from_teacher") else "student"
            yield Read(f"{path}.{name}.module_path", side, config.get("module_path"), config.get("io"))


def _pair_paths(kwargs: Mapping[Any, Any], path: str, pool: Any) -> Iterator[Read]:
    """Pairs such as ``{student: {path: layer1, io: output}, teacher: {...}}`` at any depth."""
    for place, config in _mappings(kwargs, path):
        side = re.match(r"student|teacher", place.rpartition(".")[2])
        if side and "path" in config and "io" in config:
            yield Read(f"{place}.path", side[0], config["path"], config["io"], pool)


def _check_hooked(walk: Walk, place: str, module_path: Any, io: Any, side: Mapping[Any, Any], path: str) -> None:
    if module_path is None:
        walk.report(place, "required: '.' for the output of the whole model, or the path of a hooked module")
    if not isinstance(module_path, str) or io not in ("input", "output") or "auxiliary_model_wrapper" in side:
        return
    hooked = [name for _, name in _texts(mapping(side.get("forward_hook")).get(io), "")]
    if module_path not in hooked and (module_path, io) != (".", "output"):
        walk.report(place, f"the {io} of {module_path!r} is not kept; list it in {path}.forward_hook.{io}")


def _check_pools(walk: Walk, model: nn.Module, reads: list[Read]) -> None:
    """Report pools and losses that do not fit the outputs of the modules, by one forward pass on the meta device."""
    pooled = [
        read
        for read in reads
        if isinstance(read.pool, str)
        and isinstance(read.path, str)
        and read.io in ("input", "output")
        and (read.path == "." or _reaches(model, read.path))
    ]
    if not pooled:
        return
    # The adapter loads pytorch-metric-learning, which a recipe without such losses does not need.
    from rkd_plugin.adapters.torchdistill import is_channels_last, pooling, reading

    values: Mapping[tuple[str, str], Any] = {}
    for image in _images(model):
        try:
            with torch.no_grad(), torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with reading(model.eval(), {(read.path, read.io) for read in pooled}) as values:
                    model(image)
        except Exception:  # the model needs another size or input, or its computation depends on values
            continue
        break
    for read in pooled:
        where = f"the {read.io} of the {read.side}'s {read.path!r}"
        if (read.path, read.io) not in values:
            walk.skip(read.place, f"the shape of {where}, as the model does not run on images of usual sizes")
            continue
        value = values[read.path, read.io]
        if not isinstance(value, Tensor):
            walk.report(read.place, f"{where}: expected one tensor, got {type(value).__name__}; name another module")
            continue
        last = is_channels_last(value.shape) if value.ndim > 3 else _normalizes(model, value.shape[-1])
        if read.pool == "map":
            if last or value.ndim < 3:
                found = f"{tuple(value.shape)}{', whose channels are last' * (value.ndim > 2)}"
                walk.report(read.place, f"{where}: expected a map (N, C, H, W), got {found}; name another module")
            continue
        try:
            name = pooling(value, read.pool)
        except KeyError:  # an unknown pool, which the check of arguments reports
            continue
        except ValueError as error:
            walk.report(read.place, f"{where}: {error}")
            continue
        if read.pool == "auto" and name == "avg" and value[0, 0].numel() > 1:
            walk.note(
                read.place,
                f"{where} is a map {tuple(value.shape)}, which is averaged over its positions; "
                "torchdistill's RKDLoss flattens it; set pool to 'avg' or 'flatten'",
            )
        # The images are square, and so are the maps.
        first = value.ndim > 3 and value.shape[-1] == value.shape[-2] != value.shape[1]
        if (name == "avg" and last) or (name == "avg_channels_last" and first):
            others = (
                {True: "'avg_channels_last'", False: "'mean', 'cls' or 'last'"}[value.ndim > 3] if last else "'avg'"
            )
            walk.report(
                read.place,
                f"{where}: expected channels in {'axis 1' if last else 'the last axis'} for pool {name!r}, got "
                f"{tuple(value.shape)}, whose channels are {'last' if last else 'axis 1'}; set pool to {others}",
            )


def _images(model: nn.Module) -> Iterator[Tensor]:
    """Batches of two images on the meta device, of sizes that a model is likely to take."""
    channels = next((weight.shape[1] for weight in model.parameters() if weight.ndim == 4), 3)
    # Transformers of torchvision, and all networks of timm, have a fixed image size.
    own = (getattr(model, "image_size", None), *mapping(getattr(model, "default_cfg", None)).get("input_size", ())[-1:])
    for size in dict.fromkeys((*(size for size in own if isinstance(size, int)), 224, 64, 32)):
        yield torch.empty(2, channels, size, size, device="meta")


def _normalizes(model: nn.Module, width: int) -> bool:
    """Whether a model has a LayerNorm over a last axis of this width."""
    return any(type(m) is nn.LayerNorm and tuple(m.normalized_shape) == (width,) for m in model.modules())
