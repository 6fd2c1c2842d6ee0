"""What a torchdistill experiment names in YAML once it lists ``dependencies: ['rkd_plugin.adapters.torchdistill']``.

Losses (mid-level): ``RKDDistanceLoss``, ``RKDAngleLoss``, ``RKDDALoss`` on any pair of hooked modules, and ``PMLLoss``,
any loss of pytorch-metric-learning. Model wrapper: ``TrainedWith``, for a loss that has parameters. Forward processes,
for teachers: ``forward_in_eval_mode``, and ``no_forward`` for a stage without one. Pre-epoch process: ``seeded_epoch``.
Scheduler: ``MultiStepFractionLR``. torchdistill's own ``RKDLoss`` stays as it is.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchdistill.common.main_util import set_seed
from torchdistill.core.interfaces.pre_epoch_proc import (
    default_pre_epoch_process_with_teacher,
    default_pre_epoch_process_without_teacher,
)
from torchdistill.core.interfaces.registry import (
    FORWARD_PROC_FUNC_DICT,
    PRE_EPOCH_PROC_FUNC_DICT,
    register_forward_proc_func,
    register_pre_epoch_proc_func,
)
from torchdistill.datasets.wrapper import BaseDatasetWrapper
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, register_mid_level_loss
from torchdistill.models.registry import AUXILIARY_MODEL_WRAPPER_DICT, register_auxiliary_model_wrapper
from torchdistill.models.wrapper import AuxiliaryModelWrapper
from torchdistill.optim.registry import SCHEDULER_DICT, register_scheduler

from rkd_plugin import losses


def _wrapped(dataset: Any) -> BaseDatasetWrapper:
    return BaseDatasetWrapper(dataset)


# A loader's process that is not forked meets this first, and the host's own module needs torchvision before it.
copyreg.pickle(BaseDatasetWrapper, lambda wrapper: (_wrapped, (wrapper.org_dataset,)))

IO = Literal["input", "output"]
Pool = Literal["avg", "flatten"]
Hooked = Mapping[str, Mapping[str, Any]]
T = TypeVar("T", bound=Callable[..., Any])


def _register(register: Callable[[T], T], registry: Mapping[str, Any]) -> Callable[[T], T]:
    """A host's decorator that refuses a name that something else holds; the host itself would overwrite it."""

    def decorate(component: T) -> T:
        held = registry.get(component.__name__, component)
        if (held.__module__, held.__qualname__) != (component.__module__, component.__qualname__):
            raise ValueError(
                f"torchdistill's {component.__name__!r} is already {held.__module__}.{held.__qualname__}; "
                f"register that one under another key"
            )
        return register(component)

    return decorate


mid_level_loss = _register(register_mid_level_loss, MIDDLE_LEVEL_LOSS_DICT)
_forward_proc = _register(register_forward_proc_func, FORWARD_PROC_FUNC_DICT)
_pre_epoch_proc = _register(register_pre_epoch_proc_func, PRE_EPOCH_PROC_FUNC_DICT)
_scheduler = _register(register_scheduler, SCHEDULER_DICT)
_model_wrapper = _register(register_auxiliary_model_wrapper, AUXILIARY_MODEL_WRAPPER_DICT)


def find_hooked(io_dict: Hooked, side: str, path: str, io: str) -> Tensor:
    """The tensor that a hook left at ``io_dict[path][io]``."""
    if path not in io_dict or io not in io_dict[path]:
        there = ", ".join(f"{name!r} ({', '.join(kinds) or 'nothing'})" for name, kinds in io_dict.items()) or "nothing"
        raise ValueError(
            f"the {side} has no {io} of module {path!r}, only {there}; list it under train.{side}.forward_hook.{io}"
        )
    value = io_dict[path][io]
    if not isinstance(value, Tensor):
        raise TypeError(f"the {side}'s {io} of module {path!r} must be one tensor, got {type(value).__name__}")
    return value


