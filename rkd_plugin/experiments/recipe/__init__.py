"""Recipes: finding, reading, overriding and checking YAML files of torchdistill, without executing what they name."""

from rkd_plugin.experiments.recipe.catalog import Entry, configs_root, find, names
from rkd_plugin.experiments.recipe.errors import Findings, Problem, RecipeError
from rkd_plugin.experiments.recipe.overrides import quoted
from rkd_plugin.experiments.recipe.reading import Recipe, check, examine, read
from rkd_plugin.experiments.recipe.suites import read_suite
from rkd_plugin.experiments.recipe.values import Tagged

__all__ = [
    "Entry",
    "Findings",
    "Problem",
    "Recipe",
    "RecipeError",
    "Tagged",
    "check",
    "configs_root",
    "examine",
    "find",
    "names",
    "quoted",
    "read",
    "read_suite",
]
