"""The arguments of a component, from its signature and, if it passes ``**kwargs`` on, from its source."""

from __future__ import annotations

import ast
import builtins
import collections.abc
import enum
import functools
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rkd_plugin.experiments.recipe.errors import suggest
from rkd_plugin.experiments.recipe.values import Tagged, spelled

Report = Callable[[str, str], None]
_SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "nothing"}


@dataclass(frozen=True)
class Argument:
    """An argument: whether it is required, its default, and its type hint (Any if unknown)."""

    required: bool = False
    default: Any = None
    hint: Any = Any


@dataclass(frozen=True)
class Arguments:
    """The arguments of a component.

    Attributes:
        named: all arguments that can be passed by keyword.
        positional: the names of those that can be passed by position, in order.
        is_open: whether other keywords can be passed, or are unknown.
        is_variadic: whether any number of positional arguments can be passed.
        ignores: whether other keywords can be passed and are not used.
    """

    named: Mapping[str, Argument] = field(default_factory=dict)
    positional: Sequence[str] = ()
    is_open: bool = False
    is_variadic: bool = False
    ignores: bool = False

    def without(self, given: int, names: Collection[str]) -> Arguments:
        """The arguments that remain after some are passed, by position and by name."""
        taken = {*self.positional[:given], *names}
        left = {name: argument for name, argument in self.named.items() if name not in taken}
        return replace(self, named=left, positional=self.positional[given:])


_ANYTHING = Arguments(is_open=True, is_variadic=True)


def arguments(component: Any) -> Arguments:
    """The arguments of a class or function, including those that ``**kwargs`` stands for.

    ``super().__init__(**kwargs)`` is followed along the MRO of the class, and ``build(x, **kwargs)`` into ``build``. A
    name that a component accepts and ignores does not count.

    Example:
        >>> from pytorch_metric_learning.distances import LpDistance
        >>> sorted(arguments(LpDistance).named)
        ['collect_stats', 'is_inverted', 'normalize_embeddings', 'p', 'power']
    """
    return _arguments(component) if isinstance(component, Hashable) else _arguments.__wrapped__(component)


@functools.cache
def _arguments(component: Any) -> Arguments:
    try:
        if isinstance(component, type):
            return _of_class(component.__mro__)
        return _of_function(inspect.unwrap(component))
    except RecursionError:  # two functions that pass their keywords to each other
        return _ANYTHING


def bind(
    report: Report,
    path: str,
    name: str,
    component: Any,
    kwargs: Any,
    args: Any = None,
    *,
    given: int = 0,
    taken: Collection[str] = (),
    note: Report | None = None,
) -> None:
    """Report problems of the arguments of a component, without calling it.

    Args:
        report: function of a path and a message.
        path: YAML path of the mapping with ``args`` and ``kwargs``.
        name: name of the component.
        component: class or function.
        kwargs: plain data.
        args: plain data.
        given: number of positional arguments that the host passes before ``args``.
        taken: names of arguments that the host passes.
        note: `report` for an argument that the component accepts and ignores; None to report a problem.
    """
    if isinstance(kwargs, Tagged) or isinstance(args, Tagged):
        return
    if kwargs is not None and not isinstance(kwargs, dict):
        report(f"{path}.kwargs", f"expected a mapping of arguments, got {show(kwargs)}")
        return
    if args is not None and not isinstance(args, list):
        report(f"{path}.args", f"expected a list of arguments, got {show(args)}")
        return
    all_arguments, kwargs, args = arguments(component), kwargs or {}, args or []
    known = all_arguments.without(given, taken)
    if len(args) > len(known.positional) and not known.is_variadic:
        report(f"{path}.args", f"{name} takes at most {len(known.positional)} positional arguments, got {len(args)}")
    passed = dict(zip(known.positional, args, strict=False))
    for index, (key, value) in enumerate(passed.items()):
        _check_argument(report, f"{path}.args.{index}", value, known.named.get(key, Argument()))
    left = known.without(len(args), ())
    for key, value in kwargs.items():
        if key in left.named:
            _check_argument(report, f"{path}.kwargs.{key}", value, left.named[key])
        elif key in passed or key in taken or key in all_arguments.positional[:given]:
            report(f"{path}.kwargs.{key}", f"{name} already gets this argument")
        elif not left.is_open:
            new = getattr(component, "renamed", {}).get(key)
            hint = f"; use {new}" if new else suggest(str(key), left.named)
            if note and left.ignores:
                note(f"{path}.kwargs.{key}", f"{name} ignores this argument{hint}")
            else:
                report(f"{path}.kwargs.{key}", f"{name} has no such argument{hint}")
    for key, argument in left.named.items():
        if argument.required and key not in kwargs:
            report(f"{path}.kwargs.{key}", f"required by {name}, but missing")


