"""Recipes: find, read, override and check a YAML of torchdistill without executing what it names."""

from rkd_plugin.experiments.recipe.catalog import Entry, configs_root, find, names
from rkd_plugin.experiments.recipe.errors import Problem, RecipeError
from rkd_plugin.experiments.recipe.reading import Recipe, Tagged, check, quoted, read
from rkd_plugin.experiments.recipe.suites import read_suite

__all__ = [
    "Entry",
    "Problem",
    "Recipe",
    "RecipeError",
    "Tagged",
    "check",
    "configs_root",
    "find",
    "names",
    "quoted",
    "read",
    "read_suite",
]
