"""Recipes as YAML nodes: reading, overriding and writing them without executing what they name."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rkd_plugin.experiments.recipe import overrides as _overrides
from rkd_plugin.experiments.recipe.catalog import find
from rkd_plugin.experiments.recipe.errors import Findings, Problem, RecipeError
from rkd_plugin.experiments.recipe.values import Tagged, extent, ill_formed, text_of

# A recipe has 20 levels, hundreds of values and 20,000 characters; aliases of aliases can make billions of values.
_DEEPEST, _MOST, _LONGEST = 64, 20_000, 2**19
_HINTS = {
    r"'\\t' that cannot start": "indent with spaces, not with tabs",
    r"character .* that cannot start": "quote a value that begins with it",
    "mapping values are not allowed": "correct the indentation, or quote a value that contains ': '",
    "expected <block end>|could not find expected ':'": "correct the indentation",
}


@dataclass(frozen=True, eq=False)
class Recipe:
    """A recipe with its overrides, which is read but not executed.

    Attributes:
        path: the file.
        root: its YAML nodes.
        data: the same as dicts, lists and scalars, with `Tagged` for what torchdistill would execute.
    """

    path: Path
    root: yaml.MappingNode
    data: dict[Any, Any]

    def section(self, name: str) -> Any:
        """The plain data of a top-level section; None if there is no such section."""
        return self.data.get(name)

    @property
    def settings(self) -> dict[str, Any]:
        """The ``recipe:`` section, which belongs to this package and not to torchdistill."""
        settings = self.section("recipe")
        return settings if isinstance(settings, dict) else {}

    @property
    def task(self) -> str:
        """The task, which decides how the recipe is measured."""
        return str(self._required("task", str))

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self._required("seed", int))

    def resolved(self) -> str:
        """The YAML text with all overrides, for the loader of torchdistill, without comments and names of anchors."""
        text: str = yaml.serialize(self.root, Dumper=yaml.SafeDumper, allow_unicode=True, width=120)
        return text

    def validate(self) -> None:
        """Raise a `RecipeError` if `examine` finds problems, or something that `rkd run` needs is missing."""
        findings = examine(self)
        if problems := [*findings.problems, *findings.needs]:
            raise RecipeError(self.path, problems)

    def _required(self, name: str, kind: type) -> Any:
        value = self.settings.get(name)
        if type(value) is not kind:
            raise RecipeError(self.path, [(f"recipe.{name}", f"expected {kind.__name__}, got {value!r}")])
        return value


def read(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides; nothing that it names is imported or called.

    Args:
        name: a path, or the name of a packaged recipe.
        overrides: strings such as ``"train.num_epochs=2"``. They change the YAML nodes, so that all aliases have the
            new value of an anchor. A value is a YAML scalar or a flow collection, without tags.

    Raises:
        RecipeError: if there is no such recipe, it is malformed, or an override names a key that it does not have.

    Example:
        >>> recipe = read("quickstart/rkd_da", ["recipe.num_epochs=2"])
        >>> recipe.section("train")["num_epochs"]
        2
    """
    path = find(name)
    try:
        with path.open("rb") as file:
            return parse(file.read(_LONGEST + 1), path, overrides)
    except OSError as error:
        raise RecipeError(path, [("", f"cannot be read: {error.strerror}")]) from error


