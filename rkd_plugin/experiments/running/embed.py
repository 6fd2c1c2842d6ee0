"""Writing a teacher bank: what a recipe's losses read of its teacher, for every item of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rkd_plugin import distributed
from rkd_plugin.adapters.torchdistill import Pool, pooled, pooling, reading
from rkd_plugin.environment import environment
from rkd_plugin.experiments.recipe import Recipe
from rkd_plugin.experiments.recipe.schema import stages
from rkd_plugin.experiments.recipe.teacher_bank import SETTING, identity, rebuilt, teacher_reads
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.experiments.support import processes
from rkd_plugin.experiments.support.files import alone_in, write_json
from rkd_plugin.printing import printable
from rkd_plugin.teacher_bank import Bank
from rkd_plugin.teacher_bank.files import (
    DTYPES,
    FORMAT,
    HEADER,
    UNFINISHED,
    VERSION,
    Layout,
    ShardReader,
    ShardWriter,
    decoded,
    encoded,
    read_header,
    read_json,
    shard_rows,
)
from rkd_plugin.teacher_bank.fingerprint import digest, of_data, of_weights
from rkd_plugin.teacher_bank.views import check_repeats, draws, image, items

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
            draws random numbers and ``views`` is 0, a view cannot be drawn again, a vector is not finite in that
            dtype, or the processes have other recipes, data or teachers.
        FileExistsError: if the folder holds another bank, or files of those names that are of none.
        BlockingIOError: if another `rkd embed` writes there.
        OSError: if the disk has no room for all rows.
    """
    recipe.validate()
    reads = teacher_reads(recipe.data)
    _check_recipe(recipe, reads, dtype, views)
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
        "shard_rows": shard_rows([array["width"] for array in arrays], dtype),
        "arrays": arrays,
        "data": {"dataset_id": name, **of_data(dataset, seed)},
        "teacher": {
            "model": identity(recipe.data["models"]["teacher_model"]),
            "weights": of_weights(teacher.state_dict()),
            "precision": experiment.settings.get("precision", "float32"),
        },
    }
    processes.check_equal({f"{name} of the bank": digest(value) for name, value in header.items()})
    with ExitStack() as held:
        distributed.broadcast(lambda: held.enter_context(alone_in(folder)))
        if distributed.broadcast(lambda: _is_new(folder, header)):
            options = loader["kwargs"]
            size = options.get("batch_size") or (loader.get("batch_sampler") or {}).get("kwargs", {}).get("batch_size")
            _write(folder, header, _Rows(dataset, views, seed), read, size or BATCH, options.get("num_workers", 0))
            where = environment(experiment.device.type)
            distributed.broadcast(lambda: _finish(folder, header, where))
    return Bank(folder)


def _check_recipe(recipe: Recipe, reads: Any, dtype: str, views: int) -> None:
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
    experiment: Experiment, teacher: nn.Module, reads: dict[tuple[str, str], set[Any]], first: Tensor
) -> tuple[Reader, list[dict[str, Any]]]:
    """What turns a batch of images into rows of each array, and the arrays, found out with one image."""

    @torch.no_grad()
    def values_of(images: Tensor) -> list[Any]:
        with reading(teacher, reads) as seen, experiment.precision():
            teacher(experiment.place(images))
        return [seen[read] for read in reads]

    arrays = []
    pools: list[Pool] = []
    for ((path, io), ways), value in zip(reads.items(), values_of(first[None]), strict=True):
        where = f"the {io} of the teacher's {path!r}"
        if not isinstance(value, Tensor) or value.ndim < 2:
            raise ValueError(f"{where}: expected a tensor (N, ...) for a bank, got {type(value).__name__}")
        names = {None if way is None else pooling(value, way) for way in ways}
        if value.ndim > 2 and (None in names or len(names) > 1):
            raise ValueError(
                f"{where}: expected vectors for a bank, or maps that every loss pools alike, got "
                f"{tuple(value.shape)} for a loss that reads maps; train that one with the teacher itself"
            )
        pool: Any = next(iter(names)) if value.ndim > 2 else None
        pools.append(pool or "auto")
        arrays.append({"path": path, "io": io, "pool": pool, "width": pooled(value, pools[-1]).shape[1]})

    def read(images: Tensor) -> list[Tensor]:
        return [pooled(value, pool) for value, pool in zip(values_of(images), pools, strict=True)]

    return read, arrays


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
    is_done = (folder / HEADER).exists()
    if is_done or (folder / UNFINISHED).exists():
        held = read_header(folder) if is_done else read_json(folder / UNFINISHED)
        known = held if isinstance(held, dict) else {}
        if differing := [name for name, value in header.items() if known.get(name) != value]:
            raise FileExistsError(
                f"{folder} holds another teacher bank, of other {', '.join(differing)}; give this one another folder, "
                "or delete that one"
            )
    elif found := sorted(path.name for path in folder.glob("*.npy")):
        raise FileExistsError(f"expected no arrays in {folder}, found {found[0]}, of no bank; give another folder")
    else:
        write_json(folder / UNFINISHED, header)
    if not is_done:
        ShardWriter(folder, Layout.of(header)).allocate()
    return not is_done


