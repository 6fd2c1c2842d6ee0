"""Relational knowledge distillation as functions of two batches of embeddings.

The student need not copy the teacher's embeddings, only the *relations* among the N rows of a batch: their pairwise
distances (RKD-D) and the angles of their triplets (RKD-A). Both losses ignore translation, rotation and uniform scaling
of either side, and student and teacher may have different widths.

This file documents the losses and combines their steps. `rkd_plugin.options` checks the inputs, ``rkd_plugin.kernels``
does the arithmetic, and `rkd_plugin.distributed` gathers the batches of several processes.

Reference: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from numbers import Integral
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rkd_plugin.kernels.choose import choose, differentiable
from rkd_plugin.kernels.pairwise import widest
from rkd_plugin.options import (
    Gather,
    Impl,
    Options,
    Pairs,
    Reduction,
    Triplets,
    check_batch,
    checked_indices,
    warn_of_lost_distances,
)

if TYPE_CHECKING:
    from rkd_plugin.distributed import GlobalBatch


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
    function. The default takes the mean over all :math:`N^2` pairs, including the zero diagonal, as the authors' code
    does; their published weights are for this mean. No gradient flows to ``teacher``. The gradient between two equal
    rows is 0, since no direction separates them: a student whose rows are all equal does not learn, so watch their
    spread.

    Args:
        student: the student's embeddings, shape ``(N, D_s)``, float64, float32, float16 or bfloat16.
        teacher: the teacher's embeddings, shape ``(N, D_t)``, in any of these dtypes, on the student's device; row i is
            the same example as the student's row i.
        reduction: ``"mean"`` over all ``N^2`` entries; ``"tuple_mean"`` over the ``N (N - 1)`` pairs of distinct rows,
            so that a weight means the same at every batch size; ``"sum"``, the paper's equation; ``"anchor"``, a
            vector ``(N,)`` with the loss of the pairs that start at row i; its mean equals ``"mean"``.
        huber_delta: the threshold between the quadratic and the linear part of the Huber function; positive.
        impl: the kernel: ``"reference"``, ``"chunked"``, ``"fused"``, or ``"auto"``, which takes ``"fused"`` for CUDA
            tensors if Triton is installed and ``"chunked"`` otherwise. Second derivatives and the transforms of
            ``torch.func`` need ``"reference"``, and a loss that is not compiled: PyTorch gives a wrong second
            derivative of any compiled function, without an error.
        pairs: ``(from, to)``, index vectors ``(P,)``, int64 or int32: only these pairs count, and the mean of the loss
            is over them. The mean distance :math:`\mu` is still over the whole batch.
        gather: True, or a process group: the loss is over the batches of all processes of ``torch.distributed``, or of
            the group, and ``N`` is the number of all their rows. Every process must call this function and the backward
            pass; every process gets the same value. Gradients are right for ``DistributedDataParallel``, see
            `rkd_plugin.distributed`.

    Returns:
        A scalar, or ``(N,)`` for ``"anchor"``, in the student's dtype, but at least float32.

    Raises:
        TypeError: if an input is not a dense floating-point tensor, an option has the wrong type, or indices are not
            integers.
        ValueError: if a batch is not 2-D, the numbers of rows or the devices differ, an option has an invalid value, or
            an index is out of range.
        RuntimeError: if ``impl`` is ``"fused"`` and cannot run here; if ``gather`` finds no process group; or if a
            second derivative or a transform of ``torch.func`` is requested of a kernel other than ``"reference"``.

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
    and its cosines are 0. ``"chunked"`` and ``"fused"`` need ``O(N^2)`` memory, ``"reference"`` needs ``O(N^3)``.

    Args:
        student: the student's embeddings, shape ``(N, D_s)``, float64, float32, float16 or bfloat16.
        teacher: the teacher's embeddings, shape ``(N, D_t)``, in any of these dtypes, on the student's device; row i is
            the same example as the student's row i.
        reduction: ``"mean"`` over all ``N^3`` entries; ``"tuple_mean"`` over the ``N (N - 1) (N - 2)`` triplets of
            distinct rows; ``"sum"``, the paper's equation; ``"anchor"``, a vector ``(N,)`` with the loss of the
            triplets that have their vertex at row i; its mean equals ``"mean"``.
        huber_delta: the threshold between the quadratic and the linear part of the Huber function; positive.
        impl: the kernel, as in `rkd_distance_loss`.
        triplets: ``(vertex, arm, arm)``, index vectors ``(T,)``, int64 or int32: only these triplets count, and the
            mean of the loss is over them.
        anchors: the number of rows (an integer), or the fraction of them (a float up to 1), that are vertices. Each
            call draws them at random with PyTorch's generator, and weights them so that the expected loss is the loss
            over all vertices. The cubic cost falls by the same fraction.
        gather: as in `rkd_distance_loss`; not together with ``triplets``, which name rows of one process.

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
    """The weighted sum of `rkd_distance_loss` and `rkd_angle_loss` (RKD-DA), with the distances computed once.

    Args:
        student: the student's embeddings, shape ``(N, D_s)``, float64, float32, float16 or bfloat16.
        teacher: the teacher's embeddings, shape ``(N, D_t)``, in any of these dtypes, on the student's device; row i is
            the same example as the student's row i.
        distance_weight: of the distance term; 0 skips it. The paper has 1 in metric learning, 25 in classification.
        angle_weight: of the angle term; 0 skips it, and its cubic cost. The paper has 2 and 50.
        reduction: of both terms: ``"mean"``, ``"tuple_mean"``, ``"sum"`` or ``"anchor"``, as in the two losses.
        huber_delta: of both terms, as in `rkd_distance_loss`.
        impl: the kernel, as in `rkd_distance_loss`.
        pairs: ``(from, to)`` of the distance term, as in `rkd_distance_loss`.
        triplets: ``(vertex, arm, arm)`` of the angle term, as in `rkd_angle_loss`.
        anchors: the number or fraction of the rows that are vertices of the angle term, as in `rkd_angle_loss`; the
            distance term uses all rows.
        gather: as in `rkd_distance_loss`; not together with ``pairs`` or ``triplets``, which name rows of one process.

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


