"""Data-parallel training with `torch.distributed`: the process group and its collectives.

`torchrun`, `srun` and `accelerate launch` start the processes. Each rank loads its share of the data, and the gradients
are averaged here. The boxes, hooks and wrappers of torchdistill then see plain modules, as in a single process.
torchdistill's own ``DistributedDataParallel`` needs CUDA, hides the second forward pass of wrappers, and does not know
parameters that are reached through hooks only.

In a single process every function works without communication.
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
def process_group(command: Mapping[str, str] | None = None) -> Iterator[None]:
    """Initialise a process group of all launched processes in the block: NCCL on GPUs, gloo on CPUs.

    A single process that ``torchrun`` launched has a group too; a process without a launcher has none.

    Args:
        command: what all processes must be started with, such as the verb; compared before anything else is exchanged.

    Raises:
        ConnectionError: if another process ended early (with gloo; NCCL waits until its timeout).
        ValueError: if a process was started with another command.
    """
    launched()
    if "RANK" not in os.environ or is_initialized():
        yield
        return
    if torch.cuda.is_available():
        # If each process sees only its own GPU, that GPU has number 0.
        torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        check_equal(command or {})
        yield
    except RuntimeError as error:
        # gloo raises no special type, and a long message.
        if re.search("closed by peer|reset by peer", str(error)):
            raise ConnectionError(
                "expected the other processes to continue, got one that has ended; see its output, then start all again"
            ) from error
        raise
    # Not after an error: the other ranks can wait for this one until the launcher ends them.
    distributed.destroy_process_group()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def all_gather(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def all_reduce_max(number: int) -> int:
    """The maximum over all ranks."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def all_reduce_mean(loss: Tensor) -> float:
    """The mean of a scalar over all ranks."""
    if world_size() == 1:
        return loss.item()
    total = loss.detach().double()
    distributed.all_reduce(total)
    return total.item() / world_size()


def barrier() -> None:
    """Wait until every rank has reached this call."""
    if world_size() > 1:
        distributed.all_reduce(torch.zeros(()))  # unlike distributed.barrier, also on the CPU of a machine with GPUs


def check_equal(values: Mapping[str, str]) -> None:
    """Raise on every rank if some rank has other values than rank 0.

    Args:
        values: name for the message -> value, such as the version of a package, or a digest.

    Raises:
        ValueError: if they differ; it names the rank and both values.
    """
    everywhere = all_gather(dict(values))
    for number, found in enumerate(everywhere):
        differing = [name for name, value in everywhere[0].items() if found.get(name) != value]
        if differing:
            name = differing[0]
            with suppress(RuntimeError):  # raised by a rank that is late; all ranks have received the values
                barrier()
            raise ValueError(
                f"rank {number} of {len(everywhere)}: expected the {', '.join(differing)} of rank 0, got another one "
                f"({found.get(name)} instead of {everywhere[0][name]}); start all processes with the same command, "
                "packages and files"
            )


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0 first, then on local rank 0 of every node, then on all other ranks.

    Later ranks find the files that earlier ones downloaded or decoded, on a shared disk or on that of the node.
    """
    turn = 0 if rank() == 0 else 1 if _local_rank() == 0 else 2
    for at in range(3):
        if at == turn:
            yield
        barrier()


def broadcast_weights(module: nn.Module) -> None:
    """Broadcast parameters and buffers, such as the statistics of BatchNorm, from rank 0."""
    if world_size() > 1:
        for tensor in chain(module.parameters(), module.buffers()):
            whole = tensor.detach().contiguous()
            distributed.broadcast(whole, src=0)
            tensor.detach().copy_(whole)


def average_gradients(loss: Tensor, parameters: Iterable[Tensor]) -> None:
    """Average the gradients over all ranks at the end of the next backward pass from ``loss``.

    This is before clipping, which then sees the mean. The gradient of a parameter that this rank does not use is 0;
    that of a parameter that no rank uses stays None.
    """
    if world_size() > 1:
        learning = list(parameters)
        # As in DistributedDataParallel and FSDP.
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
    """All tuples of tensors in order; ``own`` has every `world_size`-th of them, starting with the `rank`-th."""
    if world_size() == 1:
        return own
    # A tensor would arrive on the device of its sender, with the whole storage of a view.
    parts = all_gather([tuple(tensor.cpu().clone() for tensor in item) for item in own])
    return [tuple(tensor.to(device) for tensor in item) for turn in zip_longest(*parts) for item in turn if item]
