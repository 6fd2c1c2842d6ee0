"""A recipe that was built: its data, its models and their precision; embedding and measuring test data."""

from __future__ import annotations

import copyreg
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import Tensor, nn
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.datasets.util import build_data_loader
from torchdistill.datasets.wrapper import BaseDatasetWrapper
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

from rkd_plugin import distributed
from rkd_plugin.adapters.torchdistill import seed_epoch
from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.running.first_checks import check_data, check_episodes, check_images
from rkd_plugin.experiments.running.metrics import EVALUATORS, Layer, embed
from rkd_plugin.experiments.running.ranks import check_equal_start, check_equal_weights, share_batches
from rkd_plugin.experiments.running.teacher_bank import learn_from_bank
from rkd_plugin.experiments.running.weights import load_weights, read_named_weights
from rkd_plugin.experiments.support import processes, threads
from rkd_plugin.experiments.support.failures import message_from_worker
from rkd_plugin.experiments.support.signals import random_state, set_random_state
from rkd_plugin.teacher_bank.labels import item_name


def _wrapped(dataset: Any) -> BaseDatasetWrapper:
    return BaseDatasetWrapper(dataset)


# A worker that is not forked unpickles this first; torchdistill's own module fails without torchvision before it.
copyreg.pickle(BaseDatasetWrapper, lambda wrapper: (_wrapped, (wrapper.org_dataset,)))


