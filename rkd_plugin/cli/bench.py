"""The verb ``rkd bench``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rkd_plugin.cli.arguments import RECIPE, add_recipe
from rkd_plugin.experiments.support.threads import limit_spinning
from rkd_plugin.printing import show

ABOUT = "measure time and memory of the losses and of torchdistill's, or of the training steps of a recipe"
EXAMPLES = (
    "bench",
    "bench --n 128 512 2048 --impl chunked --dtype bfloat16 --picture bench.png",
    "bench --n 2048 16384 --impl distance_16 angle_16 softmax",
    "bench --show tests/bench/cpu.json",
    "bench quickstart/rkd_da --steps 40",
)
SHARES_WORK = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a recipe and its overrides, or the sizes of a benchmark of the losses."""
    add_recipe(parser, f"measure the training steps of this recipe: {RECIPE}", optional=True)
    parser.add_argument("--steps", type=int, default=20, help="number of steps of a recipe in each of three rounds")
    parser.add_argument(
        "--busy", type=int, default=0, metavar="K", help="measure a recipe while K other processes compute"
    )
    parser.add_argument("--n", type=int, nargs="+", default=[128, 512, 1024], help="batch sizes")
    parser.add_argument(
        "--impl",
        nargs="+",
        default=[],
        help="kernels of RKD-DA (default: those that are useful on the device), or other losses: distance_16 and "
        "angle_16, RKD-D and RKD-A on 16 neighbours, or softmax, the divergence of rows",
    )
    parser.add_argument("--student-dim", type=int, default=128, help="width of the student's embeddings")
    parser.add_argument("--teacher-dim", type=int, default=512, help="width of the teacher's embeddings")
    parser.add_argument("--dtype", default="float32", help="dtype of student and teacher, such as bfloat16")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="number of timed repetitions, more for small N; the table has their median",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--picture", type=Path, help="plot time and memory over N into this PNG")
    parser.add_argument(
        "--show", type=Path, metavar="JSON", help="measure nothing; print the table of a file that --json wrote"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--peer-limit-gb",
        type=float,
        default=8.0,
        help="if torchdistill's loss needs more memory, it is estimated and not run",
    )


def execute(options: argparse.Namespace) -> None:
    """Print the table, or JSON."""
    if options.recipe:
        limit_spinning()  # as `rkd run`; the losses alone are measured as in a user's own program
        from rkd_plugin.experiments.recipe import read
        from rkd_plugin.experiments.tables.throughput import throughput

        show(throughput(read(options.recipe, options.overrides), options.steps, options.busy))
        return
    from rkd_plugin import bench

    if options.show:
        measured = bench.read(options.show)
    else:
        dims = options.student_dim, options.teacher_dim
        measured = bench.main(
            options.n, options.impl, *dims, options.dtype, options.device, options.repeats, options.peer_limit_gb
        )
    show(bench.show(measured, options.json, options.picture))