class HookedLoss(nn.Module):
    """Finds student and teacher embeddings in the host's dictionaries, for the loss of two tensors it is mixed into."""

    def __init__(
        self,
        student_module_path: str | None = None,
        teacher_module_path: str | None = None,
        student_module_io: IO = "output",
        teacher_module_io: IO = "output",
        pool: Pool = "avg",
        l2_normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        name = type(self).__name__
        if options.get("reduction") == "anchor":
            raise ValueError(f"{name}: torchdistill sums scalar terms, so reduction must not be 'anchor'")
        if pool not in get_args(Pool):
            raise ValueError(f"{name}: pool must be one of {get_args(Pool)}, got {pool!r}")
        self.pool = pool
        self.l2_normalize = l2_normalize
        self.paths = {"student": student_module_path, "teacher": teacher_module_path}
        self.ios = {"student": student_module_io, "teacher": teacher_module_io}
        for side, io in self.ios.items():
            if io not in get_args(IO):
                raise ValueError(f"{name}: {side}_module_io must be one of {get_args(IO)}, got {io!r}")

    def forward(self, student: Tensor | Hooked, teacher: Tensor | Hooked, *_: Any) -> Tensor:
        """The host's dictionaries, or, under ``SimpleLossWrapper``, two tensors; further arguments are not needed."""
        try:
            loss: Tensor = super().forward(self.embeddings("student", student), self.embeddings("teacher", teacher))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self}: {error}") from error
        return loss

    def embeddings(self, side: str, source: Tensor | Hooked) -> Tensor:
        """``(N, D)``: what the loss compares of a side's hooked module, pooled and scaled as the options say."""
        path = self.paths[side]
        if isinstance(source, Mapping):
            if path is None:
                raise ValueError(f"{side}_module_path must name one of {list(source)}, and was not given")
            source = find_hooked(source, side, path, self.ios[side])
        if source.ndim > 2:
            source = source.flatten(1) if self.pool == "flatten" else source.flatten(2).mean(2)
        # In half precision a length may overflow.
        return normalize(source.to(torch.promote_types(source.dtype, torch.float32))) if self.l2_normalize else source

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        places = ", ".join(f"{side}={self.paths[side]!r} {self.ios[side]}" for side in self.paths)
        return f"{places}, pool={self.pool!r}, l2_normalize={self.l2_normalize}, {super().extra_repr()}"


@mid_level_loss
class RKDDistanceLoss(HookedLoss, losses.RKDDistanceLoss):
    """See `rkd_plugin.rkd_distance_loss`; between any two hooked modules, of any widths.

    Args:
        student_module_path: the student's hooked module, ``'.'`` for its output. Needed but under SimpleLossWrapper.
        teacher_module_path: the teacher's.
        student_module_io: ``'input'`` or ``'output'`` of that module.
        teacher_module_io: likewise.
        pool: feature maps ``(N, C, ...)`` become ``(N, C)`` by ``'avg'``, or ``(N, C * ...)`` by ``'flatten'``.
        l2_normalize: whether both sides' rows are then scaled to length 1, as the authors' code does for image
            classification.
        options: ``reduction``, ``huber_delta``, ``impl``, ``gather``; for RKDAngleLoss and RKDDALoss also ``anchors``;
            for RKDDALoss also ``distance_weight``, ``angle_weight``. ``gather: true`` compares the batch of all
            processes, see `rkd_plugin.distributed`.

    Raises:
        TypeError: for an unknown option, or a module whose output is no tensor.
        ValueError: if a module is not hooked (naming those that are), or the batches differ in length.

    Example:
        >>> import torch
        >>> student = {"fc": {"output": torch.tensor([[0., 0.], [1., 0.], [2., 0.]])}}
        >>> teacher = {"layer4": {"output": torch.tensor([[0., 0.], [4., 0.], [0., 3.]])}}
        >>> RKDDistanceLoss(student_module_path="fc", teacher_module_path="layer4")(student, teacher)
        tensor(0.0972)
    """


@mid_level_loss
class RKDAngleLoss(HookedLoss, losses.RKDAngleLoss):
    """See `rkd_plugin.rkd_angle_loss`; arguments as `RKDDistanceLoss`."""


@mid_level_loss
class RKDDALoss(HookedLoss, losses.RKDDALoss):
    """See `rkd_plugin.rkd_da_loss`; arguments as `RKDDistanceLoss`."""


