"""Relational knowledge distillation as functions of two batches of embeddings.

The student need not copy the teacher's embeddings, only the *relations* among the N rows of a batch: their pairwise
distances (RKD-D) and the angles of their triplets (RKD-A). Both losses ignore translation, rotation and uniform scaling
of either side, and student and teacher may have different widths.

This file holds documentation and input checks. The arithmetic is in ``rkd_plugin.kernels``; what several processes
exchange is in ``rkd_plugin.distributed``.

Reference: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from numbers import Integral, Real
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from rkd_plugin.kernels.choose import choose, differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from rkd_plugin.distributed import GlobalBatch

Reduction = Literal["mean", "tuple_mean", "sum", "anchor"]
Impl = Literal["auto", "reference", "chunked", "fused"]
Pairs = tuple[Tensor, Tensor]
Triplets = tuple[Tensor, Tensor, Tensor]
Gather = Union[bool, "ProcessGroup"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def rkd_distance_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: Reduction = "mean",
    huber_delta: float = 1.0,
    impl: Impl = "auto",
    pairs: Pairs | None = None,
    gather: Gather = False,
) -> Tensor:
    r"""Huber loss between mean-normalised pairwise distances (RKD-D, equations 4 to 6 of the paper).

    .. math::
        \frac{1}{N^2}\sum_{i,j} \ell_\delta\!\left(
            \frac{\lVert s_i-s_j\rVert}{\mu_s},\ \frac{\lVert t_i-t_j\rVert}{\mu_t}\right)

    with :math:`\mu` the mean distance over all pairs of distinct rows of one side and :math:`\ell_\delta` the Huber
    function. The authors' code takes the mean over all :math:`N^2` pairs, the zero diagonal included, and so does the
    default; their published weights belong to it. No gradient flows to ``teacher``. None flows to equal rows, since no
    direction separates them: a student whose rows are all equal does not learn, so watch their spread.

    Args:
        student: embeddings that learn, shape ``(N, D_s)``, float64, float32, float16 or bfloat16.
        teacher: embeddings to imitate, shape ``(N, D_t)``, of any of these dtypes, on the student's device; row i is
            the same example as the student's row i.
        reduction: ``"mean"`` over all ``N^2`` entries; ``"tuple_mean"`` over the ``N (N - 1)`` pairs of distinct rows,
            so that a weight means the same at every batch size; ``"sum"``, the paper's equation; ``"anchor"``, a
            vector ``(N,)`` with the loss of the pairs that start at row i, its mean equal to ``"mean"``.
        huber_delta: where the loss turns from quadratic to linear; positive.
        impl: the kernel: ``"reference"``, ``"chunked"``, ``"fused"``, or ``"auto"``, which takes ``"fused"`` for CUDA
            tensors where Triton is installed and ``"chunked"`` everywhere else. For second derivatives and
            ``torch.func`` transforms, which the fast kernels do not have, choose ``"reference"``.
        pairs: ``(from, to)``, index vectors ``(P,)``, int64 or int32: only these pairs count, and means are over them.
            The mean distance still runs over the whole batch.
        gather: whether the loss is over the batches of all processes of ``torch.distributed``, or of the process group
            that is passed. Each process calls this function and the backward pass, gets the value of the whole batch,
            and ``N`` is its size; gradients are right for `DistributedDataParallel`, see `rkd_plugin.distributed`.

    Returns:
        A scalar, or ``(N,)`` for ``"anchor"``, in the student's dtype, or float32 where that is narrower.

    Raises:
        TypeError: if an input is no dense floating-point tensor, an option has the wrong type, or indices are not
            integers.
        ValueError: if a batch is not 2-D, the row counts or devices differ, an option has a value that it cannot
            have, or an index names no row.
        RuntimeError: if ``impl`` is ``"fused"`` and cannot run here, or ``gather`` finds no process group.

    Example:
        A 3-4-5 triangle against three points on a line.

        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> rkd_distance_loss(student, teacher)
        tensor(0.0972)
        >>> rkd_distance_loss(student, teacher, reduction="anchor")
        tensor([0.1042, 0.0521, 0.1354])
        >>> rkd_distance_loss(3 * teacher + 1, teacher)  # the same shape: nothing to learn
        tensor(0.)
    """
    options = Options(1.0, 0.0, reduction, huber_delta, impl, pairs=pairs, gather=gather)
    return _loss("rkd_distance_loss", student, teacher, options)


def rkd_angle_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: Reduction = "mean",
    huber_delta: float = 1.0,
    impl: Impl = "auto",
    triplets: Triplets | None = None,
    anchors: float | None = None,
    gather: Gather = False,
) -> Tensor:
    r"""Huber loss between the cosines of all triplets' angles (RKD-A, equations 7 to 9 of the paper).

    .. math::
        \frac{1}{N^3}\sum_{i,j,k} \ell_\delta\!\left(\cos\angle s_j s_i s_k,\ \cos\angle t_j t_i t_k\right)

    with the vertex at row i. A triplet that names a row twice adds 0. An arm between two equal rows has no direction,
    and its cosines are 0 on that side. ``"chunked"`` and ``"fused"`` need ``O(N^2)`` memory, whatever the width of the
    embeddings.

    Args:
        student: embeddings that learn, shape ``(N, D_s)``, float64, float32, float16 or bfloat16.
        teacher: embeddings to imitate, shape ``(N, D_t)``, of any of these dtypes, on the student's device; row i is
            the same example as the student's row i.
        reduction: ``"mean"`` over all ``N^3`` entries; ``"tuple_mean"`` over the ``N (N - 1) (N - 2)`` triplets of
            distinct rows; ``"sum"``, the paper's equation; ``"anchor"``, a vector ``(N,)`` with the loss of the
            triplets that have their vertex at row i, its mean equal to ``"mean"``.
        huber_delta: where the loss turns from quadratic to linear; positive.
        impl: the kernel, as in `rkd_distance_loss`; ``"reference"`` needs ``O(N^3)`` memory.
        triplets: ``(vertex, arm, arm)``, index vectors ``(T,)``, int64 or int32: only these triplets count, and means
            are over them.
        anchors: how many rows (an integer) or which share of them (a float up to 1) are vertices: drawn anew in each
            call by PyTorch's generator, and weighted so that the expected loss is that of all. The cubic cost falls
            by the same share.
        gather: as in `rkd_distance_loss`; neither with ``triplets`` nor with ``pairs``, which name rows of one process.

    Returns:
        As `rkd_distance_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as `rkd_distance_loss`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> rkd_angle_loss(student, teacher)
        tensor(0.1393)
        >>> rkd_angle_loss(2 * teacher + 1, teacher)
        tensor(0.)
    """
    options = Options(0.0, 1.0, reduction, huber_delta, impl, triplets=triplets, anchors=anchors, gather=gather)
    return _loss("rkd_angle_loss", student, teacher, options)


def rkd_da_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 1.0,
    angle_weight: float = 2.0,
    reduction: Reduction = "mean",
    huber_delta: float = 1.0,
    impl: Impl = "auto",
    pairs: Pairs | None = None,
    triplets: Triplets | None = None,
    anchors: float | None = None,
    gather: Gather = False,
) -> Tensor:
    """The weighted sum of `rkd_distance_loss` and `rkd_angle_loss` (RKD-DA), the distances computed once for both.

    Args:
        student: embeddings that learn, shape ``(N, D_s)``, float64, float32, float16 or bfloat16.
        teacher: embeddings to imitate, shape ``(N, D_t)``, of any of these dtypes, on the student's device; row i is
            the same example as the student's row i.
        distance_weight: of the distance term; 0 skips it. The paper: 1 in metric learning, 25 in classification.
        angle_weight: of the angle term; 0 skips it, and its cubic cost. The paper: 2 and 50.
        reduction: ``"mean"``, ``"tuple_mean"``, ``"sum"`` or ``"anchor"``, as in the two losses, for both terms.
        huber_delta: where either loss turns from quadratic to linear; positive.
        impl: the kernel, as in `rkd_distance_loss`.
        pairs: ``(from, to)`` of the distance term, as in `rkd_distance_loss`.
        triplets: ``(vertex, arm, arm)`` of the angle term, as in `rkd_angle_loss`.
        anchors: number or share of the vertices of the angle term, as in `rkd_angle_loss`; the distance term still
            has all rows.
        gather: as in `rkd_distance_loss`; neither with ``pairs`` nor with ``triplets``, which name rows of one process.

    Returns:
        As `rkd_distance_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as `rkd_distance_loss`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> rkd_da_loss(student, teacher)  # 0.0972 + 2 * 0.1393
        tensor(0.3757)
    """
    options = Options(distance_weight, angle_weight, reduction, huber_delta, impl, pairs, triplets, anchors, gather)
    return _loss("rkd_da_loss", student, teacher, options)


@dataclass(frozen=True)
class Options:
    """How a loss is computed: the options of `rkd_da_loss`. A term whose weight is 0 is not computed."""

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
        """Raise in the name of a loss unless each option, but for index vectors, is one that it can have.

        Raises:
            TypeError: if an option has the wrong type.
            ValueError: if an option has a value that it cannot have, alone or beside the others.
        """
        numbers = {"distance_weight": self.distance_weight, "angle_weight": self.angle_weight}
        for option, value in numbers.items():
            if not abs(_number(name, option, value)) < math.inf:  # as torch.compile can trace it
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
                    f"{name}: expected anchors to be a number of rows, an integer from 1 on, or a share of them, a "
                    f"float above 0 and up to 1.0, got {self.anchors!r}"
                )
            if self.triplets is not None:
                raise ValueError(f"{name}: expected triplets or anchors, got both; triplets name their own vertices")
        if not isinstance(self.gather, bool) and not _is_group(self.gather):
            raise TypeError(f"{name}: expected gather to be True, False or a process group, got {self.gather!r}")
        if self.gather is not False and (self.pairs is not None or self.triplets is not None):
            raise ValueError(
                f"{name}: expected gather=False beside pairs or triplets, which name rows of this process alone, "
                f"got {self.gather!r}"
            )


def _number(name: str, option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        advice = "; a number in YAML has a point, as in 1.0e-4" if isinstance(value, str) else ""
        raise TypeError(f"{name}: expected {option} to be a number, got {value!r}{advice}")
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf


def _is_group(group: Any) -> bool:
    """Whether it is a process group, or what ``new_group`` returns to a process that is not in it."""
    distributed = torch.distributed
    return distributed.is_available() and (
        isinstance(group, distributed.ProcessGroup) or group == distributed.GroupMember.NON_GROUP_MEMBER
    )


class Terms(NamedTuple):
    """Both terms of a loss, times their weights: vectors ``(N,)`` in the precision of the kernel.

    Row i has the pairs that start there, or the triplets that have their vertex there. The vectors are what
    ``reduction="anchor"`` returns. With any other reduction, the loss is their sum.
    """

    distance: Tensor | None  # None if its weight is 0
    angle: Tensor | None
    zero: Tensor  # what both terms hold too: 0, connected to the student's graph, or NaN for a row that is not finite


def relation_terms(name: str, student: Tensor, teacher: Tensor, options: Options) -> Terms:
    """Both terms from one set of relations and, with ``gather``, from one exchange between processes.

    Args:
        name: of the loss, for error messages.
        student: as in `rkd_da_loss`.
        teacher: as in `rkd_da_loss`.
        options: as in `rkd_da_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as `rkd_da_loss`.
    """
    options.check(name)
    _check_batch(name, student, teacher)
    pairs = _indices(name, "pairs", options.pairs, 2, student)
    triplets = _indices(name, "triplets", options.triplets, 3, student)
    options = replace(options, pairs=pairs, triplets=triplets)
    kernel = choose(name, options.impl, student.device)
    student = differentiable(name, kernel, student)
    batch = _gather(name, student, teacher, options)
    if batch is not None:
        student, teacher = batch.student, batch.teacher
    teacher = teacher.detach()
    with _without_autocast(student.device.type):
        zero = (student * 0).sum(1, dtype=_wide(student)) + (teacher * 0).sum(1, dtype=_wide(student))
        if batch is None and options.anchors is None:
            distance, angle = _sums(kernel, student, teacher, options)
        else:
            distance, angle = _share_of_sums(kernel, student, teacher, options, batch)
        if distance is not None:
            distance = zero + _reduce(float(options.distance_weight) * distance, options.reduction, 2, pairs)
        if angle is not None:
            angle = zero + _reduce(float(options.angle_weight) * angle, options.reduction, 3, triplets)
    return Terms(distance, angle, zero)


def _loss(name: str, student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    terms = relation_terms(name, student, teacher, options)
    total = terms.zero
    for term in (terms.angle, terms.distance):
        total = total if term is None else total + term
    return (total if options.reduction == "anchor" else total.sum()).to(_wide(student))


def _gather(name: str, student: Tensor, teacher: Tensor, options: Options) -> GlobalBatch | None:
    if options.gather is False:
        return None
    from rkd_plugin import distributed  # not every build of PyTorch has it

    draws = options.anchors is not None
    batch: GlobalBatch | None = distributed.gather(name, student, teacher, options.gather, draws)
    return batch


def _without_autocast(device_type: str) -> Any:
    """Autocast would take Gram products and norms down to half precision, where close rows become equal."""
    # The meta device has none, and no way to ask for its absence.
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def _sums(
    kernel: ModuleType, student: Tensor, teacher: Tensor, options: Options, vertices: int | None = None
) -> Sequence[Tensor | None]:
    """Losses of distances ``(N,)`` and of angles ``(vertices,)``, summed over the tuples of each row."""
    ours, theirs = kernel.relations(student), kernel.relations(teacher)
    delta = float(options.huber_delta)
    # The angles first: what the distances keep for their gradient is then not there yet.
    angle = kernel.angle(ours, theirs, delta, options.triplets, vertices) if options.angle_weight else None
    distance = kernel.distance(ours, theirs, delta, options.pairs) if options.distance_weight else None
    return distance, angle


def _share_of_sums(
    kernel: ModuleType, student: Tensor, teacher: Tensor, options: Options, batch: GlobalBatch | None
) -> Sequence[Tensor | None]:
    """`_sums` of the vertices that ``anchors`` draws, ``(N,)`` both; each process computes its share of the rows."""
    rows = student.shape[0]  # len() would be a constant of an exported program
    everyone = torch.arange(rows, device=student.device)
    vertices = everyone if options.anchors is None else _draw(everyone, options.anchors, batch and batch.seed)
    own, starts = (vertices, everyone) if batch is None else (batch.share(vertices), batch.share(everyone))
    # A kernel's vertices are its first rows. Sorted, since torch.compile cannot know how many rows a mask selects.
    order = (everyone + rows).index_copy(0, own, everyone[: own.shape[0]]).argsort()
    place = order.argsort()  # of each row in that order
    if options.pairs is not None:
        options = replace(options, pairs=(place[options.pairs[0]], place[options.pairs[1]]))
    distance, angle = _sums(kernel, student[order], teacher[order], options, own.shape[0])
    if angle is not None:
        angle = pad(angle * (rows / max(vertices.shape[0], 1)), (0, rows - own.shape[0]))[place]
    if distance is not None:
        distance = torch.zeros_like(distance).index_add(0, starts, distance[place[starts]])
    return (distance, angle) if batch is None else batch.sum_terms(distance, angle)


def _draw(everyone: Tensor, anchors: float, seed: int | None) -> Tensor:
    """Some of the rows, without repetition."""
    rows = everyone.shape[0]
    number = int(anchors) if isinstance(anchors, Integral) else max(round(float(anchors) * rows), 1)
    if seed is None:
        return torch.randperm(rows, device=everyone.device)[:number]
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:number].to(everyone.device)


def _reduce(sums: Tensor, reduction: str, order: int, tuples: tuple[Tensor, ...] | None) -> Tensor:
    """Sums over the tuples of ``order`` rows that start at each row, divided as the reduction says."""
    if reduction == "sum":
        return sums
    rows = sums.shape[0]
    count = 1 if tuples is None else tuples[0].shape[0]
    if tuples is None:
        for i in range(order):  # not math.perm, which takes no size that torch.compile leaves open
            count *= rows - i if reduction == "tuple_mean" else rows
    sums = sums / max(count, 1)
    return sums * rows if reduction == "anchor" else sums


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_batch(name: str, student: Tensor, teacher: Tensor) -> None:
    for side, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected {side} to be a tensor, got {type(x).__name__}")
        _check_dense(name, side, x)
        if x.ndim != 2:
            raise ValueError(f"{name}: expected {side} to have shape (N, D), got {tuple(x.shape)}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{name}: expected one row per example in student and teacher, got {student.shape[0]} and "
            f"{teacher.shape[0]} rows"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{name}: expected student and teacher on one device, got {student.device} and {teacher.device}"
        )


def _check_dense(name: str, side: str, x: Tensor) -> None:
    kind = advice = None
    if hasattr(x, "full_tensor") or hasattr(x, "get_mask"):  # DTensor, MaskedTensor: no need to load their classes
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


def _indices(name: str, option: str, tuples: Any, number: int, student: Tensor) -> Any:
    """Index vectors as int64, all of them rows of ``student``."""
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
    rows = _known_rows(torch.stack([index.long() for index in tuples]), student.shape[0], f"{name}: expected {option}")
    return tuple(rows.unbind())


# An operator, since torch.compile cannot trace a check of values.
@torch.library.custom_op("rkd_plugin::known_rows", mutates_args=())
def _known_rows(indices: Tensor, rows: int, what: str) -> Tensor:
    # A CUDA graph cannot wait for values; it is captured after calls that could.
    if indices.numel() and not (indices.is_cuda and torch.cuda.is_current_stream_capturing()):
        low, high = (int(index) for index in indices.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{what} to name rows from 0 to {rows - 1}, got {low if low < 0 else high}")
    return indices.clone()


@_known_rows.register_fake
def _(indices: Tensor, rows: int, what: str) -> Tensor:
    return torch.empty_like(indices)
