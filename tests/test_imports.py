"""The imports between the rooms of the package: allowed arrows, no circles, and no heavy imports."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
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
    ["adapters.pml", "adapters.torchdistill"],
    ["teacher_bank", "core"],
    ["kernels"],
    ["environment", "storage", "markdown"],
]
CORE = ["options", "functional", "losses", "distributed"]
FOREIGN = [
    "yaml", "triton", "torchdistill", "pytorch_metric_learning", "torchvision", "matplotlib", "sklearn", "tqdm",
    "tensorboard", "rkd_plugin.adapters", "rkd_plugin.experiments", "rkd_plugin.bench", "rkd_plugin.cli",
]  # fmt: skip


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
    assert without == ["", "__main__", "adapters", "experiments"]  # the last two are empty packages


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


def loaded_by(statement):
    """The modules in memory after a statement in a fresh interpreter."""
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def foreign(modules):
    return {m for m in modules for name in FOREIGN if m == name or m.startswith(f"{name}.")}


@pytest.fixture(scope="module")
def torch_alone():
    return loaded_by("import torch")


def test_the_core_loads_nothing_but_torch(torch_alone):
    modules = loaded_by("from rkd_plugin import RKDDALoss")
    assert "rkd_plugin.functional" in modules
    assert foreign(modules - torch_alone) == set()


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("import rkd_plugin.adapters.torchdistill", "torchdistill"),
        ("import rkd_plugin.adapters.pml", "pytorch_metric_learning"),
        ("import rkd_plugin.bench", "rkd_plugin.bench"),
        pytest.param(
            "import rkd_plugin.kernels.fused",
            "triton",
            marks=pytest.mark.skipif(not find_spec("triton"), reason="none"),
        ),
    ],
)
def test_foreign_imports_are_found(torch_alone, statement, name):
    assert name in foreign(loaded_by(statement) - torch_alone)


@pytest.mark.parametrize("room", ["bench", "teacher_bank"])
def test_these_load_no_host(torch_alone, room):
    found = foreign(loaded_by(f"import rkd_plugin.{room}") - torch_alone)
    assert {name for name in found if not name.startswith(f"rkd_plugin.{room}")} == set()
