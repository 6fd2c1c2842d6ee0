"""Specs of recipes: small functions that check plain data and report its problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rkd_plugin.experiments.recipe.errors import Findings, Problem, suggest
from rkd_plugin.experiments.recipe.imports import unlisted_module
from rkd_plugin.experiments.recipe.signatures import bind, mismatch, show, wrong
from rkd_plugin.experiments.recipe.values import Tagged

Spec = Callable[["Walk", Any, str], None]
Components = Callable[[], Mapping[str, Any]]
"""A function that returns a registry; the dependencies of the recipe can add to it before it is called."""


_MOST_PROBLEMS = 100  # more are not useful, and computing the hints of thousands takes minutes


class TooManyProblemsError(Exception):
    """There are so many problems that the rest of the recipe is not checked."""


@dataclass
class Walk:
    """One walk over a recipe: its data, the names of the imported dependencies, and the findings so far, each once."""

    data: Mapping[Any, Any]
    found: dict[Problem, None] = field(default_factory=dict)
    needs: dict[Problem, None] = field(default_factory=dict)
    missing: dict[Problem, None] = field(default_factory=dict)
    notes: dict[Problem, None] = field(default_factory=dict)
    unchecked: dict[Problem, None] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    visited: set[tuple[int, Spec]] = field(default_factory=set)
    built: dict[str, Any] = field(default_factory=dict)

    def report(self, path: str, message: str) -> None:
        """Add a problem."""
        self._add(self.found, path, message)

    def need(self, path: str, message: str) -> None:
        """Add what `rkd run` needs in addition."""
        self._add(self.needs, path, message)

    def lack(self, path: str, message: str) -> None:
        """Add a file or folder that a run needs and that does not exist."""
        self._add(self.missing, path, message)

    def note(self, path: str, message: str) -> None:
        """Add what runs but is possibly not intended."""
        self._add(self.notes, path, message)

    def skip(self, path: str, message: str) -> None:
        """Add what was not checked, and why."""
        self._add(self.unchecked, path, message)

    def findings(self) -> Findings:
        """All findings."""
        return Findings(*map(list, (self.found, self.needs, self.missing, self.notes, self.unchecked)))

    def _add(self, findings: dict[Problem, None], path: str, message: str) -> None:
        findings[path, message] = None
        if len(findings) >= _MOST_PROBLEMS:
            raise TooManyProblemsError

    def visit(self, spec: Spec, value: Any, path: str) -> None:
        """Check a value: once if several aliases share it, and not at all if torchdistill computes it."""
        seen = (id(value), spec)
        if isinstance(value, Tagged) or (isinstance(value, dict | list) and seen in self.visited):
            return
        self.visited.add(seen)
        spec(self, value, path)


def anything(walk: Walk, value: Any, path: str) -> None:
    """A spec that every value fits."""


def of_type(hint: Any) -> Spec:
    """A value that fits a type hint."""

    def check(walk: Walk, value: Any, path: str) -> None:
        if expected := mismatch(value, hint):
            walk.report(path, wrong(value, expected))

    return check


def positive(walk: Walk, value: Any, path: str) -> None:
    """An integer of at least 1."""
    if expected := mismatch(value, int):
        walk.report(path, wrong(value, expected))
    elif value < 1:
        walk.report(path, f"expected at least 1, got {value}")


def optional(spec: Spec) -> Spec:
    """A value that fits the spec, or None."""

    def check(walk: Walk, value: Any, path: str) -> None:
        if value is not None:
            spec(walk, value, path)

    return check


def each(spec: Spec) -> Spec:
    """A list or mapping whose values all fit the spec."""

    def check(walk: Walk, value: Any, path: str) -> None:
        if not isinstance(value, dict | list):
            walk.report(path, f"expected a list or mapping, got {show(value)}")
            return
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            walk.visit(spec, item, f"{path}.{key}")

    return check


def section(required: Mapping[str, Spec], others: Mapping[str, Spec] | None = None, *, is_open: bool = False) -> Spec:
    """A mapping with these keys; further keys that begin with ``_`` are allowed for anchors, as in torchdistill.

    Args:
        required: required keys, and the specs of their values.
        others: optional keys, and the specs of their values.
        is_open: whether further keys are allowed.
    """
    known = {**required, **(others or {})}

    def check(walk: Walk, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            walk.report(path, f"expected a mapping, got {show(value)}")
            return
        prefix = f"{path}." if path else ""
        for key, spec in known.items():
            if key in value:
                walk.visit(spec, value[key], prefix + key)
            elif key in required:
                walk.report(prefix + key, "required, but missing")
        for key in value:
            if key not in known and not is_open and not str(key).startswith("_"):
                walk.report(f"{prefix}{key}", f"unknown key{suggest(str(key), known)}")

    return check


def one_of(kind: str, components: Components) -> Spec:
    """The name of a registered component."""

    def check(walk: Walk, value: Any, path: str) -> None:
        find(walk, value, path, kind, components())

    return check


def find(walk: Walk, key: Any, path: str, kind: str, components: Mapping[str, Any]) -> Any:
    """A registered component; if it does not exist, report a problem and return None."""
    component = components.get(key) if isinstance(key, str) else None
    unlisted = unlisted_module(key, component, walk.modules) if isinstance(key, str) else None
    if component is None or unlisted:
        hint = suggest(key, components) if isinstance(key, str) else ""
        hint = f"; add {unlisted!r} to `dependencies`" if unlisted else hint
        walk.report(path, f"no {kind} is registered as {key!r}{hint}")
    return component


@dataclass(frozen=True, eq=False)
class Component:
    """A mapping with ``key`` and ``kwargs``, from which torchdistill builds a registered class or function.

    Args:
        kind: name of the kind of component in messages.
        components: the registry.
        given: number of positional arguments that torchdistill passes.
        needs_kwargs: whether ``kwargs:`` is required even if empty.
        inside: spec of ``kwargs``, in addition to the signature.
        others: keys besides ``key``, ``args`` and ``kwargs``.
    """

    kind: str
    components: Components
    given: int = 0
    needs_kwargs: bool = True
    inside: Spec = anything
    others: Mapping[str, Spec] = field(default_factory=dict)

    def __call__(self, walk: Walk, value: Any, path: str) -> None:
        """Check a value."""
        known = {"args": anything, "kwargs": anything, **self.others}
        section({"key": anything}, known)(walk, value, path)
        if not isinstance(value, dict):
            return
        kwargs = value.get("kwargs")
        if self.needs_kwargs and kwargs is None:
            walk.report(f"{path}.kwargs", "required even if empty; write `kwargs: {}`")
        if "key" in value and not isinstance(value["key"], Tagged):
            component = find(walk, value["key"], f"{path}.key", self.kind, self.components())
            if component is not None:
                args = value.get("args")
                bind(walk.report, path, value["key"], component, kwargs, args, given=self.given, note=walk.note)
        if isinstance(kwargs, dict):
            walk.visit(self.inside, kwargs, f"{path}.kwargs")
