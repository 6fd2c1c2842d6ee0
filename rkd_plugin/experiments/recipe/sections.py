"""The sections of a recipe: what torchdistill 1.1.5 reads, and what `rkd run` needs in addition."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torchvision
from torch.utils.data import DataLoader
from torchdistill.core.interfaces import registry as procs
from torchdistill.datasets import registry as datasets
from torchdistill.losses import registry as losses
from torchdistill.models import registry as models
from torchdistill.optim import registry as optim

from rkd_plugin.experiments.recipe.imports import import_for
from rkd_plugin.experiments.recipe.schema import has_teacher, mapping, mid_level_losses, model_builders
from rkd_plugin.experiments.recipe.signatures import bind, show
from rkd_plugin.experiments.recipe.specs import (
    Component,
    Spec,
    Walk,
    anything,
    each,
    find,
    of_type,
    one_of,
    optional,
    positive,
    section,
)
from rkd_plugin.experiments.recipe.tags import resolve
from rkd_plugin.experiments.recipe.values import Tagged

Task = Literal["classification", "few_shot", "metric_learning", "text"]
_TEXT, _FLAG, _NUMBER, _WHOLE = of_type(str), of_type(bool), of_type(float), of_type(int)
_TEXTS = of_type(list[str])


_MODEL_OTHERS: dict[str, Spec] = {
    "src_ckpt": optional(_TEXT),
    "dst_ckpt": optional(_TEXT),
    "quantized": _FLAG,
    "sync_bn": _FLAG,
    "repo_or_dir": anything,
}


# Arguments that torchvision still accepts.
_LEGACY = {"pretrained", "pretrained_backbone"}


def _model(walk: Walk, value: Any, path: str) -> None:
    if isinstance(value, dict) and value.get("repo_or_dir") is not None:
        return  # torch.hub downloads it, so that nothing can be checked
    is_quantized = isinstance(value, dict) and value.get("quantized") is True
    for name in _LEGACY & set(mapping(mapping(value).get("kwargs"))):
        if str(value.get("key")) in torchvision.models.list_models():
            kwargs = {key: given for key, given in value["kwargs"].items() if key != name}
            value = {**value, "kwargs": kwargs}
            new = name.replace("pretrained", "weights")
            walk.note(f"{path}.kwargs.{name}", f"torchvision has replaced it; set {new}, to a name or to None")
    Component("model", functools.partial(model_builders, is_quantized), others=_MODEL_OTHERS)(walk, value, path)


def _models(walk: Walk, value: Any, path: str) -> None:
    section({}, {"teacher_model": _model, "student_model": _model, "model": _model})(walk, value, path)
    if isinstance(value, dict) and not {"student_model", "model"} & set(value):
        walk.report(f"{path}.student_model", "required, but missing")


def _dependencies(walk: Walk, value: Any, path: str) -> None:
    for index, entry in enumerate(value if isinstance(value, list) else [value]):
        place = f"{path}.{index}" if isinstance(value, list) else path
        match entry:
            case str():
                arguments = [entry]
            case {"name": str()}:
                arguments = [entry["name"], entry.get("package")]
            case [str(), *rest] if len(rest) < 2:
                arguments = entry
            case None if not isinstance(value, list):
                return
            case _:
                walk.report(place, f"expected the name of a module, got {show(entry)}")
                continue
        if module := import_for(walk.report, place, *arguments):
            walk.modules.add(module.__name__)


def _dataset_id(walk: Walk, value: Any, path: str) -> None:
    known = walk.data.get("datasets")
    if isinstance(known, dict):
        find(walk, value, path, "data set under `datasets:`", known)


def _sampler(walk: Walk, value: Any, path: str) -> None:
    section({"class_or_func": anything}, {"kwargs": optional(of_type(dict))})(walk, value, path)
    sampler = value.get("class_or_func") if isinstance(value, dict) else None
    if isinstance(sampler, Tagged) and sampler.tag == "!import_get":
        if isinstance(sampler.value, dict) and (component := resolve(sampler.value)) is not None:
            name = str(sampler.value["key"]).rpartition(".")[2]
            bind(walk.report, path, name, component, value.get("kwargs"), given=1)
    elif sampler is not None and not isinstance(sampler, Tagged):
        walk.report(f"{path}.class_or_func", f"expected a class or function (`!import_get`), got {show(sampler)}")


def _no_cache(walk: Walk, value: Any, path: str) -> None:
    walk.note(path, "torchdistill 1.1.5 ignores it; use recipe.teacher_bank for precomputed teacher outputs")


_LOADER = section(
    {"dataset_id": _dataset_id, "sampler": _sampler, "kwargs": anything},
    {
        "batch_sampler": optional(Component("batch sampler", lambda: datasets.BATCH_SAMPLER_DICT, given=1)),
        "dataset_wrapper": optional(
            Component("data set wrapper", lambda: datasets.DATASET_WRAPPER_DICT, given=1, needs_kwargs=False)
        ),
        "collate_fn": optional(one_of("collate function", lambda: datasets.COLLATE_FUNC_DICT)),
        "requires_supp": _FLAG,
        "cache_output": optional(_no_cache),
    },
)


def _data_loader(walk: Walk, value: Any, path: str) -> None:
    _LOADER(walk, value, path)
    if not isinstance(value, dict) or "kwargs" not in value:
        return
    taken = ("sampler", "batch_sampler", "collate_fn")
    if value["kwargs"] is None:
        walk.report(f"{path}.kwargs", "required even if empty; write `kwargs: {}`")
    bind(walk.report, path, "DataLoader", DataLoader, value["kwargs"], given=1, taken=taken)
    for name, least in {"batch_size": 1, "num_workers": 0}.items():
        given = mapping(value["kwargs"]).get(name)
        if type(given) is int and given < least:
            walk.report(f"{path}.kwargs.{name}", f"expected at least {least}, got {given}")
    exclusive = {"batch_size", "shuffle", "drop_last"} if value.get("batch_sampler") else {"shuffle"}
    for name in sorted(exclusive & set(value["kwargs"] if isinstance(value["kwargs"], dict) else ())):
        walk.report(f"{path}.kwargs.{name}", "the sampler decides this; leave it out here")


_LOSS = Component("loss", mid_level_losses)
_WRAPPER = Component("loss wrapper", lambda: losses.LOSS_WRAPPER_DICT, given=1, needs_kwargs=False)
_TERM = section({"criterion": _LOSS, "weight": _NUMBER}, {"criterion_wrapper": optional(_WRAPPER)})


def _term(walk: Walk, value: Any, path: str) -> None:
    _TERM(walk, value, path)
    criterion = value.get("criterion") if isinstance(value, dict) else None
    key = criterion.get("key") if isinstance(criterion, dict) else None
    is_plain = isinstance(key, str) and key in mid_level_losses() and key not in losses.MIDDLE_LEVEL_LOSS_DICT
    if is_plain and not value.get("criterion_wrapper"):
        hint = "required, as torchdistill calls every loss with dictionaries of module outputs"
        walk.report(f"{path}.criterion_wrapper", f"{hint}; `key: SimpleLossWrapper` passes two tensors to {key}")


_CRITERION = Component(
    "criterion",
    lambda: losses.HIGH_LEVEL_LOSS_DICT,
    needs_kwargs=False,
    inside=section(
        {},
        {
            "sub_terms": optional(each(_term)),
            "model_term": optional(section({"weight": optional(of_type(float | dict))})),
        },
        is_open=True,
    ),
    others={
        "func2extract_model_loss": optional(
            one_of("function to extract losses", lambda: losses.FUNC2EXTRACT_MODEL_OUTPUT_DICT)
        )
    },
)

_OPTIMIZER_OTHERS: dict[str, Spec] = {
    "filters_params": _FLAG,
    "max_grad_norm": optional(_NUMBER),
    "grad_accum_step": positive,
}
_GROUPS = each(section({"module": _TEXT}, {"kwargs": optional(of_type(dict)), "is_teacher": _FLAG}))


def _optimizer(groups: str) -> Spec:
    # The two boxes of torchdistill have different names for the parameter groups.
    return Component("optimizer", lambda: optim.OPTIM_DICT, given=1, others=_OPTIMIZER_OTHERS | {groups: _GROUPS})


_SCHEDULER = Component("scheduler", lambda: optim.SCHEDULER_DICT, given=1, others={"scheduling_step": _WHOLE})


def _adaptations() -> Mapping[str, Any]:
    return {**models.MODULE_DICT, **models.ADAPTATION_MODULE_DICT}


def _no_checkpoint(walk: Walk, value: Any, path: str) -> None:
    walk.need(path, "torchdistill would execute the content of this file; name it under `models:` instead")


_REDESIGN: dict[str, Spec] = {
    "sequential": optional(_TEXTS),
    "frozen_modules": _TEXTS,
    "adaptations": optional(each(Component("adaptation module", _adaptations))),
}
_FORWARD_PROC = one_of("forward process", lambda: procs.FORWARD_PROC_FUNC_DICT)
_SIDE: dict[str, Spec] = _REDESIGN | {
    "forward_proc": _FORWARD_PROC,
    "requires_grad": _FLAG,
    "forward_hook": section({}, {"input": _TEXTS, "output": _TEXTS}),
    "auxiliary_model_wrapper": section(
        {"key": one_of("model wrapper", lambda: models.AUXILIARY_MODEL_WRAPPER_DICT)},
        {"kwargs": optional(of_type(dict))} | _REDESIGN,
    ),
    "wrapper": optional(of_type(str | dict)),
    "src_ckpt": optional(_no_checkpoint),
    "dst_ckpt": optional(_TEXT),
}
_STUDENT = section({"forward_proc": _FORWARD_PROC}, _SIDE)


def _teacher(walk: Walk, value: Any, path: str) -> None:
    section({}, _SIDE)(walk, value, path)
    if not isinstance(value, dict):
        return
    if "forward_proc" not in value:
        walk.report(
            f"{path}.forward_proc",
            "required, but missing; write 'forward_in_eval_mode', as 'forward_batch_only' leaves the teacher in "
            "training mode",
        )
    if "requires_grad" not in value:
        message = "missing; write `False` to freeze the teacher, which torchdistill trains otherwise"
        walk.need(f"{path}.requires_grad", message)


_STAGE: dict[str, Spec] = {
    "num_epochs": positive,
    "train_data_loader": _data_loader,
    "val_data_loader": _data_loader,
    "criterion": _CRITERION,
    "scheduler": optional(_SCHEDULER),
    "pre_epoch_process": one_of("pre-epoch process", lambda: procs.PRE_EPOCH_PROC_FUNC_DICT),
    "pre_forward_process": one_of("pre-forward process", lambda: procs.PRE_FORWARD_PROC_FUNC_DICT),
    "post_forward_process": one_of("post-forward process", lambda: procs.POST_FORWARD_PROC_FUNC_DICT),
    "post_epoch_process": one_of("post-epoch process", lambda: procs.POST_EPOCH_PROC_FUNC_DICT),
}
_ALONE: dict[str, Spec] = _STAGE | {"model": _STUDENT, "optimizer": _optimizer("module_wise_kwargs")}
_WITH_TEACHER: dict[str, Spec] = _STAGE | {
    "teacher": _teacher,
    "student": _STUDENT,
    "optimizer": _optimizer("module_wise_configs"),
}


def _train(walk: Walk, value: Any, path: str) -> None:
    if not isinstance(value, dict):
        walk.report(path, f"expected a mapping, got {show(value)}")
        return
    keys = _WITH_TEACHER if has_teacher(walk.data) else _ALONE
    sides = ("teacher", "student") if has_teacher(walk.data) else ("model",)
    # A later stage keeps the data and the optimizer of the previous one, but not the settings of the models.
    later = {name: keys[name] for name in ("num_epochs", "criterion", *sides)}
    first = later | {name: keys[name] for name in ("train_data_loader", "optimizer")}
    where, begin = (f"{path}.stage1", value["stage1"]) if "stage1" in value else (path, value)
    if isinstance(begin, dict) and "val_data_loader" not in begin:
        walk.need(f"{where}.val_data_loader", "missing; the student is measured after every epoch")
    if "stage1" not in value:
        section(first | {"log_freq": positive}, keys)(walk, value, path)
        return
    count = sum(str(key).startswith("stage") for key in value)
    numbered = {f"stage{n}": section(first if n == 1 else later, keys) for n in range(1, count + 1)}
    side = section({}, {"dst_ckpt": _TEXT})
    section(numbered | {"log_freq": positive}, dict.fromkeys(sides, side))(walk, value, path)


def _task(walk: Walk, value: Any, path: str) -> None:
    of_type(list[int])(walk, value, path)
    if isinstance(value, list) and len(value) != 2:
        walk.report(path, f"expected a pair of way and shot, got {len(value)} numbers")


SETTINGS: dict[str, Spec] = {
    "task": of_type(Task),
    "seed": _WHOLE,
    "precision": of_type(Literal["float32", "bf16"]),
    "channels_last": _FLAG,
    "compile": _FLAG,
    "recall_at": of_type(list[int]),
    "test_tasks": each(_task),
    "test_queries": positive,
    "test_episodes": positive,
    "patience": optional(positive),
    "teacher_bank": optional(_TEXT),
    "test_bank": optional(_TEXT),
}
_NEEDED = {"task": f"one of {', '.join(get_args(Task))}", "seed": "an integer"}
_DATA: dict[str, Spec] = {"datasets": of_type(dict)}
_OTHERS: dict[str, Spec] = {"recipe": section({}, SETTINGS, is_open=True), "dependencies": _dependencies}
_TEST: dict[str, Spec] = {"test": section({"test_data_loader": _data_loader})}
# In the order of the file, so that a problem of an alias is reported at its anchor.
_RECIPE = section({**_DATA, "models": _models, "train": _train, **_TEST}, _OTHERS)
_TEST_RECIPE = section(_DATA | _TEST, _OTHERS)


def check_sections(walk: Walk) -> None:
    """Report problems of the sections of a recipe, or of a recipe of test data."""
    # First, as dependencies register what the other sections name.
    walk.visit(_dependencies, walk.data.get("dependencies"), "dependencies")
    spec = _RECIPE if {"models", "train"} & set(walk.data) else _TEST_RECIPE
    spec(walk, walk.data, "")
    for name, kind in _NEEDED.items():
        if name not in mapping(walk.data.get("recipe")):
            walk.need(f"recipe.{name}", f"missing; set {kind}")
