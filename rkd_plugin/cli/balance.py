"""The verb ``rkd balance``."""

from __future__ import annotations

import argparse

from rkd_plugin.cli.arguments import add_recipe
from rkd_plugin.experiments.support.threads import limit_spinning
from rkd_plugin.printing import show

ABOUT = "compare the gradients of a recipe's loss terms on a few batches, and print weights that equalise them"
EXAMPLES = (
    "balance quickstart/rkd_da recipe.teacher_checkpoint=runs/teacher/last.pt",
    "balance my_recipe.yaml --at fc",
)
SHARES_WORK = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a recipe and its overrides, the number of batches, and a module."""
    add_recipe(parser)
    parser.add_argument("--batches", type=int, default=5, metavar="N", help="number of batches (default: 5)")
    parser.add_argument(
        "--at", metavar="MODULE", help="a hooked module of the student (default: the last that all terms depend on)"
    )


def execute(options: argparse.Namespace) -> None:
    """Print the table; nothing is trained, and no run is written."""
    limit_spinning()
    from rkd_plugin.experiments.recipe import read
    from rkd_plugin.experiments.running.balance import balance

    show(balance(read(options.recipe, options.overrides), options.batches, options.at))
