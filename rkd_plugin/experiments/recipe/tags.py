"""Checks of the tags that torchdistill adds to YAML; nothing that they name is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rkd_plugin.experiments.recipe.errors import suggest
from rkd_plugin.experiments.recipe.imports import import_for
from rkd_plugin.experiments.recipe.signatures import bind
from rkd_plugin.experiments.recipe.specs import Spec, Walk, anything, each, of_type, optional, section
from rkd_plugin.experiments.recipe.values import Tagged

_INIT = optional(section({}, {"args": anything, "kwargs": anything}))


def resolve(entry: Mapping[Any, Any], walk: Walk | None = None, path: str = "") -> Any:
    """Import what ``key`` and ``package`` name; if it does not exist, report a problem and return None."""
    key, package = entry.get("key"), entry.get("package")
    if not isinstance(key, str) or not isinstance(package, str | None):
        return None
    place, name = f"{path}.key", key
    if package is None:
        package, _, name = key.rpartition(".")
    module = import_for(walk.report if walk else None, place, package)
    if module is None:
        return None
    return _member(module, name, package, walk, place)


def check_tags(walk: Walk) -> None:
    """Report problems of all tagged values."""
    for path, value in _tagged(walk.data, "", set()):
        if value.tag not in _TAGS:
            walk.report(path, f"unknown tag {value.tag}{suggest(value.tag, _TAGS)}")
        elif not isinstance(value.value, Tagged):
            walk.visit(_TAGS[value.tag], value.value, path)


def _tagged(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tagged]]:
    if id(value) in seen or not isinstance(value, dict | list | Tagged):
        return
    seen.add(id(value))
    if isinstance(value, Tagged):
        yield path, value
        yield from _tagged(value.value, path, seen)
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _tagged(item, f"{path}.{key}" if path else str(key), seen)


def _member(owner: Any, name: str, owner_name: str, walk: Walk | None, path: str) -> Any:
    try:
        return getattr(owner, name)
    except Exception:  # a module that imports on demand can raise any type
        if walk:
            walk.report(path, f"{owner_name} has no {name!r}{suggest(name, dir(owner))}")
        return None


def _call(walk: Walk, component: Any, name: str, init: Any, path: str) -> None:
    if component is None:
        return
    if not callable(component):
        walk.report(path, f"{name} cannot be called: it is a {type(component).__name__}")
    elif isinstance(init, dict | None):
        init = init or {}
        bind(walk.report, f"{path}.init", name, component, init.get("kwargs"), init.get("args"))


def _import_get(walk: Walk, value: Any, path: str) -> None:
    section({"key": of_type(str)}, {"package": of_type(str)})(walk, value, path)
    if isinstance(value, dict):
        resolve(value, walk, path)


def _import_call(walk: Walk, value: Any, path: str) -> None:
    section({"key": of_type(str)}, {"package": of_type(str), "init": _INIT})(walk, value, path)
    if isinstance(value, dict):
        _call(walk, resolve(value, walk, path), str(value.get("key")).rpartition(".")[2], value.get("init"), path)


def _import_call_method(walk: Walk, value: Any, path: str) -> None:
    names = {"class_name": of_type(str), "method_name": of_type(str)}
    section({"package": of_type(str)}, names | {"init": _INIT})(walk, value, path)
    if not isinstance(value, dict) or not isinstance(value.get("package"), str):
        return
    if names.keys() <= value.keys():
        package, owner, method = value["package"], str(value["class_name"]), str(value["method_name"])
    elif value["package"].count(".") < 2:
        walk.report(f"{path}.package", f"expected package.Class.method, got {value['package']!r}")
        return
    else:
        package, owner, method = value["package"].rsplit(".", 2)
    found = resolve({"key": owner, "package": package}, walk, path)
    if found is not None:
        _call(walk, _member(found, method, owner, walk, f"{path}.package"), method, value.get("init"), path)


_TAGS: dict[str, Spec] = {
    "!import_get": _import_get,
    "!import_call": _import_call,
    "!import_call_method": _import_call_method,
    "!call_method": section(
        {"obj": anything, "method_name": of_type(str)},
        {"args": optional(of_type(list)), "kwargs": optional(of_type(dict)), "returns_obj": of_type(bool)},
    ),
    "!getattr": of_type(list),
    "!setattr": of_type(list),
    "!access_by_index_or_key": section({"data": anything, "index_or_key": anything}),
    "!join": each(anything),
    "!pathjoin": each(anything),
    "!expanduser": of_type(str),
    "!abspath": of_type(str),
}
