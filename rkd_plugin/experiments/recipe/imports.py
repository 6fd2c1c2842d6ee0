"""Imports of the modules that a recipe names, from installed packages and from the current folder."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from rkd_plugin.experiments.recipe.errors import suggest

# Modules whose import registers components in torchdistill.
_REGISTERING = (
    "rkd_plugin.adapters.torchdistill",
    *(f"rkd_plugin.components.{name}" for name in ("models", "baselines", "few_shot", "samplers")),
)
# Modules of Python itself that run a program when they are imported.
_PROGRAMS = {"__hello__", "__phello__", "antigravity", "idlelib.idle", "test.autotest", "this"}


def find_modules_of_user() -> None:
    """Let recipes name modules of the current folder, as with ``python -m``; installed modules come first."""
    here = os.getcwd()
    if here not in sys.path and not getattr(sys.flags, "safe_path", False):  # since Python 3.11
        sys.path.append(here)


def import_for(
    report: Callable[[str, str], None] | None, path: str, name: str, package: str | None = None
) -> ModuleType | None:
    """Import a module that a recipe names; report a problem and return None if this fails.

    Args:
        report: function of a path and a message; None to report nothing.
        path: YAML path of the name.
        name: name such as ``torchvision.datasets``; a relative name such as ``.datasets`` needs ``package``.
        package: package from which a relative name starts.
    """
    try:
        full = _full_name(name, package)
    except ValueError as error:
        message = str(error)
    else:
        try:
            return importlib.import_module(full)
        except (Exception, SystemExit) as error:  # importing a module can raise any type
            message = f"module {full!r} cannot be imported: {type(error).__name__}: {error}{_hint(error)}"
    if report:
        report(path, message)
    return None


def _full_name(name: str, package: str | None) -> str:
    """The absolute name of a module.

    Raises:
        ValueError: if it is not the name of a module, or importing the module runs a program.
    """
    try:
        full = importlib.util.resolve_name(name, package or "")
    except ImportError as error:
        raise ValueError(f"expected the full name of a module, got {name!r}: {error}") from error
    parts = full.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"expected the name of a module such as 'package.module', got {full!r}")
    if "__main__" in parts or full in _PROGRAMS:
        raise ValueError(f"expected a module that registers or defines something, got {full!r}, which runs a program")
    return full


def _hint(error: BaseException) -> str:
    """The closest names of modules, if there is no module of that name."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    parent, _, name = error.name.rpartition(".")
    hint = suggest(name, _modules_in(parent))
    return hint if "did you mean" in hint else ""


@functools.lru_cache(maxsize=32)
def _modules_in(package: str) -> list[str]:
    try:
        places = getattr(importlib.import_module(package), "__path__", []) if package else None
        return [module.name for module in pkgutil.iter_modules(places)]
    except (Exception, SystemExit):  # the package cannot be imported
        return []


def unlisted_module(key: str, component: Any, dependencies: Iterable[str]) -> str | None:
    """The module of this package that registers a component and that no dependency imports; None if there is none.

    A registry alone does not show it: it also has the components of modules that this process imported for itself.

    Args:
        key: the name of the component.
        component: what is registered under this name, None if nothing is.
        dependencies: names of imported modules.
    """
    if component is not None and not _is_ours(component):
        return None
    for wanted in _REGISTERING:
        found = getattr(import_for(None, "", wanted), key, None)
        if _is_inside(getattr(found, "__module__", ""), wanted):
            is_listed = component is not None and any(_imports(name, wanted, set()) for name in dependencies)
            return None if is_listed else wanted
    return None


def _is_ours(component: Any) -> bool:
    return str(getattr(component, "__module__", "")).startswith("rkd_plugin.")


def _is_inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def _imports(name: str, wanted: str, seen: set[str]) -> bool:
    """Whether a module is, or has something from, a module of this package; True for modules of other packages."""
    if not name.startswith("rkd_plugin.") or _is_inside(name, wanted):
        return True
    seen.add(name)
    names = {value.__module__ for value in vars(sys.modules[name]).values() if _is_ours(value)}
    return any(_imports(other, wanted, seen) for other in names - seen)
