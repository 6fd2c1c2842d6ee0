"""The command ``rkd``: recipes, tables of recipes, and benchmarks, from a shell."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import rkd_plugin
from rkd_plugin.experiments.processes import launched

RECIPE = "a YAML file, or the name of a packaged recipe as `rkd ls` shows it"
OVERRIDES = "key.path=value, changing the recipe before anything is built"
TOGETHER = ("run", "eval", "embed")  # what many processes do together


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 for an error that was said in words, 2 for wrong usage."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes what stands behind an option for no part of a list that it has already read.
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    command: Callable[[argparse.Namespace], int] = options.command
    name = f"rkd {options.verb}"
    try:
        rank, count = launched()
        if count > 1:
            name += f", rank {rank} of {count} processes"
            if options.verb not in TOGETHER:
                verbs = " and ".join(f"`rkd {verb}`" for verb in TOGETHER)
                raise ValueError(
                    f"expected one process, got {count}, which share the work of {verbs} alone; start this without "
                    "torchrun or srun"
                )
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"{name}: {message}", file=sys.stderr)
            return command(options)
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on from there", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rkd", description=rkd_plugin.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"rkd-plugin {rkd_plugin.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, command: Callable[[argparse.Namespace], int], about: str, *examples: str
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=about,
            description=about,
            epilog="\n".join(["examples:", *(f"  rkd {example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=command)
        return added

    verb("ls", _ls, "list the packaged recipes and suites", "ls")

    check = verb(
        "check", _check, "report every problem of a recipe, without running it",
        "check quickstart/rkd_da", "check my_recipe.yaml train.num_epochs=2",
    )  # fmt: skip
    run = verb(
        "run", _run, "train what a recipe describes, or go on with it; loading a recipe executes what it names",
        "run quickstart/teacher --out runs/teacher",
        "run quickstart/rkd_da recipe.teacher_checkpoint=runs/teacher/last.pt recipe.num_epochs=2",
    )  # fmt: skip
    for added in (check, run):
        added.add_argument("recipe", help=RECIPE)
        added.add_argument("overrides", nargs="*", help=OVERRIDES)
    run.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE)")

    evaluate = verb(
        "eval", _eval, "measure a model on test data, and picture what it makes of it",
        "eval runs/teacher --checkpoint best --pictures",
        "eval quickstart/student --checkpoint runs/student/last.pt",
        "eval runs/cars_rkd_da --data metric_learning/test_sets/cub200",
    )  # fmt: skip
    evaluate.add_argument("recipe", help=f"folder of `rkd run`, or {RECIPE}")
    evaluate.add_argument("overrides", nargs="*", help=OVERRIDES)
    evaluate.add_argument(
        "--checkpoint",
        help="a file; of a run also `last` or `best` (default: last; of a recipe: its model as it is built)",
    )
    evaluate.add_argument("--data", help="a recipe whose test data is taken instead")
    evaluate.add_argument(
        "--pictures", action="store_true", help="retrieval or confusion, map, distances, relations as PNG"
    )
    evaluate.add_argument("--out", type=Path, help="folder of the pictures (default: in the run, or runs/eval/RECIPE)")

    reproduce = verb(
        "reproduce", _reproduce, "run a whole table, or read what of it is there, and write tables and pictures",
        "reproduce quickstart", "reproduce quickstart --seeds 7 8 9 --out /tmp/table",
        "reproduce metric_learning/table1_cub200 recipe.data_root=/data/cub200 --rows cub200_rkd_da_128_x",
        "reproduce classification/table4_cifar100 recipe.data_root=/data/cifar100 --fast",
    )  # fmt: skip
    reproduce.add_argument("suite", help="the name of a suite, or a YAML file")
    reproduce.add_argument("overrides", nargs="*", help=f"{OVERRIDES}, in every row")
    reproduce.add_argument("--out", type=Path, help="folder of runs and tables (default: runs/ and the suite's folder)")
    reproduce.add_argument("--seeds", type=int, nargs="+", help="instead of the suite's own")
    reproduce.add_argument("--rows", nargs="+", metavar="ROW", help="only these, and the teachers that they need")
    reproduce.add_argument("--fast", action="store_true", help="the fraction of the schedule that the suite states")

    embed = verb(
        "embed", _embed, "write what a recipe's losses read of its teacher into a bank, or go on with it",
        "embed quickstart/rkd_da --out runs/quickstart/bank",
        "embed classification/cifar100/rkd --views 8 --dtype bfloat16 --out banks/cifar100",
        "embed --verify runs/quickstart/bank",
    )  # fmt: skip
    embed.add_argument("recipe", nargs="?", help=RECIPE)
    embed.add_argument("overrides", nargs="*", help=OVERRIDES)
    embed.add_argument("--out", type=Path, help="folder of the bank, for recipe.teacher_bank")
    embed.add_argument("--data", metavar="ID", help="a data set of the recipe (default: the one that it trains on)")
    embed.add_argument("--dtype", default="float32", help="of the files: float32 (default), float16 or bfloat16")
    embed.add_argument("--views", type=int, default=0, metavar="K", help="of each image, where transforms are random")
    embed.add_argument("--verify", type=Path, metavar="BANK", help="hold every row of this bank against its checksum")

    bench = verb(
        "bench", _bench, "time and memory of the losses beside torchdistill's own, or a recipe's training step",
        "bench", "bench --n 128 512 2048 --impl chunked --dtype bfloat16 --picture bench.png",
        "bench --show tests/bench/cpu.json", "bench quickstart/rkd_da --steps 40",
    )  # fmt: skip
    bench.add_argument("recipe", nargs="?", help=f"time training steps of this: {RECIPE}")
    bench.add_argument("overrides", nargs="*", help=OVERRIDES)
    bench.add_argument("--steps", type=int, default=20, help="of a recipe, in each of three rounds")
    bench.add_argument("--n", type=int, nargs="+", default=[128, 512, 1024], help="batch sizes")
    bench.add_argument("--impl", nargs="+", default=[], help="kernels (default: all that are worth a row)")
    bench.add_argument("--student-dim", type=int, default=128, help="width of the student's embeddings")
    bench.add_argument("--teacher-dim", type=int, default=512, help="width of the teacher's embeddings")
    bench.add_argument("--dtype", default="float32", help="of both, such as bfloat16")
    bench.add_argument("--repeats", type=int, default=5, help="timed repetitions; the table shows their median")
    bench.add_argument("--json", action="store_true", help="JSON instead of a table")
    bench.add_argument("--picture", type=Path, help="draw time and memory over N into this PNG")
    bench.add_argument("--show", type=Path, metavar="JSON", help="measure nothing, show what --json printed before")
    bench.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    bench.add_argument(
        "--peer-limit-gb",
        type=float,
        default=8.0,
        help="torchdistill's loss is estimated, not run, where it needs more",
    )
    return parser


def _ls(_: argparse.Namespace) -> int:
    from rkd_plugin.experiments.recipe import names

    entries = names()
    width = max(len(entry.name) for entry in entries)
    for name, summary, is_suite in entries:
        print(f"{name:{width}}  {'suite   ' if is_suite else 'recipe  '}{summary}")
    return 0


def _check(options: argparse.Namespace) -> int:
    from rkd_plugin.experiments.recipe import read

    read(options.recipe, options.overrides).validate()
    print(f"{options.recipe}: no problems")
    return 0


def _run(options: argparse.Namespace) -> int:
    from rkd_plugin.experiments.memory import keep_memory
    from rkd_plugin.experiments.processes import joined, rank
    from rkd_plugin.experiments.recipe import read
    from rkd_plugin.experiments.runner import run

    recipe = read(options.recipe, options.overrides)
    folder = options.out or Path("runs", *Path(options.recipe).with_suffix("").parts[-2:])
    keep_memory()
    with joined():
        result = run(recipe, folder)
        if rank() > 0:
            return 0
    for when in ("final", "best"):
        print(f"{when:6}", "  ".join(f"{name} {value:.4g}" for name, value in result[when].items()))
    print(f"in {folder}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    from rkd_plugin.experiments.experiment import evaluate, of_folder
    from rkd_plugin.experiments.processes import joined, rank
    from rkd_plugin.experiments.recipe import read

    folder = Path(options.recipe)
    if folder.is_dir():
        recipe = of_folder(folder, options.overrides)
        checkpoint = options.checkpoint or "last"
        checkpoint = folder / f"{checkpoint}.pt" if checkpoint in ("last", "best") else Path(checkpoint)
    else:
        recipe = read(options.recipe, options.overrides)
        checkpoint = options.checkpoint and Path(options.checkpoint)
        folder = Path("runs", "eval", recipe.path.stem)
    with joined():
        evaluation = evaluate(recipe, checkpoint, read(options.data) if options.data else None)
        if rank() > 0:
            return 0
    for name, value in evaluation.metrics.items():
        print(f"{name} {value:.4g}")
    if options.pictures:
        from rkd_plugin.experiments.report import evaluation_pictures

        for path in evaluation_pictures(evaluation, options.out or folder / "pictures"):
            print(path)
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from rkd_plugin.experiments.memory import keep_memory
    from rkd_plugin.experiments.suite import reproduce

    keep_memory()
    folder, table = reproduce(options.suite, options.out, options.seeds, options.rows, options.overrides, options.fast)
    print(table)
    print(f"in {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())))
    return 0


def _embed(options: argparse.Namespace) -> int:
    from rkd_plugin.experiments.bank import writing
    from rkd_plugin.experiments.processes import joined, rank
    from rkd_plugin.experiments.recipe import read

    if options.verify:
        print(f"{options.verify}: {sum(writing.verified(options.verify))} rows are as they were written")
        return 0
    if not options.recipe or not options.out:
        raise ValueError("expected a recipe and --out BANK, or --verify BANK; see `rkd embed --help`")
    recipe = read(options.recipe, options.overrides)
    with joined():
        bank = writing.embed(recipe, options.out, options.data, options.dtype, options.views)
        if rank() > 0:
            return 0
    for array in bank.arrays or ():
        print(f"the {array.io} of {array.path!r}: {bank.count} images, {bank.views or 1} views, {array.width} wide")
    print(f"in {options.out}; learn from it with recipe.teacher_bank={options.out}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    if options.recipe:
        from rkd_plugin.experiments.recipe import read
        from rkd_plugin.experiments.throughput import throughput

        print(throughput(read(options.recipe, options.overrides), options.steps))
        return 0
    from rkd_plugin import bench

    if options.show:
        measured = bench.read(options.show)
    else:
        dims = options.student_dim, options.teacher_dim
        try:
            measured = bench.main(
                options.n, options.impl, *dims, options.dtype, options.device, options.repeats, options.peer_limit_gb
            )
        except RuntimeError as error:  # a kernel that cannot run here, or is wrong
            raise ValueError(error) from error
    print(bench.show(measured, options.json, options.picture))
    return 0
