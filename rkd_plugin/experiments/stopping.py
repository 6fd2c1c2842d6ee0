"""A run that is asked to stop does so between two steps, and its checkpoint knows where that was."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Take SIGINT and SIGTERM down instead of ending at once; the block looks into the list, and ends where it can.

    Then the signal does what it would have done. The same one again does so at once, but not the other: whoever presses
    Ctrl-C sends processes SIGINT, and ``torchrun`` SIGTERM after it. Outside the main thread, where Python
    lets nobody set what signals do, and for a signal that is ignored, as SIGINT behind ``nohup``, nothing changes.
    """
    asked: list[int] = []
    before: dict[int, Any] = {}

    def ask(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        does = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before |= {number: what for number, what in does.items() if what not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    except RuntimeError as error:
        # A terminal sends its signal to the loader's processes as well, and PyTorch raises that they are gone.
        if not asked or "DataLoader worker" not in str(error):
            raise
    finally:
        for number, does in before.items():
            signal.signal(number, does)
    if asked:
        signal.raise_signal(asked[0])
        raise SystemExit(128 + asked[0])  # if that did nothing


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the random numbers of Python, NumPy and PyTorch are, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),  # PyTorch cannot pickle uint32
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on where `random_state` was; on a GPU as well, if that state has one."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
