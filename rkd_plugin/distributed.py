r"""The batch of all processes of a ``torch.distributed`` group, for the losses' argument ``gather``.

Every process holds all rows and computes the terms of its share of the anchors, 1 / W of the cubic work among W
processes. Communication: the shapes, one all-gather a side, one sum of N losses, so that each process knows the value,
and, in the backward pass, one reduce-scatter. A process without rows takes part in all of it.

Why gradients carry a factor W: with :math:`L = \sum_p L_p`, the sum of what the processes compute, the reduce-scatter
gives each process the whole :math:`\partial L / \partial s` of its own rows s, and its parameters the part of
:math:`\partial L / \partial \theta` that runs through these rows. The parts must be added up.
``DistributedDataParallel`` and FSDP take their mean instead, as fits a loss that is a mean over processes; W times the
mean is the sum. Whoever adds gradients up by hand divides the loss by W.

What the angle loss of N rows costs each of W processes, with n = N / W rows of its own, forward and backward:

    time       c3 N^3 / W + c2 N^2 + sending       c2 by the widths, N^2 D: every process needs all distances
    received   (W - 1) / W * N * (b_s D_s + b_t D_t + 4 D_s) + 8 N bytes, with b the bytes of a number of each side
    memory     m N^2 + N (D_s + D_t) numbers

``chunked`` on a core of an AMD EPYC has c3 = 0.7 ns (N = 1024) to 1.1 ns (N = 2048), c2 = 70 to 130 ns at widths of 128
and 512, and m = 50 to 59 bytes; the model is within 7 % of what one, two and three processes took (README), but for
three at N = 512, which took 25 % more. With c3 = 1 ns, from 1024 rows to 65536:

    N        memory     W = 1       8           64          512
    1,024    58 MB      1.1 s       0.13 s      17 ms       2.1 ms
    4,096    0.9 GB     69 s        8.6 s       1.1 s       0.13 s
    16,384   15 GB      1.2 h       9.2 min     69 s        8.6 s
    65,536   236 GB     78 h        9.8 h       1.2 h       9.2 min

On a GPU nothing has been measured. What ``fused`` is to reach on an H100 is c3 = 1 ps, 1 ms at N = 1024: a thousandth
of these times, though three times that for a share, since its tiles meet all rows wherever one vertex lies.

An image of one's own costs c3 N^2 whatever W is, and a network's step the same at any N. Beside a step of 1 ms an
image, as of a large network on such a GPU, 1 ps would come to 2 % at N = 4,096 and to 27 % at 16,384. On a core, beside
100 ms, it is 1 % at N = 1,024 and 17 % at 4,096. From there on ``anchors=A`` is the sensible choice: A / N of the time,
so that 1,024 anchors cost at N = 16,384 what all do at 4,096. It needs the memory of all. Where N^2 does not fit, from
N = 38,000 on in 80 GB, ``gather=`` takes a process group: the relations of a part of the batch, exact.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

# The later name where PyTorch has it, since the earlier one then warns.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class GlobalBatch(NamedTuple):
    """The rows of all processes, process by process: ``(N, D_s)``, in float32 at least, and ``(N, D_t)``."""

    student: Tensor
    teacher: Tensor
    rank: int
    processes: int
    seed: int  # the same on all of them, drawn by the first
    group: Any

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of ``rows``, an index vector that all processes pass alike."""
        return rows.tensor_split(self.processes)[self.rank]

    def sum(self, parts: Tensor) -> Tensor:
        """The sum over all processes, whose gradient is that of this process's ``parts``."""
        whole = parts.detach().clone()
        distributed.all_reduce(whole, group=self.group)
        # Not parts + (whole - parts), which rounds.
        total: Tensor = _Instead.apply(parts, whole)
        return total

    def sum_terms(self, *terms: Tensor | None) -> list[Tensor | None]:
        """`sum` of each term that is not None, in one exchange."""
        there = [term for term in terms if term is not None]
        sums = iter(self.sum(torch.stack(there)).unbind() if there else ())
        return [None if term is None else next(sums) for term in terms]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gather(name: str, student: Tensor, teacher: Tensor, group: Any, draws: bool) -> GlobalBatch | None:
    """The batch of ``group``, or of all processes for True; with a new seed if the caller ``draws``.

    None for True in a process that nobody else was started with: it holds the whole batch.

    Raises:
        TypeError: if ``group`` is something else.
        RuntimeError: if processes were started together and have not joined, or this one does not belong to the group.
        ValueError: on all processes alike, if they disagree on widths, dtypes or whether the student needs a gradient.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        if group is True and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return None
        raise RuntimeError(
            f"{name}: gather needs torch.distributed, which is not initialised; call init_process_group, or start "
            "with torchrun"
        )
    members = None if isinstance(group, bool) else group
    stranger = members == distributed.GroupMember.NON_GROUP_MEMBER  # what new_group gives to others
    if not (stranger or isinstance(group, bool | distributed.ProcessGroup)):
        raise TypeError(f"{name}: expected gather to be True, False or a process group, got {group!r}")
    if stranger or distributed.get_rank(members) < 0:
        raise RuntimeError(f"{name}: gather needs a group that this process belongs to, got one that it does not")
    rank, processes = distributed.get_rank(members), distributed.get_world_size(members)
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    seed = int(torch.randint(2**62, ())) if draws and rank == 0 else 0
    own = [len(student), seed, student.shape[1], teacher.shape[1]]
    own += [_DTYPES.index(student.dtype), _DTYPES.index(teacher.dtype), int(needs_gradient)]
    told = torch.tensor([own], device=student.device)
    table = told.new_empty(processes, len(own))
    _all_gather(table, told, group=members)
    rows, seeds, *rest = table.T.tolist()
    for what, values in zip(
        ("student's width", "teacher's width", "student's dtype", "teacher's dtype", "need of a gradient"),
        rest,
        strict=True,
    ):
        if len(set(values)) > 1:
            found = [str(_DTYPES[v]) if "dtype" in what else v for v in values]
            raise ValueError(f"{name}: all processes must agree on the {what}, got {found} by rank")
    students: Tensor = _Gather.apply(student, rows, members)
    return GlobalBatch(students, _gather(teacher.detach(), rows, members), rank, processes, seeds[0], members)


def _gather(x: Tensor, rows: list[int], group: Any) -> Tensor:
    """``(N, D)`` of all processes, sent in its own dtype, each padded to the longest."""
    padded = x.new_zeros(max(rows), x.shape[1])
    padded[: len(x)] = x
    # As bytes, since not every backend knows every dtype.
    whole = x.new_empty(len(rows) * len(padded), x.shape[1])
    if whole.numel():
        _all_gather(whole.view(torch.uint8), padded.view(torch.uint8), group=group)
    if min(rows) == max(rows):
        return whole
    parts = whole.view(len(rows), -1, x.shape[1])
    return torch.cat([part[:length] for part, length in zip(parts, rows, strict=True)])


class _Gather(torch.autograd.Function):
    """`_gather`, in float32 at least, so that the processes' gradients are rounded to the input's dtype as a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], group: Any) -> Tensor:
        ctx.rows, ctx.group, ctx.dtype = rows, group, x.dtype
        return _gather(x, rows, group).to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, processes = ctx.rows, len(ctx.rows)
        padded = grad.new_zeros(processes, max(rows), grad.shape[1])
        for part, own in zip(padded, torch.split(grad, rows), strict=True):
            part[: len(own)] = own
        total = grad.new_empty(max(rows), grad.shape[1])
        if total.numel():
            _reduce_scatter(total, padded.flatten(0, 1), group=ctx.group)
        limit = torch.finfo(ctx.dtype).max
        own = total[: rows[distributed.get_rank(ctx.group)]] * processes  # see the head of this file
        return own.clamp(-limit, limit).to(ctx.dtype), None, None


class _Instead(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
