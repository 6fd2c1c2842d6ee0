"""What a torchdistill experiment names in YAML once it lists ``dependencies: ['rkd_plugin.adapters.torchdistill']``.

Losses (mid-level): ``RKDDistanceLoss``, ``RKDAngleLoss``, ``RKDDALoss`` on any pair of hooked modules, and ``PMLLoss``,
any loss of pytorch-metric-learning. Model wrapper: ``TrainedWith``, for a loss that has parameters. Forward processes,
for teachers: ``forward_in_eval_mode``, and ``no_forward`` for a stage without one. Pre-epoch process: ``seeded_epoch``.
In place of a teacher, the precomputed outputs of a teacher bank: ``BankTeacher`` and ``WithTeacherBank``.
torchdistill's own ``RKDLoss`` stays as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchdistill.common.main_util import set_seed
from torchdistill.common.module_util import get_module
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
from torchdistill.datasets.registry import DATASET_WRAPPER_DICT, register_dataset_wrapper
from torchdistill.datasets.wrapper import BaseDatasetWrapper
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, register_mid_level_loss
from torchdistill.models.registry import (
    AUXILIARY_MODEL_WRAPPER_DICT,
    MODEL_DICT,
    register_auxiliary_model_wrapper,
    register_model,
)
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from rkd_plugin import losses
from rkd_plugin.teacher_bank import Bank

IO = Literal["input", "output"]
Pool = Literal["auto", "avg", "avg_channels_last", "mean", "cls", "last", "flatten"]
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
_model_wrapper = _register(register_auxiliary_model_wrapper, AUXILIARY_MODEL_WRAPPER_DICT)
_model = _register(register_model, MODEL_DICT)
_dataset_wrapper = _register(register_dataset_wrapper, DATASET_WRAPPER_DICT)


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


@contextmanager
def reading(model: nn.Module, reads: Iterable[tuple[str, str]]) -> Iterator[dict[tuple[str, str], Any]]:
    """Within the block, a forward pass of ``model`` fills the dictionary with what the modules take or return.

    Args:
        model: of which the modules are.
        reads: pairs of a module's path, ``"."`` for the model, and ``"input"`` or ``"output"``.
    """
    values: dict[tuple[str, str], Any] = {}

    def keep(read: tuple[str, str]) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            values[read] = inputs[0] if read[1] == "input" else output

        return hook

    with ExitStack() as hooks:
        for path, io in reads:
            module = model if path == "." else get_module(model, path)
            hooks.enter_context(module.register_forward_hook(keep((path, io))))
        yield values


class _Pooling(NamedTuple):
    shape: str
    ndims: range
    apply: Callable[[Tensor], Tensor]


_POOLINGS = {
    "avg": _Pooling("(N, C, L), (N, C, H, W) or (N, C, D, H, W)", range(3, 6), lambda maps: maps.flatten(2).mean(2)),
    "avg_channels_last": _Pooling(
        "(N, H, W, C) or (N, D, H, W, C)", range(4, 6), lambda maps: maps.flatten(1, -2).mean(1)
    ),
    "mean": _Pooling("tokens (N, T, D)", range(3, 4), lambda tokens: tokens.mean(1)),
    "cls": _Pooling("tokens (N, T, D)", range(3, 4), lambda tokens: tokens[:, 0]),
    "last": _Pooling("tokens (N, T, D)", range(3, 4), lambda tokens: tokens[:, -1]),
    "flatten": _Pooling("(N, ...)", range(3, 64), lambda values: values.flatten(1)),
}


def pooling(value: Tensor, pool: Pool = "auto") -> Pool | None:
    """The pooling that makes vectors of a module's input or output, never ``"auto"``; None for vectors.

    Raises:
        ValueError: if ``pool`` does not fit the shape, or is ``"auto"`` and the shape does not tell which axis holds
            the channels.
    """
    shape = tuple(value.shape)
    if len(shape) < 3:
        return None
    if pool == "auto":
        if len(shape) == 3:
            raise ValueError(
                f"expected a pool for the three axes {shape}, got 'auto'; set pool to 'mean', 'cls' or 'last' for "
                "tokens (N, T, D), or to 'avg' for (N, C, L)"
            )
        if is_channels_last(shape):
            raise ValueError(
                f"expected a feature map (N, C, H, W), got {shape}, whose channels seem to be last; set pool to "
                "'avg_channels_last', or to 'avg' if axis 1 holds the channels"
            )
        pool = "avg"
    if len(shape) not in _POOLINGS[pool].ndims:
        fitting = [repr(name) for name, known in _POOLINGS.items() if len(shape) in known.ndims]
        raise ValueError(
            f"pool {pool!r}: expected {_POOLINGS[pool].shape}, got {shape}; set pool to one of {', '.join(fitting)}"
        )
    return pool


def is_channels_last(shape: Sequence[int]) -> bool:
    """Whether a map of four or five axes looks like ``(N, H, W, C)``: most are square, and have more channels."""
    return shape[-3] == shape[-2] != shape[-1]


def pooled(value: Tensor, pool: Pool = "auto") -> Tensor:
    """``(N, D)``: a module's input or output as the vectors that a loss compares; see `RKDDistanceLoss` for ``pool``.

    Raises:
        ValueError: see `pooling`.

    Example:
        >>> tokens = torch.arange(12.).reshape(1, 3, 4)
        >>> pooled(tokens, "cls"), pooled(tokens, "mean"), pooled(tokens, "avg")
        (tensor([[0., 1., 2., 3.]]), tensor([[4., 5., 6., 7.]]), tensor([[1.5000, 5.5000, 9.5000]]))
    """
    name = pooling(value, pool)
    return value if name is None else _POOLINGS[name].apply(value)


def pool_of(pool: Any, side: str) -> Any:
    """The pool of ``"student"`` or ``"teacher"``, where `HookedLoss` may have been given one for each."""
    return pool.get(side, "auto") if isinstance(pool, Mapping) else pool


class HookedLoss(nn.Module):
    """Finds student and teacher embeddings in the host's dictionaries, for the loss of two tensors it is mixed into."""

    renamed: ClassVar[Mapping[str, str]] = {
        "student_output_path": "student_module_path",
        "teacher_output_path": "teacher_module_path",
    }
    """Arguments of torchdistill's losses, and what they are called here."""

    def __init__(
        self,
        student_module_path: str | None = None,
        teacher_module_path: str | None = None,
        student_module_io: IO = "output",
        teacher_module_io: IO = "output",
        pool: Pool | Mapping[str, Pool] = "auto",
        l2_normalize: bool = False,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        for old, new in self.renamed.items():
            if old in options:
                raise TypeError(
                    f"{name}: expected none of the arguments of torchdistill's losses, got {old}; use {new}"
                )
        super().__init__(**options)
        if options.get("reduction") == "anchor":
            raise ValueError(f"{name}: torchdistill sums scalar terms, so reduction must not be 'anchor'")
        sides = ("student", "teacher")
        if isinstance(pool, Mapping) and not set(pool) <= set(sides):
            raise ValueError(f"{name}: pool must be for 'student' and 'teacher', got {', '.join(map(repr, pool))}")
        self.pools = {side: pool_of(pool, side) for side in sides}
        for value in self.pools.values():
            if value not in get_args(Pool):
                raise ValueError(f"{name}: pool must be one of {get_args(Pool)}, got {value!r}")
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
        """``(N, D)``: what the loss compares of a side's hooked module, pooled and scaled as the options say.

        Raises:
            TypeError: if the module's output is not one tensor.
            ValueError: if the module is not hooked, or `pool` does not fit its shape.
        """
        path = self.paths[side]
        if isinstance(source, Mapping):
            if path is None:
                raise ValueError(f"{side}_module_path must name one of {list(source)}, and was not given")
            source = find_hooked(source, side, path, self.ios[side])
        try:
            vectors = pooled(source, self.pools[side])
        except ValueError as error:
            raise ValueError(f"the {side}: {error}") from error
        # In half precision a length may overflow.
        return (
            normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32))) if self.l2_normalize else vectors
        )

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        places = ", ".join(
            f"{side}={self.paths[side]!r} {self.ios[side]} pool={self.pools[side]!r}" for side in self.paths
        )
        return f"{places}, l2_normalize={self.l2_normalize}, {super().extra_repr()}"


