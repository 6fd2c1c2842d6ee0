"""The verb ``rkd check``."""

from __future__ import annotations

import argparse

from rkd_plugin.cli.arguments import add_recipe
from rkd_plugin.printing import show

ABOUT = "report problems of a recipe (exit status 1) and missing files (exit status 0), without running it"
EXAMPLES = ("check quickstart/rkd_da", "check my_recipe.yaml train.num_epochs=2")
SHARES_WORK = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a recipe and its overrides."""
    add_recipe(parser)


def execute(options: argparse.Namespace) -> None:
    """Print notes, missing files, what was not checked and a summary, and raise the problems."""
    from rkd_plugin.experiments.recipe import RecipeError, examine, read
    from rkd_plugin.experiments.recipe.errors import described

    recipe = read(options.recipe, options.overrides)
    findings = examine(recipe)
    show(described(options.recipe, findings))
    if findings.problems:
        raise RecipeError(recipe.path, findings.problems)
