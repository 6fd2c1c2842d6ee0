"""A recipe that was built: its data, models and precision; and what a model makes of test data."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Sequence
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
from torchdistill.datasets.util import build_data_loader
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

from rkd_plugin.adapters.torchdistill import seed_epoch
from rkd_plugin.experiments.files import read_checkpoint
from rkd_plugin.experiments.metrics import EVALUATORS, embed
from rkd_plugin.experiments.recipe import Recipe, read


class Experiment:
    """A recipe, built by torchdistill's own loader, which executes what the recipe names: data sets and models.

    Args:
        recipe: a recipe, or one of test data alone, which has neither ``models`` nor ``train``.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.settings = recipe.settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.layout = torch.channels_last if self.settings.get("channels_last") else torch.preserve_format
        self.seed(0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "recipe.yaml")
            path.write_text(recipe.resolved(), encoding="utf-8")
            self.config = yaml_util.load_yaml_file(str(path))
        import_dependencies(self.config["dependencies"])

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
        """See `seed_epoch`."""
        seed_epoch(self.settings["seed"], epoch)

    def _build(self, config: dict[str, Any]) -> nn.Module:
        model = get_image_classification_model(config)
        if model is None:
            model = get_model(config["key"], config.get("repo_or_dir"), **config["kwargs"])
        if config.get("src_ckpt"):
            # torchdistill goes on with random weights where this file is missing, and executes what it holds.
            model.load_state_dict(read_checkpoint(Path(config["src_ckpt"]))["model"])
        built: nn.Module = model.to(self.device, memory_format=self.layout)
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

    def box(self) -> Any:
        """Torchdistill's training or distillation box: models, criterion, optimizer and data loaders of ``train``."""
        teacher = self.teacher()  # first, as in torchdistill's scripts: both draw their weights from one seed
        student = self.student
        common = (self.config["datasets"], self.config["train"], self.device, None, False, 1)
        return get_distillation_box(teacher, student, *common) if teacher else get_training_box(student, *common)

    def embed(self, model: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
        """See `metrics.embed`, in the recipe's precision and memory layout."""
        with self.precision():
            outputs, labels = embed(model, ((self.place(images), labels) for images, labels, *_ in loader), self.device)
        return outputs.float(), labels

    def measure(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """The task's metrics, with what the recipe says of them (such as ``recipe.recall_at``)."""
        evaluator = EVALUATORS[self.settings["task"]]
        known = inspect.signature(evaluator).parameters
        return evaluator(outputs, labels, **{name: self.settings[name] for name in known if name in self.settings})

    def test_loader(self) -> Any:
        """The loader that ``test`` describes."""
        config = self.config["test"]["test_data_loader"]
        return build_data_loader(self.config["datasets"][config["dataset_id"]], config, False)


class Evaluation(NamedTuple):
    """Test data as a model sees it: metrics, embeddings ``(M, D)``, labels ``(M,)``, and where they came from."""

    metrics: dict[str, float]
    outputs: Tensor
    labels: Tensor
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
        ValueError: if the checkpoint is none, or of another model.
    """
    for described in (recipe, *([data] if data else [])):
        described.validate()
    weights = None if checkpoint is None else read_checkpoint(checkpoint)["model"]
    experiment = Experiment(recipe)
    if weights is not None:
        try:
            experiment.student.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"{checkpoint} holds another model than {recipe.path} describes; give the run's own folder"
            ) from error
    source = Experiment(data) if data else experiment
    loader = source.test_loader()
    outputs, labels = experiment.embed(experiment.student, loader)
    return Evaluation(source.measure(outputs, labels), outputs, labels, loader, experiment)


def of_folder(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run, as it was resolved.

    Raises:
        FileNotFoundError: if the folder holds no run.
    """
    if not (folder / "recipe.yaml").is_file():
        raise FileNotFoundError(f"expected a folder of `rkd run` with recipe.yaml, found none in {folder}")
    return read(folder / "recipe.yaml", overrides)
