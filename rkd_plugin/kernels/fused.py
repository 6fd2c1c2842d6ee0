"""Triton on a GPU, in ``O(N^2)`` memory: squared distances, and all cosines with their gradient, in one kernel each.

A triangle i, j, k has three angles, which depend on the same three distances. A program computes a tile of pairs i < j
in a loop over all k: it adds the angles at i and at j to the losses of these vertices, and all three to the gradient of
the distance between i and j. With h = D / 2, r = 1 / sqrt(D), or 0 where D = 0, and W the slope of the Huber loss:

    cos_i = (h_ij + h_ik - h_jk) * r_ij * r_ik                     likewise cos_j and cos_k
    dL/dD_ij = sum_k W_i r_ij r_ik + W_j r_ij r_jk - W_k r_ik r_jk - r_ij^2 (W_i cos_i + W_j cos_j)

The sums of a program stay in registers: there are no atomics, and the same input gives the same bits in every run. The
price is that a cosine is computed three times, once for each side of its triangle. Tile sizes are fixed for the same
reason: others would change the order of the sums. Index tuples, which PyTorch computes, are reproducible only under
``torch.use_deterministic_algorithms``.

The numerator cancels if one side is much shorter than the others. Unless the input is float64, h is therefore split
into whole steps of about 2^-23 of the largest, whose sums are exact in float32, and the rest, whose sums are rounded to
2^-47 of the largest. For a tile that needs more digits (`APART`), a second launch of the kernel computes the cosines
from the differences of the rows, in float64: exact at any distance, for D times the work. Most batches have no such
tile, and the second launch ends at once.

Offsets are 64-bit integers, since from N = 46,341 on N^2 is larger than a 32-bit integer.

No value is read back from the GPU, so a CUDA graph can capture a call after an earlier call has compiled the kernels.
``TRITON_INTERPRET=1``, set before the first use, runs the kernels on a CPU, slowly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkd_plugin.kernels import chunked, pairwise
from rkd_plugin.kernels.chunked import NO_LIMIT, Relations, distance
from rkd_plugin.kernels.operators import angle_operator
from rkd_plugin.kernels.pairwise import EQUAL, inverse_lengths, rescale

__all__ = ["INTERPRETED", "Relations", "angle", "distance", "relations"]

TILE = 32  # rows i and rows j of a program
SPAN = 32  # rows k that are added up in float32, before float64 takes their sum
UNROLL = 16  # columns of x that are loaded at once
# Four numbers of a tile for each thread, since more do not fit into its registers. No fused multiply-subtract, since
# cosines are rounded before they are compared, so that equal relations differ by exactly 0.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
# The ratio of the largest square to the product of two arms from which cosines are computed from differences: there
# the split numbers have an error of 2^-21. Float64 numbers have one of 2^-33, as in ``chunked``, for the whole batch.
APART = {torch.float32: 2.0**26, torch.float64: pairwise.APART[torch.float64]}
LONGEST_INVERSE = 2.0**60  # float32 can hold its square
EQUAL_SQUARES = tl.constexpr(EQUAL[torch.float64])
STEPS = 2.0**30  # float64 numbers near STEPS times the largest are spaced by 2^-23 to 2^-22 of the largest


@triton.jit
def _rows_of(tile_of_rows, tile: tl.constexpr):
    """Indices of the rows of a tile, in 64 bits, so that offsets computed from them are too."""
    return (tile_of_rows * tile + tl.arange(0, tile)).to(tl.int64)


@triton.jit
def _squares_kernel(x, squares, rows, width, columns, tile: tl.constexpr, unroll: tl.constexpr):
    """Squared distances of the rows of ``x``, which is stored as ``(columns, width)``, padded with zeros."""
    if tl.program_id(0) > tl.program_id(1):
        return
    i, j = _rows_of(tl.program_id(0), tile), _rows_of(tl.program_id(1), tile)
    total = tl.zeros((tile, tile), tl.float64)
    for first in range(0, columns, unroll):
        for step in tl.static_range(unroll):
            column = x + tl.cast(first + step, tl.int64) * width
            difference = tl.load(column + i)[:, None] - tl.load(column + j)[None, :]
            total = tl.fma(difference, difference, total)
    inside = (i < rows)[:, None] & (j < rows)[None, :]
    tl.store(squares + i[:, None] * rows + j[None, :], total, mask=inside)
    tl.store(squares + j[None, :] * rows + i[:, None], total, mask=inside)


@triton.jit
def _squares_backward_kernel(x, weights, gradient, rows, width, tile: tl.constexpr, unroll: tl.constexpr):
    """``sum_j weights_ij (x_i - x_j)``: ``x`` and ``gradient`` as in `_squares_kernel`, ``weights`` padded as well.

    The weights of close rows are large, so the difference is computed before the sum: two sums would cancel.
    """
    i, column = _rows_of(tl.program_id(0), tile), _rows_of(tl.program_id(1), unroll)
    entries = x + column[None, :] * width
    own = tl.load(entries + i[:, None])
    total = tl.zeros((tile, unroll), tl.float64)
    for first in range(0, rows, unroll):
        for step in tl.static_range(unroll):
            j = tl.cast(first + step, tl.int64)
            weight = tl.load(weights + j * width + i)[:, None]  # which are symmetric
            total = tl.fma(weight, own - tl.load(entries + j), total)
    tl.store(gradient + column[None, :] * width + i[:, None], total)


@triton.jit
def _numerators(h_ij, h_ik, h_jk):
    """The law of cosines at i, j and k, without the lengths."""
    difference = h_ik - h_jk
    at_i = h_ij + difference
    return at_i, h_ij - difference, 2 * h_ik - at_i


@triton.jit
def _cosines(h_ij, l_ij, r_ij, row, plane, i, j, split: tl.constexpr):
    """The cosines at i, j and k of one side, and the reciprocal lengths of their arms."""
    at_i, at_j, at_k = _numerators(h_ij, tl.load(row + i)[:, None], tl.load(row + j)[None, :])
    r_ik, r_jk = tl.load(row + plane + i)[:, None], tl.load(row + plane + j)[None, :]
    if split:
        rest = row + 2 * plane
        rest_i, rest_j, rest_k = _numerators(l_ij, tl.load(rest + i)[:, None], tl.load(rest + j)[None, :])
        at_i += rest_i
        at_j += rest_j
        at_k += rest_k
    scale_i, scale_j, scale_k = r_ij * r_ik, r_ij * r_jk, r_ik * r_jk
    return at_i * scale_i, at_j * scale_j, at_k * scale_k, scale_i, scale_j, scale_k


@triton.jit
def _inverse_length(squares):
    """``1 / sqrt(squares)``, and 0 between rows that count as equal."""
    equal = squares < EQUAL_SQUARES
    return tl.where(equal, 0.0, 1.0 / tl.sqrt(tl.where(equal, 1.0, squares)))


@triton.jit
def _cosines_apart(r_ij, x, squares, columns, width, rows, i, j, k):
    """As `_cosines`, from the rows ``x``, which are stored as ``(columns, width)``, padded with zeros."""
    r_ik = _inverse_length(tl.load(squares + k * rows + i, mask=i < rows, other=0.0))[:, None]
    r_jk = _inverse_length(tl.load(squares + k * rows + j, mask=j < rows, other=0.0))[None, :]
    at_i, at_j, at_k = r_ij * 0, r_ij * 0, r_ij * 0
    for column in range(columns):
        entries = x + tl.cast(column, tl.int64) * width
        x_i, x_j, x_k = tl.load(entries + i)[:, None], tl.load(entries + j)[None, :], tl.load(entries + k)
        at_i = tl.fma(x_j - x_i, x_k - x_i, at_i)
        at_j = tl.fma(x_i - x_j, x_k - x_j, at_j)
        at_k = tl.fma(x_i - x_k, x_j - x_k, at_k)
    # One factor at a time, since a product of two large inverse lengths overflows.
    return at_i * r_ij * r_ik, at_j * r_ij * r_jk, at_k * r_ik * r_jk, r_ij * r_ik, r_ij * r_jk, r_ik * r_jk


@triton.jit
def _slope(difference, limit, split: tl.constexpr):
    """The slope of the Huber function."""
    if not split:  # Triton compiles a symmetric clamp to an instruction that float64 does not have
        return tl.minimum(tl.maximum(difference, -limit), limit)
    return tl.clamp(difference, -limit, limit)


@triton.jit
def _angle_kernel(
    student,
    teacher,
    student_rows,
    teacher_rows,
    student_squares,
    teacher_squares,
    reach,
    huber_delta,
    weights,
    end,
    losses,
    gradient,
    rows,
    vertices,
    width,
    student_columns,
    teacher_columns,
    apart: tl.constexpr,
    by_tile: tl.constexpr,
    split: tl.constexpr,
    weighted: tl.constexpr,
    needs_losses: tl.constexpr,
    needs_gradient: tl.constexpr,
    tile: tl.constexpr,
    span: tl.constexpr,
):
    """One tile: losses per vertex, and the gradient of the squares, for ``weights`` of the vertices if there are any.

    ``student`` and ``teacher`` are results of `_packed`, and ``reach`` has a number from it for each side. ``losses``
    is ``(2, width / tile, width)``; for rows after the first ``vertices``, whose weights are 0, it is incomplete.

    A launch with ``apart`` computes, from the rows, the tiles for which the law of cosines loses digits; a launch
    without it computes all other tiles.
    """
    tile_i, tile_j = tl.program_id(0), tl.program_id(1)
    if tile_i > tile_j:
        return
    i, j = _rows_of(tile_i, tile), _rows_of(tile_j, tile)
    plane = tl.cast(width, tl.int64) * width
    pairs = i[:, None] * width + j[None, :]
    rs_ij, rt_ij = tl.load(student + plane + pairs), tl.load(teacher + plane + pairs)
    reach_s, reach_t = tl.load(reach), tl.load(reach + 1)
    if by_tile:
        reach_s *= tl.max(rs_ij).to(tl.float64)
        reach_t *= tl.max(rt_ij).to(tl.float64)
    if ((reach_s > 1) | (reach_t > 1)) != apart:
        return
    if apart:
        inside = (i < rows)[:, None] & (j < rows)[None, :]
        hs_ij = tl.load(student_squares + i[:, None] * rows + j[None, :], mask=inside, other=0.0)
        ht_ij = tl.load(teacher_squares + i[:, None] * rows + j[None, :], mask=inside, other=0.0)
        rs_ij, rt_ij = _inverse_length(hs_ij), _inverse_length(ht_ij)
        hs_ij, ht_ij = hs_ij / 2, ht_ij / 2
    else:
        hs_ij, ht_ij = tl.load(student + pairs), tl.load(teacher + pairs)
    dtype: tl.constexpr = hs_ij.dtype
    ls_ij, lt_ij = hs_ij, ht_ij
    if split:
        ls_ij, lt_ij = tl.load(student + 2 * plane + pairs), tl.load(teacher + 2 * plane + pairs)
    limit = tl.load(huber_delta)
    last = rows
    if weighted:
        weight_i, weight_j = tl.load(weights + i)[:, None], tl.load(weights + j)[None, :]
    if end is not None:
        last = tl.load(end)
    if tile_i * tile >= vertices:  # where neither i nor j is a vertex, only k can be one
        last = tl.minimum(last, vertices)
    total_across = tl.zeros((tile, tile), tl.float64)
    total_along = tl.zeros((tile, tile), tl.float64)
    losses_i = tl.zeros((tile,), tl.float64)
    losses_j = tl.zeros((tile,), tl.float64)
    upper = i[:, None] < j[None, :]
    for first in range(0, last, span):
        loss_i = tl.zeros((tile, tile), dtype)
        loss_j = tl.zeros((tile, tile), dtype)
        across = tl.zeros((tile, tile), dtype)
        along = tl.zeros((tile, tile), dtype)
        for k in range(first, tl.minimum(first + span, last)):
            row = tl.cast(k, tl.int64)
            if apart:
                cos_i, cos_j, cos_k, scale_i, scale_j, scale_k = _cosines_apart(
                    rs_ij, student_rows, student_squares, student_columns, width, rows, i, j, row
                )
                want_i, want_j, want_k, _0, _1, _2 = _cosines_apart(
                    rt_ij, teacher_rows, teacher_squares, teacher_columns, width, rows, i, j, row
                )
            else:
                cos_i, cos_j, cos_k, scale_i, scale_j, scale_k = _cosines(
                    hs_ij, ls_ij, rs_ij, student + row * width, plane, i, j, split
                )
                want_i, want_j, want_k, _0, _1, _2 = _cosines(
                    ht_ij, lt_ij, rt_ij, teacher + row * width, plane, i, j, split
                )
            # An arm and itself span no angle; at k the formula compares 0 with 0.
            diff_i = tl.where((j != k)[None, :], cos_i - want_i, 0.0)
            diff_j = tl.where((i != k)[:, None], cos_j - want_j, 0.0)
            slope_i, slope_j = _slope(diff_i, limit, split), _slope(diff_j, limit, split)
            if needs_losses:
                loss_i = tl.fma(slope_i, tl.fma(slope_i, -0.5, diff_i), loss_i)
                loss_j = tl.fma(slope_j, tl.fma(slope_j, -0.5, diff_j), loss_j)
            if weighted:
                slope_i *= weight_i
                slope_j *= weight_j
            if needs_gradient:
                slope_k = _slope(want_k - cos_k, limit, split)
                if weighted:
                    slope_k *= tl.load(weights + k)
                across = tl.fma(slope_k, scale_k, tl.fma(slope_j, scale_j, tl.fma(slope_i, scale_i, across)))
                along = tl.fma(slope_j, cos_j, tl.fma(slope_i, cos_i, along))
        if needs_losses:
            losses_i += tl.sum(tl.where(upper, loss_i, 0.0).to(tl.float64), 1)
            losses_j += tl.sum(tl.where(upper, loss_j, 0.0).to(tl.float64), 0)
        if needs_gradient:
            total_across += across.to(tl.float64)
            total_along += along.to(tl.float64)
    if needs_losses:
        tl.store(losses + tl.cast(tile_j, tl.int64) * width + i, losses_i)
        tl.store(losses + tl.cast(tl.num_programs(0) + tile_i, tl.int64) * width + j, losses_j)
    if needs_gradient:
        halves = hs_ij.to(tl.float64)
        if split:
            halves += ls_ij.to(tl.float64)
        # Not r_ij^2: its rounding would affect only this term, where the two cancel.
        inverse = tl.where(rs_ij == 0, 0.0, 0.5 / tl.where(rs_ij == 0, 1.0, halves))
        slopes = total_across - inverse * total_along
        tl.store(gradient + i[:, None] * rows + j[None, :], slopes, mask=upper & (j < rows)[None, :])


INTERPRETED = not isinstance(_angle_kernel, triton.JITFunction)  # on a CPU, by TRITON_INTERPRET=1


def relations(x: Tensor) -> Relations:
    """As ``chunked.relations``, but from the differences of all rows, so that no pair is computed twice."""
    rows = rescale(x)
    return Relations(_squared_distances(rows), rows.detach(), torch.promote_types(x.dtype, torch.float32))


def angle(
    student: Relations,
    teacher: Relations,
    huber_delta: float,
    triplets: tuple[Tensor, Tensor, Tensor] | None = None,
    vertices: int | None = None,
) -> Tensor:
    """As ``reference.angle``, from squared distances, all triplets in one kernel.

    V of N vertices cost about 3 V / N of the time of all, and never more than all, since a tile with one of them loops
    over all rows. Selected triplets go to ``chunked``.
    """
    if triplets is not None:
        return chunked.angle(student, teacher, huber_delta, triplets)
    needs_gradient = torch.is_grad_enabled() and student.squares.requires_grad
    vertices = student.squares.shape[0] if vertices is None else vertices
    sides = student.squares, teacher.squares, student.rows, teacher.rows
    sums: Tensor = _angle(*sides, min(huber_delta, NO_LIMIT), student.dtype, vertices, needs_gradient)[0]
    return sums


def _columns(x: Tensor) -> Tensor:
    """``(N, D)`` transposed, so that a tile of rows is contiguous, and padded with zeros, which add no distance."""
    rows, columns = x.shape
    padded = x.new_zeros(triton.cdiv(columns, UNROLL) * UNROLL, triton.cdiv(rows, TILE) * TILE)
    padded[:columns, :rows] = x.T
    return padded


@torch.library.custom_op("rkd_plugin::fused_squared_distances", mutates_args=())
def _squared_distances(x: Tensor) -> Tensor:
    squares = x.new_empty(x.shape[0], x.shape[0])
    columns = _columns(x)
    tiles = columns.shape[1] // TILE
    if tiles:
        with torch.cuda.device_of(x):
            _squares_kernel[(tiles, tiles)](
                columns, squares, len(x), tiles * TILE, len(columns), tile=TILE, unroll=UNROLL, **LAUNCH
            )
    return squares


@_squared_distances.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[0])


@torch.library.custom_op("rkd_plugin::fused_squared_distances_backward", mutates_args=())
def _squared_distances_backward(grad: Tensor, x: Tensor) -> Tensor:
    columns, rows = _columns(x), len(x)
    count, width = columns.shape
    weights = columns.new_zeros(width, width)
    torch.add(grad, grad.T, out=weights[:rows, :rows])
    gradient = torch.empty_like(columns)
    if columns.numel():
        with torch.cuda.device_of(x):
            _squares_backward_kernel[(width // TILE, count // UNROLL)](
                columns, weights, gradient, rows, width, tile=TILE, unroll=UNROLL, **LAUNCH
            )
    return 2 * gradient[: x.shape[1], :rows].T.contiguous()


@_squared_distances_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


_squared_distances.register_autograd(
    lambda ctx, grad: _squared_distances_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _packed(squares: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(2 or 3, width, width)``, padded with zeros to whole tiles: h, r and, in float32, the rounded-off part of h.

    Also the ``reach`` of `_angle_kernel`, which float32 multiplies by the largest r of a tile: above 1, the law of
    cosines may lose digits.
    """
    rows, width = len(squares), triton.cdiv(len(squares), TILE) * TILE
    packed = torch.zeros(2 if dtype == torch.float64 else 3, width, width, dtype=dtype, device=squares.device)
    coarse = halves = squares / 2
    largest = halves.amax()
    packed[1, :rows, :rows] = inverse_lengths(squares)
    if dtype != torch.float64:
        packed[1].clamp_(max=LONGEST_INVERSE)
        # Adding and subtracting a number of this size rounds to whole steps.
        offset = STEPS * largest
        coarse = (halves + offset).sub_(offset)
        packed[2, :rows, :rows] = halves.sub_(coarse)
    packed[0, :rows, :rows] = coarse
    longest_inverse = packed[1].amax().double()
    reach = 2 * largest / APART[dtype] * longest_inverse
    return packed, reach * longest_inverse if dtype == torch.float64 else reach


