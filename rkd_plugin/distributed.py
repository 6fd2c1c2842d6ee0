r"""The loss over the batches of all processes of a ``torch.distributed`` group, for the losses' argument ``gather``.

Every rank gathers all rows and computes the terms of its share of the anchors, 1 / W of the cubic work at a world size
of W. Communication: one all_gather of the shapes, one all_gather of the rows of each side, one all_reduce of N losses,
so that every rank has the value, and, in the backward pass, one reduce_scatter. A rank without rows takes part in all
of them.

Gradients have a factor of W. With :math:`L = \sum_p L_p`, the sum over the ranks, the reduce_scatter gives each rank
the whole :math:`\partial L / \partial s` of its own rows s, and its parameters the part of
:math:`\partial L / \partial \theta` that goes through these rows. The sum of these parts is the gradient.
``DistributedDataParallel`` and FSDP compute the mean of these parts instead, which is right for a loss that is a mean
over ranks; W times the mean is the sum. If you sum the gradients of the ranks yourself, divide the loss by W.

The gathered loss has a first derivative only; a second one raises an error.

The cost of the angle loss of N rows for each of W ranks, forward and backward:

    time       c3 N^3 / W + c2 N^2 + communication   c2 by the widths, N^2 D: every rank needs all distances
    received   (W - 1) / W * N * (b_s D_s + b_t D_t + 4 D_s) + 8 N bytes, with b the bytes of a number of each side
    memory     m N^2 + N (D_s + D_t) numbers

``chunked`` on a core of an AMD EPYC has c3 = 0.7 ns (N = 1024) to 1.1 ns (N = 2048), c2 = 70 to 130 ns at widths of 128
and 512, and m = 50 to 59 bytes. The model is within 7 % of the measured times of one, two and three ranks, except for
three ranks at N = 512, which took 25 % more (docs/pages/guides/many-processes.md). All of this was measured before the
C++ library, `rkd_plugin.kernels.native`, which has a smaller c3. With c3 = 1 ns, from 1024 to 65536 rows:

    N        memory     W = 1       8           64          512
    1,024    58 MB      1.1 s       0.13 s      17 ms       2.1 ms
    4,096    0.9 GB     69 s        8.6 s       1.1 s       0.13 s
    16,384   15 GB      1.2 h       9.2 min     69 s        8.6 s
    65,536   236 GB     78 h        9.8 h       1.2 h       9.2 min

On a GPU nothing has been measured. The goal for ``fused`` on an H100 is c3 = 1 ps, 1 ms at N = 1024: a thousandth of
these times, but three times that for a share of the vertices, since a tile with one of them loops over all rows.

For each image of its batch a rank computes c3 N^2, for any W, while a step of the network takes the same time at any N.
Relative to a step of 1 ms per image, as for a large network on such a GPU, 1 ps is 2 % at N = 4,096 and 27 % at 16,384.
On a core, relative to 100 ms, 1 ns is 1 % at N = 1,024 and 17 % at 4,096. For larger batches use ``anchors=A``, which
takes A / N of the time and the same memory: 1,024 anchors at N = 16,384 cost the same as all anchors at 4,096. If N^2
numbers do not fit, from N = 38,000 on in 80 GB, pass a process group as ``gather``: the exact loss of that part of the
batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from rkd_plugin.kernels.derivatives import first_only
from rkd_plugin.kernels.pairwise import substitute_value

# The newer name where PyTorch has it, since the older one then warns.
_all_gather: Any = getattr(distributed, "all_gather_single", None) or getattr(
    distributed, "all_gather_into_tensor", None
)
_reduce_scatter: Any = getattr(distributed, "reduce_scatter_single", None) or getattr(
    distributed, "reduce_scatter_tensor", None
)
T = TypeVar("T")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def rank() -> int:
    """The rank of this process, 0 without a process group; rank 0 writes all files."""
    return distributed.get_rank() if is_initialized() else 0


def world_size() -> int:
    """The number of processes of the default group; 1 without one."""
    return distributed.get_world_size() if is_initialized() else 1


def is_initialized() -> bool:
    """Whether this process has a default process group."""
    return distributed.is_available() and distributed.is_initialized()


def broadcast(compute: Callable[[], T]) -> T:
    """Call ``compute`` on rank 0 only; return its result, or raise its exception, on every rank."""
    if world_size() == 1:
        return compute()
    sent: list[Any] = [None, None]
    if rank() == 0:
        try:
            sent[0] = compute()
        except Exception as error:
            sent[1] = error
    distributed.broadcast_object_list(sent, src=0)
    if sent[1] is not None:
        raise sent[1]
    result: T = sent[0]
    return result


class GlobalBatch(NamedTuple):
    """The rows of all ranks, in the order of the ranks: ``(N, D_s)``, in float32 at least, and ``(N, D_t)``."""

    student: Tensor
    teacher: Tensor
    rank: int
    world_size: int
    seed: int  # drawn by rank 0, the same on all ranks
    group: Any

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of ``rows``, an index vector that is the same on all ranks."""
        return rows.tensor_split(self.world_size)[self.rank]

    def sum(self, parts: Tensor) -> Tensor:
        """The sum over all ranks, with the gradient of this rank's ``parts``."""
        whole = parts.detach().clone()
        distributed.all_reduce(whole, group=self.group)
        # Not parts + (whole - parts).detach(), which rounds.
        return substitute_value(parts, whole)

    def sum_terms(self, *terms: Tensor | None) -> list[Tensor | None]:
        """`sum` of each term that is not None, in one exchange."""
        there = [term for term in terms if term is not None]
        sums = iter(self.sum(torch.stack(there)).unbind() if there else ())
        return [None if term is None else next(sums) for term in terms]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gather(name: str, student: Tensor, teacher: Tensor, group: Any, draws: bool) -> GlobalBatch | None:
    """The global batch of ``group``, or of the default group for True; with a new seed if ``draws``.

    None for True in a single process without ``torch.distributed``: its batch is the global batch.

    Raises:
        TypeError: if ``group`` is not a process group or a bool.
        RuntimeError: if several processes were started and ``torch.distributed`` is not initialised, or this process
            has no rank in the group; in the backward pass, for a second derivative.
        ValueError: on all ranks, if they differ in widths, dtypes or whether the student needs a gradient.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        if group is True and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return None
        raise RuntimeError(
            f"{name}: expected an initialised torch.distributed for gather, got none; call init_process_group, or "
            "start with torchrun"
        )
    pg = None if isinstance(group, bool) else group
    outside = pg == distributed.GroupMember.NON_GROUP_MEMBER  # what new_group returns to a process without a rank
    if not (outside or isinstance(group, bool | distributed.ProcessGroup)):
        raise TypeError(f"{name}: expected gather to be True, False or a process group, got {group!r}")
    if outside or distributed.get_rank(pg) < 0:
        raise RuntimeError(
            f"{name}: expected a group in which this process has a rank for gather, got another; pass one of its groups"
        )
    rank, world_size = distributed.get_rank(pg), distributed.get_world_size(pg)
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    seed = int(torch.randint(2**62, ())) if draws and rank == 0 else 0
    own = [len(student), seed, student.shape[1], teacher.shape[1]]
    own += [_DTYPES.index(student.dtype), _DTYPES.index(teacher.dtype), int(needs_gradient)]
    header = torch.tensor([own], device=student.device)
    headers = header.new_empty(world_size, len(own))
    _all_gather(headers, header, group=pg)
    rows, seeds, *rest = headers.T.tolist()
    for what, values in zip(
        ("student's width", "teacher's width", "student's dtype", "teacher's dtype", "need of a gradient"),
        rest,
        strict=True,
    ):
        if len(set(values)) > 1:
            found = [str(_DTYPES[v]) if "dtype" in what else v for v in values]
            raise ValueError(f"{name}: expected the {what} to be the same on all ranks, got {found} by rank")
    student = first_only(student, f"{name}: gather", "use gather=False")
    students: Tensor = _Gather.apply(student, rows, pg)
    return GlobalBatch(students, _gather(teacher.detach(), rows, pg), rank, world_size, seeds[0], pg)


def _gather(x: Tensor, rows: list[int], group: Any) -> Tensor:
    """The rows of all ranks, ``(N, D)``, exchanged in their own dtype, padded to the longest batch."""
    padded = x.new_zeros(max(rows), x.shape[1])
    padded[: len(x)] = x
    # As bytes, since some backends lack some dtypes.
    whole = x.new_empty(len(rows) * len(padded), x.shape[1])
    if whole.numel():
        _all_gather(whole.view(torch.uint8), padded.view(torch.uint8), group=group)
    if min(rows) == max(rows):
        return whole
    parts = whole.view(len(rows), -1, x.shape[1])
    return torch.cat([part[:length] for part, length in zip(parts, rows, strict=True)])


class _Gather(torch.autograd.Function):
    """`_gather`, in float32 at least, so that the gradients of the ranks are summed before they are rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], group: Any) -> Tensor:
        ctx.rows, ctx.group, ctx.dtype = rows, group, x.dtype
        return _gather(x, rows, group).to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, world_size = ctx.rows, len(ctx.rows)
        with torch.no_grad():  # a second derivative raises, see `gather`
            padded = grad.new_zeros(world_size, max(rows), grad.shape[1])
            for part, own in zip(padded, torch.split(grad, rows), strict=True):
                part[: len(own)] = own
            total = grad.new_empty(max(rows), grad.shape[1])
            if total.numel():
                _reduce_scatter(total, padded.flatten(0, 1), group=ctx.group)
            limit = torch.finfo(ctx.dtype).max
            own = total[: rows[distributed.get_rank(ctx.group)]] * world_size  # see the docstring of this file
            return own.clamp(-limit, limit).to(ctx.dtype), None, None
