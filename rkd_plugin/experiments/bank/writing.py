"""Writing a bank: what a recipe's losses read of its teacher, for every image of a data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdistill.common.module_util import get_module
from tqdm import tqdm

from rkd_plugin.adapters.torchdistill import RKDDALoss
from rkd_plugin.bench import environment
from rkd_plugin.experiments import processes
from rkd_plugin.experiments.bank.files import (
    DTYPES,
    FORMAT,
    HEADER,
    UNFINISHED,
    VERSION,
    Bank,
    checksums,
    decoded,
    digest,
    encoded,
    maps,
    read_header,
)
from rkd_plugin.experiments.bank.recipes import SETTING, identity, rebuilt, taught, weights_of
from rkd_plugin.experiments.bank.views import check_repeats, described, draws, image, items
from rkd_plugin.experiments.experiment import Experiment
from rkd_plugin.experiments.files import write_json
from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.recipe.schema import stages

BATCH = 128  # images, where the recipe does not say how many it trains on at once
Reader = Callable[[Tensor], list[Tensor]]


def embed(recipe: Recipe, folder: Path, dataset_id: str | None = None, dtype: str = "float32", views: int = 0) -> Bank:
    """Write a bank of what the losses of a recipe read of its teacher, or go on with it, or open it if it is done.

    Under ``torch.distributed`` the processes, which must share the file system's cache and so be on one machine, take
    turns with shards of rows.

    Args:
        recipe: with a teacher; nothing is trained.
        folder: of the bank.
        dataset_id: of the data set, under ``datasets``; None for the one that the recipe trains on.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, of the files.
        views: how many views of each image, of a data set that draws random numbers; 0 for one that does not.

    Returns:
        The bank.

    Raises:
        RecipeError: if the recipe has problems.
        ValueError: if the recipe has no such teacher or data set, a loss reads what a bank cannot hold, the data set
            draws random numbers and ``views`` is 0, a view cannot be drawn again, or a vector is not finite in that
            dtype.
        FileExistsError: if the folder holds another bank.
    """
    recipe.validate()
    reads = taught(recipe.data)
    _check(recipe, reads, dtype, views)
    experiment = Experiment(recipe)
    name, loader = _data(recipe, experiment, dataset_id)
    dataset = experiment.config["datasets"][name]
    seed = experiment.settings["seed"]
    if views:
        check_repeats(dataset, seed)
    elif random := draws(dataset):
        raise ValueError(
            f"datasets.{name}: expected a transform that draws no random numbers, got one that does ({random}); give "
            "--views K to hold K views of each image, which training then draws from, or --data with another data set"
        )
    teacher = experiment.teacher()
    assert teacher is not None  # as it is read
    read, arrays = _reader(experiment, teacher.eval(), reads, image(items(dataset, [0], views, seed)[0]))
    header = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "views": views,
        "seed": seed,
        "arrays": arrays,
        "data": {"dataset_id": name, **described(dataset, seed)},
        "teacher": {
            "model": identity(recipe.data["models"]["teacher_model"]),
            "weights": weights_of(teacher.state_dict()),
            "precision": experiment.settings.get("precision", "float32"),
        },
    }
    if processes.broadcast(lambda: _is_new(folder, header)):
        options = loader["kwargs"]
        size = options.get("batch_size") or (loader.get("batch_sampler") or {}).get("kwargs", {}).get("batch_size")
        _write(folder, header, _Rows(dataset, views, seed), read, size or BATCH, options.get("num_workers", 0))
        where = environment(experiment.device.type)
        processes.broadcast(lambda: _finish(folder, header, where))
    return Bank(folder)


def _check(recipe: Recipe, reads: Any, dtype: str, views: int) -> None:
    if recipe.settings.get("teacher_bank"):
        raise ValueError(f"{SETTING}: expected none, as its teacher is to be run, got a bank; set it to null")
    if not reads:
        raise ValueError(f"{recipe.path}: expected a loss that reads a teacher, found none; name a recipe that has one")
    if places := rebuilt(recipe.data):
        raise ValueError(f"{places[0]}: expected a teacher as the network is, got further modules; leave them out")
    if dtype not in DTYPES:
        raise ValueError(f"expected a dtype out of {', '.join(DTYPES)}, got {dtype!r}")
    if views < 0:
        raise ValueError(f"expected a number of views of at least 0, got {views}")


def _data(recipe: Recipe, experiment: Experiment, dataset_id: str | None) -> tuple[str, dict[str, Any]]:
    """The data set's name, and the configuration of the loader that trains on it, or of the first one."""
    loaders = [stage["train_data_loader"] for stage in stages(recipe.data).values() if "train_data_loader" in stage]
    names = list(dict.fromkeys(loader["dataset_id"] for loader in loaders))
    known = list(experiment.config["datasets"])
    if dataset_id is None and len(names) > 1:
        raise ValueError(f"{recipe.path} trains on {', '.join(names)}, a bank is of one: name it with --data")
    name = dataset_id or names[0]
    if name not in known:
        raise ValueError(f"{recipe.path}: expected a data set out of {', '.join(known)}, got {name!r}")
    return name, next((loader for loader in loaders if loader["dataset_id"] == name), loaders[0])


