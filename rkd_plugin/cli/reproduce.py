"""The verb ``rkd reproduce``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rkd_plugin.cli.arguments import OVERRIDES
from rkd_plugin.experiments.support.threads import limit_spinning
from rkd_plugin.printing import show

ABOUT = "run the rows of a table that are not finished, and write the table and pictures"
EXAMPLES = (
    "reproduce quickstart",
    "reproduce quickstart --seeds 7 8 9 --out /tmp/table",
    "reproduce metric_learning/table1_cub200 recipe.data_root=/data/cub200 --rows cub200_rkd_da_128_x",
    "reproduce classification/table4_cifar100 recipe.data_root=/data/cifar100 --fast",
)
SHARES_WORK = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a suite, overrides of all its rows, and the rows and seeds to run."""
    parser.add_argument("suite", help="the name of a suite, or a YAML file")
    parser.add_argument("overrides", nargs="*", help=f"{OVERRIDES}, for every row")
    parser.add_argument("--out", type=Path, help="folder of runs and tables (default: runs/ and the suite's folder)")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: those of the suite)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="run these rows and those that they need")
    parser.add_argument("--fast", action="store_true", help="use the shorter schedule of the suite")


def execute(options: argparse.Namespace) -> None:
    """Print the table and the names of the files."""
    limit_spinning()
    from rkd_plugin.experiments.support.memory import keep_memory
    from rkd_plugin.experiments.tables.suite import reproduce

    keep_memory()
    folder, table = reproduce(options.suite, options.out, options.seeds, options.rows, options.overrides, options.fast)
    show(table)
    show(f"in {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())))
