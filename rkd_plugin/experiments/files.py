"""Files that are whole or absent, and what a published number has to carry with it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import rkd_plugin


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` once the block ends well; a kill leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``path`` in one piece."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write ``path`` in one piece."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``path`` in one piece; torchdistill's scripts read the model in it, under the key they expect."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint; nothing in it is executed.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is no checkpoint that can be read without executing what it holds.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none; train that model first")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for a file that is not its own
        raise ValueError(
            f"expected a checkpoint of tensors and plain values at {path}, could not read it: {error}"
        ) from error
    return content


def provenance() -> dict[str, Any]:
    """Commit, hardware and versions, without which a number says little."""
    checkout = Path(rkd_plugin.__file__).parent.parent
    git = subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    packages = ("torch", "torchvision", "torchdistill", "pytorch-metric-learning")
    return {
        "commit": git.stdout.strip() or f"rkd-plugin {rkd_plugin.__version__}",
        "hardware": f"{device}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