def _launch(
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    huber_delta: float,
    dtype: torch.dtype,
    vertices: int,
    needs_gradient: bool,
    weights: Tensor | None = None,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Angle losses ``(vertices,)`` and their gradient ``(N, N)``; given ``weights`` and ``end``, only the gradient.

    ``end`` is the end of the loop over the rows k, a tensor of one integer: 0 skips the work.
    """
    rows = len(student)
    gradient = student.new_zeros((rows, rows) if needs_gradient else 0)
    if rows < 3 or vertices == 0:
        return student.new_zeros(vertices), gradient
    if weights is None and vertices < rows:
        weights = student.new_ones(vertices)
    sides, reaches = zip(*(_packed(squares, dtype) for squares in (student, teacher)), strict=True)
    columns = [_columns(x) for x in (student_rows, teacher_rows)]
    width = sides[0].shape[1]
    losses = student.new_zeros(2, width // TILE, width)
    limit = torch.full((1,), huber_delta, dtype=dtype, device=student.device)
    if weights is not None:
        weights = torch.nn.functional.pad(weights.to(dtype), (0, width - vertices))
    with torch.cuda.device_of(student):
        for apart in (False, True):
            _angle_kernel[(width // TILE, width // TILE)](
                *sides,
                *columns,
                student,
                teacher,
                torch.stack(reaches),
                limit,
                weights,
                end,
                losses,
                gradient,
                rows,
                vertices,
                width,
                *map(len, columns),
                apart=apart,
                by_tile=dtype != torch.float64,
                split=dtype != torch.float64 and not apart,
                weighted=weights is not None,
                needs_losses=end is None,
                needs_gradient=needs_gradient,
                tile=TILE,
                span=SPAN,
                **LAUNCH,
            )
    return losses[..., :vertices].sum((0, 1)), gradient


def _backward(
    weights: Tensor,
    gradient: Tensor,
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    huber_delta: float,
    dtype: torch.dtype,
) -> Tensor:
    # Only the device knows whether all weights are equal. Then the saved gradient is right, and the loop is empty.
    equal = (weights == weights[:1]).all()
    end = len(student) * (~equal).int()
    sides = student, teacher, student_rows, teacher_rows
    weighted = _launch(*sides, huber_delta, dtype, len(weights), True, weights, end)[1]
    return torch.where(equal, gradient * weights[:1].sum(), weighted)  # 0 without vertices


def _forward(
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    huber_delta: float,
    dtype: torch.dtype,
    vertices: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return _launch(student, teacher, student_rows, teacher_rows, huber_delta, dtype, vertices, needs_gradient)


_angle = angle_operator("fused_angle", _forward, _backward)
