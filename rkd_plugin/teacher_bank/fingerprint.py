"""Fingerprints of data sets and weights, stored with the results that were computed from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkd_plugin.teacher_bank.labels import files_of, find_labels, unwrapped
from rkd_plugin.teacher_bank.views import drawn, image, probed

CLOSE = 0.01  # of the standard deviation: another version of an image decoder may change the mean by this


def digest(content: Any) -> str:
    """SHA-256 of an array, or of a JSON value."""
    is_array = isinstance(content, np.ndarray)
    encoded = content.tobytes() if is_array else json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(encoded).hexdigest()


def of_weights(state: Mapping[str, Any]) -> str:
    """SHA-256 of a ``state_dict``: names, dtypes, shapes and values."""
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        tensor = torch.as_tensor(value).detach().cpu()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def of_data(dataset: Any, seed: int) -> dict[str, Any]:
    """Labels, file names, transform and statistics of a few images of a data set, as JSON values.

    Args:
        dataset: a data set; it may wrap, split or join others.
        seed: of the random numbers of its transform.
    """
    transforms = [repr(getattr(part, "transform", None)) for part in unwrapped(dataset)]
    # The rest of a path differs between machines.
    files = ["/".join(Path(file).parts[-2:]) for file in files_of(dataset)]
    labels = find_labels(dataset)
    return {
        "count": len(dataset),
        "labels": None if labels is None else _digest_of_repr(labels),
        "files": _digest_of_repr(files) if files else None,
        # Without memory addresses, which differ in each run.
        "transform": re.sub(r" at 0x\w+", "", "; ".join(text for text in transforms if text != "None")),
        "images": [_statistics(image(drawn(dataset, index, 0, seed)), index) for index in probed(dataset)],
    }


def difference(stored: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first difference of two data sets of the same length, by their `of_data`; empty if there is none."""
    for what, words in (("labels", "its labels differ"), ("files", "its files, or their order, differ")):
        if stored[what] != found[what]:
            return words
    if stored["transform"] != found["transform"]:
        return f"its transform was {stored['transform'] or 'none'}, the data set's is {found['transform'] or 'none'}"
    for was, now in zip(stored["images"], found["images"], strict=False):
        if was["shape"] != now["shape"]:
            return f"image {now['index']} was {tuple(was['shape'])} and is {tuple(now['shape'])}"
        allowed = CLOSE * was["std"]
        # NaN is not close to anything.
        if not all(abs(was[name] - now[name]) <= allowed or was[name] == now[name] for name in ("mean", "std")):
            return f"image {now['index']} looks different"
    return ""


def _statistics(seen: Tensor, index: int) -> dict[str, Any]:
    values = seen.double()
    return {
        "index": index,
        "shape": list(seen.shape),
        # Rounded, since the last digits depend on the order of summation.
        "mean": round(float(values.mean()), 6),
        "std": round(float(values.std(correction=0)), 6),
    }


def _digest_of_repr(values: list[Any]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()
