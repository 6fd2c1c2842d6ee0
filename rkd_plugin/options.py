"""The options of a loss and the checks of what a loss receives: options, batches and index vectors.

A check raises one sentence: the name of the loss, what is expected, what it got, and what to do.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Union, get_args

import torch
from torch import Tensor

from rkd_plugin.kernels.derivatives import transformed
from rkd_plugin.kernels.potentials import DIVERGENCES, EVERY_SCALE, PENALTIES, POTENTIALS, order_of, scales_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["mean", "tuple_mean", "sum", "anchor"]
Impl = Literal["auto", "reference", "chunked", "fused"]
Pairs = tuple[Tensor, Tensor]
Triplets = tuple[Tensor, Tensor, Tensor]
Gather = Union[bool, "ProcessGroup"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """The options of `rkd_da_loss`; a term whose weight is 0 is not computed."""

    distance_weight: float = 1.0
    angle_weight: float = 2.0
    reduction: Reduction = "mean"
    huber_delta: float = 1.0
    impl: Impl = "auto"
    pairs: Pairs | None = None
    triplets: Triplets | None = None
    anchors: float | None = None
    gather: Gather = False

    def check(self, name: str) -> None:
        """Check all options except the index vectors, which `checked_indices` checks.

        Args:
            name: of the loss, for error messages.

        Raises:
            TypeError: if an option has the wrong type.
            ValueError: if an option has an invalid value, or two options exclude each other.
        """
        numbers = {"distance_weight": self.distance_weight, "angle_weight": self.angle_weight}
        for option, value in numbers.items():
            if not abs(_number(name, option, value)) < math.inf:  # a comparison, which torch.compile can trace
                raise ValueError(f"{name}: expected {option} to be a finite number, got {value!r}")
        if not 0 < _number(name, "huber_delta", self.huber_delta) < math.inf:
            raise ValueError(f"{name}: expected huber_delta to be positive and finite, got {self.huber_delta!r}")
        for option, choice, choices in (("reduction", self.reduction, Reduction), ("impl", self.impl, Impl)):
            if choice not in get_args(choices):
                raise ValueError(f"{name}: expected {option} to be one of {get_args(choices)}, got {choice!r}")
        if self.anchors is not None:
            anchors = _number(name, "anchors", self.anchors)
            if not (anchors >= 1 if isinstance(self.anchors, Integral) else 0 < anchors <= 1):
                raise ValueError(
                    f"{name}: expected anchors to be a number of rows, an integer of at least 1, or a fraction of "
                    f"them, a float above 0 and up to 1.0, got {self.anchors!r}"
                )
            if self.triplets is not None:
                raise ValueError(f"{name}: expected triplets or anchors, got both; triplets name their own vertices")
        if not isinstance(self.gather, bool) and not _is_group(self.gather):
            raise TypeError(f"{name}: expected gather to be True, False or a process group, got {self.gather!r}")
        if self.gather is not False and (self.pairs is not None or self.triplets is not None):
            raise ValueError(
                f"{name}: expected gather=False with pairs or triplets, which name rows of this process only, "
                f"got {self.gather!r}"
            )


@dataclass(frozen=True)
class RelationalOptions(Options):
    """The options of `relational_loss`."""

    potential: Any = "distance"
    penalty: Any = "huber"
    scale: str | None = "auto"
    temperature: float = 1.0
    neighbours: int | None = None
    references: Any = None

    @property
    def order(self) -> int:
        """The number of rows that the potential relates."""
        return order_of(self.potential) or 0

    @property
    def chosen_scale(self) -> str | None:
        """The scale, with the one of the potential for ``"auto"``."""
        return scales_of(self.potential)[0] if self.scale == "auto" else self.scale

    def check(self, name: str) -> None:
        """As `Options.check`."""
        super().check(name)
        for option, value, known in (
            ("potential", self.potential, (*POTENTIALS,)),
            ("penalty", self.penalty, (*PENALTIES, *DIVERGENCES)),
        ):
            if not callable(value) and not (isinstance(value, str) and value in known):
                raise ValueError(f"{name}: expected {option} to be one of {known} or a function, got {value!r}")
        if self.order not in (1, 2, 3):
            raise ValueError(
                f"{name}: expected potential to be a function of 1, 2 or 3 rows, got {self.potential!r} of "
                f"{order_of(self.potential)} positional parameters without a default; wrap it in a function of rows"
            )
        what = f"potential {self.potential!r}" if isinstance(self.potential, str) else f"a function of {self.order}"
        if self.scale not in (*EVERY_SCALE, "auto"):
            raise ValueError(f"{name}: expected scale to be one of {(*EVERY_SCALE, 'auto')}, got {self.scale!r}")
        if self.chosen_scale not in scales_of(self.potential):
            raise ValueError(
                f"{name}: expected scale to be one of {(*scales_of(self.potential), 'auto')} with {what}, got "
                f"{self.scale!r}"
            )
        sums_to_1 = ("softmax",) if self.potential == "dot" else ("softmax", "row_sum")  # a product may be negative
        if self.penalty in DIVERGENCES and self.chosen_scale not in sums_to_1:
            raise ValueError(
                f"{name}: expected rows that sum to 1 for penalty {self.penalty!r}, got scale {self.chosen_scale!r} "
                f"with {what}; use one of {sums_to_1}"
            )
        if not 0 < _number(name, "temperature", self.temperature) < math.inf:
            raise ValueError(f"{name}: expected temperature to be positive and finite, got {self.temperature!r}")
        if self.neighbours is not None:
            whole = isinstance(self.neighbours, Integral) and not isinstance(self.neighbours, bool)
            if not whole or self.neighbours < 1:
                raise (ValueError if whole else TypeError)(
                    f"{name}: expected neighbours to be None or an integer of at least 1, got {self.neighbours!r}"
                )
        for option, tuples, order in (("pairs", self.pairs, 2), ("triplets", self.triplets, 3)):
            if tuples is not None and (self.order != order or self.neighbours or self.references is not None):
                raise ValueError(
                    f"{name}: expected {option} with a potential of {order} rows, and without neighbours or "
                    f"references, got {what}, neighbours={self.neighbours!r} and "
                    f"{'no ' if self.references is None else ''}references"
                )
        if self.order == 1 and (self.neighbours or self.references is not None):
            raise ValueError(f"{name}: expected neighbours and references with a potential of 2 or 3 rows, got {what}")


def _number(name: str, option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        advice = "; a number in YAML has a point, as in 1.0e-4" if isinstance(value, str) else ""
        raise TypeError(f"{name}: expected {option} to be a number, got {value!r}{advice}")
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf


def _is_group(group: Any) -> bool:
    """Whether ``group`` is a process group, or what ``new_group`` returns to a process that is not in the group."""
    distributed = torch.distributed
    return distributed.is_available() and (
        isinstance(group, distributed.ProcessGroup) or group == distributed.GroupMember.NON_GROUP_MEMBER
    )


def check_batch(name: str, student: Tensor, teacher: Tensor, sets: bool = False, what: str = "") -> None:
    """Check both sides of a batch.

    Args:
        name: of the loss, for error messages.
        student: ``(N, D_s)``.
        teacher: ``(N, D_t)``.
        sets: whether both may have shape ``(B, N, D)``.
        what: added to the names of the sides in messages.

    Raises:
        TypeError: if a side is not a dense floating-point tensor.
        ValueError: if a side has another shape, or the numbers of rows or the devices differ.
    """
    for side, x in ((f"student{what}", student), (f"teacher{what}", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected {side} to be a tensor, got {type(x).__name__}")
        _check_dense(name, side, x)
        if x.ndim != 2 and not (sets and x.ndim == 3):
            shapes = "(N, D) or (B, N, D)" if sets else "(N, D)"
            raise ValueError(f"{name}: expected {side} to have shape {shapes}, got {tuple(x.shape)}")
    if student.shape[:-1] != teacher.shape[:-1]:
        ours, theirs = ("x".join(map(str, x.shape[:-1])) for x in (student, teacher))
        raise ValueError(
            f"{name}: expected one row per example in student{what} and teacher{what}, got {ours} and {theirs} rows"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{name}: expected student and teacher on one device, got {student.device} and {teacher.device}"
        )


def warn_of_lost_distances(name: str, student: Tensor, teacher: Tensor) -> None:
    """Warn of float64 rows so close, beside the largest difference of the batch, that the kernels count them as equal.

    The limit is described in `rkd_plugin.kernels`; entries of narrower dtypes never reach it. Nothing is looked at
    without values to look at: while a function is compiled, traced or transformed.
    """
    for side, x in (("student", student), ("teacher", teacher)):
        has_values = type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"
        if x.dtype is not torch.float64 or not has_values or not x.numel():
            continue
        is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if torch.compiler.is_compiling() or is_traced or transformed(x):
            continue
        rows = x.detach()
        # Differences to two rows: the first one may be far from all others.
        sizes = torch.stack([(rows - row).abs().amax(1) for row in rows[:2]])
        if bool(((sizes > 0) & (sizes < sizes.max() * 2.0**-500)).any()):
            warnings.warn(
                f"{name}: expected {side} rows whose distances differ by less than a factor of 2^500, got others; the "
                "smaller distances count as 0",
                stacklevel=4,
            )


def _check_dense(name: str, side: str, x: Tensor) -> None:
    kind = advice = None
    if hasattr(x, "full_tensor") or hasattr(x, "get_mask"):  # DTensor, MaskedTensor, without importing them
        kind, advice = type(x).__name__, f"{side}.full_tensor()" if hasattr(x, "full_tensor") else f"{side}.get_data()"
    elif x.is_nested:
        kind, advice = "a nested tensor", "one vector per example"
    elif x.layout != torch.strided:
        kind, advice = str(x.layout), f"{side}.to_dense()"
    elif x.is_quantized:
        kind, advice = str(x.dtype), f"{side}.dequantize()"
    elif x.is_complex():
        kind, advice = str(x.dtype), f"torch.view_as_real({side}).flatten(1), which has the same distances"
    elif x.dtype not in _DTYPES:
        kind, advice = str(x.dtype), f"{side}.float()"
    if kind is not None:
        raise TypeError(
            f"{name}: expected {side} to be a dense tensor of float64, float32, float16 or bfloat16, got {kind}; "
            f"pass {advice}"
        )


def checked_indices(name: str, option: str, tuples: Any, number: int, student: Tensor) -> Any:
    """Index vectors as int64; None for None.

    Args:
        name: of the loss, for error messages.
        option: ``"pairs"`` or ``"triplets"``.
        tuples: the value of this option.
        number: of index vectors: 2 or 3.
        student: the batch whose rows are named.

    Raises:
        TypeError: if ``tuples`` is not a tuple of integer tensors.
        ValueError: if it has another number of vectors, they differ in length or device, or an index is out of range.
    """
    if tuples is None:
        return None
    if not isinstance(tuples, tuple | list) or not all(isinstance(index, Tensor) for index in tuples):
        found = (
            [type(index).__name__ for index in tuples] if isinstance(tuples, tuple | list) else type(tuples).__name__
        )
        raise TypeError(f"{name}: expected {option} to be a tuple of {number} index vectors, got {found}")
    shapes = [tuple(index.shape) for index in tuples]
    if len(tuples) != number or any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
        raise ValueError(f"{name}: expected {option} to be {number} index vectors of one length, got shapes {shapes}")
    for index in tuples:
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected {option} to be int64 or int32, got {index.dtype}")
        if index.device != student.device:
            raise ValueError(f"{name}: expected {option} on the student's device {student.device}, got {index.device}")
    rows = _check_range(torch.stack([index.long() for index in tuples]), student.shape[0], f"{name}: expected {option}")
    return tuple(rows.unbind())


# A custom operator, since torch.compile cannot trace a check of values.
@torch.library.custom_op("rkd_plugin::check_range", mutates_args=())
def _check_range(indices: Tensor, rows: int, what: str) -> Tensor:
    # During the capture of a CUDA graph no value can be read; the warm-up calls before it have checked them.
    if indices.numel() and not (indices.is_cuda and torch.cuda.is_current_stream_capturing()):
        low, high = (int(index) for index in indices.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{what} to name rows from 0 to {rows - 1}, got {low if low < 0 else high}")
    return indices.clone()


@_check_range.register_fake
def _(indices: Tensor, rows: int, what: str) -> Tensor:
    return torch.empty_like(indices)