@mid_level_loss
class RKDDistanceLoss(HookedLoss, losses.RKDDistanceLoss):
    """See `rkd_plugin.rkd_distance_loss`; between any two hooked modules, of any widths.

    Args:
        student_module_path: the student's hooked module, ``'.'`` for its output. Needed but under SimpleLossWrapper.
        teacher_module_path: the teacher's.
        student_module_io: ``'input'`` or ``'output'`` of that module.
        teacher_module_io: likewise.
        pool: what makes vectors ``(N, D)`` of larger outputs; one name, or ``{student: ..., teacher: ...}``:

            * ``'avg'``: the mean over the positions of maps ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
            * ``'avg_channels_last'``: the same of maps ``(N, H, W, C)`` or ``(N, D, H, W, C)``, as in a Swin block.
              This is an order of axes, not ``torch.channels_last``, the memory format.
            * ``'mean'``, ``'cls'``, ``'last'``: the mean, the first or the last of tokens ``(N, T, D)``, padding
              included.
            * ``'flatten'``: all numbers in a row, as torchdistill's ``RKDLoss`` does it.
            * ``'auto'``: ``'avg'`` for four axes and more; three axes, and maps ``(N, S, S, C)``, raise.
        l2_normalize: whether both sides' rows are then scaled to length 1, as the authors' code does for image
            classification.
        options: ``reduction``, ``huber_delta``, ``impl``, ``gather``; for RKDAngleLoss and RKDDALoss also ``anchors``;
            for RKDDALoss also ``distance_weight``, ``angle_weight``. ``gather: true`` compares the batch of all
            processes, see `rkd_plugin.distributed`.

    Raises:
        TypeError: for an unknown option (naming the one of torchdistill's ``RKDLoss`` that it replaces), or a module
            whose output is no tensor.
        ValueError: if a module is not hooked (naming those that are), ``pool`` does not fit its shape, or the batches
            differ in length.

    Example:
        >>> import torch
        >>> student = {"fc": {"output": torch.tensor([[0., 0.], [1., 0.], [2., 0.]])}}
        >>> teacher = {"layer4": {"output": torch.tensor([[0., 0.], [4., 0.], [0., 3.]])}}
        >>> RKDDistanceLoss(student_module_path="fc", teacher_module_path="layer4")(student, teacher)
        tensor(0.0972)
    """

    renamed: ClassVar[Mapping[str, str]] = {
        **HookedLoss.renamed,
        "dist_factor": "the term's weight",
        "angle_factor": "RKDDALoss",
    }


