"""One run on many processes: how they find each other, and what they have to say to each other.

`torchrun`, `srun` and `accelerate launch` start them; each loads its share of the data, and the mean of the gradients
is taken here, as torchdistill's boxes, hooks and wrappers then see the plain modules that they see in one process:
its own ``DistributedDataParallel`` needs CUDA, hides the wrappers' second forward pass, and knows only of parameters
that lie between a module's input and its output, not of those that a hook leads to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from rkd_plugin.experiments.launcher import launched

T = TypeVar("T")


def rank() -> int:
    """This process's number; the first one, 0, writes all files."""
    return distributed.get_rank() if _is_joined() else 0


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _is_joined() else 1


def _is_joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """Within the block, the processes that were launched together know each other: NCCL on GPUs, gloo on CPUs.

    So does one that was launched alone by ``torchrun``, but not one that nobody launched.

    Raises:
        ConnectionError: if another process ended before its time (gloo; NCCL waits until its own limit).
    """
    launched()
    if "RANK" not in os.environ or _is_joined():
        yield
        return
    if torch.cuda.is_available():
        # Where each process is shown its own GPU alone, that one has number 0.
        torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of its own for it, and a long message.
        if re.search("closed by peer|reset by peer", str(error)):
            raise ConnectionError(
                "expected the other processes to go on, one has ended; see what that one said, then start all again"
            ) from error
        raise
    # Not after an error: the others may wait for what never comes, until the launcher ends them.
    distributed.destroy_process_group()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def of_first(compute: Callable[[], T]) -> T:
    """What the first process computes, or raises, on all of them."""
    if count() == 1:
        return compute()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = compute()
        except Exception as error:
            told[1] = error
    distributed.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    result: T = told[0]
    return result


def of_each(value: T) -> list[T]:
    """What every process passes, by rank."""
    values = [value] * count()
    if count() > 1:
        distributed.all_gather_object(values, value)
    return values


def share(asked: list[int]) -> list[int]:
    """Extend a process's list of signals by those that others got; so all stop after the same step."""
    if count() > 1:
        number = torch.tensor(asked[0] if asked else 0)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        if number and not asked:
            asked.append(int(number))
    return asked


@contextmanager
def one_after_the_other() -> Iterator[None]:
    """The first process goes first, then the first of every node, then all others.

    Whoever comes later finds the files that were downloaded or decoded before, on a disk of all nodes or of each.
    """
    turn = 0 if rank() == 0 else 1 if _local_rank() == 0 else 2
    for at in range(3):
        if at == turn:
            yield
        if count() > 1:
            distributed.all_reduce(torch.zeros(()))  # of all, which is when the last one comes


def as_first(module: nn.Module) -> None:
    """Give all processes the first one's weights and buffers, such as the statistics of BatchNorm."""
    if count() > 1:
        for tensor in chain(module.parameters(), module.buffers()):
            whole = tensor.detach().contiguous()
            distributed.broadcast(whole, src=0)
            tensor.detach().copy_(whole)


def mean(loss: Tensor) -> float:
    """Of a scalar of each process."""
    if count() == 1:
        return loss.item()
    total = loss.detach().double()
    distributed.all_reduce(total)
    return total.item() / count()


def average_gradients(loss: Tensor, parameters: Iterable[Tensor]) -> None:
    """Have the backward pass from ``loss``, still to come, end with the mean of all processes' gradients.

    At its end, and not before the optimizer's step, so that clipping sees the mean. A parameter that this process did
    not use counts as 0 here; one that none used keeps its ``grad`` of None.
    """
    if count() > 1:
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
        whole /= count()
        for gradient, part in zip(gradients, torch.split(whole, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def taken_in_turn(own: Sequence[tuple[Tensor, ...]], device: torch.device) -> Sequence[tuple[Tensor, ...]]:
    """All tuples of tensors in their order, of which this process had every `count`-th, from `rank` on."""
    if count() == 1:
        return own
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in range(count())]
    # A tensor comes back on the device that it was sent from, with all of what it is a view of.
    distributed.all_gather_object(parts, [tuple(tensor.cpu().clone() for tensor in item) for item in own])
    return [tuple(tensor.to(device) for tensor in item) for turn in zip_longest(*parts) for item in turn if item]