def mismatch(value: Any, hint: Any) -> str | None:
    """What a type hint expects, if plain data does not fit it; otherwise None.

    Example:
        >>> mismatch(1, float), mismatch(True, int), mismatch("x", int | None)
        (None, 'an integer', 'an integer or nothing')
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Tagged) or hint is Any:
        return None
    if hint in _SCALARS or hint is None:
        return None if _is_scalar(value, hint or type(None)) else _SCALARS[hint or type(None)]
    if origin is typing.Literal:
        return None if value in parts else "one of " + ", ".join(repr(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        expected = [mismatch(value, part) for part in parts]
        return None if None in expected else " or ".join(dict.fromkeys(filter(None, expected)))
    base = origin or hint
    if base in _SEQUENCES:
        return _sequence_mismatch(value, base, parts)
    if base in (dict, collections.abc.Mapping):
        return None if isinstance(value, dict) else "a mapping"
    if base is collections.abc.Callable:
        return "a function or class (`!import_get`)"
    if isinstance(base, type) and issubclass(base, enum.Enum):
        return None if isinstance(value, str | int) else "a string"
    if isinstance(base, type) and _is_torch_object(base):
        return f"an object of type {base.__name__} (`!import_call`)"
    return None


def _is_torch_object(kind: type) -> bool:
    torch = sys.modules.get("torch")  # if it is not loaded, no type is from torch
    return torch is not None and issubclass(kind, torch.Tensor | torch.nn.Module)


def wrong(value: Any, expected: str) -> str:
    """A sentence about a value of a wrong type."""
    number = spelled(value) if isinstance(value, str) and expected.startswith(("a number", "an integer")) else None
    return f"expected {expected}, got {show(value)}" + (f"; write {number}" if number else "")


def show(value: Any) -> str:
    """A value as part of a sentence."""
    if isinstance(value, str):
        return f"the string {value!r}"
    if isinstance(value, Tagged):
        return value.tag
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value)) or f"{value!r}"


def _check_argument(report: Report, path: str, value: Any, argument: Argument) -> None:
    if value is None and argument.default is None and not argument.required:
        return
    if expected := mismatch(value, argument.hint):
        report(path, wrong(value, expected))


def _is_scalar(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _sequence_mismatch(value: Any, base: type, parts: tuple[Any, ...]) -> str | None:
    if not isinstance(value, list | tuple):
        return "a list"
    if base is tuple and parts and parts[-1] is not Ellipsis:
        if len(value) != len(parts):
            return f"a list of {len(parts)}"
        hints = parts
    else:
        hints = parts[:1] * len(value)
    inner = next(filter(None, map(mismatch, value, hints)), None)
    return f"a list with {inner} at every position" if inner else None


def _of_class(mro: Sequence[type]) -> Arguments:
    for index, cls in enumerate(mro):
        if cls is object:
            return Arguments()
        if "__init__" in vars(cls):
            return _of_function(cls.__init__, mro[index + 1 :]).without(1, ())  # type: ignore[misc]
        if "__new__" in vars(cls) and mro[0].__init__ is object.__init__:  # type: ignore[misc]
            return _of_function(cls.__new__, mro[index + 1 :]).without(1, ())
    return _ANYTHING


def _of_function(function: Any, mro: Sequence[type] = ()) -> Arguments:
    """All arguments of a function, including ``self``; ``mro`` has the classes that follow in ``super()``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # written in C
        return _ANYTHING
    kinds = {parameter.kind: parameter.name for parameter in parameters}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    own = {p.name: Argument(p.default is p.empty, p.default, _hint(function, p.annotation)) for p in by_name}
    is_variadic = inspect.Parameter.VAR_POSITIONAL in kinds
    rest = kinds.get(inspect.Parameter.VAR_KEYWORD)
    passed_on = _passed_on(function, rest, mro) if rest else Arguments()
    names = [p.name for p in positional]
    return Arguments({**passed_on.named, **own}, names, passed_on.is_open, is_variadic, passed_on.ignores)


def _hint(function: Any, annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, getattr(function, "__globals__", {}))["it"]
    except Exception:  # a name that exists for type checkers only
        return Any


def _passed_on(function: Any, rest: str, mro: Sequence[type]) -> Arguments:
    """The arguments that a function reads from its ``**rest``, and those of functions that it passes it to."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return _ANYTHING
    found: dict[str, Argument] = {}
    is_open, ignores = False, True
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key))) if name == rest:
                found.setdefault(key, Argument())
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name)), args=[ast.Constant(value=str(key)), *_]) if (
                name == rest
            ):
                found.setdefault(key, Argument())
            case ast.Call(keywords=keywords) if any(k.arg is None and _is_name(k.value, rest) for k in keywords):
                passed = _callee(node.func, function, mro).without(
                    len(node.args), [keyword.arg for keyword in keywords if keyword.arg]
                )
                found = {**found, **passed.named}
                is_open = is_open or passed.is_open
                ignores = ignores and passed.ignores
    return Arguments(found, is_open=is_open, ignores=ignores)


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _callee(node: ast.expr, function: Any, mro: Sequence[type]) -> Arguments:
    match node:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr="__init__"):
            return _of_class(mro)
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return _ANYTHING
    scope = {**vars(builtins), **getattr(function, "__globals__", {})}
    target = scope.get(node.id) if node.id not in function.__code__.co_varnames else None
    for name in names:
        target = getattr(target, name, None)
    return arguments(target) if callable(target) else _ANYTHING
