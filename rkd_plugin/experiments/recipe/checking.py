"""All problems of a recipe at once."""

from __future__ import annotations

from rkd_plugin.experiments.recipe.errors import Problem
from rkd_plugin.experiments.recipe.module_paths import check_module_paths
from rkd_plugin.experiments.recipe.reading import Recipe, number_strings
from rkd_plugin.experiments.recipe.schema import check_recipe
from rkd_plugin.experiments.recipe.tags import check_tags
from rkd_plugin.experiments.recipe.teacher_bank import problems as bank_problems
from rkd_plugin.experiments.recipe.walking import Walk


def problems(recipe: Recipe) -> list[Problem]:
    """See `check`; apart from it because it loads the hosts, for which reading a recipe has no need."""
    if "suite" in recipe.data:
        return [("suite", "this is a suite of recipes, which `rkd reproduce` runs, and not a recipe")]
    walk = Walk(recipe.data)
    check_recipe(walk)
    check_tags(walk)
    for problem in number_strings(recipe.root):
        walk.report(*problem)
    check_module_paths(walk)
    for problem in bank_problems(recipe.data):
        walk.report(*problem)
    return list(walk.found)
