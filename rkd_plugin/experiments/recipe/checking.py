"""All checks of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from rkd_plugin.experiments.recipe.anchors import early_aliases
from rkd_plugin.experiments.recipe.errors import Findings
from rkd_plugin.experiments.recipe.module_paths import check_module_paths
from rkd_plugin.experiments.recipe.readiness import check_readiness
from rkd_plugin.experiments.recipe.schema import mapping
from rkd_plugin.experiments.recipe.sections import check_sections
from rkd_plugin.experiments.recipe.specs import TooManyProblemsError, Walk
from rkd_plugin.experiments.recipe.tags import check_tags
from rkd_plugin.experiments.recipe.values import number_strings


def examined(data: Mapping[Any, Any], root: yaml.Node) -> Findings:
    """See `reading.examine`.

    Args:
        data: the plain data of a recipe.
        root: its YAML nodes.
    """
    walk = Walk(data)
    try:
        _examine(walk, root)
    except TooManyProblemsError:
        walk.unchecked["", "what follows after the first 100 problems"] = None
    return walk.findings()


def _examine(walk: Walk, root: yaml.Node) -> None:
    if "suite" in walk.data:
        walk.report("suite", "expected a recipe, got a suite of recipes; run it with `rkd reproduce`")
        return
    check_sections(walk)
    check_tags(walk)
    for problem in [*number_strings(root), *early_aliases(root)]:
        walk.report(*problem)
    check_module_paths(walk)
    if mapping(walk.data.get("recipe")).get("teacher_bank"):
        from rkd_plugin.experiments.recipe.teacher_bank import problems as bank_problems

        for problem in bank_problems(walk.data):
            walk.report(*problem)
    check_readiness(walk)