def _write(folder: Path, header: dict[str, Any], rows: _Rows, read: Reader, size: int, workers: int) -> None:
    layout = Layout.of(header)
    held, writer = ShardReader(folder, layout), ShardWriter(folder, layout)
    step = max(size // layout.shard_rows, 1)
    batches = [range(start, min(start + step, layout.shards)) for start in range(0, layout.shards, step)]
    batches = batches[distributed.rank() :: distributed.world_size()]
    # A batch is computed as a whole: its rows would be rounded otherwise in a smaller one.
    todo = [
        range(layout.shard(batch[0]).start, layout.shard(batch[-1]).stop)
        for batch in batches
        if not all(map(held.is_whole, batch))
    ]
    loader = DataLoader(rows, batch_sampler=todo, num_workers=workers)  # type: ignore[arg-type]
    count = sum(layout.shard(batch[-1]).stop - layout.shard(batch[0]).start for batch in batches)
    with tqdm(
        total=count,
        initial=count - sum(map(len, todo)),
        desc=printable(f"embedding into {folder}"),
        unit="row",
        disable=distributed.rank() > 0,
    ) as bar:
        for numbers, images in loader:
            first, last = int(numbers[0]), int(numbers[-1])
            blocks = [encoded(tensor, header["dtype"]) for tensor in read(images)]
            for number, block in enumerate(blocks):
                if not bool(decoded(block).isfinite().all()):  # float16 ends at 65504
                    raise ValueError(
                        f"expected finite vectors, got NaN or Inf in array {number}, rows {first} to {last}, as "
                        f"{header['dtype']}; take --dtype bfloat16 or float32, or another teacher"
                    )
            writer.write(first, blocks)
            bar.update(len(numbers))
    processes.barrier()


def _finish(folder: Path, header: dict[str, Any], where: dict[str, Any]) -> None:
    """Check the shards of all processes, and write the header that makes them a bank."""
    layout = Layout.of(header)
    held = ShardReader(folder, layout)
    for shard in range(layout.shards):
        if not held.is_whole(shard):
            rows = layout.shard(shard)
            raise ValueError(f"rows {rows.start} to {rows.stop - 1} of {folder} were not written; run this again")
    ShardWriter(folder, layout).flush()
    whole = {**header, "environment": where, "checksums": digest(held.sums)}
    write_json(folder / HEADER, {**whole, "checksum": digest(whole)})
    (folder / UNFINISHED).unlink()


def verify(path: Path) -> Iterator[int]:
    """See `Bank.verify`, with a progress bar."""
    bank = Bank(path)
    with tqdm(total=max(bank.views, 1) * bank.count, desc=printable(f"verifying {path}"), unit="row") as bar:
        for done in bank.verify():
            bar.update(done)
            yield done
