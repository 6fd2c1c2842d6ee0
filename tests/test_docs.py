"""The documentation names what the code has: verbs, options, keys and arguments. Its Python runs as doctests."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

import rkd_plugin
from rkd_plugin import cli
from rkd_plugin.experiments.recipe import names, read, sections, suites

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "configs/README.md", *sorted((ROOT / "docs/pages").rglob("*.md"))]


def page(name):
    return (ROOT / "docs/pages" / name).read_text(encoding="utf-8")


def table(text, heading):
    """Cells of the first table below a heading, without its first two lines."""
    lines = text[text.index(heading) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    end = next((index for index, line in enumerate(lines) if index > start and not line.startswith("|")), None)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]


def quoted(cells):
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def commands(text):
    """What follows `rkd` in each command, split, in blocks for the shell and in the text."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", "").splitlines()
    found = [line.partition("rkd ")[2] for line in blocks if re.match(r"(\S*/)?rkd |.* && \S*/rkd ", line)]
    found += re.findall(r"`rkd ([^`]+)`", " ".join(text.split()))
    return [words for command in found if (words := shlex.split(command, comments=True))[0] != "VERB"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_verbs_and_options_of_the_documentation_exist(path):
    parsers = cli._parser()[1]
    for verb, *rest in commands(path.read_text(encoding="utf-8")):
        assert {word for word in rest if word.startswith("--")} <= {*parsers[verb]._option_string_actions}, verb


def test_the_command_line_lists_every_verb():
    listed = [command.split()[1] for command in quoted(row[0] for row in table(page("command-line.md"), "# The"))]
    assert listed == [*cli.VERBS]


def test_the_page_of_keys_lists_every_key():
    text, known = page("keys.md"), {*sections.SETTINGS}
    recipes = {setting for entry in names() if not entry.is_suite for setting in read(entry.name).settings}
    assert {*quoted(row[0] for row in table(text, "## `recipe:` settings"))} == known
    assert {*quoted(row[0] for row in table(text, "## `recipe:` anchors"))} == recipes - known
    for heading, spec in {"## `suite:`": suites._SUITE, "## `suite.rows`": suites._ROW}.items():
        rows, keys = table(text, heading), inspect.getclosurevars(spec).nonlocals
        assert {*quoted(row[0] for row in rows)} == {*keys["known"]}
        assert {*quoted(row[0] for row in rows if row[1] == "yes")} == {*keys["required"]}


def test_every_argument_of_the_losses_is_in_their_table():
    functions = ["rkd_distance_loss", "rkd_angle_loss", "rkd_da_loss", "relational_loss"]
    rows = table(page("losses.md"), "## Arguments")
    for column, name in enumerate(functions, start=2):
        listed = {*quoted(row[0] for row in rows if row[column] == "x")}
        parameters = inspect.signature(getattr(rkd_plugin, name)).parameters
        assert listed == parameters.keys() - {"student", "teacher"}, name


def test_the_readme_stays_short():
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 1500
