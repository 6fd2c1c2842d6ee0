"""The values of a recipe, as YAML nodes and as plain data in which some values are `Tagged`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from rkd_plugin.experiments.recipe.errors import Problem

STR, FLOAT = "tag:yaml.org,2002:str", "tag:yaml.org,2002:float"
# `\d+\.?\d*` would need quadratic time for a long number.
_EXPONENT = re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))[eE]([-+]?)(\d+)")
_LONGEST_TEXT = 10_000  # of strings that tags join; a string that joins itself doubles its length with each line


@dataclass(frozen=True, eq=False)
class Tagged:
    """A value that torchdistill computes while it loads the file, such as ``!import_call``; here only its content."""

    tag: str
    value: Any


def spelled(text: str) -> str | None:
    """A number with an exponent in the notation of PyYAML; None if the text is no such number.

    Example:
        >>> spelled("1e-3"), spelled("2.5E4"), spelled("runs/1e-3")
        ('1.0e-3', '2.5e+4', None)
    """
    if not (match := _EXPONENT.fullmatch(text)):
        return None
    mantissa, sign, digits = match.groups()
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign or '+'}{digits}"


def text_of(node: yaml.Node) -> str | None:
    """The text of a scalar, or of ``!join`` and similar tags on scalars; None for other nodes.

    Example:
        >>> text_of(yaml.compose("!join [a, /, 1]"))
        'a/1'
    """
    if isinstance(node, yaml.ScalarNode):
        if not node.tag.startswith("!"):
            return node.value if node.tag == STR else _scalar(node)
        convert = {"!expanduser": os.path.expanduser, "!abspath": os.path.abspath}.get(node.tag)
        return convert(node.value) if convert and "\0" not in node.value else None
    if not isinstance(node, yaml.SequenceNode) or node.tag not in ("!join", "!pathjoin"):
        return None
    parts = [text_of(part) for part in node.value]
    texts = [part for part in parts if part is not None]
    if len(texts) < len(parts) or sum(map(len, texts)) > _LONGEST_TEXT:
        return None
    return "".join(texts) if node.tag == "!join" else os.path.expanduser(os.path.join(*texts or [""]))


def _scalar(node: yaml.ScalarNode) -> str | None:
    try:
        return str(yaml.constructor.SafeConstructor().construct_object(node))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError):
        return None  # reported when the value is constructed


def children(node: yaml.Node) -> list[tuple[str, yaml.Node]]:
    """The children of a mapping or a list, with their names in a path."""
    if isinstance(node, yaml.MappingNode):
        return [
            (key.value if isinstance(key, yaml.ScalarNode) else text_of(key) or "", value) for key, value in node.value
        ]
    if isinstance(node, yaml.SequenceNode):
        return [(str(index), value) for index, value in enumerate(node.value)]
    return []


def extent(root: yaml.Node) -> tuple[int, int]:
    """The depth of a tree, and the number of its values with all aliases resolved.

    Raises:
        ValueError: if an anchor contains itself; the message is its path.
    """
    extents: dict[yaml.Node, tuple[int, int] | None] = {}
    place: list[tuple[yaml.Node, int]] = []  # the path, of which names are made only for an error, as keys can be long

    def measure(node: yaml.Node) -> tuple[int, int]:
        if node in extents:
            if (known := extents[node]) is None:
                raise ValueError(".".join(children(parent)[index][0] for parent, index in place))
            return known
        extents[node] = None
        depth = count = 0
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        for index, part in enumerate(parts):
            place.append((node, index))
            for inner in part if isinstance(part, tuple) else (part,):  # a key can be a list
                inner_depth, inner_count = measure(inner)
                depth, count = max(depth, inner_depth), count + inner_count
            place.pop()
        extents[node] = depth + 1, count + 1
        return depth + 1, count + 1

    return measure(root)


def ill_formed(root: yaml.Node) -> Iterator[Problem]:
    """What PyYAML accepts but is an error: duplicate keys, and keys that are not scalars."""
    for path, node in nodes(root):
        if not isinstance(node, yaml.MappingNode):
            continue
        keys = [key.value if isinstance(key, yaml.ScalarNode) else text_of(key) for key, _ in node.value]
        if None in keys:
            yield path, "expected scalars as keys"
        for name, count in Counter(keys).items():
            if count > 1 and name is not None:
                yield f"{path}.{name}" if path else name, "duplicate key"


def nodes(root: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
    """All nodes, each once, with their paths."""
    seen: set[yaml.Node] = set()
    left = [("", root)]
    while left:
        path, node = left.pop()
        if node not in seen:
            seen.add(node)
            yield path, node
            left += [(f"{path}.{name}" if path else name, child) for name, child in reversed(children(node))]


def number_nodes(root: yaml.Node) -> Iterator[tuple[str, yaml.ScalarNode, str]]:
    """Unquoted numbers such as ``1e-3``, which YAML 1.1 and PyYAML read as strings, and how to write them."""
    for path, node in nodes(root):
        if not isinstance(node, yaml.ScalarNode) or node.tag != STR or node.style is not None:
            continue
        if number := spelled(node.value):
            yield path, node, number


def number_strings(root: yaml.Node) -> Iterator[Problem]:
    """The problems of `number_nodes`."""
    for path, node, number in number_nodes(root):
        yield path, f"expected a number, got the string {node.value!r}; write {number}"
