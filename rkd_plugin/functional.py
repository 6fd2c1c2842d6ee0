"""Relational knowledge distillation as functions of two embedding batches.

The student need not copy the teacher's embeddings, only the *relations* among the N items of a batch: their pairwise
distances (RKD-D) and the angles of their triplets (RKD-A). Both losses ignore translation, rotation and uniform scaling
of either side, and student and teacher may have different widths.

Everything here is documentation, input checks and a choice of kernel; the arithmetic is in ``rkd_plugin.kernels``.

Reference: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019.
"""

from __future__ import annotations

import math
import weakref
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args

import torch
from torch import Tensor

from rkd_plugin.kernels.choose import choose, differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["mean", "tuple_mean", "sum", "anchor"]
Impl = Literal["auto", "reference", "chunked", "fused"]
Pairs = tuple[Tensor, Tensor]
Triplets = tuple[Tensor, Tensor, Tensor]
Gather = Union[bool, "ProcessGroup"]


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
    default; their published weights belong to it. No gradient flows to ``teacher``, and none to a student that has
    collapsed, whose rows are all equal: no direction parts them, so watch their spread.

    Args:
        student: embeddings that learn, shape ``(N, D_s)``, floating point.
        teacher: embeddings to imitate, shape ``(N, D_t)``, floating point, on the same device; row i belongs to row i.
            The same tensor given to another loss is not looked at again; on a GPU, where a replayed CUDA graph may have
            written to it unseen, a ``clone()`` is.
        reduction: ``"mean"`` over all ``N^2`` entries; ``"tuple_mean"`` over the ``N (N - 1)`` pairs of distinct rows,
            so that a weight means the same at every batch size; ``"sum"``, the paper's equation; ``"anchor"``, a
            vector ``(N,)`` with the loss of the pairs that start at row i, its mean equal to ``"mean"``.
        huber_delta: where the loss turns from quadratic to linear; positive.
        impl: the kernel: ``"reference"``, ``"chunked"``, ``"fused"``, or ``"auto"``, which takes ``"fused"`` for CUDA
            tensors where Triton is installed and ``"chunked"`` everywhere else.
        pairs: ``(from, to)``, index vectors ``(P,)``: only these pairs count, and means are over them. The mean
            distance still runs over the whole batch.
        gather: whether the batch is that of all processes of ``torch.distributed``, or of a process group. Each of
            them calls this and the backward pass, has the value of the whole batch, and ``N`` is its size; its
            gradient is right for `DistributedDataParallel`, see `rkd_plugin.distributed`.

    Returns:
        A scalar, or ``(N,)`` for ``"anchor"``, in the student's dtype, or float32 where that is narrower.

    Raises:
        TypeError: if an input is no floating point tensor.
        ValueError: if a batch is not 2-D, the row counts or devices differ, or an option is unknown.
        RuntimeError: if ``impl`` is ``"fused"`` and cannot run here, or ``gather`` finds no processes.

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
    options = (reduction, huber_delta, impl, pairs, None, None, gather)
    return _losses("rkd_distance_loss", student, teacher, 1.0, 0.0, *options)


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

    with the vertex at row i. A triplet that names a row twice adds 0; an arm between two equal rows has no direction,
    and its cosines are 0 on that side. ``"chunked"`` and ``"fused"`` need ``O(N^2)`` memory, whatever the width of the
    embeddings.

    Args:
        student: embeddings that learn, shape ``(N, D_s)``, floating point.
        teacher: embeddings to imitate, shape ``(N, D_t)``, floating point, on the same device; row i belongs to row i.
        reduction: as in `rkd_distance_loss`, over ``N^3`` entries or ``N (N - 1) (N - 2)`` triplets of distinct rows;
            ``"anchor"`` holds the loss of the triplets that have their vertex at row i.
        huber_delta: where the loss turns from quadratic to linear; positive.
        impl: as in `rkd_distance_loss`.
        triplets: ``(vertex, arm, arm)``, index vectors ``(T,)``: only these triplets count, and means are over them.
        anchors: how many rows (an integer) or which share of them (a float up to 1) are vertices: drawn anew in each
            call by PyTorch's generator, and weighted so that the expected loss is that of all. So is the cubic cost.
        gather: as in `rkd_distance_loss`.

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
    options = (reduction, huber_delta, impl, None, triplets, anchors, gather)
    return _losses("rkd_angle_loss", student, teacher, 0.0, 1.0, *options)


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
        student: embeddings that learn, shape ``(N, D_s)``, floating point.
        teacher: embeddings to imitate, shape ``(N, D_t)``, floating point, on the same device; row i belongs to row i.
        distance_weight: of the distance term; 0 skips it. The paper: 1 in metric learning, 25 in classification.
        angle_weight: of the angle term; 0 skips it, and its cubic cost. The paper: 2 and 50.
        reduction: as in `rkd_distance_loss`, for both terms.
        huber_delta: where either loss turns from quadratic to linear; positive.
        impl: as in `rkd_distance_loss`.
        pairs: as in `rkd_distance_loss`.
        triplets: as in `rkd_angle_loss`.
        anchors: as in `rkd_angle_loss`; distances are between all rows nevertheless.
        gather: as in `rkd_distance_loss`.

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
    options = (reduction, huber_delta, impl, pairs, triplets, anchors, gather)
    return _losses("rkd_da_loss", student, teacher, distance_weight, angle_weight, *options)