class Terms(NamedTuple):
    """Both terms of a loss, times their weights: vectors ``(N,)`` in the precision of the kernel.

    Entry i is the loss of the pairs that start at row i, or of the triplets that have their vertex there. The vectors
    are what ``reduction="anchor"`` returns. With any other reduction, the loss is their sum.
    """

    distance: Tensor | None  # None if its weight is 0
    angle: Tensor | None
    zero: Tensor | None  # of both weights 0: zeros, connected to the student's graph, or NaN for rows not finite


def relation_terms(name: str, student: Tensor, teacher: Tensor, options: Options) -> Terms:
    """Both terms from one computation of the relations and, with ``gather``, from one exchange between processes.

    Args:
        name: of the loss, for error messages.
        student: as in `rkd_da_loss`.
        teacher: as in `rkd_da_loss`.
        options: as in `rkd_da_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as `rkd_da_loss`.
    """
    options.check(name)
    check_batch(name, student, teacher)
    warn_of_lost_distances(name, student, teacher)
    pairs = checked_indices(name, "pairs", options.pairs, 2, student)
    triplets = checked_indices(name, "triplets", options.triplets, 3, student)
    options = replace(options, pairs=pairs, triplets=triplets)
    kernel = choose(name, options.impl, student.device)
    student = differentiable(name, kernel, student)
    batch = gathered(name, student, teacher, options)
    if batch is not None:
        student, teacher = batch.student, batch.teacher
    teacher = teacher.detach()
    with without_autocast(student.device.type):
        if not options.distance_weight and not options.angle_weight:
            return Terms(None, None, _zero(student, teacher))
        distance, angle = kernel_terms(kernel, student, teacher, options, batch)
    return Terms(distance, angle, None)


