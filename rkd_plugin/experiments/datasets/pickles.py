"""Arrays in pickles of others, read without executing anything."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

# What a pickle of numpy arrays names, in the versions of numpy that are about; nothing else is called.
ARRAYS = {
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read_arrays(owner: str, path: Path) -> dict[str, Any]:
    """The arrays, lists and numbers of a pickled dictionary.

    Raises:
        ValueError: if the pickle is broken, holds no dictionary, or names anything but arrays, before that is called.
    """
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle raises about anything
        raise ValueError(f"{owner}: expected a pickle of arrays in {path}, could not read it: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{owner}: expected a dictionary of arrays in {path}, got {type(content).__name__}")
    return content
