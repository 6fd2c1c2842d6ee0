"""The verb ``rkd run``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rkd_plugin.cli.arguments import add_recipe, command_of
from rkd_plugin.experiments.support.threads import limit_spinning
from rkd_plugin.printing import show

ABOUT = "train a model with a recipe, or continue a run; loading a recipe executes what it names"
EXAMPLES = (
    "run quickstart/teacher --out runs/teacher",
    "run quickstart/rkd_da recipe.teacher_checkpoint=runs/teacher/last.pt recipe.num_epochs=2",
)
SHARES_WORK = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a recipe, its overrides, and the folder of the run."""
    add_recipe(parser)
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE)")


def execute(options: argparse.Namespace) -> None:
    """Train, and print what was measured on, and the final and the best metrics."""
    limit_spinning()
    from rkd_plugin.distributed import rank
    from rkd_plugin.experiments.recipe import read
    from rkd_plugin.experiments.running import runner
    from rkd_plugin.experiments.running.run_folder import default_folder
    from rkd_plugin.experiments.support.memory import keep_memory
    from rkd_plugin.experiments.support.processes import process_group

    recipe = read(options.recipe, options.overrides)
    folder = options.out or default_folder(options.recipe)
    had_ended = (folder / "result.json").is_file()
    keep_memory()
    with process_group(command_of(options)):
        result = runner.run(recipe, folder)
        if rank() > 0:
            return
    show(f"measured on {result['measured_on']}")
    for when in ("final", "best"):
        show(f"{when:6} " + "  ".join(f"{name} {value:.4g}" for name, value in result[when].items()))
    show(f"already finished, in {folder}" if had_ended else f"in {folder}")
