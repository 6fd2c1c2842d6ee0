"""A recipe that was built: its data, models and precision; and what a model makes of test data."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
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
from torchdistill.datasets.wrapper import BaseDatasetWrapper
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

from rkd_plugin import distributed
from rkd_plugin.adapters.torchdistill import seed_epoch
from rkd_plugin.components.samplers import SharedBatchSampler
from rkd_plugin.environment import environment
from rkd_plugin.experiments.recipe import Recipe, configs_root
from rkd_plugin.experiments.recipe.schema import stages
from rkd_plugin.experiments.running.checkpoints import load_weights, read_weights
from rkd_plugin.experiments.running.episodes import episode_accuracies
from rkd_plugin.experiments.running.features import compared
from rkd_plugin.experiments.running.metrics import EVALUATORS, Layer, check_classes, embed, in_eval_mode, named_channels
from rkd_plugin.experiments.running.teacher_bank import learn_from_bank
from rkd_plugin.experiments.support import processes, threads
from rkd_plugin.experiments.support.signals import random_state, set_random_state
from rkd_plugin.teacher_bank.labels import class_names, item_name, labels_of, unwrapped

PLAIN = {"forward_batch_only", "forward_in_eval_mode"}  # forward processes that give a model the images alone


def _wrapped(dataset: Any) -> BaseDatasetWrapper:
    return BaseDatasetWrapper(dataset)


# A loader's process that is not forked meets this first, and the host's own module needs torchvision before it.
copyreg.pickle(BaseDatasetWrapper, lambda wrapper: (_wrapped, (wrapper.org_dataset,)))


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
        import_dependencies(self.config.get("dependencies"))
        sizes = {f"number of images of datasets.{name}": data for name, data in self.config["datasets"].items()}
        processes.check_equal({name: str(len(data)) for name, data in sizes.items() if hasattr(data, "__len__")})
        if distributed.world_size() > 1:
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
        seed_epoch(self.settings["seed"] + (distributed.rank() << 16 if epoch else 0), epoch)

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

    def load(self, model: nn.Module, config: dict[str, Any], weights: dict[str, Any], path: Path) -> None:
        """Load weights into a model, which they must fit; see `load_weights`.

        Args:
            model: what they are loaded into.
            config: what describes it under ``models``.
            weights: as `read_weights` gives them.
            path: of their file, for the message.
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
            # torchdistill goes on with random weights where this file is missing, and executes what it holds.
            path = Path(config["src_ckpt"])
            settings = (f"recipe.{name}" for name, value in self.settings.items() if value == config["src_ckpt"])
            option = next(settings, f"{self._place(config)}.src_ckpt")
            self.load(model, config, _weights(path, f"{option}="), path)
        check_equal_weights(model, f"weights of {config['key']}")
        if config.get("sync_bn") and distributed.world_size() > 1:
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
        self._check_images(teacher)  # after the box, which draws weights as well
        if self.settings["task"] == "few_shot":
            self._check_episodes(labels_of(box.val_data_loader.dataset, "val_data_loader"))
        return box

    def _data(self, *loaders: str) -> Iterator[tuple[str, Any, list[int] | None]]:
        """Name, data set and labels, if they are known, of what the stages' loaders load."""
        used = [
            stage[name]["dataset_id"] for stage in stages(self.config).values() for name in loaders if stage.get(name)
        ]
        for name in dict.fromkeys(used):
            dataset = self.config["datasets"][name]
            where = f"datasets.{name}"
            yield where, dataset, labels_of(dataset, where)

    def _check_data(self) -> None:
        """What a loss or a metric stumbles over after a while, and does not say what it was."""
        for name, dataset, _ in self._data("train_data_loader", "val_data_loader"):
            if len(dataset) < 2:
                raise ValueError(f"{name}: expected two images or more, got {len(dataset)}; relations are between two")
        for name, _, labels in self._data("val_data_loader"):
            if self.settings["task"] == "metric_learning" and labels and len(set(labels)) == len(labels):
                raise ValueError(
                    f"{name}: expected a class with two images or more, as one is looked for by the other, got "
                    f"{len(labels)} images of as many classes; test on other data"
                )

    @torch.no_grad()
    def _check_images(self, teacher: nn.Module | None) -> None:
        """Images or labels that do not fit a model would stop a run in its middle, with an error that names neither."""
        forwards = {stage.get("teacher", {}).get("forward_proc") for stage in stages(self.config).values()}
        models = [self.student, *([teacher] if teacher and forwards <= PLAIN else [])]
        with in_eval_mode(*models):
            for name, dataset, labels in self._data("train_data_loader", "val_data_loader"):
                if not isinstance(image := dataset[0][0], Tensor):
                    continue
                images = self.place(image[None])
                with named_channels(images, name):
                    # What `compile` compiles is calling the model, which is not worth it for one image.
                    outputs = [model.forward(images) for model in models]
                if self.settings["task"] == "classification" and labels:
                    check_classes(outputs[0].shape[1], torch.tensor(sorted(set(labels))), name)

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
                    f", as {item_name(dataset, index)} of {next(named, type(dataset).__name__)} has pixels that are; "
                    "mend that image, or what transforms it"
                )
        return ", though the images behind it are finite; lower the learning rate, or look at the loss and its weight"

    def measure(self, outputs: Tensor, labels: Tensor, evaluator: Callable[..., Any] | None = None) -> dict[str, Any]:
        """The task's metrics, or those of another evaluator, with what the recipe says of them; the first process's."""
        evaluator = evaluator or EVALUATORS[self.settings["task"]]
        known = inspect.signature(evaluator).parameters
        options = {name: self.settings[name] for name in known if name in self.settings}
        measured: dict[str, Any] = distributed.broadcast(lambda: evaluator(outputs, labels, **options))
        return measured

    def test_loader(self, all_classes: bool = False) -> Any:
        """The loader that ``test`` describes, or the same of all classes of its data set."""
        config = self.config["test"]["test_data_loader"]
        name = config["dataset_id"]
        dataset = self.config["datasets"][name]
        if all_classes:
            if not hasattr(dataset, "all_classes"):
                raise ValueError(
                    f"datasets.{name}: expected a data set that is split by class, got {type(dataset).__name__}, which "
                    "has no other classes than those that are measured already; leave out --classes all"
                )
            with processes.rank_zero_first():
                dataset = dataset.all_classes()
        return build_data_loader(dataset, config, False)