def _loss(name: str, student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    terms = [term for term in relation_terms(name, student, teacher, options) if term is not None]
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return (total if options.reduction == "anchor" else total.sum()).to(wide(student))


def gathered(name: str, student: Tensor, teacher: Tensor, options: Options) -> GlobalBatch | None:
    """The rows of all processes for ``gather``; None without it."""
    if options.gather is False:
        return None
    from rkd_plugin import distributed  # not every build of PyTorch has it

    draws = options.anchors is not None
    batch: GlobalBatch | None = distributed.gather(name, student, teacher, options.gather, draws)
    return batch


def without_autocast(device_type: str) -> Any:
    """Disable autocast: Gram matrices and norms in half precision make close rows equal."""
    # The meta device has no autocast to disable.
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def kernel_terms(
    kernel: ModuleType, student: Tensor, teacher: Tensor, options: Options, batch: GlobalBatch | None
) -> Sequence[Tensor | None]:
    """Both terms, as `Terms` describes them, from gathered rows."""
    if batch is None and options.anchors is None:
        return _sums(kernel, student, teacher, options, _weights(student, options))
    return _sums_of_vertices(kernel, student, teacher, options, batch)


def _zero(student: Tensor, teacher: Tensor) -> Tensor:
    """``(N,)``: 0, connected to the student's graph, or NaN for a row that is not finite."""
    return (student * 0).sum(1, dtype=wide(student)) + (teacher * 0).sum(1, dtype=wide(student))


def _weights(student: Tensor, options: Options) -> tuple[Tensor | None, Tensor | None]:
    """The weights of the rows in both terms, from the term's weight and the reduction; None for a weight of 0."""

    def weights(weight: float, order: int, tuples: tuple[Tensor, ...] | None) -> Tensor | None:
        if not weight:
            return None
        rows, share = student.shape[0], float(weight)
        if options.reduction != "sum":
            share = share / max(number_of_tuples(order, rows, rows, options.reduction, tuples), 1)
        share = share * rows if options.reduction == "anchor" else share
        return student.new_full(student.shape[:1], share, dtype=widest(student))

    return weights(options.distance_weight, 2, options.pairs), weights(options.angle_weight, 3, options.triplets)


def _sums(
    kernel: ModuleType,
    student: Tensor,
    teacher: Tensor,
    options: Options,
    weights: tuple[Tensor | None, Tensor | None],
) -> Sequence[Tensor | None]:
    """Losses of distances ``(N,)`` and of angles ``(V,)``, summed over the tuples of each row, times its weight."""
    delta, (of_distance, of_angle) = float(options.huber_delta), weights
    if options.pairs is None and options.triplets is None and hasattr(kernel, "sums"):
        found: Sequence[Tensor | None] = kernel.sums(student, teacher, delta, of_distance, of_angle)
        return found
    ours, theirs, zero = kernel.relations(student), kernel.relations(teacher), _zero(student, teacher)
    distance = angle = None
    # The angles first, before the distances save tensors for their gradient: this lowers the peak memory.
    if of_angle is not None:
        vertices = of_angle.shape[0]
        angle = zero[:vertices] + of_angle * kernel.angle(ours, theirs, delta, options.triplets, vertices)
    if of_distance is not None:
        distance = zero + of_distance * kernel.distance(ours, theirs, delta, options.pairs)
    return distance, angle


def _sums_of_vertices(
    kernel: ModuleType, student: Tensor, teacher: Tensor, options: Options, batch: GlobalBatch | None
) -> Sequence[Tensor | None]:
    """`_sums` of the vertices that ``anchors`` draws, both ``(N,)``; each process computes its share of the rows."""
    rows = student.shape[0]
    all_rows = torch.arange(rows, device=student.device)
    vertices = all_rows if options.anchors is None else draw(all_rows, options.anchors, batch and batch.seed)
    own, starts = (vertices, all_rows) if batch is None else (batch.share(vertices), batch.share(all_rows))
    # The vertices of a kernel are its first rows. argsort, since torch.compile cannot trace the size of a mask.
    order = (all_rows + rows).index_copy(0, own, all_rows[: own.shape[0]]).argsort()
    place = order.argsort()  # of each row in that order
    if options.pairs is not None:
        options = replace(options, pairs=(place[options.pairs[0]], place[options.pairs[1]]))
    of_distance, of_angle = _weights(student, options)
    if of_angle is not None:
        of_angle = of_angle[: own.shape[0]] * (rows / max(vertices.shape[0], 1))
    if of_distance is not None:
        of_distance = torch.zeros_like(of_distance).index_copy(0, place[starts], of_distance[: starts.shape[0]])
    distance, angle = _sums(kernel, student[order], teacher[order], options, (of_distance, of_angle))
    if angle is not None:
        angle = pad(angle, (0, rows - own.shape[0]))[place]
    if distance is not None:
        distance = distance[place]
    return (distance, angle) if batch is None else batch.sum_terms(distance, angle)


def draw(all_rows: Tensor, anchors: float, seed: int | None) -> Tensor:
    """A random choice of rows for ``anchors``, without repetition."""
    rows = all_rows.shape[0]
    number = int(anchors) if isinstance(anchors, Integral) else max(round(float(anchors) * rows), 1)
    if seed is None:
        return torch.randperm(rows, device=all_rows.device)[:number]
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:number].to(all_rows.device)


def number_of_tuples(
    order: int, rows: int, columns: int, reduction: str, tuples: tuple[Tensor, ...] | None = None, own: bool = True
) -> int:
    """The number that a reduction divides by.

    Args:
        order: the number of rows of a tuple: one that starts it, and ``order - 1`` columns.
        rows: that start a tuple.
        columns: that each of them is related to.
        reduction: ``"tuple_mean"`` counts tuples of distinct rows only.
        tuples: index vectors, if only these tuples count.
        own: whether the row itself is one of its columns.
    """
    if tuples is not None:
        return tuples[0].shape[0]
    count = rows
    for i in range(order - 1):  # not math.perm, which does not accept a symbolic size of torch.compile
        # Not in place, since a size is a tensor while a function is traced.
        count = count * (columns - (i + own if reduction == "tuple_mean" else 0))
    return count


def reduce(sums: Tensor, reduction: str, count: int) -> Tensor:
    """Divide the sums ``(..., N)`` over the tuples that start at each row by the number of the reduction."""
    if reduction == "sum":
        return sums
    sums = sums / max(count, 1)
    return sums * sums.shape[-1] if reduction == "anchor" else sums


def wide(x: Tensor) -> torch.dtype:
    """The dtype of a loss: that of ``x``, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
