"""Importing the core loads torch and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

FOREIGN = [
    "yaml", "triton", "torchdistill", "pytorch_metric_learning", "torchvision", "matplotlib", "sklearn", "tqdm",
    "tensorboard", "rkd_plugin.adapters", "rkd_plugin.experiments", "rkd_plugin.bench", "rkd_plugin.cli",
]  # fmt: skip


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
def test_the_check_can_fail(torch_alone, statement, name):
    assert name in foreign(loaded_by(statement) - torch_alone)


def test_bench_loads_no_host(torch_alone):
    assert {
        name
        for name in foreign(loaded_by("import rkd_plugin.bench") - torch_alone)
        if not name.startswith("rkd_plugin.bench")
    } == set()
