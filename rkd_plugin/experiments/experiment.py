"""A recipe that was built: its data, models and precision; and what a model makes of test data."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import Tensor, nn
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from torchdistill.datasets.registry import BATCH_SAMPLER_DICT
from torchdistill.datasets.util import build_data_loader
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

from rkd_plugin.adapters.torchdistill import seed_epoch
from rkd_plugin.bench import environment
from rkd_plugin.experiments import processes, threads
from rkd_plugin.experiments.bank.recipes import learn_from_bank
from rkd_plugin.experiments.datasets.folders import files_of
from rkd_plugin.experiments.features import compared
from rkd_plugin.experiments.few_shot import episode_accuracies
from rkd_plugin.experiments.files import load_weights, read_checkpoint
from rkd_plugin.experiments.metrics import EVALUATORS, Layer, check_classes, embed
from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.recipe.schema import stages
from rkd_plugin.experiments.samplers import SharedBatchSampler
from rkd_plugin.experiments.stopping import random_state, set_random_state


class Experiment:
    """A recipe, built by torchdistill's own loader, which executes what the recipe names: data sets and models.

    Args:
        recipe: a recipe, or one of test data alone, which has neither ``models`` nor ``train``.
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
        import_dependencies(self.config["dependencies"])
        sizes = {f"number of images of datasets.{name}": data for name, data in self.config["datasets"].items()}
        processes.check_equal({name: str(len(data)) for name, data in sizes.items() if hasattr(data, "__len__")})
        if processes.world_size() > 1:
            self._share_data()

    @functools.cached_property
    def student(self) -> nn.Module:
        """The model that is trained and measured.

        Raises:
            ValueError: if the recipe has none.
        """
        models = self.config.get("models", {})
        if not models:
            raise ValueError("this recipe describes test data only: train another one, and name this one with --data")
        return self._build(models["student_model" if "student_model" in models else "model"])

    def seed(self, epoch: int) -> None:
        """See `seed_epoch`; in an epoch every process crops and drops otherwise, the first as one that is alone."""
        seed_epoch(self.settings["seed"] + (processes.rank() << 16 if epoch else 0), epoch)

    def _share_data(self) -> None:
        """Have torchdistill build loaders of this process's batches: the recipe's own, shared."""
        for path, stage in stages(self.config).items():
            for side in ("teacher", "student", "model"):
                if stage.get(side, {}).get("wrapper"):
                    raise ValueError(
                        f"{path}.{side}.wrapper: expected none, as `rkd run` averages the gradients of its processes "
                        f"itself, got {stage[side]['wrapper']}; leave it out"
                    )
        for part in (*stages(self.config).values(), self.config.get("test", {})):
            for name in ("train_data_loader", "val_data_loader", "test_data_loader"):
                if part.get(name):
                    part[name] = _shared(part[name], whole=name != "train_data_loader")

    def _build(self, config: dict[str, Any]) -> nn.Module:
        model = get_image_classification_model(config)
        if model is None:
            model = get_model(config["key"], config.get("repo_or_dir"), **config["kwargs"])
        if config.get("src_ckpt"):
            # torchdistill goes on with random weights where this file is missing, and executes what it holds.
            path = Path(config["src_ckpt"])
            load_weights(model, read_checkpoint(path, "model")["model"], path, str(self.path))
        check_equal_weights(model, f"weights of {config['key']}")
        if config.get("sync_bn") and processes.world_size() > 1:
            if self.device.type == "cpu":
                raise ValueError(
                    f"{self.path}: expected sync_bn on GPUs, which alone PyTorch has it for, got CPUs; set sync_bn to "
                    "False, and each process normalises its own part of a batch"
                )
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        built: nn.Module = model.to(self.device, memory_format=self.layout)
        if self.settings.get("compile"):
            # Compiled code has to see the hooks of a later stage; few sizes of batches occur, each worth its own code.
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
        """What forward passes run in: autocast to bfloat16 if ``recipe.precision`` says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.get("precision") == "bf16")

    def threads(self, loader: Any, *models: nn.Module) -> AbstractContextManager[None]:
        """See `threads.fitted`; the work is that of the largest of ``models`` on a batch of the loader's mean size."""

        def work() -> int | None:
            if self.device.type != "cpu":
                return None
            before = random_state(self.device)  # transforms draw from it
            image = loader.dataset[0][0]
            set_random_state(before, self.device)
            if not isinstance(image, Tensor):
                return None
            counts = [threads.flops(model, self.place(image[None])) for model in models]
            known = [count for count in counts if count is not None]
            return max(known) * len(loader.dataset) // max(len(loader), 1) if known else None

        return threads.fitted(work)

    def box(self) -> Any:
        """Torchdistill's training or distillation box: models, criterion, optimizer and data loaders of ``train``."""
        if self.settings.get("teacher_bank"):
            learn_from_bank(self.config, self.data)
        teacher = self.teacher()  # first, as in torchdistill's scripts: both draw their weights from one seed
        student = self.student
        common = (self.config["datasets"], self.config["train"], self.device, None, False, 1)
        self._check_data()
        box = get_distillation_box(teacher, student, *common) if teacher else get_training_box(student, *common)
        if self.settings["task"] == "classification":
            self._check_labels()  # after the box, which draws weights as well
        if self.settings["task"] == "few_shot":
            self._check_episodes(getattr(box.val_data_loader.dataset, "targets", None))
        return box

    def _data(self, *loaders: str) -> Iterator[tuple[str, Any, list[Any] | None]]:
        """Name, data set and labels, if it tells them, of what the stages' loaders load."""
        used = [
            stage[name]["dataset_id"] for stage in stages(self.config).values() for name in loaders if stage.get(name)
        ]
        for name in dict.fromkeys(used):
            dataset = self.config["datasets"][name]
            labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
            if labels is not None:
                labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
                if getattr(dataset, "target_transform", None) is not None:
                    labels = list(map(dataset.target_transform, labels))
            yield f"datasets.{name}", dataset, labels

    def _check_data(self) -> None:
        """What a loss or a metric stumbles over after a while, and does not say what it was."""
        for name, dataset, labels in self._data("train_data_loader", "val_data_loader"):
            if len(dataset) < 2:
                raise ValueError(f"{name}: expected two images or more, got {len(dataset)}; relations are between two")
            for index, label in enumerate(labels or ()):
                if not isinstance(label, Integral):
                    raise ValueError(
                        f"{name}: expected labels that are whole numbers, got {label!r}, a {type(label).__name__}, for "
                        f"{_item(dataset, index)}; number the classes"
                    )
        for name, _, labels in self._data("val_data_loader"):
            if self.settings["task"] == "metric_learning" and labels and len(set(labels)) == len(labels):
                raise ValueError(
                    f"{name}: expected a class with two images or more, as one is looked for by the other, got "
                    f"{len(labels)} images of as many classes; test on other data"
                )

    @torch.no_grad()
    def _check_labels(self) -> None:
        """Cross-entropy meets a label that is no class of the model in the middle of a run, and does not say so."""
        for name, dataset, labels in self._data("train_data_loader", "val_data_loader"):
            if labels and isinstance(image := dataset[0][0], Tensor):
                # What `compile` compiles is calling the model, which is not worth it for one image.
                scores = self.student.eval().forward(self.place(image[None]))
                check_classes(scores.shape[1], torch.tensor(sorted(set(labels))), name)
        self.student.train()

    def _check_episodes(self, labels: Sequence[int] | None) -> None:
        """What a split is too small for is else known after an epoch, which is lost then."""
        if labels is not None:
            of = torch.tensor(labels)
            known = {name: self.settings[name] for name in ("test_tasks", "test_queries") if name in self.settings}
            episode_accuracies(of[:, None], of, test_episodes=1, **known)

    def embed(self, model: nn.Module, loader: Any, layer: Layer | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `metrics.embed`, in the recipe's precision and memory layout; the whole of it in every process.

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
        """The end of a sentence about numbers that are NaN or Inf: the first image that has some, or what else to do.

        Args:
            dataset: of the images, maybe wrapped by torchdistill.
            indices: of the images that may be to blame.
        """
        dataset = getattr(dataset, "org_dataset", dataset)
        for index in indices:
            if isinstance(image := dataset[index][0], Tensor) and not image.isfinite().all():
                named = (f"datasets.{name}" for name, known in self.config["datasets"].items() if known is dataset)
                return (
                    f", as {_item(dataset, index)} of {next(named, type(dataset).__name__)} has pixels that are; mend "
                    "that image, or what transforms it"
                )
        return ", though the images behind it are finite; lower the learning rate, or look at the loss and its weight"

    def measure(self, outputs: Tensor, labels: Tensor, evaluator: Callable[..., Any] | None = None) -> dict[str, Any]:
        """The task's metrics, or those of another evaluator, with what the recipe says of them; the first process's."""
        evaluator = evaluator or EVALUATORS[self.settings["task"]]
        known = inspect.signature(evaluator).parameters
        options = {name: self.settings[name] for name in known if name in self.settings}
        measured: dict[str, Any] = processes.broadcast(lambda: evaluator(outputs, labels, **options))
        return measured

    def test_loader(self) -> Any:
        """The loader that ``test`` describes."""
        config = self.config["test"]["test_data_loader"]
        return build_data_loader(self.config["datasets"][config["dataset_id"]], config, False)


def check_equal_start(recipe: Recipe) -> None:
    """Raise on every rank if some rank was started with another recipe, code or device; see `processes.check_equal`."""
    if processes.world_size() > 1:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        digest = hashlib.sha256(recipe.resolved().encode("utf-8", "surrogatepass")).hexdigest()[:12]
        where = environment(device)
        code = {f"version of {name}": where[name] for name in ("torch", "torchdistill")}
        processes.check_equal({"recipe": digest, "commit of rkd_plugin": where["commit"], **code, "device": device})


def check_equal_weights(model: nn.Module, name: str) -> None:
    """Raise on every rank if some rank's model has other weights than that of rank 0; see `processes.check_equal`."""
    if processes.world_size() > 1:
        digest = hashlib.sha256()
        for key, tensor in model.state_dict().items():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        processes.check_equal({name: digest.hexdigest()[:12]})


def _shared(loader: dict[str, Any], whole: bool) -> dict[str, Any]:
    """The same loader's configuration, of the batches of this process; see `SharedBatches`."""
    options = dict(loader["kwargs"])
    sampler = loader.get("batch_sampler")
    if sampler is None:
        decided = {"batch_size": options.pop("batch_size", 1), "drop_last": options.pop("drop_last", False)}
        sampler = {"key": "BatchSampler", "kwargs": decided}
    kind = BATCH_SAMPLER_DICT.get(sampler["key"])
    if isinstance(kind, type) and issubclass(kind, SharedBatchSampler):
        return loader
    return {
        **loader,
        "kwargs": options,
        "batch_sampler": {"key": "SharedBatches", "kwargs": {"of": sampler, "whole": whole}},
    }


def batches(loader: Any) -> Iterator[Any]:
    """What a loader yields; an error of one of its processes as it was raised there, without the traceback of there."""
    try:
        yield from loader
    except Exception as error:
        told = re.match(r"Caught \w+ in DataLoader worker process.*\n[\w.]+: (.*)", str(error), re.DOTALL)
        if told is None:
            raise
        raise type(error)(told[1].strip()) from error


def _item(dataset: Any, index: int) -> str:
    files = files_of(getattr(dataset, "dataset", dataset))
    return f"image {index}" + (f", {files[index]}," if index < len(files) else "")


class Evaluation(NamedTuple):
    """Test data as a model sees it: metrics, outputs ``(M, D)``, labels ``(M,)``, and where they came from.

    ``features`` ``(M, E)`` are what RKD compares: of an image classifier see `compared`, else the outputs.
    """

    metrics: dict[str, float]
    outputs: Tensor
    labels: Tensor
    features: Tensor
    loader: Any
    experiment: Experiment


def evaluate(recipe: Recipe, checkpoint: Path | None = None, data: Recipe | None = None) -> Evaluation:
    """Embed and measure test data with a recipe's student.

    Args:
        recipe: whose model it is, and whose precision.
        checkpoint: of `run`; None for the model as the recipe builds it, such as with pretrained weights alone.
        data: a recipe whose test data and metrics are taken instead of the first one's own.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the checkpoint is none, or of another model; if ``data`` is of another task.
    """
    for described in (recipe, *([data] if data else [])):
        described.validate()
    if data and data.settings["task"] != recipe.settings["task"]:
        raise ValueError(
            f"expected test data of the model's task, {recipe.settings['task']}, got {data.settings['task']} in "
            f"{data.path}; name a recipe of that task with --data"
        )
    # Read before any data is.
    weights = None if checkpoint is None else read_checkpoint(checkpoint, "model")["model"]
    experiment = Experiment(recipe)
    if checkpoint is not None:
        load_weights(experiment.student, weights, checkpoint, str(recipe.path))
        check_equal_weights(experiment.student, f"weights in {checkpoint}")
    source = Experiment(data) if data else experiment
    loader = source.test_loader()
    layer = compared(experiment.config, experiment.student, "student")
    outputs, labels, features = experiment.embed(experiment.student, loader, layer)
    return Evaluation(source.measure(outputs, labels), outputs, labels, features, loader, experiment)