def _losses(
    name: str,
    student: Tensor,
    teacher: Tensor,
    distance_weight: float,
    angle_weight: float,
    reduction: str,
    huber_delta: float,
    impl: str,
    pairs: Pairs | None,
    triplets: Triplets | None,
    anchors: float | None,
    gather: Gather,
) -> Tensor:
    _check(name, student, teacher, reduction, huber_delta, impl)
    _check_choices(name, pairs, triplets, anchors, gather)
    kernel = choose(name, impl, student.device)
    student = differentiable(name, kernel, student)
    dtype = torch.promote_types(student.dtype, torch.float32)
    batch = own = None
    if gather is not False:
        from rkd_plugin import distributed

        batch = distributed.gather(name, student, teacher, gather, draws=anchors is not None)
    if batch is not None:
        student, teacher = batch.student, batch.teacher
    rows = len(student)
    # Autocast would take the Gram products and norms down to half precision, where close rows become equal.
    with torch.autocast(student.device.type, enabled=False):
        # Zero, connected to the graph, and not a number where a lone row is not.
        total = (student * 0).sum(1, dtype=dtype) + (teacher.detach() * 0).sum(1, dtype=dtype)
        if batch is not None or anchors is not None:
            everyone = torch.arange(rows, device=student.device)
            vertices = everyone if anchors is None else _draw(everyone, anchors, batch and batch.seed)
            own, starts = (vertices, everyone) if batch is None else (batch.share(vertices), batch.share(everyone))
            others = torch.ones_like(everyone, dtype=torch.bool).index_fill(0, own, False)
            order = torch.cat([own, everyone[others]])  # a kernel's vertices are its first rows
            student, teacher = student[order], teacher[order]
        ours, theirs = kernel.relations(student), _teacher_relations(kernel, teacher)
        # The angles first: what the distances keep for their gradient is then not there yet.
        if angle_weight:
            sums = kernel.angle(ours, theirs, huber_delta, triplets, None if own is None else len(own))
            if own is not None:
                sums = sums.new_zeros(rows).index_add(0, own, sums * (rows / max(len(vertices), 1)))
            total = total + angle_weight * sums / _count(reduction, rows, 3, triplets)
        if distance_weight:
            sums = kernel.distance(ours, theirs, huber_delta, pairs)
            if own is not None:
                sums = torch.zeros_like(sums).index_add(0, order, sums)
                sums = torch.zeros_like(sums).index_add(0, starts, sums[starts])
            total = total + distance_weight * sums / _count(reduction, rows, 2, pairs)
        if batch is not None:
            total = batch.sum(total)
        return (total * rows if reduction == "anchor" else total.sum()).to(dtype)


