"""Training steps a second: our loop beside torchdistill's own on the same recipe, and the data alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torchdistill.misc.log import MetricLogger, SmoothedValue
from tqdm import tqdm

from rkd_plugin.environment import environment
from rkd_plugin.experiments.experiment import Experiment
from rkd_plugin.experiments.memory import keep_memory
from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.runner import steps_of

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


def throughput(recipe: Recipe, steps: int) -> str:
    """A Markdown table of the median time of a training step, data loading included.

    First torchdistill's boxes in the loop of its example scripts, and the data loader alone, which take turns; then,
    in memory that is kept as `rkd run` keeps it, `runner`'s loop with each switch (compiled, if the recipe names that
    one), which take turns as well. Memory that was kept once stays so, therefore this order.

    Args:
        recipe: what is trained; nothing is written.
        steps: of each contender in each of three rounds.

    Raises:
        RecipeError: if the recipe has problems.
        ValueError: if it has fewer steps in an epoch than are asked for.
    """
    recipe.validate()
    plain = _switched(recipe, PLAIN)
    alone = _built(plain)
    images = len(next(iter(alone[1].train_data_loader.batch_sampler)))
    contenders: dict[str, Callable[[], Iterator[Any]]] = {
        "torchdistill's loop": _loop(_built(plain), _as_torchdistill),
        **{
            name: _loop(_built(_switched(recipe, switches)), steps_of)
            for name, switches in SWITCHES.items()
            if not switches["compile"] or "compile" in recipe.settings  # it takes a minute, and a recipe may lack it
        },
        "data alone": _loop(alone, lambda _, box: iter(box.train_data_loader)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    ours = [name for name in contenders if name.startswith("rkd run")]
    for names in ([name for name in contenders if name not in ours], ours):
        for name in tqdm(ROUNDS * names, desc="throughput", leave=False):
            seconds[name] += _times(contenders[name](), steps)
        keep_memory()
    theirs = statistics.median(seconds["torchdistill's loop"])
    lines = ["| | ms a step | IQR ms | images a second | times faster |", "|---|---|---|---|---|"]
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratio = "" if name == "data alone" else f"{theirs / middle:.2f}"
        lines.append(f"| {name} | {1e3 * middle:.1f} | {1e3 * (high - low):.1f} | {images / middle:,.0f} | {ratio} |")
    where = environment(alone[0].device.type)
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in where.items())])


def _switched(recipe: Recipe, switches: dict[str, Any]) -> Recipe:
    return replace(recipe, data={**recipe.data, "recipe": {**recipe.settings, **switches}})


def _built(recipe: Recipe) -> tuple[Experiment, Any]:
    """The recipe and its box."""
    experiment = Experiment(recipe)
    return experiment, experiment.box()


def _loop(
    built: tuple[Experiment, Any], loop: Callable[[Experiment, Any], Iterator[Any]]
) -> Callable[[], Iterator[Any]]:
    experiment, box = built

    def start() -> Iterator[Any]:
        box.pre_epoch_process(epoch=0)
        experiment.seed(1)
        return loop(experiment, box)

    return start


def _times(steps: Iterator[Any], count: int) -> list[float]:
    times = []
    started = time.perf_counter()
    for _ in islice(steps, WARM_UPS + count):
        times.append(time.perf_counter() - started)
        started = time.perf_counter()
    if len(times) < WARM_UPS + count:
        raise ValueError(
            f"throughput: expected at least {WARM_UPS + count} steps an epoch, got {len(times)}; ask for fewer"
        )
    return times[WARM_UPS:]


def _as_torchdistill(experiment: Experiment, box: Any) -> Iterator[float]:
    """What torchdistill's example scripts do in a step, its log included, which is not printed."""
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
