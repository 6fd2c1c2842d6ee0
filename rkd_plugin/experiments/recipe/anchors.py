"""Aliases whose value torchdistill's tags receive too early."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import yaml

from rkd_plugin.experiments.recipe.errors import Problem
from rkd_plugin.experiments.recipe.values import Tagged, nodes


def early_aliases(root: yaml.Node) -> Iterator[Problem]:
    r"""Lists and mappings that are still empty when a tag such as ``!import_call`` uses them through an alias.

    PyYAML creates a list or mapping empty and fills it later, level by level, while torchdistill calls what a tag names
    as soon as it meets the tag. So ``recipe: {size: &size [8, 8]}`` reaches the ``!import_call`` of a data set as an
    empty list.

    Example:
        >>> text = "recipe: {size: &size [8, 8]}\ndatasets: {train: !import_call {key: Resize, size: *size}}"
        >>> [path for path, _ in early_aliases(yaml.compose(text))]
        ['datasets.train.size']
    """
    root = copy.deepcopy(root)  # constructing merges `<<` into the nodes
    constructor = _AtOnce()
    constructor.construct_document(root)
    paths = {id(node): path for path, node in nodes(root)}
    for node, place in constructor.early:
        message = (
            "expected the values of the alias, got an empty one, because PyYAML fills it after torchdistill has called "
            "this; write the values here, or give each of them an anchor of its own"
        )
        yield f"{paths[id(node)]}.{place}".lstrip("."), message


class _AtOnce(yaml.constructor.SafeConstructor):
    """Looks at what a tag is given at the moment when torchdistill would call what it names."""

    def __init__(self) -> None:
        super().__init__()
        self.early: list[tuple[yaml.Node, str]] = []

    def call(self, node: yaml.Node) -> Tagged:
        value: Any = node.value
        if isinstance(node, yaml.MappingNode):
            value = self.construct_mapping(node, deep=True)
        elif isinstance(node, yaml.SequenceNode):
            value = self.construct_sequence(node, deep=True)
        self.early += [(node, place) for place in _unfilled(node, value)]
        return Tagged(node.tag, value)  # which may be a key


_AtOnce.add_constructor(None, _AtOnce.call)  # type: ignore[type-var]


def _unfilled(node: yaml.Node, value: Any) -> Iterator[str]:
    """Places below a node where plain lists and mappings have fewer values than their nodes."""
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        parts = [(str(key), child, value[key]) for key, (_, child) in zip(value, node.value, strict=False)]
    elif isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        parts = [(str(index), child, value[index]) for index, child in enumerate(node.value) if index < len(value)]
    else:
        return
    for name, child, inner in parts:
        if not isinstance(child, yaml.CollectionNode) or not child.tag.startswith("tag:yaml.org,2002:"):
            continue
        if len(inner) < len(child.value):
            yield name
        else:
            yield from (f"{name}.{place}" for place in _unfilled(child, inner))
