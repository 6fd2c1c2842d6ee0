"""The number of threads follows cores and work; settings of the user have priority."""

import os
import sys

import pytest
import torch
from torch import nn

from rkd_plugin import cores
from rkd_plugin.experiments.recipe import read
from rkd_plugin.experiments.running import runner
from rkd_plugin.experiments.support import processes, threads

TINY = ["recipe.num_epochs=1", "recipe.samples_per_epoch=128", "recipe.batch_size=64"]


@pytest.fixture
def free(monkeypatch):
    """An environment without settings, and a machine with eight cores and threads."""
    for name in (*threads.COUNT, *threads.SPINNING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "affinity", lambda: frozenset(range(8)))
    monkeypatch.setattr(threads, "usable_cores", lambda: 6)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield monkeypatch
    torch.set_num_threads(before)


def groups(root, cgroup, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "files", "count"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/host/path\n", {"cpu.max": "400000 100000\n"}, 4),  # as a container sees it
        (
            "4:memory:/m\n3:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "500000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            5,
        ),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 8),
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
    ],
)
def test_cores_are_those_of_the_container(tmp_path, monkeypatch, cgroup, files, count):
    monkeypatch.setattr(cores, "affinity", lambda: frozenset(range(8)))
    groups(tmp_path, cgroup, files)
    assert cores.usable_cores(tmp_path) == count


def test_without_control_groups_the_affinity_counts(tmp_path):
    assert cores.usable_cores(tmp_path) == len(cores.affinity())


@pytest.mark.parametrize(("usable", "most", "workers"), [(1, 8, 0), (2, 8, 2), (64, 8, 8), (64, 0, 0)])
def test_a_loader_has_a_worker_per_core(monkeypatch, usable, most, workers):
    monkeypatch.setattr(cores, "usable_cores", lambda: usable)
    assert cores.loader_workers(most) == workers


def test_processes_on_one_machine_divide_its_cores(free):
    free.setattr(processes, "all_gather", lambda own: [own, own, ("another machine", own[1])])
    with threads.fitted():
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize(("work", "count"), [(threads.SMALL - 1, 1), (threads.SMALL, 6), (None, 6)])
def test_small_work_gets_one_thread(free, work, count):
    with threads.fitted(lambda: work):
        assert torch.get_num_threads() == count
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize("name", threads.COUNT)
def test_the_users_number_is_kept(free, name):
    free.setenv(name, "8")
    with threads.fitted(lambda: 1):
        assert torch.get_num_threads() == 8


def test_operations_are_counted_and_the_model_is_as_it_was():
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(), nn.BatchNorm1d(5))
    assert threads.flops(model, torch.ones(1, 3)) == 2 * 3 * 5
    assert model.training
    assert int(model[2].num_batches_tracked) == 0
    assert threads.flops(nn.Bilinear(2, 2, 2), torch.ones(1, 2)) is None


def test_a_run_of_a_small_network_uses_one_thread_and_has_the_same_numbers(free, tmp_path):
    recipe = read("quickstart/student", [*TINY, "models.model.kwargs.width=4"])
    fitted = runner.run(recipe, tmp_path / "fitted")
    assert fitted["environment"]["threads"] == "1"
    assert torch.get_num_threads() == 8
    torch.set_num_threads(1)
    free.setenv("OMP_NUM_THREADS", "1")
    plain = runner.run(recipe, tmp_path / "plain")
    assert fitted["final"] == plain["final"]
    assert fitted["history"][0]["loss"] == plain["history"][0]["loss"]


@pytest.mark.parametrize("name", [None, *threads.SPINNING])
def test_spinning_is_limited_unless_the_user_decides(free, name):
    free.setattr(os, "environ", dict(os.environ))
    free.delitem(sys.modules, "torch")
    if name is not None:
        os.environ[name] = "mine"
    threads.limit_spinning()
    found = {key: os.environ[key] for key in threads.SPINNING if key in os.environ}
    assert found == ({name: "mine"} if name else {"GOMP_SPINCOUNT": threads.SPINS, "KMP_BLOCKTIME": "1"})


def test_the_library_changes_nothing(free):
    """Once torch is loaded, and so in every program that imports the losses."""
    free.setattr(os, "environ", dict(os.environ))
    before = dict(os.environ)
    threads.limit_spinning()
    assert os.environ == before
