"""Recipes as YAML nodes: read, overridden and written again without executing anything they name."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rkd_plugin.experiments.recipe.catalog import find
from rkd_plugin.experiments.recipe.errors import Problem, RecipeError, suggest

_STR, _FLOAT = "tag:yaml.org,2002:str", "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?)(\d+)")
_ADDED = ("recipe", "teacher_bank")  # a key that every recipe can do without, and that an override may add
_DEEPEST, _MOST = 64, 100_000  # a recipe has 20 levels and a few hundred values; a few aliases of aliases make billions
_USAGE = "an override is written key.path=value, for example train.num_epochs=2"


@dataclass(frozen=True, eq=False)
class Tagged:
    """A value that torchdistill computes while it loads the file, such as ``!import_call``: here its text only."""

    tag: str
    value: Any


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
        """Raise a `RecipeError` if `check` finds a problem."""
        if problems := check(self):
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
        return parse(path.read_bytes(), path, overrides)
    except OSError as error:
        raise RecipeError(path, [("", f"cannot be read: {error.strerror}")]) from error


def quoted(key: str, value: object) -> str:
    """An override whose value is read as it is, whatever it contains.

    Example:
        >>> quoted("recipe.data_root", "/data/try #2")
        'recipe.data_root="/data/try #2"'
    """
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def parse(text: str | bytes, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The same for a text that was read before from `path`."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(path, [("", "a mapping of sections was expected at the top")])
        if problems := list(_ill_formed(root)):
            raise RecipeError(path, problems)
        if problems := [problem for override in overrides for problem in _override(root, override)]:
            raise RecipeError("overrides", problems)
        depth, count = _extent(root)
        if depth > _DEEPEST:
            raise RecipeError(path, [("", f"nested too deeply: {depth} levels, where {_DEEPEST} are read")])
        if count > _MOST:
            problem = f"too large: {count:,} values with all aliases written out, where {_MOST:,} are read"
            raise RecipeError(path, [("", problem)])
        # Constructing merges `<<` into the nodes, which must stay as they were written.
        data = _PlainConstructor().construct_document(copy.deepcopy(root))
    except yaml.MarkedYAMLError as error:
        raise RecipeError(path, [(_place(error), str(error.problem))]) from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise RecipeError(path, [("", f"not YAML: {' '.join(str(error).split())}")]) from error
    except RecursionError as error:
        raise RecipeError(path, [("", "nested too deeply")]) from error
    return Recipe(path, root, data)


def check(recipe: Recipe) -> list[Problem]:
    """Everything that is wrong with a recipe, found without executing it.

    Its dependencies, and the modules of all that it names, are imported. Every key is looked up, every ``kwargs`` is
    bound to the signature that it is for, and every value is held against its type hint. Models are built without
    weights and memory (on PyTorch's meta device), so that module paths can be followed; nothing else that the recipe
    names is called, nothing is downloaded or written.

    Returns:
        YAML paths such as ``train.criterion.kwargs.sub_terms.rkd.criterion.kwargs.huber``, each with one sentence.

    Example:
        >>> check(read("quickstart/rkd_da", ["train.optimizer.key=Adm"]))  # doctest: +ELLIPSIS
        [('train.optimizer.key', "no optimizer is registered as 'Adm'; did you mean Adam, ...?")]
    """
    from rkd_plugin.experiments.recipe.checking import problems

    return problems(recipe)


def number_strings(root: yaml.Node) -> Iterator[Problem]:
    """Unquoted numbers such as ``1e-3`` that YAML 1.1, and so PyYAML, takes for a string."""
    for path, node, number in _numbers(root):
        yield path, f"a number was expected, got the string {node.value!r}; write {number}"


def spelled(text: str) -> str | None:
    """A number with an exponent as PyYAML understands it, None if the text is no such number.

    Example:
        >>> spelled("1e-3"), spelled("2.5E4"), spelled("runs/1e-3")
        ('1.0e-3', '2.5e+4', None)
    """
    if not (match := _EXPONENT.fullmatch(text)):
        return None
    mantissa, sign, digits = match.groups()
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign or '+'}{digits}"


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


def _construct_tagged(constructor: Any, node: yaml.Node) -> Tagged:
    if isinstance(node, yaml.MappingNode):
        return Tagged(node.tag, constructor.construct_mapping(node, deep=True))
    if isinstance(node, yaml.SequenceNode):
        return Tagged(node.tag, constructor.construct_sequence(node, deep=True))
    return Tagged(node.tag, node.value)


_PlainConstructor.add_constructor(None, _construct_tagged)


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _children(node: yaml.Node) -> list[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        # A key that is no scalar is ill-formed, and its text may have no end.
        return [(key.value if isinstance(key, yaml.ScalarNode) else "", value) for key, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [(str(index), value) for index, value in enumerate(node.value)]
    return []


def _extent(root: yaml.Node) -> tuple[int, int]:
    """How deep a tree is, and how many values it has once every alias is written out."""

    @functools.cache
    def extent(node: yaml.Node) -> tuple[int, int]:
        inside = [extent(child) for _, child in _children(node)]
        return 1 + max((depth for depth, _ in inside), default=0), 1 + sum(count for _, count in inside)

    return extent(root)


def _ill_formed(root: yaml.Node) -> Iterator[Problem]:
    """What PyYAML lets pass, and nobody means: a key twice, a key that is no scalar, an anchor inside itself."""
    for path, node, is_inside_itself in _nodes(root):
        if is_inside_itself:
            yield path, "an anchor contains itself"
            continue
        names = [name for name, _ in _children(node)]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{path}.{name}" if path else name, "this key is there twice"
        if isinstance(node, yaml.MappingNode) and not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            yield path, "every key must be a scalar"


def _nodes(root: yaml.Node) -> Iterator[tuple[str, yaml.Node, bool]]:
    """Every node once, with its path, and whether it was met inside itself."""
    seen: set[yaml.Node] = set()

    def walk(node: yaml.Node, path: str, above: frozenset[yaml.Node]) -> Iterator[tuple[str, yaml.Node, bool]]:
        if node in above:
            yield path, node, True
        elif node not in seen:
            seen.add(node)
            yield path, node, False
            for name, child in _children(node):
                yield from walk(child, f"{path}.{name}" if path else name, above | {node})

    return walk(root, "", frozenset())


def _numbers(root: yaml.Node) -> Iterator[tuple[str, yaml.Node, str]]:
    for path, node, _ in _nodes(root):
        if isinstance(node, yaml.ScalarNode) and node.tag == _STR and node.style is None:
            number = spelled(node.value)
            if number:
                yield path, node, number


def _override(root: yaml.MappingNode, text: str) -> Iterator[Problem]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        yield text, _USAGE
        return
    try:
        new = _value(value)
    except yaml.YAMLError as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else "a character that YAML does not allow"
        yield key, f"the value {value!r} is not YAML: {problem}"
        return
    if new is None:
        yield key, f"a scalar, a [list] or a {{mapping}} without tags or aliases was expected, got {value!r}"
        return
    node: yaml.Node = root
    done: list[str] = []
    rest = key.split(".")
    while rest:
        children = dict(_children(node))
        # A key may itself contain dots: the longest one that fits.
        count = next((n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in children), 0)
        if not count and (*done, *rest) == _ADDED and isinstance(node, yaml.MappingNode):
            node.value.append((yaml.ScalarNode(_STR, rest[0]), new))
            return
        if not count:
            where = f"{'.'.join(done)} has" if done else "the recipe has"
            yield key, f"{where} no key {rest[0]!r}{suggest(rest[0], children)}"
            return
        name = ".".join(rest[:count])
        node, done, rest = children[name], [*done, name], rest[count:]
    # All aliases of an anchor are this one object.
    node.__class__ = new.__class__
    vars(node).update(vars(new))  # not the same dict, which Python 3.13.0 empties with its owner


def _value(text: str) -> yaml.Node | None:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        is_block = isinstance(event, yaml.CollectionStartEvent) and not event.flow_style
        if is_block or isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            return None
    node = yaml.compose(text or "null", Loader=yaml.SafeLoader)
    if node is None or any(_ill_formed(node)):
        return None
    for _, scalar, number in _numbers(node):
        scalar.tag, scalar.value = _FLOAT, number
    return node