def parse(text: str | bytes, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """`read` for a text that comes from `path`."""
    if len(text) > _LONGEST:
        raise RecipeError(path, [("", f"expected at most {_LONGEST:,} bytes, got more")])
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(path, [("", "expected a mapping of sections at the top")])
        if root.tag != "tag:yaml.org,2002:map":
            raise RecipeError(path, [("", f"expected a mapping without a tag at the top, got {root.tag}")])
        _check_extent(root, path)
        if problems := list(ill_formed(root)):
            raise RecipeError(path, problems)
        if problems := [problem for override in overrides for problem in _overrides.apply(root, override)]:
            raise RecipeError("overrides", problems)
        _check_extent(root, path)
        # A copy, as constructing merges `<<` into the nodes.
        data = _PlainConstructor().construct_document(copy.deepcopy(root))
    except yaml.MarkedYAMLError as error:
        raise RecipeError(path, [_syntax_problem(error, text)]) from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise RecipeError(path, [("", f"not YAML: {' '.join(str(error).split())}")]) from error
    except RecursionError as error:
        raise RecipeError(path, [("", "nested too deeply")]) from error
    return Recipe(path, root, data)


def examine(recipe: Recipe) -> Findings:
    """Check a recipe without executing it.

    The dependencies, and the modules of everything that the recipe names, are imported. Every key is looked up, every
    ``kwargs`` is bound to its signature, and every value is checked against its type hint. Models are built without
    weights and memory (on PyTorch's meta device) to follow module paths. Nothing else is called, downloaded or written.
    Files are checked for existence only.

    Returns:
        Pairs of a YAML path and a sentence: problems, what `rkd run` needs in addition, missing files, notes, and what
        was not checked.
    """
    from rkd_plugin.experiments.recipe.checking import examined  # loads the hosts, which reading does not need

    return examined(recipe.data, recipe.root)


def check(recipe: Recipe) -> list[Problem]:
    """The problems that `examine` finds in a recipe.

    Returns:
        Pairs of a YAML path such as ``train.criterion.kwargs.sub_terms.rkd.criterion.kwargs.huber`` and a sentence.

    Example:
        >>> check(read("quickstart/rkd_da", ["train.optimizer.key=Adm"]))  # doctest: +ELLIPSIS
        [('train.optimizer.key', "no optimizer is registered as 'Adm'; did you mean Adam, ...?")]
    """
    return examine(recipe).problems


class _PlainConstructor(yaml.constructor.SafeConstructor):
    """Builds dicts, lists and scalars, and `Tagged` for every tag that is not part of YAML."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, int):
                str(value)  # Python reads a hexadecimal number of any length, but raises when it prints a long one
            return value
        except (
            ValueError,
            LookupError,
            AttributeError,
            OverflowError,
        ) as error:  # such as a date of month 13, or an empty !!int
            problem = f"{node.value!r} is not a value of type {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


def _construct_tagged(constructor: Any, node: yaml.Node) -> Tagged | str:
    if (text := text_of(node)) is not None:
        return text  # joined strings, which need no execution
    if isinstance(node, yaml.MappingNode):
        return Tagged(node.tag, constructor.construct_mapping(node, deep=True))
    if isinstance(node, yaml.SequenceNode):
        return Tagged(node.tag, constructor.construct_sequence(node, deep=True))
    return Tagged(node.tag, node.value)


_PlainConstructor.add_constructor(None, _construct_tagged)


def _check_extent(root: yaml.Node, path: Path) -> None:
    try:
        depth, count = extent(root)
    except ValueError as error:
        raise RecipeError(path, [(str(error), "an anchor contains itself")]) from error
    if depth > _DEEPEST:
        raise RecipeError(path, [("", f"expected at most {_DEEPEST} levels, got {depth}")])
    if count > _MOST:
        problem = f"expected at most {_MOST:,} values with all aliases resolved, got {count:,}"
        raise RecipeError(path, [("", problem)])


def _syntax_problem(error: yaml.MarkedYAMLError, text: str | bytes) -> Problem:
    problem, mark = str(error.problem), error.problem_mark
    if mark is None:
        return "", problem
    decoded = text if isinstance(text, str) else text.decode("utf-8", "replace")
    written = "".join(re.split(r"\r\n|[\n\r\x85\u2028\u2029]", decoded)[mark.line : mark.line + 1]).strip()
    hint = next((f"; {hint}" for pattern, hint in _HINTS.items() if re.search(pattern, problem)), "")
    return f"line {mark.line + 1}, column {mark.column + 1}", f"{problem}{f' in {written!r}' if written else ''}{hint}"
