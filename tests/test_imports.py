"""The imports between the rooms of the package: allowed arrows, no circles, and no heavy imports."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rkd_plugin

PACKAGE = Path(rkd_plugin.__file__).parent
# From top to bottom: a file imports from its own room and from lower ones, not from another room on the same line.
FLOORS = [
    ["cli"],
    ["bench", "experiments.tables"],
    ["experiments.running"],
    ["experiments.recipe"],
    ["experiments.support"],
    ["components"],
    ["adapters.pml", "adapters.torchdistill", "adapters.sentence_transformers"],
    ["teacher_bank", "core"],
    ["kernels"],
    ["cores", "environment", "storage", "markdown", "printing"],
]
CORE = ["options", "functional", "relational", "memory", "losses", "distributed"]


def modules_of(folder):
    """Dotted names below ``rkd_plugin`` -> files; the package itself is ''."""
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(path, modules):
    """The package's modules that a file imports, anywhere in it but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [name for name in deeper if name.removeprefix("rkd_plugin.") in modules]
            names = inside if len(inside) == len(deeper) else [node.module, *inside]
        else:
            continue
        for name in names:
            if name == "rkd_plugin" or name.startswith("rkd_plugin."):
                found.add(name.removeprefix("rkd_plugin").removeprefix("."))
    return found & set(modules)


def room_of(module):
    """The room of a module and its floor; None for files without a room."""
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(f"{room}.") or (room == "core" and module in CORE):
                return room, floor
    return None


def wrong_arrows(folder):
    """One sentence for each import that goes up, sideways, or to the command line."""
    modules = modules_of(folder)
    for module, path in modules.items():
        here = room_of(module)
        for target in sorted(imports_of(path, modules)):
            there = room_of(target)
            if target == "" and module not in ("cli", "environment", *(m for m in modules if m.startswith("cli."))):
                yield f"rkd_plugin.{module} imports rkd_plugin, whose names are for users; import the file"
            if here and there and here[0] != there[0] and here[1] >= there[1]:
                yield f"rkd_plugin.{module} imports rkd_plugin.{target}: {here[0]} must not know {there[0]}"


def circles(folder):
    """Circles of imports, each as its list of modules."""
    modules = modules_of(folder)
    edges = {module: imports_of(path, modules) - {module, ""} for module, path in modules.items()}
    reached = {}
    for module in edges:
        seen, todo = set(), list(edges[module])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += edges[name]
        reached[module] = seen
    return sorted({tuple(sorted(n for n in reached[m] if m in reached[n])) for m in edges if m in reached[m]})


def test_every_import_follows_the_arrows():
    assert list(wrong_arrows(PACKAGE)) == []


def test_no_circle_of_imports():
    assert circles(PACKAGE) == []


def test_every_file_has_a_room():
    without = [m for m in modules_of(PACKAGE) if room_of(m) is None]
    assert without == ["", "__main__", "adapters", "experiments"]
    imported = {m: imports_of(modules_of(PACKAGE)[m], modules_of(PACKAGE)) for m in without}
    assert imported == {"": set(), "__main__": {"cli"}, "adapters": set(), "experiments": set()}


