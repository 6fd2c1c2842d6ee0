"""Writing a teacher bank: the teacher outputs that the losses of a recipe read, for every item of a data set."""

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
    Layout,
    ShardReader,
    ShardWriter,
    decoded,
    encoded,
    shard_rows,
)
from rkd_plugin.teacher_bank.fingerprint import digest, of_data, of_weights
from rkd_plugin.teacher_bank.header import FORMAT, HEADER, UNFINISHED, VERSION, read_header, read_json
from rkd_plugin.teacher_bank.views import check_repeats, draws, image, items

BATCH = 128  # images, if the recipe has no batch size
Reader = Callable[[Tensor], list[Tensor]]


def embed(recipe: Recipe, folder: Path, dataset_id: str | None = None, dtype: str = "float32", views: int = 0) -> Bank:
    """Write a bank of the teacher outputs that the losses of a recipe read, or continue it, or open a finished one.

    Under ``torch.distributed`` the ranks take turns with shards of rows; all of them must be on one machine.

    Args:
        recipe: a recipe with a teacher; nothing is trained.
        folder: folder of the bank.
        dataset_id: name of the data set under ``datasets``; None for the training data.
        dtype: dtype of the files, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        views: number of views of each image if its transform draws random numbers; 0 if it does not.

    Returns:
        The bank.

    Raises:
        RecipeError: if the recipe has problems.
        ValueError: if the recipe has no teacher or no such data set, a loss reads maps without pooling, the data set
            draws random numbers and ``views`` is 0, a view cannot be reproduced, a vector is not finite in that dtype,
            or the ranks have different recipes, data or teachers.
        FileExistsError: if the folder contains another bank, or other files with the names of a bank's.
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
            "--views K to store K views of each image, from which training draws, or --data with another data set"
        )
    teacher = experiment.teacher()
    assert teacher is not None  # as `_check_recipe` has found reads of it
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
        raise ValueError(f"{SETTING}: expected none, as the teacher itself must run, got a bank; set it to null")
    if not reads:
        raise ValueError(f"{recipe.path}: expected a loss that reads a teacher, found none; give a recipe that has one")
    if places := rebuilt(recipe.data):
        raise ValueError(f"{places[0]}: expected a teacher without further modules, got some; leave them out")
    if dtype not in DTYPES:
        raise ValueError(f"expected a dtype out of {', '.join(DTYPES)}, got {dtype!r}")
    if views < 0:
        raise ValueError(f"expected a number of views of at least 0, got {views}")


def _data(recipe: Recipe, experiment: Experiment, dataset_id: str | None) -> tuple[str, dict[str, Any]]:
    """The name of the data set, and the configuration of its training loader, or else of the first loader."""
    loaders = [stage["train_data_loader"] for stage in stages(recipe.data).values() if "train_data_loader" in stage]
    names = list(dict.fromkeys(loader["dataset_id"] for loader in loaders))
    known = list(experiment.config["datasets"])
    if dataset_id is None and len(names) > 1:
        raise ValueError(f"{recipe.path}: expected one training data set, got {', '.join(names)}; name one with --data")
    name = dataset_id or names[0]
    if name not in known:
        raise ValueError(f"{recipe.path}: expected a data set out of {', '.join(known)}, got {name!r}")
    return name, next((loader for loader in loaders if loader["dataset_id"] == name), loaders[0])


def _reader(
    experiment: Experiment, teacher: nn.Module, reads: dict[tuple[str, str], set[Any]], first: Tensor
) -> tuple[Reader, list[dict[str, Any]]]:
    """A function that computes the rows of each array for a batch of images, and the arrays, from one image."""

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
                f"{where}: expected vectors for a bank, or maps that every loss pools in the same way, got "
                f"{tuple(value.shape)} for a loss that reads maps; train with the teacher itself"
            )
        pool: Any = next(iter(names)) if value.ndim > 2 else None
        pools.append(pool or "auto")
        arrays.append({"path": path, "io": io, "pool": pool, "width": pooled(value, pools[-1]).shape[1]})

    def read(images: Tensor) -> list[Tensor]:
        return [pooled(value, pool) for value, pool in zip(values_of(images), pools, strict=True)]

    return read, arrays


class _Rows(Dataset[tuple[int, Any]]):
    """Numbers of the rows of a bank, with the images for the teacher."""

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
    """Whether rows must be written; if so, allocate the files."""
    is_done = (folder / HEADER).exists()
    if is_done or (folder / UNFINISHED).exists():
        held = read_header(folder) if is_done else read_json(folder / UNFINISHED)
        known = held if isinstance(held, dict) else {}
        if differing := [name for name, value in header.items() if known.get(name) != value]:
            raise FileExistsError(
                f"{folder} contains another teacher bank, which differs in {', '.join(differing)}; give another "
                "folder, or delete that bank"
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
    # Whole batches are computed: rounding depends on the batch size.
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
                if not bool(decoded(block).isfinite().all()):  # the largest float16 is 65504
                    raise ValueError(
                        f"expected finite vectors, got NaN or Inf in array {number}, rows {first} to {last}, as "
                        f"{header['dtype']}; use --dtype bfloat16 or float32, or another teacher"
                    )
            writer.write(first, blocks)
            bar.update(len(numbers))
    processes.barrier()


def _finish(folder: Path, header: dict[str, Any], where: dict[str, Any]) -> None:
    """Check the shards of all ranks, and write the header, which completes the bank."""
    layout = Layout.of(header)
    held = ShardReader(folder, layout)
    for shard in range(layout.shards):
        if not held.is_whole(shard):
            rows = layout.shard(shard)
            raise ValueError(f"rows {rows.start} to {rows.stop - 1} of {folder} were not written; start again")
    ShardWriter(folder, layout).flush()
    whole = {**header, "environment": where, "checksums": digest(held.sums)}
    write_json(folder / HEADER, {**whole, "checksum": digest(whole)})
    (folder / UNFINISHED).unlink()


def verify(path: Path) -> Iterator[int]:
    """`Bank.verify` with a progress bar."""
    bank = Bank(path)
    with tqdm(total=max(bank.views, 1) * bank.count, desc=printable(f"verifying {path}"), unit="row") as bar:
        for done in bank.verify():
            bar.update(done)
            yield done
