"""Checks of files, classes, batches and modes, as far as they are known without loading data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn
from torchdistill.core.interfaces.registry import FORWARD_PROC_FUNC_DICT

from rkd_plugin.experiments.recipe.building import built_model
from rkd_plugin.experiments.recipe.errors import suggest
from rkd_plugin.experiments.recipe.schema import has_teacher, mapping, stages
from rkd_plugin.experiments.recipe.specs import Walk
from rkd_plugin.experiments.recipe.tags import resolve
from rkd_plugin.experiments.recipe.values import Tagged

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_CHANGED_BY_MODE = (_BATCH_NORM, nn.modules.dropout._DropoutNd)
_AUGMENTING = ("Random", "ColorJitter", "AutoAugment", "RandAugment", "TrivialAugment", "AugMix")
# With a probability of 1 they change every image in the same way.
_FIXED_IF_CERTAIN = {
    f"Random{name}"
    for name in (
        *("Invert", "HorizontalFlip", "VerticalFlip", "Grayscale", "Equalize", "Autocontrast"),
        *("Solarize", "Posterize", "AdjustSharpness"),
    )
}
_OFFICIAL = torchvision.datasets
# Numbers of classes, training images and test images of data sets that do not change.
_PUBLISHED: dict[Any, tuple[int, int, int] | None] = {
    _OFFICIAL.CIFAR10: (10, 50_000, 10_000),
    _OFFICIAL.CIFAR100: (100, 50_000, 10_000),
    _OFFICIAL.MNIST: (10, 60_000, 10_000),  # and Fashion-MNIST and KMNIST
    _OFFICIAL.EMNIST: None,
    _OFFICIAL.QMNIST: None,
}


class Known(NamedTuple):
    """What is known about a data set that is not loaded."""

    images: int | None = None
    classes: int | None = None


def check_readiness(walk: Walk) -> None:
    """Report problems and notes about files, classes, batches and modes."""
    _check_data_folders(walk)
    _check_checkpoints(walk)
    _check_weights(walk)
    for path, stage in stages(walk.data).items():
        _check_training(walk, mapping(stage.get("train_data_loader")), f"{path}.train_data_loader")
        _check_measuring(walk, mapping(stage.get("val_data_loader")), f"{path}.val_data_loader")
        _check_teacher_mode(walk, mapping(stage.get("teacher")), f"{path}.teacher")
    test = mapping(walk.data.get("test"))
    _check_measuring(walk, mapping(test.get("test_data_loader")), "test.test_data_loader")


# Files


def _check_data_folders(walk: Walk) -> None:
    for path, call in _calls(mapping(walk.data.get("datasets")), "datasets"):
        kwargs = _kwargs(call)
        root = kwargs.get("root")
        if isinstance(root, str) and kwargs.get("download") is not True and not _exists(root):
            hint = f"; get the data{_setting_of(walk, root)}"
            walk.lack(f"{path}.init.kwargs.root", f"there is no folder {root!r}{hint}")


def _check_checkpoints(walk: Walk) -> None:
    needs_no_teacher = bool(mapping(walk.data.get("recipe")).get("teacher_bank"))
    for name, model in mapping(walk.data.get("models")).items():
        checkpoint = mapping(model).get("src_ckpt")
        if name == "teacher_model" and needs_no_teacher:
            continue
        if isinstance(checkpoint, str) and not _exists(checkpoint, is_file=True):
            hint = f"; train that model first{_setting_of(walk, checkpoint)}"
            walk.lack(f"models.{name}.src_ckpt", f"there is no file {checkpoint!r}{hint}")


def _check_weights(walk: Walk) -> None:
    for name, model in mapping(walk.data.get("models")).items():
        kwargs = mapping(mapping(model).get("kwargs"))
        weights, network = kwargs.get("weights"), kwargs.get("backbone", mapping(model).get("key"))
        if not isinstance(weights, str) or network not in torchvision.models.list_models():
            continue
        path = f"models.{name}.kwargs.weights"
        known = torchvision.models.get_model_weights(network)
        found = known.__members__.get(weights.removeprefix(f"{known.__name__}."))
        if found is None:
            walk.report(path, f"{network} has no weights {weights!r}{suggest(weights, known.__members__)}")
        elif not _exists(file := str(Path(torch.hub.get_dir(), "checkpoints", Path(found.url).name)), is_file=True):
            walk.note(path, f"{weights} of {network} are not in PyTorch's cache; they will be downloaded to {file}")


def _exists(path: str, is_file: bool = False) -> bool:
    try:
        place = Path(os.path.expanduser(path))
        return place.is_file() if is_file else place.exists()
    except (OSError, ValueError):  # no file can have this name
        return False


def _setting_of(walk: Walk, path: str) -> str:
    """The end of a sentence: the setting with which the path begins, for an override."""
    for name, value in mapping(walk.data.get("recipe")).items():
        if isinstance(value, str) and value and path.startswith(value):
            return f", or set recipe.{name}"
    return ""


# Data and batches


def _check_training(walk: Walk, loader: Mapping[Any, Any], path: str) -> None:
    if not loader or loader.get("batch_sampler"):
        return
    known = _known(walk, loader)
    _check_classes(walk, known, loader)
    sampler, kwargs = mapping(loader.get("sampler")), mapping(loader.get("kwargs"))
    images = mapping(sampler.get("kwargs")).get("num_samples", known.images)
    batch = kwargs.get("batch_size", 1)
    if type(batch) is not int or batch < 1:
        return
    if type(images) is not int:
        walk.skip(path, "the number of batches in an epoch, as the number of images is not known")
        return
    if kwargs.get("drop_last") is True:
        if images < batch:
            message = f"an epoch of {images} images has no batch of {batch}, and drop_last drops smaller ones; lower it"
            walk.report(f"{path}.kwargs.batch_size", message)
    elif images % batch == 1 or batch == 1:
        _check_single_image(walk, f"{path}.kwargs", images, batch)


def _check_single_image(walk: Walk, path: str, images: int, batch: int) -> None:
    models = (built_model(walk, name) for name in ("student_model", "model"))
    student = next((model for model in models if model is not None), None)
    norms = _kinds(student, _BATCH_NORM)
    which = "every batch" if batch == 1 else f"the last batch of {images} images"
    message = f"{which} is one image, which has no relation to another"
    if "BatchNorm1d" in norms:
        message = f"{which} is one image, for which BatchNorm1d raises in training"
        walk.report(path, f"{message}; set drop_last: True, or another batch_size")
    else:
        cause = f", and too few for {', '.join(norms)} if its maps have one pixel" if norms else ""
        walk.note(path, f"{message}{cause}; set drop_last: True, or another batch_size")


def _check_classes(walk: Walk, known: Known, loader: Mapping[Any, Any]) -> None:
    task = mapping(walk.data.get("recipe")).get("task", "classification")
    if task != "classification" or type(known.classes) is not int:
        return
    models = mapping(walk.data.get("models"))
    name = "student_model" if "student_model" in models else "model"
    outputs = mapping(mapping(models.get(name)).get("kwargs")).get("num_classes")
    path = f"models.{name}.kwargs.num_classes"
    if type(outputs) is int and outputs != known.classes:
        message = f"expected {known.classes} outputs for the classes of {loader['dataset_id']}, got {outputs}"
        (walk.report if outputs < known.classes else walk.note)(path, message)


def _check_measuring(walk: Walk, loader: Mapping[Any, Any], path: str) -> None:
    if not loader:
        return
    sampler = mapping(loader.get("sampler")).get("class_or_func")
    name = str(mapping(sampler.value).get("key")).rpartition(".")[2] if isinstance(sampler, Tagged) else ""
    if "Random" in name:
        walk.note(f"{path}.sampler", f"{name} shuffles test images; SequentialSampler keeps their order")
    if mapping(loader.get("kwargs")).get("drop_last") is True:
        walk.note(f"{path}.kwargs.drop_last", "the last images are not measured; set drop_last: False")
    for _, call in _calls(_dataset(walk, loader), ""):
        transform = str(mapping(call.value).get("key")).rpartition(".")[2]
        is_certain = transform in _FIXED_IF_CERTAIN and _kwargs(call).get("p") == 1
        if transform.startswith(_AUGMENTING) and not is_certain:
            walk.note(f"{path}.dataset_id", f"{transform} changes test images at random, and thus the metrics")


def _dataset(walk: Walk, loader: Mapping[Any, Any]) -> Any:
    name = loader.get("dataset_id")
    return mapping(walk.data.get("datasets")).get(name) if isinstance(name, str) else None


def _calls(value: Any, path: str) -> Iterator[tuple[str, Tagged]]:
    """Every ``!import_call`` in a value, with its path."""
    if isinstance(value, Tagged):
        if value.tag == "!import_call":
            yield path, value
        value = value.value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _calls(item, f"{path}.{key}")


def _kwargs(call: Tagged) -> Mapping[Any, Any]:
    return mapping(mapping(mapping(call.value).get("init")).get("kwargs"))


def _known(walk: Walk, loader: Mapping[Any, Any]) -> Known:
    """What is known about a data set from its class, its arguments and the names of its folders."""
    dataset = _dataset(walk, loader)
    if not isinstance(dataset, Tagged) or dataset.tag != "!import_call":
        return Known()
    component, kwargs = resolve(mapping(dataset.value)), _kwargs(dataset)
    if not isinstance(component, type):
        return Known()
    if issubclass(component, _OFFICIAL.FakeData):
        return Known(kwargs.get("size", 1000), kwargs.get("num_classes", 10))
    if component is _OFFICIAL.ImageFolder and isinstance(root := kwargs.get("root"), str) and _exists(root):
        return Known(classes=_count_folders(Path(os.path.expanduser(root))))
    published = next((_PUBLISHED[cls] for cls in component.__mro__ if cls in _PUBLISHED), None)
    if published is None or kwargs.get("published") is False:
        return Known()
    classes, training, test = published
    return Known(training if kwargs.get("train", True) is True else test, classes)


def _count_folders(folder: Path) -> int | None:
    try:
        return sum(entry.is_dir() for entry in folder.iterdir()) or None
    except OSError:  # a file, or a folder without permission
        return None


# Modes


def _check_teacher_mode(walk: Walk, teacher: Mapping[Any, Any], path: str) -> None:
    """Note a forward process of torchdistill that leaves the teacher in training mode."""
    name = str(teacher.get("forward_proc"))
    is_official = getattr(FORWARD_PROC_FUNC_DICT.get(name), "__module__", "").startswith("torchdistill.")
    has_bank = bool(mapping(walk.data.get("recipe")).get("teacher_bank"))
    if not has_teacher(walk.data) or not is_official or has_bank or teacher.get("requires_grad") is not False:
        return
    model = built_model(walk, "teacher_model")
    kinds = _kinds(model, *_CHANGED_BY_MODE)
    if kinds or model is None:
        layers = ", ".join(kinds) or "layers such as BatchNorm and dropout"
        message = f"{name} leaves the teacher in training mode, so that its {layers} change its outputs"
        walk.note(f"{path}.forward_proc", f"{message}; use 'forward_in_eval_mode'")


def _kinds(model: nn.Module | None, *classes: type[nn.Module]) -> list[str]:
    """The class names of a model's modules of these classes."""
    return sorted({type(module).__name__ for module in model.modules() if isinstance(module, classes)}) if model else []
