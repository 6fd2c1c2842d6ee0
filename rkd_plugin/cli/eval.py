"""The verb ``rkd eval``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rkd_plugin.cli.arguments import RECIPE, add_recipe, command_of
from rkd_plugin.experiments.support.threads import limit_spinning
from rkd_plugin.printing import show

ABOUT = "measure a model on test data, and plot its embeddings"
EXAMPLES = (
    "eval runs/teacher --checkpoint best --pictures",
    "eval quickstart/student --checkpoint runs/student/last.pt",
    "eval runs/cars_rkd_da --data metric_learning/test_sets/cub200",
    "eval runs/birds recipe.data_root=/data/other_birds --classes all",
)
SHARES_WORK = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a run or a recipe, a checkpoint, test data, and pictures."""
    add_recipe(parser, f"folder of `rkd run`, or {RECIPE}")
    parser.add_argument(
        "--checkpoint",
        help="a file, or `last` or `best` of a run (default: last; of a recipe: the model without training)",
    )
    parser.add_argument("--data", help="a recipe with other test data")
    parser.add_argument(
        "--classes",
        choices=("test", "all"),
        default="test",
        help="classes to measure: those of the test split (default), or all of the data set",
    )
    parser.add_argument(
        "--pictures", action="store_true", help="write retrieval or confusion, map, distances and relations as PNG"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the pictures (default: inside the run, or runs/eval/RECIPE)"
    )


def execute(options: argparse.Namespace) -> None:
    """Print the metrics and the paths of the pictures."""
    limit_spinning()
    from rkd_plugin.distributed import rank
    from rkd_plugin.experiments.recipe import read
    from rkd_plugin.experiments.running.evaluation import evaluate
    from rkd_plugin.experiments.running.run_folder import recipe_of_run
    from rkd_plugin.experiments.support.memory import keep_memory
    from rkd_plugin.experiments.support.processes import process_group

    folder = Path(options.recipe)
    if folder.is_dir():
        recipe = recipe_of_run(folder, options.overrides)
        checkpoint = options.checkpoint or "last"
        checkpoint = folder / f"{checkpoint}.pt" if checkpoint in ("last", "best") else Path(checkpoint)
    else:
        recipe = read(options.recipe, options.overrides)
        checkpoint = options.checkpoint and Path(options.checkpoint)
        folder = Path("runs", "eval", recipe.path.stem)
    keep_memory()
    with process_group(command_of(options)):
        data = read(options.data) if options.data else None
        evaluation = evaluate(recipe, checkpoint, data, options.classes == "all")
        if rank() > 0:
            return
    show(f"measured on {evaluation.measured_on}")
    for name, value in evaluation.metrics.items():
        show(f"{name} {value:.4g}")
    if options.pictures:
        from rkd_plugin.experiments.tables.report import evaluation_pictures

        for path in evaluation_pictures(evaluation, options.out or folder / "pictures"):
            show(path)