@mid_level_loss
class RKDAngleLoss(HookedLoss, losses.RKDAngleLoss):
    """See `rkd_plugin.rkd_angle_loss`; arguments as `RKDDistanceLoss`."""

    renamed: ClassVar[Mapping[str, str]] = {
        **HookedLoss.renamed,
        "dist_factor": "RKDDALoss",
        "angle_factor": "the term's weight",
    }


@mid_level_loss
class RKDDALoss(HookedLoss, losses.RKDDALoss):
    """See `rkd_plugin.rkd_da_loss`; arguments as `RKDDistanceLoss`.

    torchdistill's ``RKDLoss`` calls the weights ``dist_factor`` and ``angle_factor``, and flattens feature maps, which
    are averaged here: ``pool: flatten`` gives its numbers.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        **HookedLoss.renamed,
        "dist_factor": "distance_weight",
        "angle_factor": "angle_weight",
    }


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


_VECTORS = "teacher_bank"  # the key under which the host's dictionary brings them


@_dataset_wrapper
class WithTeacherBank(BaseDatasetWrapper):
    """torchdistill's wrapper of a data set that is trained on, with a bank's vectors for `BankTeacher`.

    ``rkd run`` names both where ``recipe.teacher_bank`` is set; a YAML for torchdistill's own scripts does it itself::

        models.teacher_model:     {key: BankTeacher, kwargs: {bank: PATH}}
        train.teacher:            {forward_proc: forward_batch_supp_dict, requires_grad: False}
        train.train_data_loader:  dataset_wrapper: {key: WithTeacherBank, kwargs: {bank: PATH}}

    Args:
        org_dataset: given by torchdistill.
        bank: path of a `Bank`.

    Raises:
        FileNotFoundError: if there is no bank.
        ValueError: if it is of other data; see `Bank.over`.
    """

    def __init__(self, org_dataset: Any, bank: str | Path) -> None:
        super().__init__(org_dataset)
        self.with_teacher = Bank(bank).over(org_dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, dict[str, Any]]:
        """Image, label, and the host's dictionary with the vectors."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any, dict[str, Any]]]:
        """PyTorch's hook: the items of a batch."""
        return [(*item, {_VECTORS: vectors}) for item, vectors in self.with_teacher.__getitems__(indices)]


@_model
class BankTeacher(AuxiliaryModelWrapper):
    """In place of a teacher: its modules' inputs and outputs are what a bank holds of them; see `WithTeacherBank`.

    Args:
        bank: path of a `Bank`.
        module_path: of an array alone, whose place it takes: a module of the teacher ...
        module_io: ... and its ``"input"`` or ``"output"``.
    """

    def __init__(self, bank: str | Path, module_path: str = ".", module_io: IO = "output") -> None:
        super().__init__()
        arrays = Bank(bank).arrays
        self.places = [(array.path, array.io) for array in arrays] if arrays else [(module_path, module_io)]
        self.vectors: Sequence[Tensor] = ()

    def forward(self, sample_batch: Tensor, supplement: Mapping[str, Any]) -> Tensor | None:
        """The teacher's output ``(N, D)``, None if the bank holds that of other modules alone."""
        if _VECTORS not in supplement:
            raise ValueError("BankTeacher: expected a data set wrapped in WithTeacherBank; name it as dataset_wrapper")
        self.vectors = [vectors.to(sample_batch.device, non_blocking=True) for vectors in supplement[_VECTORS]]
        return dict(zip(self.places, self.vectors, strict=True)).get((".", "output"))

    def secondary_forward(self, io_dict: dict[str, dict[str, Any]]) -> None:
        """The host's hook, which finds here what its hooks would keep of a network."""
        # Nothing is kept where the stage's forward process was `no_forward`.
        for (path, io), vectors in zip(self.places, self.vectors, strict=False):
            io_dict.setdefault(path, {})[io] = vectors

    def compile(self, *_: Any, **__: Any) -> None:
        """Nothing is worth it."""


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
