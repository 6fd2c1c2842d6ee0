"""Overrides such as ``train.num_epochs=2`` change YAML nodes, so that aliases have the new value of their anchor."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator

import yaml

from rkd_plugin.experiments.recipe.errors import Problem, suggest
from rkd_plugin.experiments.recipe.values import FLOAT, STR, children, ill_formed, nodes, number_nodes

_USAGE = "expected an override key.path=value, for example train.num_epochs=2"
_KINDS = "expected a scalar, a [list] or a {mapping} without tags, anchors or aliases"
# Keys that `rkd run` needs and a recipe for torchdistill can lack, besides the settings in their section.
_ADDED = re.compile(r"dependencies|recipe|train(\.stage\d+)?\.teacher\.requires_grad")


def apply(root: yaml.MappingNode, text: str) -> Iterator[Problem]:
    """Apply an override; yield its problems."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        yield text, _USAGE
        return
    try:
        new = parse_value(value)
    except yaml.YAMLError as error:
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else "a character that YAML does not allow"
        yield key, f"the value {value!r} is not YAML: {reason}; write a string as {shlex.quote(quoted(key, value))}"
        return
    except ValueError as error:
        yield key, f"{error}; write a string as {shlex.quote(quoted(key, value))}"
        return
    node: yaml.Node = root
    done: list[str] = []
    rest = key.split(".")
    while rest:
        known = dict(children(node))
        # A key can contain dots: the longest key that matches.
        count = next((n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in known), 0)
        if not count:
            if isinstance(node, yaml.MappingNode) and _may_be_added(key):
                _add(node, rest, new)
            else:
                where = f"{'.'.join(done)} has" if done else "the recipe has"
                others = [path for path, _ in nodes(root)] if len(rest) == len(key.split(".")) == 1 else []
                same = [path for path in others if path.rpartition(".")[2].casefold() == key.casefold()]
                yield key, f"{where} no key {rest[0]!r}{suggest(rest[0], same or known)}"
            return
        name = ".".join(rest[:count])
        node, done, rest = known[name], [*done, name], rest[count:]
    # All aliases of an anchor are this object.
    node.__class__ = new.__class__
    vars(node).update(vars(new))  # not the same dict, which Python 3.13.0 empties with its owner


def quoted(key: str, value: object) -> str:
    """An override whose value is read literally.

    Example:
        >>> quoted("recipe.data_root", "/data/try #2")
        'recipe.data_root="/data/try #2"'
    """
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def _may_be_added(key: str) -> bool:
    from rkd_plugin.experiments.recipe.sections import SETTINGS  # loads the hosts

    section, _, name = key.partition(".")
    return bool(_ADDED.fullmatch(key)) or (section == "recipe" and name in SETTINGS)


def _add(node: yaml.MappingNode, names: list[str], value: yaml.Node) -> None:
    for name in reversed(names[1:]):
        value = yaml.MappingNode("tag:yaml.org,2002:map", [(yaml.ScalarNode(STR, name), value)])
    node.value.append((yaml.ScalarNode(STR, names[0]), value))


def parse_value(text: str) -> yaml.Node:
    """Parse the value of an override.

    Raises:
        ValueError: if its kind is not allowed in an override, or YAML would read only a part of it.
        yaml.YAMLError: if it is not YAML.
    """
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        is_block = isinstance(event, yaml.CollectionStartEvent) and not event.flow_style
        is_block |= isinstance(event, yaml.ScalarEvent) and event.style in ("|", ">")
        is_marked = isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None)
        if is_block or is_marked or (isinstance(event, yaml.DocumentStartEvent) and event.explicit):
            raise ValueError(f"{_KINDS}, got {text!r}")
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    if rest := text[node.end_mark.index if node else 0 :].strip():
        raise ValueError(f"YAML reads {rest!r} as a comment")
    if node is None:  # an empty value
        return yaml.ScalarNode("tag:yaml.org,2002:null", "null")
    if problem := next(ill_formed(node), None):
        raise ValueError(f"{_KINDS}, got {text!r}: {problem[1]}")
    for _, scalar, number in number_nodes(node):
        scalar.tag, scalar.value = FLOAT, number
    return node