def _weights(path: Path, option: str) -> dict[str, Any]:
    """See `read_weights`; where there is no such file, what to type instead.

    Args:
        path: of the file.
        option: of the command line that names the file.
    """
    try:
        return read_weights(path)
    except FileNotFoundError as error:
        folder, root = path.parent, configs_root()
        recipes = [file for file in root.rglob(f"{folder.name}.yaml") if file.parent.name == folder.parent.name]
        recipe = recipes[0].relative_to(root).with_suffix("").as_posix() if recipes else "RECIPE"
        is_default = recipes and folder == Path("runs", folder.parent.name, folder.name)
        command = f"rkd run {recipe}" if is_default else f"rkd run {recipe} --out {folder}"
        # `rkd reproduce` names folders by row and seed.
        others = sorted(folder.parent.glob(f"{folder.name}-seed*/{path.name}"))
        instead = f", or give {option}{others[0]}, which is there" if others else ""
        raise FileNotFoundError(
            f"expected a checkpoint at {path}, found none; train that model first with `{command}`{instead}"
        ) from error


def check_equal_start(recipe: Recipe) -> None:
    """Raise on every rank if some rank was started with another recipe, code or device; see `processes.check_equal`."""
    if distributed.world_size() > 1:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        digest = hashlib.sha256(recipe.resolved().encode("utf-8", "surrogatepass")).hexdigest()[:12]
        where = environment(device)
        code = {f"version of {name}": where[name] for name in ("torch", "torchdistill")}
        processes.check_equal({"recipe": digest, "commit of rkd_plugin": where["commit"], **code, "device": device})


def check_equal_weights(model: nn.Module, name: str) -> None:
    """Raise on every rank if some rank's model has other weights than that of rank 0; see `processes.check_equal`."""
    if distributed.world_size() > 1:
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


def measured_on(dataset: Any, labels: Tensor) -> str:
    """How much of a data set was measured, such as "200 images of 2 of 4 classes"; see ``class_count`` of data sets."""
    counts = [part.class_count for part in unwrapped(dataset) if hasattr(part, "class_count")]
    known = counts[0] if len(counts) == 1 else len(class_names(dataset))
    return f"{len(labels)} images of {len({*labels.tolist()})} " + (f"of {known} classes" if known else "classes")


class Evaluation(NamedTuple):
    """Test data as a model sees it: metrics, outputs ``(M, D)``, labels ``(M,)``, and where they came from.

    ``measured_on`` is the number of images and classes, and of how many classes of the data set, as text.
    ``features`` ``(M, E)`` are what RKD compares: of an image classifier see `compared`, else the outputs.
    """

    metrics: dict[str, float]
    measured_on: str
    outputs: Tensor
    labels: Tensor
    features: Tensor
    loader: Any
    experiment: Experiment


def evaluate(
    recipe: Recipe, checkpoint: Path | None = None, data: Recipe | None = None, all_classes: bool = False
) -> Evaluation:
    """Embed and measure test data with a recipe's student.

    Args:
        recipe: whose model it is, and whose precision.
        checkpoint: of `run`; None for the model as the recipe builds it, such as with pretrained weights alone.
        data: a recipe whose test data and metrics are taken instead of the first one's own.
        all_classes: measure all classes of the data set, not those of its test split alone.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the checkpoint is none, or of another model; if ``data`` is of another task; if the data set is
            not split by class, and so has no other classes than its own.
    """
    for described in (recipe, *([data] if data else [])):
        described.validate()
    if data and data.settings["task"] != recipe.settings["task"]:
        raise ValueError(
            f"expected test data of the model's task, {recipe.settings['task']}, got {data.settings['task']} in "
            f"{data.path}; name a recipe of that task with --data"
        )
    # Read before any data is.
    weights = None if checkpoint is None else _weights(checkpoint, "--checkpoint ")
    experiment = Experiment(recipe)
    if checkpoint is not None and weights is not None:
        models = experiment.config["models"]
        config = models.get("student_model") or models["model"]
        experiment.load(experiment.student, config, weights, checkpoint)
        check_equal_weights(experiment.student, f"weights in {checkpoint}")
    source = Experiment(data) if data else experiment
    loader = source.test_loader(all_classes)
    layer = compared(experiment.config, experiment.student, "student")
    outputs, labels, features = experiment.embed(experiment.student, loader, layer)
    measured = measured_on(loader.dataset, labels)
    return Evaluation(source.measure(outputs, labels), measured, outputs, labels, features, loader, experiment)
