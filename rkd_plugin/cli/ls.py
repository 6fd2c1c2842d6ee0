"""The verb ``rkd ls``."""

from __future__ import annotations

import argparse

from rkd_plugin.printing import show

ABOUT = "list the packaged recipes and suites"
EXAMPLES = ("ls",)
SHARES_WORK = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""


def execute(_: argparse.Namespace) -> None:
    """Print name, kind and summary of each file."""
    from rkd_plugin.experiments.recipe.catalog import names

    entries = names()
    width = max(len(entry.name) for entry in entries)
    for name, summary, is_suite in entries:
        show(f"{name:{width}}  {'suite   ' if is_suite else 'recipe  '}{summary}")