@pytest.mark.parametrize(
    ("file", "statement", "problem"),
    [
        ("kernels/a.py", "from rkd_plugin.functional import x", "kernels must not know core"),
        ("adapters/pml/a.py", "import rkd_plugin.adapters.torchdistill", "must not know adapters.torchdistill"),
        ("components/a.py", "def f():\n    from rkd_plugin.experiments.support import files", "experiments.support"),
        ("experiments/running/a.py", "from rkd_plugin.cli import main", "experiments.running must not know cli"),
        ("experiments/running/a.py", "from rkd_plugin import RKDDALoss", "import the file"),
    ],
)
def test_a_wrong_arrow_is_named(tmp_path, file, statement, problem):
    for name in (file, "functional.py", "adapters/torchdistill.py", "experiments/support/files.py", "cli/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        for folder in (tmp_path / name).relative_to(tmp_path).parents:
            (tmp_path / folder / "__init__.py").touch()
    (tmp_path / file).write_text(statement)
    (found,) = set(wrong_arrows(tmp_path)) or [""]
    assert problem in found


def test_a_circle_is_found(tmp_path):
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a.py").write_text("import rkd_plugin.b")
    (tmp_path / "b.py").write_text("def f():\n    from rkd_plugin import a")
    (tmp_path / "c.py").write_text("import rkd_plugin.a")
    assert circles(tmp_path) == [("a", "b")]


# Each is executed in the same interpreter after those above it.
STATEMENTS = {
    "import torch": "torch",
    "from rkd_plugin import RKDDALoss": "rkd_plugin",
    "import rkd_plugin.bench": "rkd_plugin",
    "import rkd_plugin.teacher_bank": "rkd_plugin filelock safetensors",
    "import rkd_plugin.adapters.torchdistill": "torchdistill",
    "import rkd_plugin.adapters.pml": "pytorch_metric_learning",
    "import rkd_plugin.adapters.sentence_transformers": "rkd_plugin",
    "import rkd_plugin.experiments.tables.pictures": "rkd_plugin",
}


def patched(modules, others=()):
    """What of modules and their classes, and of other objects, is the package's."""
    values = [value for module in modules for value in vars(module).values()]
    values += [inner for value in values if isinstance(value, type) for inner in vars(value).values()]
    return [
        repr(value) for value in (*values, *others) if str(getattr(value, "__module__", "")).startswith("rkd_plugin")
    ]


FRESH = f"""
import copyreg, json, sys
{inspect.getsource(patched)}
added, before = {{}}, set(sys.modules)
for statement in json.loads(sys.argv[1]):
    exec(statement)
    added[statement] = sorted(set(sys.modules) - before)
    before |= set(sys.modules)
hosts = [m for name, m in sys.modules.items() if name.partition(".")[0] in ("torchdistill", "pytorch_metric_learning")]
print(json.dumps([added, patched(hosts, copyreg.dispatch_table.values())]))
"""


@pytest.fixture(scope="module")
def fresh():
    """Of one fresh interpreter: the modules that each statement adds, and what the adapters patched."""
    command = [sys.executable, "-c", FRESH, json.dumps(list(STATEMENTS))]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def loaded(fresh):
    """The modules that each statement adds, without those of Python and torch."""
    return {
        statement: {name for name in names if name.partition(".")[0] not in {*sys.stdlib_module_names, "torch"}}
        for statement, names in fresh[0].items()
    }


@pytest.mark.parametrize(
    ("statement", "rooms"),
    [
        ("from rkd_plugin import RKDDALoss", {"core", "kernels"}),
        ("import rkd_plugin.bench", {"bench", "environment", "markdown"}),
        ("import rkd_plugin.teacher_bank", {"teacher_bank", "environment", "storage"}),
    ],
)
def test_what_is_below_the_hosts_loads_none(loaded, statement, rooms):
    names = loaded[statement]
    assert f"rkd_plugin.{statement.rpartition('.')[2] if '.' in statement else 'losses'}" in names
    assert {name.partition(".")[0] for name in names} <= {*STATEMENTS[statement].split()}
    own = {name.removeprefix("rkd_plugin.") for name in names if name.startswith("rkd_plugin.")}
    assert {room_of(name)[0] for name in own} <= rooms


@pytest.mark.parametrize("statement", list(STATEMENTS)[4:6])
def test_an_adapter_loads_its_host(loaded, statement):
    assert STATEMENTS[statement] in loaded[statement]  # so the test above can fail


def test_the_adapter_of_sentence_transformers_needs_no_library(loaded):
    statement = "import rkd_plugin.adapters.sentence_transformers"
    room = "rkd_plugin.adapters.sentence_transformers"
    assert loaded[statement] == {room, f"{room}.columns", f"{room}.losses"}


def test_matplotlib_is_loaded_by_the_first_picture_only(loaded):
    names = loaded["import rkd_plugin.experiments.tables.pictures"]
    assert "rkd_plugin.experiments.tables.pictures" in names
    assert not any("matplotlib" in modules for modules in loaded.values())


@pytest.mark.parametrize(("room", "other"), [("pml", "torchdistill"), ("torchdistill", "pytorch_metric_learning")])
def test_an_adapter_imports_no_other_host(room, other):
    nodes = [
        node for path in (PACKAGE / "adapters" / room).rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
    ]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert "torch" in names
    assert not {name for name in names if name.partition(".")[0] == other}


def test_importing_an_adapter_patches_no_host(fresh):
    assert fresh[1] == []


def test_a_patch_is_found(monkeypatch):
    host = type(sys)("host")
    host.Trainer = type("Trainer", (), {"__module__": "host", "train": lambda self: None})
    assert patched([host]) == []
    monkeypatch.setattr(host.Trainer.train, "__module__", "rkd_plugin.adapters.pml")
    assert len(patched([host], [test_a_patch_is_found])) == 1
