"""Any relation, any penalty: the paper's general objective (equation 3) as one function.

``relational_loss`` checks its inputs and takes one of two ways: RKD-D and RKD-A go to the kernels of
`rkd_plugin.functional`, every other relation to ``rkd_plugin.kernels.potentials``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rkd_plugin.functional import draw, gathered, kernel_terms, number_of_tuples, reduce, wide, without_autocast
from rkd_plugin.kernels import reference
from rkd_plugin.kernels.choose import choose, differentiable
from rkd_plugin.kernels.neighbours import nearest
from rkd_plugin.kernels.pairwise import widen
from rkd_plugin.kernels.potentials import Relation, Selection, Side
from rkd_plugin.memory import RelationMemory
from rkd_plugin.options import (
    Gather,
    Impl,
    Options,
    Pairs,
    Reduction,
    RelationalOptions,
    Triplets,
    check_batch,
    checked_indices,
    warn_of_lost_distances,
)

if TYPE_CHECKING:
    from rkd_plugin.distributed import GlobalBatch

Potential = (
    Literal["identity", "distance", "squared_distance", "dot", "cosine", "gaussian", "angle"] | Callable[..., Tensor]
)
Penalty = Literal["huber", "mse", "l1", "kl", "js"] | Callable[[Tensor, Tensor], Tensor]
Scale = Literal["auto", "mean", "row_sum", "row_norm", "softmax"]
References = tuple[Tensor, Tensor] | RelationMemory

NO_LIMIT = 1e30  # of the Huber function, half of the square up to here; relations divided by their mean are at most N^2


def relational_loss(
    student: Tensor,
    teacher: Tensor,
    potential: Potential = "distance",
    penalty: Penalty = "huber",
    *,
    scale: Scale | None = "auto",
    temperature: float = 1.0,
    huber_delta: float = 1.0,
    neighbours: int | None = None,
    references: References | None = None,
    reduction: Reduction = "mean",
    pairs: Pairs | None = None,
    triplets: Triplets | None = None,
    anchors: float | None = None,
    gather: Gather = False,
    impl: Impl = "auto",
) -> Tensor:
    r"""The general relational loss: a penalty between relations of the student's rows and of the teacher's rows.

    .. math::
        \sum_{i_1, \ldots, i_n} \ell\bigl(\psi(s_{i_1}, \ldots, s_{i_n}),\ \psi(t_{i_1}, \ldots, t_{i_n})\bigr)

    No gradient flows to ``teacher``. What is in use, with ``s`` and ``t`` for student and teacher:

    ===================================  ===============================================================================
    method                               call
    ===================================  ===============================================================================
    RKD-D                                ``relational_loss(s, t)``
    RKD-A                                ``relational_loss(s, t, "angle")``
    SP, similarity preserving            ``relational_loss(s, t, "dot", "mse")``
    CC, bilinear                         ``relational_loss(s, t, "dot", "mse", scale=None)``
    CC, Gaussian, of unit rows           ``relational_loss(s, t, "gaussian", "mse", temperature=1 / (2 * gamma))``
    PKT                                  ``relational_loss(s, t, "cosine", "kl", scale="row_sum")``
    cosine Gram                          ``relational_loss(s, t, "cosine", "mse")``
    row softmax                          ``relational_loss(s, t, "cosine", "kl", scale="softmax", temperature=0.1)``
    SEED, CompRess                       the same with ``references=memory``, a `RelationMemory`
    CLIP affinity                        the same with ``references=(student_texts, teacher_texts)``
    MarginMSE                            a function of three rows, ``"mse"``, ``triplets=(query, positive, negative)``
    ICKD                                 ``relational_loss(s, t, "dot", "mse")``, channels as rows ``(B, N, D)``
    FitNet, embedding MSE                ``relational_loss(s, t, "identity", "mse")``
    distillation of logits               ``relational_loss(s, t, "identity", "kl", scale="softmax", temperature=4)``
    ===================================  ===============================================================================

    torchdistill's ``PKTLoss`` is this loss, and its ``SPKDLoss(reduction="batchmean")`` is SP with ``scale="row_sum"``,
    since it divides by sums of absolute values instead of lengths; ``ChSimLoss`` for B sets of N channels is ``N / B``
    times ICKD; ``CCKDLoss(reduction="batchmean")`` is the square root of the loss with
    ``reduction="sum"``, divided by ``N^2``.

    ==================  ==========================================================  ========  ==========================
    potential           relation                                                    "auto"    other scales
    ==================  ==========================================================  ========  ==========================
    identity            the row, and its loss is the mean over its entries          None      row_norm, softmax
    distance            Euclidean distance                                          mean      all; minus it in softmax
    squared_distance    its square                                                  mean      all; minus it in softmax
    dot                 dot product                                                 row_norm  None, row_sum, softmax
    cosine              cosine; ``(1 + cosine) / 2`` in row_sum                     None      row_sum, row_norm, softmax
    gaussian            ``exp(-distance^2 / (2 temperature))``                      None      all
    angle               cosine of the angle at ``i`` between the arms to j and k    None      none
    function of 1 row   number or row of numbers ``(E,)``, as for identity          None      all but mean
    function of 2       number                                                      None      all
    function of 3       number                                                      None      none
    ==================  ==========================================================  ========  ==========================

    Args:
        student: the student's embeddings, shape ``(N, D_s)``, float64, float32, float16 or bfloat16; or B sets of rows,
            ``(B, N, D_s)``, such as the tokens of each image: relations are within each set, and the loss is the mean
            over the sets (``"sum"``: their sum; ``"anchor"``: ``(B, N)``).
        teacher: the teacher's embeddings, shape ``(N, D_t)`` or ``(B, N, D_t)``, in any of these dtypes, on the
            student's device; row i is the same example as the student's row i.
        potential: a name of the table, or a function of 1, 2 or 3 rows. It gets tensors ``(..., D)`` whose other
            dimensions broadcast, in float32 at least, and returns one number for each tuple of rows. The number of its
            arguments without a default decides. Strips of rows are computed again in the backward pass, so that memory
            does not grow with the number of tuples.
        penalty: ``"huber"``, ``"mse"`` or ``"l1"``; ``"kl"``, the divergence of the student's row from the teacher's,
            or ``"js"``, both over rows that sum to 1 (scale ``"softmax"`` or ``"row_sum"``); or a function of
            ``(student_relations, teacher_relations)``, of the relations of some rows, that returns losses of their
            shape.
        scale: what relations are divided by: ``"mean"``, their mean over all pairs of distinct rows; ``"row_sum"``,
            the sum of the absolute values of each row; ``"row_norm"``, its Euclidean length; ``"softmax"`` of each
            row; None, nothing; or ``"auto"``, see the table. A row holds the relations of row i to all columns, itself
            included.
        temperature: of ``"softmax"`` (relations are divided by it), and of ``"gaussian"`` (its variance).
        huber_delta: the threshold between the quadratic and the linear part of the Huber function; positive.
        neighbours: k: only the relations of each row i to its k nearest rows in the teacher's space (of equal
            distances, those with the lowest index); for triples, both other rows are among these. Row scales are over
            these k, ``"mean"`` is over the whole batch. ``reduction="mean"`` divides by ``N (k + 1)`` or
            ``N (k + 1)^2``, as if the row itself were there with a loss of 0. ``k >= N - 1`` is the loss without
            ``neighbours``, bit by bit.
        references: ``(student_rows, teacher_rows)``, ``(M, D_s)`` and ``(M, D_t)``, or a `RelationMemory`: relations
            of each row of the batch to these rows, instead of the batch. Triples have their vertex in the batch and
            both other rows here. The student's part may have a gradient, except with ``gather``.
        reduction: ``"mean"`` over all entries, ``N^n`` of them; ``"tuple_mean"`` over tuples of distinct rows;
            ``"sum"``; ``"anchor"``, a vector ``(N,)`` with the loss of the tuples that start at row i; its mean equals
            ``"mean"``.
        pairs: ``(from, to)``, index vectors ``(P,)``, of a potential of two rows: only these pairs count, and the mean
            of the loss is over them. Scales are still over all pairs.
        triplets: index vectors ``(T,)`` of a potential of three rows: only these triplets count.
        anchors: the number or fraction of the rows that start tuples, drawn at random, as in `rkd_angle_loss`.
        gather: as in `rkd_distance_loss`; each process computes whole rows of relations. Not with sets, which are not
            related to each other, nor with ``pairs`` or ``triplets``. ``references`` must be the same on all processes.
        impl: as in `rkd_distance_loss`; ``"fused"`` computes RKD-D and RKD-A only. ``"reference"`` has all derivatives
            and needs memory for all tuples times the width.

    Returns:
        A scalar, or ``(N,)`` for ``"anchor"``, in the student's dtype, but at least float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `rkd_distance_loss`; also for a function of another number of rows, or a
            result of another shape.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0., 0.], [4., 0.], [0., 3.]])
        >>> student = torch.tensor([[0., 0.], [1., 0.], [2., 0.]])
        >>> relational_loss(student, teacher)  # RKD-D
        tensor(0.0972)
        >>> relational_loss(student, teacher, "dot", "mse")  # SP
        tensor(0.1463)
        >>> def margin(query, positive, negative):
        ...     return (query * positive).sum(-1) - (query * negative).sum(-1)
        >>> first = torch.tensor([1]), torch.tensor([2]), torch.tensor([0])
        >>> relational_loss(student, teacher, margin, "mse", triplets=first)  # 2 - 0 and 0 - 0
        tensor(4.)
    """
    options = RelationalOptions(
        reduction=reduction,
        huber_delta=huber_delta,
        impl=impl,
        pairs=pairs,
        triplets=triplets,
        anchors=anchors,
        gather=gather,
        potential=potential,
        penalty=penalty,
        scale=scale,
        temperature=temperature,
        neighbours=neighbours,
        references=references,
    )
    return checked_loss("relational_loss", student, teacher, options)


def checked_loss(name: str, student: Tensor, teacher: Tensor, options: RelationalOptions) -> Tensor:
    """`relational_loss` with its options in one object; errors begin with ``name``."""
    options.check(name)
    check_batch(name, student, teacher, sets=True)
    options = _fitted(name, student, teacher, options)
    kernel = choose(name, options.impl, student.device)
    student = differentiable(name, kernel, student)
    if options.references is not None:
        ours, theirs = options.references
        options = replace(options, references=(differentiable(name, kernel, ours), theirs.detach()))
    batch = gathered(name, student, teacher, options)
    if batch is not None:
        student, teacher = batch.student, batch.teacher
    teacher = teacher.detach()
    with without_autocast(student.device.type):
        zero = (student * 0).sum(-1, dtype=wide(student)) + (teacher * 0).sum(-1, dtype=wide(student))
        for rows in options.references or ():
            zero = zero + (rows * 0).sum(dtype=wide(student))
        losses = zero + _row_losses(name, kernel, student, teacher, options, batch)
    if options.reduction == "anchor":
        return losses.to(wide(student))
    sets = student.shape[0] if student.ndim == 3 and options.reduction != "sum" else 1
    return (losses.sum() / max(sets, 1)).to(wide(student))


def _fitted(name: str, student: Tensor, teacher: Tensor, options: RelationalOptions) -> RelationalOptions:
    """The options with checked index vectors and references."""
    if student.ndim == 3 and options.gather is not False:
        raise ValueError(
            f"{name}: expected gather=False with sets of rows (B, N, D), which are not related to each other, got "
            f"{options.gather!r}"
        )
    if options.potential == "identity" and student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"{name}: expected rows of one width for potential 'identity', got {student.shape[-1]} and "
            f"{teacher.shape[-1]}; project the student to the teacher's width"
        )
    if student.ndim == 2 and options.potential in ("distance", "angle"):
        warn_of_lost_distances(name, student, teacher)
    first = student.transpose(0, -2)  # as many as the rows of a set
    pairs = checked_indices(name, "pairs", options.pairs, 2, first)
    triplets = checked_indices(name, "triplets", options.triplets, 3, first)
    references = options.references
    if isinstance(references, RelationMemory):
        references = references.references
    if references is not None:
        if not isinstance(references, tuple | list) or len(references) != 2:
            raise TypeError(
                f"{name}: expected references to be (student_rows, teacher_rows) or a RelationMemory, got "
                f"{type(references).__name__}"
            )
        check_batch(name, references[0], references[1], what=" references")
        for side, rows, x in zip(("student", "teacher"), references, (student, teacher), strict=True):
            if rows.device != x.device or (rows.shape[0] and rows.shape[1] != x.shape[-1]):
                raise ValueError(
                    f"{name}: expected {side} references of width {x.shape[-1]} on {x.device}, got width "
                    f"{rows.shape[1]} on {rows.device}"
                )
        if options.gather is not False and references[0].requires_grad:
            raise ValueError(
                f"{name}: expected references without a gradient for gather, which must be the same on all "
                "processes, got one with a gradient; detach them"
            )
        # An empty memory has no width yet.
        references = tuple(
            rows if rows.shape[0] else x.new_zeros(0, x.shape[-1])
            for rows, x in zip(references, (student, teacher), strict=True)
        )
    return replace(options, pairs=pairs, triplets=triplets, references=references)


def _row_losses(
    name: str,
    kernel: ModuleType,
    student: Tensor,
    teacher: Tensor,
    options: RelationalOptions,
    batch: GlobalBatch | None,
) -> Tensor:
    """``(..., N)``: the loss of the tuples that start at each row, divided by the number of the reduction."""
    own, rows = options.references is None, student.shape[-2]
    columns = rows if options.references is None else options.references[0].shape[0]
    if options.neighbours is not None and options.neighbours >= columns - own:
        options = replace(options, neighbours=None)
    by_kernel = (
        (options.potential, options.chosen_scale) in (("distance", "mean"), ("angle", None))
        and options.penalty in ("huber", "mse")
        and own
        and options.neighbours is None
        and not (options.potential == "distance" and options.anchors is not None)
    )
    if options.impl == "fused" and not by_kernel:
        raise RuntimeError(f"{name}: expected RKD-D or RKD-A for impl 'fused', got another relation; use impl='auto'")
    if student.ndim == 3 and (by_kernel or options.order == 3 or options.neighbours):
        sets = [_row_losses(name, kernel, s, t, options, batch) for s, t in zip(student, teacher, strict=True)]
        return torch.stack(sets) if sets else student.new_zeros(student.shape[:-1], dtype=wide(student))
    if by_kernel:
        return _by_kernel(kernel, student, teacher, options, batch)
    sums = _sums(kernel, student, teacher, options, batch)
    if options.neighbours is not None:
        columns = options.neighbours + own
    tuples = options.pairs or options.triplets
    count = number_of_tuples(options.order, rows, columns, options.reduction, tuples, own)
    return reduce(sums, options.reduction, count)


def _by_kernel(
    kernel: ModuleType, student: Tensor, teacher: Tensor, options: RelationalOptions, batch: GlobalBatch | None
) -> Tensor:
    """``(N,)``: RKD-D or RKD-A; the Huber function of a large threshold is half of the square."""
    square = options.penalty == "mse"
    weight, is_distance = 2.0 if square else 1.0, options.potential == "distance"
    rkd = Options(
        distance_weight=weight if is_distance else 0.0,
        angle_weight=0.0 if is_distance else weight,
        reduction=options.reduction,
        huber_delta=NO_LIMIT if square else options.huber_delta,
        pairs=options.pairs,
        triplets=options.triplets,
        anchors=options.anchors,
    )
    distance, angle = kernel_terms(kernel, student, teacher, rkd, batch)
    term = distance if is_distance else angle
    assert term is not None
    return term


def _sums(
    kernel: ModuleType, student: Tensor, teacher: Tensor, options: RelationalOptions, batch: GlobalBatch | None
) -> Tensor:
    """``(..., N)``: any relation, summed over the tuples of each row; each process computes its share of the rows."""
    rows = student.shape[-2]
    all_rows = torch.arange(rows, device=student.device)
    starts = all_rows if options.anchors is None else draw(all_rows, options.anchors, batch and batch.seed)
    share = starts if batch is None else batch.share(starts)
    relation = Relation(
        potential=options.potential,
        penalty=options.penalty,
        scale=options.chosen_scale,
        temperature=float(options.temperature),
        huber_delta=float(options.huber_delta),
        exact=kernel is reference,
    )
    sides, dtype = [], relation.dtype(student, teacher)
    for x, others in zip((student, teacher), options.references or (None, None), strict=True):
        x = widen(x, dtype)
        sides.append(Side(x, x if others is None else widen(others, dtype).expand(*x.shape[:-2], *others.shape)))
    ours, theirs = sides
    found = None
    if options.neighbours is not None:
        columns = None if options.references is None else theirs.columns
        found = nearest(theirs.rows, share, columns, options.neighbours)
    chosen = Selection(
        rows=share,
        own=options.references is None,
        distinct=options.reduction == "tuple_mean",
        nearest=found,
        pairs=options.pairs,
        triplets=options.triplets,
    )
    sums = relation.sums(ours, theirs, chosen)
    if options.anchors is not None:
        sums = sums * (rows / max(starts.shape[0], 1))
    if options.anchors is not None or batch is not None:
        sums = sums.new_zeros(*sums.shape[:-1], rows).index_add(-1, share, sums)
    return sums if batch is None else batch.sum(sums)
