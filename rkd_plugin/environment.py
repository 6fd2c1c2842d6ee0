"""The environment of a measurement: commit, hardware, versions."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def environment(device: str) -> dict[str, str]:
    """Commit, hardware and versions, to publish with measured numbers.

    Args:
        device: such as ``"cpu"`` or ``"cuda:0"``.
    """
    import rkd_plugin

    # Only a checkout has a commit; an installed package may be inside another repository.
    checkout = Path(__file__).parents[1]
    commit = f"v{rkd_plugin.__version__}"
    if (checkout / ".git").exists():
        git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "commit": commit,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchdistill": version("torchdistill"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