class Experiment:
    """The data sets and models of a recipe, built by torchdistill's loader, which executes what the recipe names.

    Args:
        recipe: a recipe, or a recipe of test data, which has neither ``models`` nor ``train``.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.settings = recipe.settings
        self.data = recipe.data
        self.path = recipe.path
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_equal_start(recipe)
        self.layout = torch.channels_last if self.settings.get("channels_last") else torch.preserve_format
        self.seed(0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "recipe.yaml")
            path.write_text(recipe.resolved(), encoding="utf-8")
            with processes.rank_zero_first():
                self.config = yaml_util.load_yaml_file(str(path))
        import_dependencies(self.config.get("dependencies"))
        sizes = {f"number of images of datasets.{name}": data for name, data in self.config["datasets"].items()}
        processes.check_equal({name: str(len(data)) for name, data in sizes.items() if hasattr(data, "__len__")})
        if distributed.world_size() > 1:
            share_batches(self.config)

    @functools.cached_property
    def student(self) -> nn.Module:
        """The model that is trained and measured.

        Raises:
            ValueError: if the recipe has none.
        """
        models = self.config.get("models", {})
        if not models:
            raise ValueError(
                "expected a recipe with a model, got one of test data; train another recipe, and name this one with "
                "--data"
            )
        return self._build(models["student_model" if "student_model" in models else "model"])

    def seed(self, epoch: int) -> None:
        """See `seed_epoch`; in an epoch each rank has its own seed, and rank 0 that of a single process."""
        seed_epoch(self.settings["seed"] + (distributed.rank() << 16 if epoch else 0), epoch)

    def load(self, model: nn.Module, config: dict[str, Any], weights: dict[str, Any], path: Path) -> None:
        """Load weights into a model of the recipe; see `load_weights`.

        Args:
            model: the model that gets the weights.
            config: its configuration under ``models``.
            weights: from `read_weights`.
            path: of the file of the weights, for the message.
        """
        built = {f"{self._place(config)}.kwargs.{key}": value for key, value in (config.get("kwargs") or {}).items()}
        load_weights(model, weights, path, str(self.path), built)

    def _place(self, config: dict[str, Any]) -> str:
        return next(f"models.{name}" for name, known in self.config["models"].items() if known is config)

    def _build(self, config: dict[str, Any]) -> nn.Module:
        model = get_image_classification_model(config)
        if model is None:
            model = get_model(config["key"], config.get("repo_or_dir"), **config["kwargs"])
        if config.get("src_ckpt"):
            # torchdistill would continue with random weights if this file is missing, and execute what it contains.
            path = Path(config["src_ckpt"])
            settings = (f"recipe.{name}" for name, value in self.settings.items() if value == config["src_ckpt"])
            option = next(settings, f"{self._place(config)}.src_ckpt")
            self.load(model, config, read_named_weights(path, f"{option}="), path)
        check_equal_weights(model, f"weights of {config['key']}")
        if config.get("sync_bn") and distributed.world_size() > 1:
            if self.device.type == "cpu":
                raise ValueError(
                    f"{self.path}: expected sync_bn on GPUs, the only devices for which PyTorch has it, got CPUs; set "
                    "sync_bn to False, and each process normalises its part of a batch"
                )
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        built: nn.Module = model.to(self.device, memory_format=self.layout)
        if self.settings.get("compile"):
            # Compiled code must run the hooks of a later stage. Few batch sizes occur, and each is compiled.
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            built.compile(dynamic=False)
        return built

    def teacher(self) -> nn.Module | None:
        """The teacher with its checkpoint, None if the recipe has none."""
        config = self.config.get("models", {}).get("teacher_model")
        return None if config is None else self._build(config)

    def place(self, images: Tensor) -> Tensor:
        """A batch on the device, in the recipe's memory layout."""
        return images.to(self.device, memory_format=self.layout, non_blocking=True)

    def precision(self) -> AbstractContextManager[Any]:
        """The context of forward passes: autocast to bfloat16 if ``recipe.precision`` is ``bf16``."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.get("precision") == "bf16")

    def threads(self, loader: Any, *models: nn.Module) -> AbstractContextManager[None]:
        """See `threads.fitted`; the work is that of the largest of ``models`` on a batch of mean size."""

        def work() -> int | None:
            if self.device.type != "cpu":
                return None
            before = random_state(self.device)  # transforms draw random numbers
            image = loader.dataset[0][0]
            set_random_state(before, self.device)
            if not isinstance(image, Tensor):
                return None
            counts = [threads.flops(model, self.place(image[None])) for model in models]
            known = [count for count in counts if count is not None]
            return max(known) * len(loader.dataset) // max(len(loader), 1) if known else None

        return threads.fitted(work)

    def box(self) -> Any:
        """The training or distillation box of torchdistill: models, criterion, optimizer and loaders of ``train``."""
        if self.settings.get("teacher_bank"):
            learn_from_bank(self.config, self.data)
        teacher = self.teacher()  # before the student, as in torchdistill's scripts: both draw weights from one seed
        student = self.student
        common = (self.config["datasets"], self.config["train"], self.device, None, False, 1)
        check_data(self)
        box = get_distillation_box(teacher, student, *common) if teacher else get_training_box(student, *common)
        check_images(self, teacher)  # after the box, which draws random weights
        if self.settings["task"] == "few_shot":
            check_episodes(self, box.val_data_loader.dataset)
        return box

    def embed(self, model: nn.Module, loader: Any, layer: Layer | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `metrics.embed`; in the precision and memory layout of the recipe. Every rank has the whole result.

        Raises:
            FloatingPointError: if an output is NaN or Inf.
        """
        images = ((self.place(images), labels) for images, labels, *_ in batches(loader))
        with self.precision(), self.threads(loader, model):
            outputs, labels, features = embed(model, images, self.device, layer)
        broken = (~outputs.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise FloatingPointError(
                f"the outputs of {len(broken)} of {len(outputs)} test images became NaN or Inf"
                + self.not_finite(loader.dataset, broken[:1])
            )
        return outputs.float(), labels, features.float()

    def not_finite(self, dataset: Any, indices: Iterable[int]) -> str:
        """The end of a sentence about NaN or Inf: the first image that contains them, or other advice.

        Args:
            dataset: of the images; torchdistill can have wrapped it.
            indices: of the images that can be the cause.
        """
        dataset = getattr(dataset, "org_dataset", dataset)
        for index in indices:
            if isinstance(image := dataset[index][0], Tensor) and not image.isfinite().all():
                named = (f"datasets.{name}" for name, known in self.config["datasets"].items() if known is dataset)
                return (
                    f", as {item_name(dataset, index)} of {next(named, type(dataset).__name__)} has pixels that are; "
                    "repair that image or its transform"
                )
        return ", although the images are finite; lower the learning rate, or check the loss and its weight"

    def measure(
        self, outputs: Tensor, labels: Tensor, dataset: Any, evaluator: Callable[..., Any] | None = None
    ) -> dict[str, Any]:
        """The metrics of the task, or of another evaluator, with the options of the recipe; those of rank 0."""
        evaluator = evaluator or EVALUATORS[self.settings["task"]]
        known = inspect.signature(evaluator).parameters
        options = {name: self.settings[name] for name in known if name in self.settings}
        if "dataset" in known:
            options["dataset"] = getattr(dataset, "org_dataset", dataset)
        measured: dict[str, Any] = distributed.broadcast(lambda: evaluator(outputs, labels, **options))
        return measured

    def test_loader(self, all_classes: bool = False) -> Any:
        """The loader of ``test``, or the same with all classes of its data set."""
        config = self.config["test"]["test_data_loader"]
        name = config["dataset_id"]
        dataset = self.config["datasets"][name]
        if all_classes:
            if not hasattr(dataset, "all_classes"):
                raise ValueError(
                    f"datasets.{name}: expected a data set that is split by class, got {type(dataset).__name__}, of "
                    "which all classes are measured already; leave out --classes all"
                )
            with processes.rank_zero_first():
                dataset = dataset.all_classes()
        return build_data_loader(dataset, config, False)


def batches(loader: Any) -> Iterator[Any]:
    """What a loader yields; an error of a worker with the message that it had there, without the traceback as text."""
    try:
        yield from loader
    except Exception as error:
        message = message_from_worker(error)
        if message is None:
            raise
        raise type(error)(message) from error
