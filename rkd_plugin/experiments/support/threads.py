"""The number of CPU threads of PyTorch, and how long they spin.

PyTorch starts one thread per core of the machine, even if a container, or other processes of the same run, leave fewer
cores to this process. The threads of OpenMP spin for milliseconds after each of the thousands of small parallel regions
of a step, on cores that other processes need. `rkd` limits both, unless the environment does, as ``torchrun`` with
OMP_NUM_THREADS=1 for several processes. The losses and the adapters change neither.

``rkd bench RECIPE`` measures this with one thread and with all threads; ``--busy K`` runs K processes that compute at
the same time. To compare, use ``OMP_WAIT_POLICY=ACTIVE`` or ``GOMP_SPINCOUNT=300000`` (OpenMP's default). A step of
``quickstart/rkd_da`` takes 16.0 ms with one thread and 12.3 ms with two, and 18.5 ms with two that spin; beside four
processes that compute 39, 60 and 180 ms (two cores of an AMD EPYC, torch 2.15.0, commit 94e34bd, medians of 30 steps).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rkd_plugin.cores import affinity, usable_cores

if TYPE_CHECKING:
    from torch import Tensor, nn

COUNT = "OMP_NUM_THREADS", "MKL_NUM_THREADS"
SPINNING = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"
# Tens of microseconds: longer than the gap between two operators, 300 times shorter than the default.
SPINS = "1000"
# Operations of a forward pass of a batch; with fewer, starting several threads takes as long as an operator.
SMALL = 2**27


def limit_spinning() -> None:
    """Let OpenMP's threads sleep soon after a parallel region, unless the user sets it; call before torch loads."""
    if "torch" not in sys.modules and not any(name in os.environ for name in SPINNING):
        os.environ["GOMP_SPINCOUNT"] = SPINS
        os.environ["KMP_BLOCKTIME"] = "1"  # of Intel's and LLVM's OpenMP, in milliseconds, instead of 200


def share(cores: int, own: tuple[str, frozenset[int]], everyone: Sequence[tuple[str, frozenset[int]]]) -> int:
    """The number of threads with which all processes on a machine together use each core once.

    Args:
        cores: number of cores of this process.
        own: its machine and the set of its cores.
        everyone: machine and cores of every process, this one included.

    Example:
        >>> both, first = frozenset({0, 1}), frozenset({0})
        >>> share(2, ("a", both), [("a", both), ("a", both)]), share(2, ("a", both), [("a", both), ("b", both)])
        (1, 2)
    """
    machine, mine = own
    counts = [sum(core in theirs for where, theirs in everyone if where == machine) for core in mine]
    return max(1, int(min(cores, sum(1 / count for count in counts))))


def flops(model: nn.Module, images: Tensor) -> int | None:
    """Floating-point operations of a forward pass in eval mode; None if the model needs other inputs than images."""
    from torch import no_grad
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    try:
        with no_grad(), FlopCounterMode(display=False) as counter:
            model.eval().forward(images)  # `forward`, as a call would compile the model
        return int(counter.get_total_flops())
    except TypeError:
        return None
    finally:
        model.train(training)


@contextmanager
def fitted(work: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """Set the number of threads in the block to this process's share of the cores, or to 1 for a small model.

    The number depends on model and machine, not on its load, so that a run is reproducible. All ranks of a process
    group call this together.

    Args:
        work: returns the floating-point operations of a forward pass of a batch; None if they are unknown.
    """
    import torch

    from rkd_plugin.experiments.support import processes

    before = torch.get_num_threads()
    if any(name in os.environ for name in COUNT) or processes.all_reduce_max(before) == 1:
        yield
        return
    own = socket.gethostname(), affinity()
    allowed = share(usable_cores(), own, processes.all_gather(own))
    operations = work()
    with exactly(1 if operations is not None and operations < SMALL else min(before, allowed)):
        yield


@contextmanager
def exactly(count: int) -> Iterator[None]:
    """Set the number of threads in the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
