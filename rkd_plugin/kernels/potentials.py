"""Named potentials, scales and penalties, and the sums of a general relational loss.

A potential relates each row to columns, ``(..., N, D), (..., M, D) -> (..., N, M)``, or for triples ``(..., N, M, M)``.
The columns are the batch itself, reference rows, or the neighbours of each row; then each row is a set of its own.
Relations are float64 (`widest`), since distances and Gram matrices cancel. Unlike the kernels of RKD, nothing is
rescaled: products of float64 entries beyond 1e150 or below 1e-150 leave the range of float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkd_plugin.kernels.functions import in_strips, number_of_rows, related
from rkd_plugin.kernels.pairwise import cross_squares, inverse_lengths, safe_sqrt, widest
from rkd_plugin.kernels.reference import huber

Squares = Callable[[Tensor, Tensor], Tensor]
EPSILON = 1e-7  # added to probabilities of ``row_sum`` before the logarithm, as the authors of PKT do


def _unit(x: Tensor) -> Tensor:
    return x * inverse_lengths(x.square().sum(-1, keepdim=True))


def _differences(x: Tensor, y: Tensor) -> Tensor:
    return y.unsqueeze(-3) - x.unsqueeze(-2)


def _exact_squares(x: Tensor, y: Tensor) -> Tensor:
    return _differences(x, y).square().sum(-1)


def _angle(x: Tensor, y: Tensor, *_: Any) -> Tensor:
    arms = _unit(_differences(x, y))
    return arms @ arms.mT


class Potential(NamedTuple):
    """A named potential: how many rows it relates, its function of ``(x, y, squares, temperature)``, and scales."""

    order: int
    psi: Callable[[Tensor, Tensor, Squares, float], Tensor]
    scale: str | None  # of ``"auto"``
    scales: tuple[str | None, ...]


EVERY_SCALE = (None, "mean", "row_sum", "row_norm", "softmax")
POTENTIALS = {
    "identity": Potential(1, lambda x, *_: x, None, (None, "row_norm", "softmax")),
    "distance": Potential(2, lambda x, y, squares, _: safe_sqrt(squares(x, y)), "mean", EVERY_SCALE),
    "squared_distance": Potential(2, lambda x, y, squares, _: squares(x, y), "mean", EVERY_SCALE),
    "dot": Potential(2, lambda x, y, *_: x @ y.mT, "row_norm", (None, "row_sum", "row_norm", "softmax")),
    "cosine": Potential(2, lambda x, y, *_: _unit(x) @ _unit(y).mT, None, (None, "row_sum", "row_norm", "softmax")),
    "gaussian": Potential(2, lambda x, y, squares, t: (squares(x, y) / (-2 * t)).exp(), None, EVERY_SCALE),
    "angle": Potential(3, _angle, None, (None,)),
}
# What a function of 1, 2 or 3 rows allows; the first is the scale of "auto".
FUNCTION_SCALES: dict[int, tuple[str | None, ...]] = {
    1: (None, "row_sum", "row_norm", "softmax"),
    2: EVERY_SCALE,
    3: (None,),
}
PENALTIES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "huber": huber,
    "mse": lambda s, t, _: (s - t).square(),
    "l1": lambda s, t, _: (s - t).abs(),
}


def _kl(_: Tensor, teacher: Tensor, student_log: Tensor, teacher_log: Tensor) -> Tensor:
    return teacher * (teacher_log - student_log)


def _js(student: Tensor, teacher: Tensor, student_log: Tensor, teacher_log: Tensor) -> Tensor:
    middle = torch.logaddexp(student_log, teacher_log) - torch.log(student_log.new_full((), 2))
    return (student * (student_log - middle) + teacher * (teacher_log - middle)) / 2


DIVERGENCES = {"kl": _kl, "js": _js}  # penalties over rows that sum to 1


def order_of(potential: Any) -> int | None:
    """How many rows a potential relates."""
    return POTENTIALS[potential].order if isinstance(potential, str) else number_of_rows(potential)


def scales_of(potential: Any) -> tuple[str | None, ...]:
    """The scales that a potential may have; the first is that of ``"auto"``."""
    if not isinstance(potential, str):
        return FUNCTION_SCALES[order_of(potential) or 0]
    named = POTENTIALS[potential]
    return (named.scale, *(scale for scale in named.scales if scale != named.scale))


class Side(NamedTuple):
    """Rows ``(..., N, D)`` of the student or the teacher, and the rows ``(..., M, D)`` that they are related to."""

    rows: Tensor
    columns: Tensor
    mean: Tensor | None = None  # of all relations, for the scale "mean"


class Selection(NamedTuple):
    """The tuples that count."""

    rows: Tensor  # (R,), indices of those that start a tuple
    own: bool  # columns are the rows themselves
    distinct: bool  # only tuples of distinct rows
    nearest: Tensor | None = None  # (R, k), indices of columns
    pairs: tuple[Tensor, Tensor] | None = None
    triplets: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Relation:
    """A potential with its scale and penalty."""

    potential: Any
    penalty: Any
    scale: str | None
    temperature: float
    huber_delta: float
    exact: bool  # only differentiable operations, without strips

    def dtype(self, student: Tensor, teacher: Tensor) -> torch.dtype:
        """Of the rows: `widest`, or float32 at least for a function."""
        if self.exact or isinstance(self.potential, str):
            return widest(student)
        return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)

    def sums(self, student: Side, teacher: Side, chosen: Selection) -> Tensor:
        """``(..., R)``: the losses summed over the tuples that start at each of the chosen rows."""
        sides = [student, teacher]
        order = order_of(self.potential)
        leading = student.rows.shape[:-2]
        columns = student.columns.shape[-2] if chosen.nearest is None else chosen.nearest.shape[1]
        width = columns * student.rows.shape[-1]
        function_of_3 = order == 3 and not isinstance(self.potential, str)
        if chosen.triplets is not None:
            return self._sums_of_triplets(sides, chosen.triplets)
        if function_of_3:
            at_pairs = functools.partial(self._at_pairs, chosen, columns)
            pairs = self._strips(at_pairs, sides, len(chosen.rows) * columns, width)
            return pairs.view(-1, columns).sum(1) if columns else pairs.new_zeros(len(chosen.rows))
        if self.scale == "mean":
            sides = [side._replace(mean=self._mean(side, chosen.own)) for side in sides]
        counts = None
        if chosen.pairs is not None:
            shape = student.rows.shape[-2], student.columns.shape[-2]
            counts = torch.zeros(shape, dtype=widest(student.rows), device=student.rows.device)
            counts = counts.index_put(chosen.pairs, counts.new_ones(()), accumulate=True)

        def at_rows(part: slice, *sides: Side) -> Tensor:
            losses = self._losses(*(self._scaled(self._relations(side, chosen, part), side.mean) for side in sides))
            if counts is not None:
                losses = losses * counts[chosen.rows[part]]
            elif (kept := self._kept(chosen, part, columns, order)) is not None:
                losses = losses.masked_fill(~kept, 0)
            if order == 1:
                return losses.flatten(len(leading) + 1).mean(-1)
            return losses.sum((-2, -1) if order == 3 else -1)

        if order == 3:
            width = columns * (columns + student.rows.shape[-1])
        elif isinstance(self.potential, str) and chosen.nearest is None:
            width = max(columns, student.rows.shape[-1])
        return self._strips(at_rows, sides, len(chosen.rows), width * leading.numel())

    def _strips(self, compute: Callable[..., Tensor], sides: Sequence[Side], total: int, width: int) -> Tensor:
        """`in_strips` of ``compute(part, *sides)``."""
        size = len(Side._fields)

        def of_tensors(part: slice, *tensors: Any) -> Tensor:
            return compute(part, *(Side(*tensors[i : i + size]) for i in range(0, len(tensors), size)))

        return in_strips(of_tensors, total, 0 if self.exact else width, *itertools.chain(*sides))

    def _psi(self, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.potential, str):
            squares = _exact_squares if self.exact else cross_squares
            relations = POTENTIALS[self.potential].psi(x, y, squares, self.temperature)
            if self.scale == "softmax" and self.potential in ("distance", "squared_distance"):
                return -relations  # near rows are similar
            if self.scale == "row_sum" and self.potential == "cosine":
                return (1 + relations) / 2
            return relations
        rows = (x,) if order_of(self.potential) == 1 else (x.unsqueeze(-2), y.unsqueeze(-3))
        return self._related(*rows)

    def _related(self, *rows: Tensor) -> Tensor:
        return related(self.potential, *rows).to(widest(rows[0]))

    def _relations(self, side: Side, chosen: Selection, part: slice) -> Tensor:
        x = side.rows[..., chosen.rows[part], :]
        if chosen.nearest is None:
            return self._psi(x, side.columns)
        return self._psi(x.unsqueeze(-2), side.columns[chosen.nearest[part]]).squeeze(1)

    def _at_pairs(self, chosen: Selection, columns: int, part: slice, *sides: Side) -> Tensor:
        """Losses of a function of three rows ``x_i, y_j, y_k``, summed over k, for a part of all pairs (i, j)."""
        pair = torch.arange(part.start, part.stop, device=chosen.rows.device)
        place, j = pair // max(columns, 1), pair % max(columns, 1)
        i, k = chosen.rows[place], torch.arange(columns, device=pair.device)
        if chosen.nearest is not None:
            k = chosen.nearest[place]
            j = k.gather(1, j.unsqueeze(1)).squeeze(1)
        relations = [
            self._related(x[i].unsqueeze(1), y[j].unsqueeze(1), y[k] if k.ndim == 2 else y.unsqueeze(0))
            for x, y, _ in sides
        ]
        losses = self._losses(*((r, None) for r in relations))
        if chosen.distinct:
            same = k == j.unsqueeze(1)
            if chosen.own:
                same = same | (k == i.unsqueeze(1)) | (i == j).unsqueeze(1)
            losses = losses.masked_fill(same, 0)
        return losses.sum(1)

    def _sums_of_triplets(self, sides: Sequence[Side], triplets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        a, b, c = triplets

        def at(part: slice, *sides: Side) -> Tensor:
            found = []
            for x, y, _ in sides:
                rows = x[a[part]], y[b[part]], y[c[part]]
                if isinstance(self.potential, str):
                    found.append((self._psi(rows[0].unsqueeze(1), torch.stack(rows[1:], 1))[:, 0, 0, 1], None))
                else:
                    found.append((self._related(*rows), None))
            losses = self._losses(*found)
            return losses.masked_fill(b[part] == c[part], 0) if isinstance(self.potential, str) else losses

        losses = self._strips(at, sides, len(a), 3 * sides[0].rows.shape[1])
        return losses.new_zeros(sides[0].rows.shape[0]).index_add(0, a, losses)

    def _kept(self, chosen: Selection, part: slice, columns: int, order: int | None) -> Tensor | None:
        """Which relations of a strip count; None for all."""
        j = torch.arange(columns, device=chosen.rows.device)
        drop = chosen.distinct and chosen.own and chosen.nearest is None
        other = j != chosen.rows[part].unsqueeze(1) if drop else None
        if order == 3:  # angles: an arm and itself span none, as in ``reference.angle``
            apart = j != j.unsqueeze(1)
            return apart if other is None else apart & other.unsqueeze(1) & other.unsqueeze(2)
        return other if order == 2 else None

    def _mean(self, side: Side, own: bool) -> Tensor:
        """The mean relation of all pairs, of distinct rows if the columns are the rows themselves; 1 if it is 0."""
        rows, columns = side.rows.shape[-2], side.columns.shape[-2]
        every = torch.arange(rows, device=side.rows.device)

        # Named relations that have a mean are symmetric: twice the gradient of the rows is that of rows and columns.
        symmetric = own and isinstance(self.potential, str) and not self.exact
        if symmetric:
            side = Side(2 * side.rows - side.rows.detach(), side.columns.detach())

        def at_rows(part: slice, side: Side) -> Tensor:
            relations = self._psi(side.rows[..., part, :], side.columns)
            if own:
                relations = relations.masked_fill(torch.arange(columns, device=every.device) == every[part, None], 0)
            return relations.sum(-1)

        width = max(columns, side.rows.shape[-1]) if isinstance(self.potential, str) else columns * side.rows.shape[-1]
        total = self._strips(at_rows, [side], rows, width * side.rows.shape[:-2].numel()).sum(-1)
        mean = total / max(rows * (columns - own), 1)
        return mean.masked_fill(mean == 0, 1)[..., None, None]

    def _scaled(self, relations: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Relations after the scale, and their logarithms where these are more exact than the logarithm."""
        if mean is not None:
            return relations / mean, None
        if self.scale == "row_norm":
            return _unit(relations), None
        if self.scale == "row_sum":
            total = relations.abs().sum(-1, keepdim=True)
            return relations / total.masked_fill(total == 0, 1), None
        if self.scale == "softmax":
            logs = (relations / self.temperature).log_softmax(-1)
            return logs.exp(), logs
        return relations, None

    def _losses(self, student: tuple[Tensor, Tensor | None], teacher: tuple[Tensor, Tensor | None]) -> Tensor:
        (ours, our_logs), (theirs, their_logs) = student, teacher
        if ours.shape != theirs.shape:
            raise ValueError(
                f"potential: expected relations of one shape from student and teacher, got {tuple(ours.shape)} and "
                f"{tuple(theirs.shape)}"
            )
        if self.penalty in PENALTIES:
            return PENALTIES[self.penalty](ours, theirs, self.huber_delta)
        if self.penalty in DIVERGENCES:
            logs = [(p + EPSILON).log() if log is None else log for p, log in ((ours, our_logs), (theirs, their_logs))]
            return DIVERGENCES[self.penalty](ours, theirs, *logs)
        losses = self.penalty(ours, theirs)
        if not isinstance(losses, Tensor) or losses.shape != ours.shape:
            raise ValueError(
                f"penalty: expected one loss for each relation, a tensor of shape {tuple(ours.shape)}, got "
                f"{tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__}"
            )
        return losses
