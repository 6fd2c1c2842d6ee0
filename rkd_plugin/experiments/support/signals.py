"""Signals stop a run between two steps; the states of the random number generators are saved and restored."""

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
    """Record SIGINT and SIGTERM in a list in the block, which reads the list and ends where it can.

    After the block the signal has its usual effect. If the same signal comes twice, it has its usual effect at once;
    the other signal does not, as ``torchrun`` sends SIGTERM after Ctrl-C has sent SIGINT to all processes. Nothing
    changes outside the main thread, in which alone Python sets signal handlers, and for a signal that is ignored, such
    as SIGINT with ``nohup``.
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
        # A terminal sends its signal to the workers of the DataLoader as well, and PyTorch raises that they have ended.
        if not signals or "DataLoader worker" not in str(error):
            raise
    finally:
        for number, does in before.items():
            signal.signal(number, does)
    if signals:
        signal.raise_signal(signals[0])
        raise SystemExit(128 + signals[0])  # if the signal had no effect


def is_stopping(signals: list[int]) -> bool:
    """Whether any rank has recorded a signal; all ranks then record it, and stop after the same step."""
    number = processes.all_reduce_max(signals[0] if signals else 0)
    if number and not signals:
        signals.append(number)
    return bool(number)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the random number generators of Python, NumPy and PyTorch, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),  # PyTorch cannot pickle uint32
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the states that `random_state` returned, including that of a GPU if there is one."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