def _reader(
    experiment: Experiment, teacher: nn.Module, reads: dict[tuple[str, str], set[str | None]], first: Tensor
) -> tuple[Reader, list[dict[str, Any]]]:
    """What turns a batch of images into rows of each array, and the arrays, found out with one image."""

    @torch.no_grad()
    def raw(images: Tensor) -> list[Any]:
        seen: dict[tuple[str, str], Any] = {}

        def keep(read: tuple[str, str]) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                seen[read] = inputs[0] if read[1] == "input" else output

            return hook

        with ExitStack() as hooks, experiment.precision():
            for path, io in reads:
                module = teacher if path == "." else get_module(teacher, path)
                hooks.enter_context(module.register_forward_hook(keep((path, io))))
            teacher(experiment.place(images))
        return [seen[read] for read in reads]

    arrays = []
    pools: list[RKDDALoss] = []
    for ((path, io), ways), value in zip(reads.items(), raw(first[None]), strict=True):
        name = f"the {io} of the teacher's {path!r}"
        if not isinstance(value, Tensor) or value.ndim < 2:
            raise ValueError(f"{name}: expected a tensor (N, ...) for a bank, got {type(value).__name__}")
        pool: Any = None if value.ndim == 2 else next(iter(ways)) if len(ways) == 1 else None
        if value.ndim > 2 and pool is None:
            raise ValueError(
                f"{name}: expected vectors for a bank, or maps that every loss pools alike, got "
                f"{tuple(value.shape)} for a loss that reads maps; train that one with the teacher itself"
            )
        pools.append(RKDDALoss(pool=pool or "avg"))
        arrays.append({"path": path, "io": io, "pool": pool, "width": pools[-1].embeddings("teacher", value).shape[1]})
    return (
        lambda images: [p.embeddings("teacher", value) for p, value in zip(pools, raw(images), strict=True)],
        arrays,
    )


class _Rows(Dataset[tuple[int, Any]]):
    """Rows of a bank, with the images that the teacher is to see."""

    def __init__(self, dataset: Any, views: int, seed: int) -> None:
        self.dataset = dataset
        self.views = views
        self.seed = seed

    def __len__(self) -> int:
        return max(self.views, 1) * len(self.dataset)

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[int, Any]]:
        seen = items(self.dataset, rows, self.views, self.seed)
        return [(row, image(item)) for row, item in zip(rows, seen, strict=True)]


def _is_new(folder: Path, header: dict[str, Any]) -> bool:
    """Whether there is something to write; the files are then there, with room for all rows."""
    total = max(header["views"], 1) * header["data"]["count"]
    held = read_header(folder) if (folder / HEADER).is_file() else None
    if held is None and (folder / UNFINISHED).is_file():
        held = json.loads((folder / UNFINISHED).read_text(encoding="utf-8"))
    if held is not None and any(held.get(name) != value for name, value in header.items()):
        differing = [name for name, value in header.items() if held.get(name) != value]
        raise FileExistsError(
            f"{folder} holds another teacher bank, of other {', '.join(differing)}; give this one another folder, "
            "or delete that one"
        )
    if held is None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, array in enumerate(header["arrays"]):
            maps(folder, number, "w+", dtype=DTYPES[header["dtype"]], shape=(total, array["width"]))
        write_json(folder / UNFINISHED, header)  # last: where it is, the files have their size
    return not (folder / HEADER).is_file()


def _write(folder: Path, header: dict[str, Any], rows: _Rows, read: Reader, size: int, workers: int) -> None:
    files = [maps(folder, number, "r+") for number in range(len(header["arrays"]))]
    shards = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    shards = shards[processes.rank() :: processes.world_size()]
    todo = [shard for shard in shards if not all(_is_written(vectors, sums, shard) for vectors, sums in files)]
    loader = DataLoader(rows, batch_sampler=todo, num_workers=workers)  # type: ignore[arg-type]
    count = sum(map(len, shards))
    with tqdm(
        total=count,
        initial=count - sum(map(len, todo)),
        desc=f"embedding into {folder}",
        unit="row",
        disable=processes.rank() > 0,
    ) as bar:
        for numbers, images in loader:
            chosen = slice(int(numbers[0]), int(numbers[-1]) + 1)
            for number, ((vectors, sums), tensor) in enumerate(zip(files, read(images), strict=True)):
                block = encoded(tensor, header["dtype"])
                if not bool(decoded(block).isfinite().all()):  # float16 ends at 65504
                    raise ValueError(
                        f"expected finite vectors, got NaN or Inf in array {number}, rows {chosen.start} to "
                        f"{chosen.stop - 1}, as {header['dtype']}; take --dtype bfloat16 or float32, or another teacher"
                    )
                vectors[chosen] = block
                sums[chosen] = checksums(block)  # after the rows: a row whose checksum fits is whole
            bar.update(len(numbers))
    for pair in files:
        for array in pair:
            array.flush()  # type: ignore[attr-defined]
    processes.barrier()


def _is_written(vectors: Any, sums: Any, shard: range) -> bool:
    rows = slice(shard.start, shard.stop)
    return bool(sums[rows].all()) and bool((checksums(vectors[rows]) == sums[rows]).all())


def _finish(folder: Path, header: dict[str, Any], where: dict[str, Any]) -> None:
    """Hold the rows of all processes against their checksums, and write the header that makes them a bank."""
    files = [maps(folder, number) for number in range(len(header["arrays"]))]
    whole = {**header, "environment": where, "sums": [digest(np.asarray(sums)) for _, sums in files]}
    for vectors, sums in files:
        for start in range(0, len(sums), BATCH):
            shard = range(start, min(start + BATCH, len(sums)))
            if not _is_written(vectors, sums, shard):
                raise ValueError(f"rows {start} to {shard.stop - 1} of {folder} were not written; run this again")
    write_json(folder / HEADER, {**whole, "checksum": digest(whole)})
    (folder / UNFINISHED).unlink()


def verified(path: Path) -> Iterator[int]:
    """See `Bank.verify`, with a progress bar."""
    bank = Bank(path)
    with tqdm(total=max(bank.views, 1) * bank.count, desc=f"verifying {path}", unit="row") as bar:
        for done in bank.verify():
            bar.update(done)
            yield done
