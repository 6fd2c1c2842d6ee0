"""Recipes as YAML nodes: read, overridden and written again without executing anything they name."""

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

# A recipe has 20 levels, a few hundred values and 20,000 characters; a few aliases of aliases make billions of values.
_DEEPEST, _MOST, _LONGEST = 64, 20_000, 2**19
_HINTS = {
    r"'\\t' that cannot start": "a tab cannot indent: use spaces",
    r"character .* that cannot start": "quote a value that begins with it",
    "mapping values are not allowed": "mend the indentation, or quote a value that contains ': '",
    "expected <block end>|could not find expected ':'": "mend the indentation",
}


@dataclass(frozen=True, eq=False)
class Recipe:
    """A recipe that was read, with its overrides, and not executed.

    Attributes:
        path: the file.
        root: its YAML nodes.
        data: the same as dicts, lists and scalars, with `Tagged` where torchdistill would execute something.
    """

    path: Path
    root: yaml.MappingNode
    data: dict[Any, Any]

    def section(self, name: str) -> Any:
        """The plain data of a top-level section, None if there is none."""
        return self.data.get(name)

    @property
    def settings(self) -> dict[str, Any]:
        """The ``recipe:`` section, which belongs to this package and not to torchdistill."""
        settings = self.section("recipe")
        return settings if isinstance(settings, dict) else {}

    @property
    def task(self) -> str:
        """What the recipe trains for, and is measured by."""
        return str(self._required("task", str))

    @property
    def seed(self) -> int:
        """The seed of every random number of the run."""
        return int(self._required("seed", int))

    def resolved(self) -> str:
        """The YAML text with all overrides, for torchdistill's own loader; comments and anchor names are lost."""
        text: str = yaml.serialize(self.root, Dumper=yaml.SafeDumper, allow_unicode=True, width=120)
        return text

    def validate(self) -> None:
        """Raise a `RecipeError` if `examine` finds a problem, or something that `rkd run` needs is missing."""
        findings = examine(self)
        if problems := [*findings.problems, *findings.needs]:
            raise RecipeError(self.path, problems)

    def _required(self, name: str, kind: type) -> Any:
        value = self.settings.get(name)
        if type(value) is not kind:
            raise RecipeError(self.path, [(f"recipe.{name}", f"required, and {kind.__name__}; got {value!r}")])
        return value


def read(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides; nothing it names is imported or called.

    Args:
        name: a path, or the name of a packaged recipe.
        overrides: texts such as ``"train.num_epochs=2"``. They change the YAML nodes, so that a new value of an anchor
            reaches all its aliases. A value is a YAML scalar or a flow collection, without tags.

    Raises:
        RecipeError: if there is no such recipe, it is malformed, or an override names no key of it.

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
    """The same for a text that was read before from `path`."""
    if len(text) > _LONGEST:
        raise RecipeError(path, [("", f"too large: more than the {_LONGEST:,} bytes that are read")])
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(path, [("", "a mapping of sections was expected at the top")])
        if root.tag != "tag:yaml.org,2002:map":
            raise RecipeError(path, [("", f"a mapping without a tag was expected at the top, got {root.tag}")])
        _check_extent(root, path)
        if problems := list(ill_formed(root)):
            raise RecipeError(path, problems)
        if problems := [problem for override in overrides for problem in _overrides.apply(root, override)]:
            raise RecipeError("overrides", problems)
        _check_extent(root, path)
        # Constructing merges `<<` into the nodes, which must stay as they were written.
        data = _PlainConstructor().construct_document(copy.deepcopy(root))
    except yaml.MarkedYAMLError as error:
        raise RecipeError(path, [_syntax_problem(error, text)]) from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise RecipeError(path, [("", f"not YAML: {' '.join(str(error).split())}")]) from error
    except RecursionError as error:
        raise RecipeError(path, [("", "nested too deeply")]) from error
    return Recipe(path, root, data)


def examine(recipe: Recipe) -> Findings:
    """Everything that can be found out about a recipe without executing it.

    Its dependencies, and the modules of all that it names, are imported. Every key is looked up, every ``kwargs`` is
    bound to the signature that it is for, and every value is checked against its type hint. Models are built without
    weights and memory (on PyTorch's meta device), so that module paths can be followed; nothing else that the recipe
    names is called, nothing is downloaded or written. Of files it is looked up whether they exist.

    Returns:
        Pairs of a YAML path and one sentence: problems; what `rkd run` needs besides; notes; what was not checked.
    """
    from rkd_plugin.experiments.recipe.checking import examined  # loads the hosts, which reading does not need

    return examined(recipe.data, recipe.root)


def check(recipe: Recipe) -> list[Problem]:
    """Everything that is wrong with a recipe: the problems that `examine` finds.

    Returns:
        YAML paths such as ``train.criterion.kwargs.sub_terms.rkd.criterion.kwargs.huber``, each with one sentence.

    Example:
        >>> check(read("quickstart/rkd_da", ["train.optimizer.key=Adm"]))  # doctest: +ELLIPSIS
        [('train.optimizer.key', "no optimizer is registered as 'Adm'; did you mean Adam, ...?")]
    """
    return examine(recipe).problems


class _PlainConstructor(yaml.constructor.SafeConstructor):
    """Builds dicts, lists and scalars, and `Tagged` for every tag that is not YAML's own."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, int):
                str(value)  # Python reads a hexadecimal number of any length, and refuses to write it
            return value
        except (ValueError, LookupError, AttributeError, OverflowError) as error:  # a date of month 13, an empty !!int
            problem = f"{node.value!r} is not a value of type {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


def _construct_tagged(constructor: Any, node: yaml.Node) -> Tagged | str:
    if (text := text_of(node)) is not None:
        return text  # joined texts, which nothing has to be executed for
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
        raise RecipeError(path, [("", f"nested too deeply: {depth} levels, where {_DEEPEST} are read")])
    if count > _MOST:
        problem = f"too large: {count:,} values with all aliases written out, where {_MOST:,} are read"
        raise RecipeError(path, [("", problem)])


def _syntax_problem(error: yaml.MarkedYAMLError, text: str | bytes) -> Problem:
    problem, mark = str(error.problem), error.problem_mark
    if mark is None:
        return "", problem
    decoded = text if isinstance(text, str) else text.decode("utf-8", "replace")
    written = "".join(re.split(r"\r\n|[\n\r\x85\u2028\u2029]", decoded)[mark.line : mark.line + 1]).strip()
    hint = next((f"; {hint}" for pattern, hint in _HINTS.items() if re.search(pattern, problem)), "")
    return f"line {mark.line + 1}, column {mark.column + 1}", f"{problem}{f' in {written!r}' if written else ''}{hint}"
