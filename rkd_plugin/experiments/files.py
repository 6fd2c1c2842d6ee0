"""Files that are whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


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
