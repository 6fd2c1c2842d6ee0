"""How many threads PyTorch uses on CPUs, and how long they spin.

PyTorch starts as many threads as the machine has cores, whatever share of them a container, or other processes of the
same run, leave to this one; and OpenMP's threads spin for milliseconds after each of the thousands of small parallel
regions of a step, on cores that other work needs. So `rkd` limits both, as long as the environment sets neither, as
``torchrun`` does with OMP_NUM_THREADS=1 for several processes; the losses and the adapters change nothing.

``rkd bench RECIPE`` measures it: rows with one and with all threads, on a quiet machine, and with ``--busy K`` beside K
processes that compute. ``OMP_WAIT_POLICY=ACTIVE rkd bench RECIPE`` and ``GOMP_SPINCOUNT=300000`` (OpenMP's default)
are what to compare with.
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
# A few tens of microseconds: longer than the gap between two operators, and 300 times shorter than the default.
SPINS = "1000"
# Of a forward pass of a batch: below that, handing an operator to several threads takes as long as the operator.
SMALL = 2**27


def limit_spinning() -> None:
    """Let OpenMP's threads sleep soon after a parallel region, unless the user decides; call it before torch loads."""
    if "torch" not in sys.modules and not any(name in os.environ for name in SPINNING):
        os.environ["GOMP_SPINCOUNT"] = SPINS
        os.environ["KMP_BLOCKTIME"] = "1"  # of Intel's and LLVM's OpenMP, in milliseconds, instead of 200


def share(cores: int, own: tuple[str, frozenset[int]], everyone: Sequence[tuple[str, frozenset[int]]]) -> int:
    """How many threads one of several processes on a machine uses, so that together they use each core once.

    Args:
        cores: that this process may use.
        own: its machine and the numbers of its cores.
        everyone: the same of all processes, this one included.

    Example:
        >>> both, first = frozenset({0, 1}), frozenset({0})
        >>> share(2, ("a", both), [("a", both), ("a", both)]), share(2, ("a", both), [("a", both), ("b", both)])
        (1, 2)
    """
    machine, mine = own
    counts = [sum(core in theirs for where, theirs in everyone if where == machine) for core in mine]
    return max(1, int(min(cores, sum(1 / count for count in counts))))


def flops(model: nn.Module, images: Tensor) -> int | None:
    """Floating-point operations of a forward pass in eval mode; None of a model that takes more than images."""
    from torch import no_grad
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    try:
        with no_grad(), FlopCounterMode(display=False) as counter:
            model.eval().forward(images)  # compiled models are compiled where they are called, not here
        return int(counter.get_total_flops())
    except TypeError:
        return None
    finally:
        model.train(training)


@contextmanager
def fitted(work: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """Within the block PyTorch uses the threads that this process's share of the cores allows, and one for small work.

    The number depends on the work and the machine only, never on its load, so that a run gives the same numbers again.
    All ranks of a process group call this together.

    Args:
        work: floating-point operations of a forward pass of a batch; None if they are not known.
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
    """Within the block PyTorch uses that many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
