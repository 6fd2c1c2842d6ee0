"""One run on many processes, in the words of `torch.distributed`: ranks, their group, and what they exchange.

`torchrun`, `srun` and `accelerate launch` start them. Each loads its share of the data, and the mean of the gradients
is taken here, as torchdistill's boxes, hooks and wrappers then see the plain modules that they see in one process:
its own ``DistributedDataParallel`` needs CUDA, hides the wrappers' second forward pass, and knows only of parameters
that lie between a module's input and its output, not of those that a hook leads to.

Every function works in a single process as well, where it exchanges nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from rkd_plugin.distributed import is_initialized, rank, world_size
from rkd_plugin.experiments.support.launcher import launched

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Within the block there is a process group of all launched processes: NCCL on GPUs, gloo on CPUs.

    A single process that ``torchrun`` launched has one as well; one without a launcher has none.

    Raises:
        ConnectionError: if another process ended early (gloo; NCCL waits until its own limit).
    """
    launched()
    if "RANK" not in os.environ or is_initialized():
        yield
        return
    if torch.cuda.is_available():
        # Where each process sees its own GPU only, that one has number 0.
        torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of its own for it, and a long message.
        if re.search("closed by peer|reset by peer", str(error)):
            raise ConnectionError(
                "expected the other processes to go on, one has ended; see what that one printed, then start all again"
            ) from error
        raise
    # Not after an error: the others may wait for what never comes, until the launcher ends them.
    distributed.destroy_process_group()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def all_gather(value: T) -> list[T]:
    """The values of all ranks, by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def all_reduce_max(number: int) -> int:
    """The largest of all ranks' numbers."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def all_reduce_mean(loss: Tensor) -> float:
    """The mean of all ranks' scalars."""
    if world_size() == 1:
        return loss.item()
    total = loss.detach().double()
    distributed.all_reduce(total)
    return total.item() / world_size()


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        distributed.all_reduce(torch.zeros(()))  # unlike distributed.barrier, on the CPU also where there are GPUs


def check_equal(values: Mapping[str, str]) -> None:
    """Raise on every rank if some rank has other values than rank 0, and name both.

    Args:
        values: by the name that the error gives them, such as the versions of packages, or digests.

    Raises:
        ValueError: if they differ.
    """
    everywhere = all_gather(dict(values))
    for number, found in enumerate(everywhere):
        differing = [name for name, value in everywhere[0].items() if found.get(name) != value]
        if differing:
            name = differing[0]
            with suppress(RuntimeError):  # raised by a rank that came too late; all have received the values
                barrier()
            raise ValueError(
                f"rank {number} of {len(everywhere)}: expected the {', '.join(differing)} of rank 0, got another one "
                f"({found.get(name)} instead of {everywhere[0][name]}); start all processes with the same command, "
                "packages and files"
            )


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """The block runs on rank 0 first, then on local rank 0 of every node, then on all others.

    Whoever comes later finds the files that were downloaded or decoded before, on a disk of all nodes or of each.
    """
    turn = 0 if rank() == 0 else 1 if _local_rank() == 0 else 2
    for at in range(3):
        if at == turn:
            yield
        barrier()


def broadcast_weights(module: nn.Module) -> None:
    """Give all ranks the weights and buffers of rank 0, such as the statistics of BatchNorm."""
    if world_size() > 1:
        for tensor in chain(module.parameters(), module.buffers()):
            whole = tensor.detach().contiguous()
            distributed.broadcast(whole, src=0)
            tensor.detach().copy_(whole)


def average_gradients(loss: Tensor, parameters: Iterable[Tensor]) -> None:
    """Have the backward pass from ``loss``, still to come, end with the mean of all ranks' gradients.

    At its end, and not before the optimizer's step, so that clipping sees the mean. A parameter that this rank did
    not use counts as 0 here; one that none used keeps its ``grad`` of None.
    """
    if world_size() > 1:
        learning = list(parameters)
        # As DistributedDataParallel and FSDP do it.
        engine: Any = torch.autograd.Variable._execution_engine
        loss.register_hook(  # type: ignore[no-untyped-call]
            lambda _: engine.queue_callback(lambda: _average(learning))
        )


def _average(parameters: Sequence[Tensor]) -> None:
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    distributed.all_reduce(used, distributed.ReduceOp.MAX)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter, is_used in zip(parameters, used.tolist(), strict=True):
        if is_used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(whole)
        whole /= world_size()
        for gradient, part in zip(gradients, torch.split(whole, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def all_gather_in_turn(own: Sequence[tuple[Tensor, ...]], device: torch.device) -> Sequence[tuple[Tensor, ...]]:
    """All tuples of tensors in their order, of which this rank has every `world_size`-th, from `rank` on."""
    if world_size() == 1:
        return own
    # A tensor comes back on the device that it was sent from, with all of what it is a view of.
    parts = all_gather([tuple(tensor.cpu().clone() for tensor in item) for item in own])
    return [tuple(tensor.to(device) for tensor in item) for turn in zip_longest(*parts) for item in turn if item]
