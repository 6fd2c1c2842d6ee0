"""Arguments of several verbs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

RECIPE = "a YAML file, or the name of a packaged recipe as `rkd ls` prints it"
OVERRIDES = "key.path=value, which changes the recipe before anything is built"


def add_recipe(parser: argparse.ArgumentParser, about: str = RECIPE, optional: bool = False) -> None:
    """Add a recipe and its overrides to the arguments of a verb."""
    parser.add_argument("recipe", nargs="?" if optional else None, help=about)
    parser.add_argument("overrides", nargs="*", help=OVERRIDES)


def command_of(options: argparse.Namespace) -> dict[str, str]:
    """The verb and its options without overrides; of a path only whether it is given, since nodes may differ in it."""
    values = {name: value for name, value in vars(options).items() if name not in ("overrides", "recipe")}
    paths = {"out", "checkpoint", "data", "verify"}
    return {
        "verb" if name == "verb" else f"option --{name}": str(value if name not in paths else value is not None)
        for name, value in values.items()
    }


def unrecognized(words: Sequence[str], takes_overrides: bool) -> str:
    """The error for words that are no argument of a verb, with the form of an override if one was intended.

    Example:
        >>> unrecognized(["--num_epochs=2"], True)
        'unrecognized arguments: --num_epochs=2; write an override without dashes: recipe.num_epochs=2'
        >>> unrecognized(["--lr"], False)
        'unrecognized arguments: --lr'
    """
    message = f"unrecognized arguments: {' '.join(words)}"
    first, *rest = words
    key, equals, value = first.lstrip("-").partition("=")
    if not takes_overrides or not first.startswith("-") or not key:
        return message
    value = value if equals else next((word for word in rest if not word.startswith("-")), "VALUE")
    path = key if "." in key else f"recipe.{key.replace('-', '_')}"
    return f"{message}; write an override without dashes: {path}={value}"
