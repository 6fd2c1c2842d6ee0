"""The command ``rkd`` with one file per verb.

The parser loads neither torch nor NumPy nor yaml: a verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import rkd_plugin
from rkd_plugin.cli import balance, bench, check, embed, ls, reproduce, run
from rkd_plugin.cli import eval as evaluate
from rkd_plugin.cli.arguments import unrecognized
from rkd_plugin.cli.failures import one_sentence
from rkd_plugin.cli.streams import lasting_streams
from rkd_plugin.experiments.support.launcher import launched
from rkd_plugin.printing import report

VERBS: dict[str, ModuleType] = {
    "ls": ls,
    "check": check,
    "balance": balance,
    "run": run,
    "eval": evaluate,
    "reproduce": reproduce,
    "embed": embed,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 for an error reported in one sentence, 2 for wrong usage."""
    with lasting_streams():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser, verbs = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse does not add words that follow an option to a list of arguments before the option.
    if rest and hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest):
        options.overrides += rest
    elif rest:
        verbs[options.verb].error(unrecognized(rest, hasattr(options, "overrides")))
    verb, name = VERBS[options.verb], f"rkd {options.verb}"
    try:
        rank, world_size = launched()
        if world_size > 1:
            name += f", rank {rank} of {world_size}"
            _check_shared(options.verb, world_size)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: report(f"{name}: {message}")
            from rkd_plugin.experiments.recipe.imports import find_modules_of_user  # loads yaml

            find_modules_of_user()
            verb.execute(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        report(f"{name}: stopped; the same command continues from there")
        return 130
    except Exception as error:
        sentence = one_sentence(error)
        if sentence is None:
            raise
        report(f"{name}: {sentence}")
        return 1
    return 0


def _check_shared(verb: str, world_size: int) -> None:
    if not VERBS[verb].SHARES_WORK:
        shared = " and ".join(f"`rkd {name}`" for name, module in VERBS.items() if module.SHARES_WORK)
        raise ValueError(
            f"expected one process, got {world_size}, which can share the work of {shared} only; start this without "
            "torchrun or srun"
        )


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and the parsers of the verbs by name."""
    parser = argparse.ArgumentParser(prog="rkd", description=rkd_plugin.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"rkd-plugin {rkd_plugin.__version__}")
    verbs: Any = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        added = verbs.add_parser(
            name,
            help=verb.ABOUT,
            description=verb.ABOUT,
            epilog="\n".join(["examples:", *(f"  rkd {example}" for example in verb.EXAMPLES)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(added)
    return parser, verbs.choices
