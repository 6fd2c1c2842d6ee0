"""Reading the header of a bank: JSON with a checksum, whose values are all checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkd_plugin.teacher_bank.files import DTYPES, check_regular
from rkd_plugin.teacher_bank.fingerprint import digest

FORMAT = "rkd_plugin teacher bank"
VERSION = 2  # increases when the files or their meaning change
HEADER, UNFINISHED = "bank.json", "unfinished.json"
LARGEST = 2**24  # bytes

_TEXT_OR_NONE = (str, type(None))
_HEADER = {
    "format": str, "version": int, "dtype": str, "views": int, "seed": int, "shard_rows": int, "checksums": str,
    "arrays": [{"path": str, "io": str, "pool": _TEXT_OR_NONE, "width": int}],
    "data": {
        "count": int, "labels": _TEXT_OR_NONE, "files": _TEXT_OR_NONE, "transform": str,
        "images": [{"index": int, "shape": [int], "mean": float, "std": float}],
    },
    "teacher": {"model": dict, "weights": str, "precision": str},
}  # fmt: skip


def read_header(folder: Path) -> dict[str, Any]:
    """The content of ``bank.json``, checked.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the bank is unfinished or of another version, or its header is truncated, changed or of wrong
            types.
    """
    path = folder / HEADER
    if not path.exists():
        if (folder / UNFINISHED).exists():
            raise ValueError(f"the teacher bank {folder} is unfinished; the same `rkd embed` goes on with it")
        found = f"found a folder without {HEADER}" if folder.is_dir() else "found none"
        raise FileNotFoundError(
            f"expected a teacher bank at {folder}, {found}; write it with `rkd embed RECIPE --out {folder}`"
        )
    again = "; delete the bank and write it again with `rkd embed`"
    header = read_json(path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} cannot be used: it is cut or changed, or no header of a teacher bank{again}")
    if header.get("version") != VERSION:
        raise ValueError(f"{path} cannot be used: its version is {header.get('version')!r}, not {VERSION}{again}")
    if header.pop("checksum", None) != digest(header):
        raise ValueError(f"{path} cannot be used: it is cut or changed, its checksum differs{again}")
    if not _fits(header, _HEADER) or not _is_sound(header):
        raise ValueError(f"{path} cannot be used: its values are not those of a teacher bank{again}")
    return header


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it is not JSON, or larger than `LARGEST`."""
    check_regular(path)
    if path.stat().st_size > LARGEST:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the types and all keys of a pattern."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(name in value and _fits(value[name], kind[name]) for name in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
    kinds = kind if isinstance(kind, tuple) else (kind, int) if kind is float else (kind,)
    return type(value) in kinds


def _is_sound(header: Mapping[str, Any]) -> bool:
    """Whether the values of a header with the right types are valid."""
    return (
        header["dtype"] in DTYPES
        and min(header["data"]["count"], header["views"]) >= 0
        and bool(header["arrays"])
        and min(header["shard_rows"], *(array["width"] for array in header["arrays"])) > 0
        and all(array["io"] in ("input", "output") for array in header["arrays"])
    )
