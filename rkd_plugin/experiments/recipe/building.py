"""Building the models of a recipe without memory, weights or random numbers, within a time limit."""

from __future__ import annotations

import functools
import json
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rkd_plugin.experiments.recipe.schema import mapping, model_builders
from rkd_plugin.experiments.recipe.signatures import arguments
from rkd_plugin.experiments.recipe.specs import Walk

# Arguments with which a model would read or download weights, or read images; nothing but models is called.
_WEIGHTS = {"weights", "weights_backbone", "pretrained", "pretrained_backbone", "principal_components", "images"}
_SECONDS = 3.0  # of CPU time; the largest network of torchvision needs less than 1
_LARGEST_NUMBER = 10**6  # of blocks, channels or classes; a larger length of a list could fill the memory


class NotBuiltError(Exception):
    """The reason why a model is not built; it is not a problem of the recipe."""


def built_model(walk: Walk, name: str) -> nn.Module | None:
    """Build a model of ``models:`` on PyTorch's meta device; None if there is no such model or it cannot be built.

    A model that cannot be built is reported as a problem, or as not checked.
    """
    if name not in walk.built:
        try:
            walk.built[name] = _build_for(walk, name)
        except NotBuiltError as error:
            walk.built[name] = None
            walk.skip(f"models.{name}", f"its module paths, as {error}")
    model: nn.Module | None = walk.built[name]
    return model


def _build_for(walk: Walk, name: str) -> nn.Module | None:
    config = mapping(mapping(walk.data.get("models")).get(name))
    path = f"models.{name}"
    if not config or any(place == path or place.startswith(f"{path}.") for place, _ in walk.found):
        return None
    builder = model_builders(config.get("quantized") is True).get(str(config.get("key")))
    if builder is None or config.get("repo_or_dir"):
        raise NotBuiltError("torch.hub would download the model")
    kwargs = {key: value for key, value in mapping(config.get("kwargs")).items() if key not in _WEIGHTS}
    kwargs |= dict.fromkeys(_WEIGHTS & arguments(builder).named.keys())  # some models load weights by default
    try:
        text = json.dumps(kwargs, sort_keys=True)
    except TypeError as error:  # a value that torchdistill computes while it loads the file
        raise NotBuiltError("an argument of the model is computed while torchdistill loads the recipe") from error
    if _largest_number(kwargs) > _LARGEST_NUMBER:
        raise NotBuiltError(f"an argument of the model is larger than {_LARGEST_NUMBER:,}")
    try:
        model = _build(builder, text)
    except NotBuiltError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        walk.report(path, f"cannot be built: {error}")
        return None
    except Exception as error:  # a model that reads numbers while it is built, which the meta device does not have
        reason = f"the model cannot be built without weights and memory: {type(error).__name__}"
        raise NotBuiltError(reason) from error
    return model if isinstance(model, nn.Module) else None


def _largest_number(value: Any) -> float:
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return max(map(_largest_number, items), default=0)
    return abs(value) if isinstance(value, int | float) else 0


@functools.lru_cache(maxsize=64)
def _build(builder: Any, kwargs: str) -> Any:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        warnings.simplefilter("ignore")
        # A time limit may stop the builder inside `no_grad`, at a point where that cannot switch gradients on again.
        with torch.set_grad_enabled(torch.is_grad_enabled()), _time_limit(_SECONDS):
            return builder(**json.loads(kwargs))


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise in the block after this CPU time; only in the main thread, as other threads get no signals."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise NotBuiltError(f"building the model takes longer than {seconds:g} seconds")

    def again(lost: Any) -> None:
        """Python drops what is raised in a callback or a finalizer."""
        if isinstance(lost.exc_value, NotBuiltError):
            signal.setitimer(signal.ITIMER_PROF, 0.001, seconds)
        else:
            report(lost)

    report, sys.unraisablehook = sys.unraisablehook, again
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        sys.unraisablehook = report
