"""A run that a signal stops ends between two steps, and its checkpoint knows where that was."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rkd_plugin.experiments.support import processes


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Record SIGINT and SIGTERM in a list instead of ending at once; the block reads it, and ends where it can.

    After the block the signal does what it would have done. The same signal once more does so at once, but not the
    other one: Ctrl-C sends SIGINT to all processes, and ``torchrun`` sends SIGTERM after it. Outside the main thread,
    where Python does not set signal handlers, and for a signal that is ignored, as SIGINT behind ``nohup``, nothing
    changes.
    """
    signals: list[int] = []
    before: dict[int, Any] = {}

    def record(number: int, _: object) -> None:
        signals.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        does = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before |= {number: what for number, what in does.items() if what not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, record)
    try:
        yield signals
    except RuntimeError as error:
        # A terminal sends its signal to the loader's processes as well, and PyTorch raises that they are gone.
        if not signals or "DataLoader worker" not in str(error):
            raise
    finally:
        for number, does in before.items():
            signal.signal(number, does)
    if signals:
        signal.raise_signal(signals[0])
        raise SystemExit(128 + signals[0])  # if that did nothing


def is_stopping(signals: list[int]) -> bool:
    """Whether any rank has recorded a signal, which all then have, so that all stop after the same step."""
    number = processes.all_reduce_max(signals[0] if signals else 0)
    if number and not signals:
        signals.append(number)
    return bool(number)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the random numbers of Python, NumPy and PyTorch, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),  # PyTorch cannot pickle uint32
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the states that `random_state` returned; that of a GPU as well, if there is one."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
