"""Imports of the modules that a recipe names: code of installed packages and of modules beside the user."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType

from rkd_plugin.experiments.recipe.errors import suggest

# Modules of Python itself that run a program when they are imported.
_PROGRAMS = {"__hello__", "__phello__", "antigravity", "idlelib.idle", "test.autotest", "this"}


def find_modules_of_user() -> None:
    """Let recipes name modules of the current folder, as with ``python -m``; what is installed comes first."""
    here = os.getcwd()
    if here not in sys.path and not getattr(sys.flags, "safe_path", False):  # since Python 3.11
        sys.path.append(here)


def import_for(
    report: Callable[[str, str], None] | None, path: str, name: str, package: str | None = None
) -> ModuleType | None:
    """Import a module that a recipe names; if that cannot be, None and a problem.

    Args:
        report: takes a path and a message; None if the problem is reported elsewhere.
        path: where the recipe names it.
        name: such as ``torchvision.datasets``, relative names such as ``.datasets`` only with ``package``.
        package: that a relative name starts from.
    """
    try:
        full = _full_name(name, package)
    except ValueError as error:
        message = str(error)
    else:
        try:
            return importlib.import_module(full)
        except (Exception, SystemExit) as error:  # whatever a module may raise while it is imported
            message = f"module {full!r} cannot be imported: {type(error).__name__}: {error}{_hint(error)}"
    if report:
        report(path, message)
    return None


def _full_name(name: str, package: str | None) -> str:
    """The absolute name of a module.

    Raises:
        ValueError: if it is no name of a module, or of a program.
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
    """The modules that may be meant, where there is none of that name."""
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
    except (Exception, SystemExit):  # the package itself cannot be imported
        return []
