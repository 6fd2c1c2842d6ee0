"""The time of training steps: the loop of `rkd run`, torchdistill's loop on the same recipe, and data loading."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torchdistill.misc.log import MetricLogger, SmoothedValue
from tqdm import tqdm

from rkd_plugin import markdown
from rkd_plugin.environment import environment
from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.experiments.running.steps import models_of, steps_of
from rkd_plugin.experiments.support import threads
from rkd_plugin.experiments.support.memory import keep_memory

HEADS = "", "ms a step", "IQR ms", "images a second", "times faster"
WARM_UPS = 2
ROUNDS = 3
PLAIN = {"precision": "float32", "channels_last": False, "compile": False}
SWITCHES: dict[str, dict[str, Any]] = {
    "rkd run": PLAIN,
    "rkd run, channels_last": {**PLAIN, "channels_last": True},
    "rkd run, compile": {**PLAIN, "compile": True},
    "rkd run, bf16": {**PLAIN, "precision": "bf16"},
    "rkd run, bf16, channels_last": {**PLAIN, "precision": "bf16", "channels_last": True},
    "rkd run, bf16, channels_last, compile": {"precision": "bf16", "channels_last": True, "compile": True},
}


Contender = Callable[[int], list[float]]
"""Number of steps -> seconds of each step."""


def throughput(recipe: Recipe, steps: int, busy: int = 0) -> str:
    """A Markdown table of the median time of a training step, including data loading.

    First, torchdistill's boxes in the loop of its example scripts and the data loader alone take turns. Then, with
    memory kept as in `rkd run`, the loop of `rkd run` takes turns with each switch (compiled, if the recipe has that
    switch), and with one thread and all threads of the CPU. The order is fixed, as `keep_memory` cannot be undone.

    Args:
        recipe: the recipe to train; nothing is written.
        steps: number of steps of each row in each of three rounds.
        busy: number of other processes that compute at the same time.

    Raises:
        RecipeError: if the recipe has problems.
        ValueError: if an epoch has fewer steps than requested.
    """
    recipe.validate()
    plain = _switched(recipe, PLAIN)
    first = _built(plain)
    experiment, box = first
    images = len(next(iter(box.train_data_loader.batch_sampler)))
    contenders: dict[str, Contender] = {
        "torchdistill's loop": _loop(_built(plain), _as_torchdistill, nullcontext),
        **{
            name: _as_run(_built(_switched(recipe, switches)))
            for name, switches in SWITCHES.items()
            if not switches["compile"] or "compile" in recipe.settings  # compiling takes a minute
        },
        "data alone": _loop(first, lambda _, box: iter(box.train_data_loader), nullcontext),
    }
    for count in sorted({1, torch.get_num_threads()}):
        name = f"rkd run, {count} thread{'s' if count > 1 else ''}"
        contenders[name] = _loop(_built(plain), steps_of, partial(threads.exactly, count))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    ours = [name for name in contenders if name.startswith("rkd run")]
    with _busy(busy):
        for names in ([name for name in contenders if name not in ours], ours):
            for name in tqdm(ROUNDS * names, desc="throughput", leave=False):
                seconds[name] += contenders[name](steps)
            keep_memory()
    theirs = statistics.median(seconds["torchdistill's loop"])
    rows = []
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratio = "" if name == "data alone" else f"{theirs / middle:.2f}"
        rows.append([name, f"{1e3 * middle:.1f}", f"{1e3 * (high - low):.1f}", f"{images / middle:,.0f}", ratio])
    with experiment.threads(box.train_data_loader, *models_of(experiment, box)):
        where = {**environment(experiment.device.type), "busy": str(busy)}
    conditions = ", ".join(f"{key} {value}" for key, value in where.items())
    return markdown.table(HEADS, rows) + f"\n\n{conditions}"


def _switched(recipe: Recipe, switches: dict[str, Any]) -> Recipe:
    return replace(recipe, data={**recipe.data, "recipe": {**recipe.settings, **switches}})


def _built(recipe: Recipe) -> tuple[Experiment, Any]:
    """The experiment of a recipe, and its box."""
    experiment = Experiment(recipe)
    return experiment, experiment.box()


def _as_run(built: tuple[Experiment, Any]) -> Contender:
    """The loop of `rkd run` with its number of threads."""
    experiment, box = built
    return _loop(built, steps_of, lambda: experiment.threads(box.train_data_loader, *models_of(experiment, box)))


def _loop(
    built: tuple[Experiment, Any],
    loop: Callable[[Experiment, Any], Iterator[Any]],
    context: Callable[[], AbstractContextManager[Any]],
) -> Contender:
    """A function that measures the first steps of an epoch."""
    experiment, box = built

    def times(count: int) -> list[float]:
        with context():
            box.pre_epoch_process(epoch=0)
            experiment.seed(1)
            return _times(loop(experiment, box), count)

    return times


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """Run a number of processes in the block, each of which keeps a core busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _times(steps: Iterator[Any], count: int) -> list[float]:
    times = []
    started = time.perf_counter()
    for _ in islice(steps, WARM_UPS + count):
        times.append(time.perf_counter() - started)
        started = time.perf_counter()
    if len(times) < WARM_UPS + count:
        raise ValueError(
            f"throughput: expected at least {WARM_UPS + count} steps an epoch, got {len(times)}; request fewer with "
            "--steps"
        )
    return times[WARM_UPS:]


def _as_torchdistill(experiment: Experiment, box: Any) -> Iterator[float]:
    """The training step of torchdistill's example scripts, including its log, which is not printed."""
    log = MetricLogger(delimiter="  ")
    log.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    log.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
    for batch, targets, supplement in box.train_data_loader:
        started = time.time()
        batch, targets = batch.to(experiment.device), targets.to(experiment.device)
        box.pre_forward_process()
        loss = box.forward_process(batch, targets, supplement)
        box.post_forward_process(loss)
        log.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        log.meters["img/s"].update(len(batch) / (time.time() - started))
        if torch.isnan(loss) or torch.isinf(loss):
            raise FloatingPointError("the loss is not finite")
        yield loss.item()