def _draw(rows: Tensor, anchors: float, seed: int | None) -> Tensor:
    """Some of ``rows``, without repetition."""
    number = anchors if isinstance(anchors, int) else max(round(anchors * len(rows)), 1)
    if seed is None:
        return torch.randperm(len(rows), device=rows.device)[:number]
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return drawn[:number].to(rows.device)


class _Kept(NamedTuple):
    teacher: weakref.ref[Tensor]
    version: int
    values: Tensor | None  # a copy, on a CPU
    kernel: ModuleType
    relations: Any

    def serves(self, kernel: ModuleType, teacher: Tensor) -> bool:
        if self.teacher() is not teacher or self.version != teacher._version or self.kernel is not kernel:
            return False
        # NumPy and other processes write without a new version. Asking a GPU would wait for it.
        return self.values is None or torch.equal(self.values, teacher)


_KEPT: list[_Kept] = []  # of the last teacher, or nothing


def _teacher_relations(kernel: ModuleType, teacher: Tensor) -> Any:
    """``kernel.relations``, kept for the next loss of the same tensor, as long as that lives and is not written to."""
    # Where the tensor tells no version, or what is computed now may be replayed or saved later, nothing is kept.
    passing = torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or teacher.is_inference()
    if passing or (teacher.is_cuda and torch.cuda.is_current_stream_capturing()):
        return kernel.relations(teacher.detach())
    for kept in _KEPT:
        if kept.serves(kernel, teacher):
            return kept.relations
    relations = kernel.relations(teacher.detach())

    def forget(reference: weakref.ref[Tensor]) -> None:
        _KEPT[:] = [kept for kept in _KEPT if kept.teacher is not reference]

    values = None if teacher.is_cuda else teacher.detach().clone()
    _KEPT[:] = [_Kept(weakref.ref(teacher, forget), teacher._version, values, kernel, relations)]
    return relations


def _count(reduction: str, rows: int, order: int, tuples: tuple[Tensor, ...] | None) -> int:
    """How many tuples of ``order`` rows a reduction divides by."""
    if reduction == "sum":
        return 1
    if tuples is not None:
        return max(len(tuples[0]), 1)
    return max(math.perm(rows, order) if reduction == "tuple_mean" else rows**order, 1)


def _check_choices(
    name: str, pairs: Pairs | None, triplets: Triplets | None, anchors: float | None, gather: Gather
) -> None:
    if anchors is not None:
        whole = isinstance(anchors, int) and not isinstance(anchors, bool) and anchors >= 1
        if not whole and not (isinstance(anchors, float) and 0 < anchors <= 1):
            raise ValueError(
                f"{name}: anchors must be a number of rows, at least 1, or a share of them, above 0 and up to 1.0, "
                f"got {anchors!r}"
            )
        if triplets is not None:
            raise ValueError(f"{name}: triplets name their vertices, so anchors must not be given with them")
    if gather is not False and (pairs is not None or triplets is not None):
        raise ValueError(f"{name}: pairs and triplets name rows of this process, so gather must be False with them")


def _check(name: str, student: Tensor, teacher: Tensor, reduction: str, huber_delta: float, impl: str) -> None:
    for side, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {side} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: {side} must be floating point, got {x.dtype}")
        if x.ndim != 2:
            raise ValueError(f"{name}: {side} must have shape (N, D), got {tuple(x.shape)}")
    if len(student) != len(teacher):
        raise ValueError(
            f"{name}: student and teacher must have one row per example, got {len(student)} and {len(teacher)} rows"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"{name}: student and teacher must be on one device, got {student.device} and {teacher.device}"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"{name}: reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if impl not in get_args(Impl):
        raise ValueError(f"{name}: impl must be one of {get_args(Impl)}, got {impl!r}")
    if not huber_delta > 0:
        raise ValueError(f"{name}: huber_delta must be positive, got {huber_delta!r}")
