"""The cores that this process may use, which in a container or a job are fewer than the machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: its affinity, and the CPU quota of its container (cgroup v1 and v2).

    Args:
        root: of the file system in which ``proc`` and ``sys`` are.
    """
    return max(1, int(min([len(affinity()), *_quotas(root)])))


def affinity() -> frozenset[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))  # not on Linux


def _quotas(root: Path) -> Iterator[float]:
    """Cores that each control group above this process may use, where there is a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    groups = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Inside of a container its own group is often mounted as the root of all.
        for group in [PurePosixPath(own), *PurePosixPath(own).parents]:
            for mounted in [groups] if not controllers else [groups / controllers, groups / "cpu"]:
                yield from _quota(mounted / str(group).lstrip("/"))


def _quota(group: Path) -> Iterator[float]:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0 and int(period) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return


def loader_workers(most: int = 8) -> int:
    """Worker processes for a ``DataLoader``: one per usable core, at most ``most``; 0 on a single core.

    Recipes call it as the default of ``recipe.num_workers``.

    Args:
        most: the largest number, at least 0.

    Example:
        >>> loader_workers(0)
        0
    """
    cores = usable_cores()
    return 0 if cores == 1 else min(cores, most)