_TRAINED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@_model_wrapper
class TrainedWith(AuxiliaryModelWrapper):
    """A model and the modules that train with it, such as a loss of pytorch-metric-learning with proxies.

    ``train.student.auxiliary_model_wrapper: {key: TrainedWith, kwargs: {modules: {proxies: *loss}}}``, where ``&loss``
    marks the ``!import_call`` of a `PMLLoss`. The model's own hooks are then under ``student_model.`` (or ``model.``,
    where there is no teacher).

    Args:
        modules: name -> module; their parameters go to the optimizer and into the checkpoint.
        student_model: given by torchdistill, or
        model: likewise, where there is no teacher.
        kwargs: further arguments of torchdistill, about devices.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        student_model: nn.Module | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.path = "student_model" if model is None else "model"
        self.add_module(self.path, student_model if model is None else model)
        self.trained = nn.ModuleDict(modules)
        _TRAINED.update(self.trained.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        return getattr(self, self.path)(*args, **kwargs)


@mid_level_loss
class PMLLoss(nn.Module):
    """Any loss of pytorch-metric-learning, with or without a miner, as a mid-level loss.

    Args:
        loss: the loss, built in YAML by ``!import_call``, its distance, reducer and regulariser likewise.
        miner: the miner, or None.
        student_module_path: the hooked module whose output is the embedding, ``'.'`` for the student's output.
        student_module_io: ``'input'`` or ``'output'`` of that module.

    Raises:
        TypeError: if ``loss`` is no module.
        ValueError: if ``loss`` has parameters and no `TrainedWith` trains them, or the module is not hooked.
        FloatingPointError: if the loss or the miner fails on embeddings that are NaN or Inf.

    Example:
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> embeddings = torch.tensor([[1., 0.], [0., 1.], [-1., 0.]])
        >>> PMLLoss(ContrastiveLoss())({".": {"output": embeddings}}, {}, torch.tensor([0, 0, 1]))
        tensor(1.4142)
    """

    def __init__(
        self,
        loss: nn.Module,
        miner: nn.Module | None = None,
        student_module_path: str = ".",
        student_module_io: IO = "output",
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"PMLLoss: loss must be a module, built with !import_call, got {loss!r}")
        if loss not in _TRAINED and any(True for _ in loss.parameters()):
            raise ValueError(
                f"PMLLoss: {type(loss).__name__} has parameters, which torchdistill does not give to the optimizer; "
                "name it under auxiliary_model_wrapper with the key TrainedWith as well"
            )
        self.loss = loss
        self.miner = miner
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io

    def forward(self, student_io_dict: Hooked, teacher_io_dict: Hooked, targets: Tensor, *_: Any) -> Tensor:
        """The host's dictionaries and class labels ``(N,)`` -> a scalar."""
        embeddings = find_hooked(student_io_dict, "student", self.student_module_path, self.student_module_io)
        # In half precision the host's distances are coarse, and some of its miners fail.
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            try:
                mined = None if self.miner is None else self.miner(embeddings, targets)
                loss: Tensor = self.loss(embeddings, targets, mined)
            except (RuntimeError, ValueError, IndexError) as error:
                if embeddings.isfinite().all():
                    raise
                raise FloatingPointError("PMLLoss: expected finite embeddings, got NaN or Inf") from error
        return loss


@_forward_proc
def forward_in_eval_mode(model: nn.Module, sample_batch: Any, *_: Any, **__: Any) -> Any:
    """``train.teacher.forward_proc`` of every recipe here: a teacher whose BatchNorm and dropout stand still.

    torchdistill leaves the teacher in training mode, so that its running statistics drift with every batch and dropout
    blurs what it teaches. To have it that way, name ``'forward_batch_only'`` instead.
    """
    if any(module.training for module in model.modules()):
        model.eval()
    return model(sample_batch)


@_forward_proc
def no_forward(model: nn.Module, *_: Any, **__: Any) -> None:
    """``train.stage2.teacher.forward_proc`` where the student goes on alone: the teacher costs nothing."""


@_scheduler
class MultiStepFractionLR(torch.optim.lr_scheduler.MultiStepLR):
    """PyTorch's ``MultiStepLR`` with milestones as fractions, so that they follow the number of epochs.

    Args:
        optimizer: given by torchdistill.
        num_epochs: of the training, at least 1.
        milestones: fractions of ``num_epochs``, above 0 and up to 1; each is rounded to a whole epoch, the first at
            the earliest. After each of them the learning rate is multiplied by ``gamma``.
        gamma: the factor.
        last_epoch: as PyTorch's.

    Raises:
        ValueError: if a milestone is not above 0 and up to 1.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> sorted(MultiStepFractionLR(optimizer, num_epochs=200, milestones=[0.3, 0.6, 0.8]).milestones)
        [60, 120, 160]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_epochs: int,
        milestones: Sequence[float],
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        if not all(0 < milestone <= 1 for milestone in milestones):
            raise ValueError(
                f"MultiStepFractionLR: expected milestones as fractions of num_epochs, above 0 and up to 1, got "
                f"{list(milestones)}; write 0.3 for epoch 60 of 200"
            )
        epochs = [max(round(milestone * num_epochs), 1) for milestone in milestones]
        super().__init__(optimizer, epochs, gamma, last_epoch)


def seed_epoch(seed: int, epoch: int) -> None:
    """Random numbers for an epoch, from 1, or for building the models, 0; they depend on nothing that came before."""
    set_seed((seed * 1_000_003 + epoch) % 2**32 if epoch else seed)


@_pre_epoch_proc
def seeded_epoch(self: Any, epoch: int = 0, **kwargs: Any) -> None:
    """``train.pre_epoch_process``: the host's own, then `seed_epoch` from the seed that the script was started with.

    So torchdistill's scripts with ``--seed S`` draw the random numbers of ``rkd run`` with ``recipe.seed=S``.
    """
    if hasattr(self, "teacher_model"):
        default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    else:
        default_pre_epoch_process_without_teacher(self, epoch=epoch, **kwargs)
    if not hasattr(self, "seed"):
        self.seed = torch.initial_seed()
    seed_epoch(self.seed, epoch + 1)
