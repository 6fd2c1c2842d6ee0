"""The verb ``rkd embed``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rkd_plugin.cli.arguments import add_recipe, command_of
from rkd_plugin.experiments.support.threads import limit_spinning
from rkd_plugin.printing import show

ABOUT = "write a teacher bank, the teacher outputs that the losses of a recipe read, or continue it"
EXAMPLES = (
    "embed quickstart/rkd_da --out runs/quickstart/bank",
    "embed classification/cifar100/rkd --views 8 --dtype bfloat16 --out banks/cifar100",
    "embed --verify runs/quickstart/bank",
)
SHARES_WORK = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a recipe and its overrides, the folder and the format of the bank, or a bank to verify."""
    add_recipe(parser, optional=True)
    parser.add_argument("--out", type=Path, help="folder of the bank, as in recipe.teacher_bank")
    parser.add_argument("--data", metavar="ID", help="a data set of the recipe (default: the training data)")
    parser.add_argument("--dtype", default="float32", help="dtype of the files: float32 (default), float16 or bfloat16")
    parser.add_argument(
        "--views", type=int, default=0, metavar="K", help="number of views of each image, if transforms are random"
    )
    parser.add_argument("--verify", type=Path, metavar="BANK", help="check all rows of this bank against its checksums")


def execute(options: argparse.Namespace) -> None:
    """Write or verify a bank, and print its arrays."""
    limit_spinning()
    from rkd_plugin.distributed import rank
    from rkd_plugin.experiments.recipe import quoted, read
    from rkd_plugin.experiments.running.embed import embed, verify
    from rkd_plugin.experiments.support.memory import keep_memory
    from rkd_plugin.experiments.support.processes import process_group

    if options.verify:
        show(f"{options.verify}: {sum(verify(options.verify))} rows are unchanged")
        return
    if not options.recipe or not options.out:
        raise ValueError("expected a recipe and --out BANK, or --verify BANK; see `rkd embed --help`")
    recipe = read(options.recipe, options.overrides)
    keep_memory()
    with process_group(command_of(options)):
        bank = embed(recipe, options.out, options.data, options.dtype, options.views)
        if rank() > 0:
            return
    for array in bank.arrays or ():
        show(f"the {array.io} of {array.path!r}: {bank.count} images, {bank.views or 1} views, {array.width} wide")
    advice = shlex.quote(quoted("recipe.teacher_bank", options.out))
    show(f"in {options.out}; learn from it with {advice}")
