"""Runs on two processes: the numbers of one process, whole files, and a quick end."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import many_processes
import pytest
import torch
from children import in_child

from rkd_plugin import cli, distributed
from rkd_plugin.experiments.recipe import read
from rkd_plugin.experiments.running.checkpoints import read_checkpoint
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.experiments.running.ranks import check_equal_weights
from rkd_plugin.experiments.support import processes
from rkd_plugin.experiments.support.launcher import launched

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]  # on a port of its own
CLOSE = 1e-11  # float64, with another order of summation

HEAD = """
recipe: {task: TASK, seed: 3, num_epochs: &num_epochs 6, test_tasks: [[3, 1]], test_queries: 2, test_episodes: 50}
dependencies:
  - rkd_plugin.adapters.torchdistill
  - rkd_plugin.components.few_shot
  - rkd_plugin.components.samplers
  - many_processes
datasets:
  train: !import_call {key: many_processes.Points, init: {kwargs: {count: 90, seed: 1}}}
  test: !import_call {key: many_processes.Points, init: {kwargs: {count: 73, seed: 2}}}
models:
  teacher_model: {key: Perceptron, kwargs: {width: 12, dim: 10}}
  student_model: {key: Perceptron, kwargs: {width: 5, dim: 10}}
test:
  test_data_loader: &test_data_loader
    dataset_id: test
    sampler: {class_or_func: !import_get {key: torch.utils.data.SequentialSampler}}
    kwargs: {batch_size: 16}
train:
  log_freq: 10
"""
STAGE = """
num_epochs: *num_epochs
train_data_loader:
  dataset_id: train
  sampler: {class_or_func: !import_get {key: torch.utils.data.RandomSampler}}
  BATCHES
val_data_loader: *test_data_loader
teacher: {forward_proc: forward_in_eval_mode, requires_grad: false, forward_hook: {output: ['1']}}
student: {forward_proc: forward_batch_only, STUDENT}
optimizer: {key: Adam, kwargs: {lr: 0.01, weight_decay: 0.01}, max_grad_norm: 0.3, grad_accum_step: 1}
criterion: {key: WeightedSumLoss, kwargs: {sub_terms: {TERMS}}}
"""
HOOKED = "forward_hook: {output: ['1']}"
RKD = (
    "rkd: {criterion: {key: RKDDALoss, kwargs: "
    "{student_module_path: '1', teacher_module_path: '1', gather: true}}, weight: 2.0}"
)
LABELLED = (
    "ce: {criterion: {key: CrossEntropyLoss, kwargs: {}}, weight: 1.0, criterion_wrapper: {key: SimpleLossWrapper, "
    "kwargs: {input: {is_from_teacher: false, module_path: '.', io: output}, target: {uses_label: true}}}}"
)


def recipe(path, task, *stages):
    """A recipe of one or more stages, each a mapping of placeholders in capitals to values."""
    written = []
    for number, stage in enumerate(stages, 1):
        text = STAGE
        for name, value in stage.items():
            text = text.replace(name, value)
        text = textwrap.indent(text, "  ")
        written.append(text if len(stages) == 1 else f"  stage{number}:\n" + textwrap.indent(text, "  "))
    path.write_text(HEAD.replace("TASK", task) + "".join(written))
    return str(path)


def classification(path):
    """Random batches, the last one shorter; RKD of the global batch."""
    return recipe(
        path,
        "classification",
        {"BATCHES": "kwargs: {batch_size: 16}", "STUDENT": HOOKED, "TERMS": f"{LABELLED}, {RKD}"},
    )


def two_stages(path):
    """Class-balanced batches and a loss with parameters of its own; then a layer that only this stage has."""
    balanced = (
        "batch_sampler: {key: ClassBalancedBatchSampler, "
        "kwargs: {batch_size: 24, images_per_class: 4, iterations: 4}}\n  kwargs: {}"
    )
    wrapped = (
        "forward_hook: {output: ['student_model.1']}, auxiliary_model_wrapper: {key: TrainedWith, "
        "kwargs: {modules: {proxies: &proxies !import_call {key: many_processes.Proxies}}}}"
    )
    proxies = "proxies: {criterion: {key: PMLLoss, kwargs: {loss: *proxies}}, weight: 1.0}"
    longer = (
        f"{HOOKED}, sequential: ['0', '1', '2', '+more'], adaptations: {{more: {{key: Linear, "
        "kwargs: {in_features: 10, out_features: 10, dtype: !import_get {key: torch.float64}}}}"
    )
    return recipe(
        path,
        "metric_learning",
        {"BATCHES": balanced, "STUDENT": wrapped, "TERMS": f"{proxies}, {RKD.replace('1', 'student_model.1', 1)}"},
        {"BATCHES": "kwargs: {batch_size: 16, drop_last: true}", "STUDENT": longer, "TERMS": f"{LABELLED}, {RKD}"},
    )


def few_shot(path):
    episodes = "batch_sampler: {key: EpisodicBatchSampler, kwargs: {way: 4, shot: 1, query: 2, episodes: 6}}"
    prototypes = "prototypes: {criterion: {key: PrototypicalLoss, kwargs: {shot: 1}}, weight: 1.0}"
    return recipe(
        path,
        "few_shot",
        {"BATCHES": f"{episodes}\n  kwargs: {{}}", "STUDENT": HOOKED, "TERMS": prototypes},
    )


def python(*arguments, folder=None, **environment):
    """The result of a fresh interpreter with one thread."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder,
        capture_output=True, text=True, timeout=240,  # so that a test ends
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def tasks_of_slurm(*commands, folders=(None, None), **environment):
    """Two processes that are connected by the variables of SLURM only; the results are those of `python`.

    Both have one command, or each its own.
    """
    environment |= {"MASTER_PORT": free_port(), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "127.0.0.[1-2],other"}
    with ThreadPoolExecutor() as pool:
        tasks = [
            pool.submit(python, *command, folder=folder, **environment, SLURM_PROCID=rank, SLURM_LOCALID=rank)
            for rank, command, folder in zip("01", commands * 2, folders, strict=False)
        ]
        return [task.result() for task in tasks]


def same(histories, but=("seconds",)):
    """Whether two runs are equal, epoch by epoch."""
    first, second = ([{k: v for k, v in epoch.items() if k not in but} for epoch in each] for each in histories)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=CLOSE)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def run_by_torchrun(command):
    done = python(*TORCHRUN, "-m", "rkd_plugin", *command)
    assert done.returncode == 0, done.stderr


def run_by_variables(command):
    """Two forked processes with the variables of torchrun."""
    port = free_port()
    ranks = [in_child(_run_as, str(rank), port, command) for rank in range(2)]
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0


def _run_as(rank, port, command):
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sys.exit(cli.main(command))


@pytest.mark.parametrize("launch", [run_by_variables, pytest.param(run_by_torchrun, marks=pytest.mark.processes)])
def test_rkd_run_has_the_numbers_of_one_process(tmp_path, launch):
    path, short = classification(tmp_path / "recipe.yaml"), "recipe.num_epochs=2"
    many_processes.train(path, tmp_path / "one", short)
    launch(["run", path, short, "--out", str(tmp_path / "two")])
    runs = [result(tmp_path / name) for name in ("one", "two")]
    assert [run["processes"] for run in runs] == [1, 2]
    same([run["history"] for run in runs])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each recipe trained by this process."""
    folder = tmp_path_factory.mktemp("alone")
    recipes = {make.__name__: make(folder / f"{make.__name__}.yaml") for make in (classification, two_stages, few_shot)}
    for name, path in recipes.items():
        # A step of two processes has an episode of each.
        overrides = ["train.optimizer.grad_accum_step=2"] if name == "few_shot" else []
        many_processes.train(path, folder / name, *overrides)
    return folder, recipes


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """The same by two processes, which also measure what was trained before."""
    before, recipes = alone
    folder = tmp_path_factory.mktemp("together")
    todo = {
        "train": [[path, str(folder / name)] for name, path in recipes.items()],
        "measure": [[path, str(before / name / "last.pt")] for name, path in recipes.items()],
        "out": str(folder),
    }
    start = [sys.executable, "-c", "import many_processes; many_processes.main()"]
    done = python(*TORCHRUN, "--no-python", *start, json.dumps(todo))
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.processes
@pytest.mark.parametrize("name", ["classification", "two_stages", "few_shot"])
def test_two_processes_have_the_numbers_of_one(alone, together, name):
    """Epoch by epoch: the loss of the global batch, and the metrics of the student."""
    runs = [result(folder / name) for folder in (alone[0], together[0])]
    assert [run["processes"] for run in runs] == [1, 2]
    same([run["history"] for run in runs])
    assert len({epoch["loss"] for epoch in runs[0]["history"]}) == len(runs[0]["history"])
    weights = [read_checkpoint(folder / name / "last.pt")["model"] for folder in (alone[0], together[0])]
    torch.testing.assert_close(weights[0], weights[1], rtol=CLOSE, atol=CLOSE)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["classification", "two_stages", "few_shot"])
def test_test_data_is_embedded_once_and_in_order(alone, together, name):
    folder, recipes = alone
    one = many_processes.measure(recipes[name], folder / name / "last.pt")
    for found in together[1]:
        assert torch.equal(found[recipes[name]]["outputs"], one["outputs"])
        assert torch.equal(found[recipes[name]]["labels"], one["labels"])
        assert found[recipes[name]]["metrics"] == one["metrics"]


@pytest.mark.processes
def test_a_sharded_student_has_the_gradients_of_a_whole_one(together):
    for found in together[1]:
        sharded, whole, sizes = found["fsdp"]
        assert len(whole) == 4
        assert 0 < sum(sizes) < sum(gradient.numel() for gradient in whole)
        torch.testing.assert_close(sharded, whole, rtol=CLOSE, atol=CLOSE)


@pytest.mark.processes
def test_gradients_are_means_also_of_what_one_process_uses(together):
    """The gradients are rank + 1 and twice that; a parameter that no rank uses has none."""
    for found in together[1]:
        assert found["mean"] == [3.0, 1.5, 0.5, 1.0, None]


# Faults


def waited(folder):
    """Seconds since the last saved epoch; an epoch takes less than one."""
    return time.time() - (folder / "last.pt").stat().st_mtime


def epochs(folder):
    return len(read_checkpoint(folder / "last.pt")["history"])


@pytest.mark.processes
def test_a_process_that_dies_ends_all_and_any_number_goes_on(alone, tmp_path, monkeypatch):
    """Killed with two, broken with one, broken with two, and at last through SLURM's variables to the end of one."""
    path, folder = alone[1]["two_stages"], tmp_path / "run"
    command = ["-m", "rkd_plugin", "run", path, "--out", str(folder)]

    killed = python(*TORCHRUN, *command, BREAK="1,120,kill")
    assert waited(folder) < 60
    assert killed.returncode != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9", killed.stderr)
    assert epochs(folder) == 2

    with monkeypatch.context() as patch:
        patch.setenv("BREAK", "0,700,raise")
        with pytest.raises(OSError, match="cannot read point"):
            many_processes.train(path, folder)
    assert epochs(folder) == 9  # in the second stage

    broken = python(*TORCHRUN, *command, BREAK="1,50,raise")
    assert waited(folder) < 60
    assert broken.returncode != 0
    assert re.search(r"rkd run, rank 1 of 2: cannot read point \d+\n", broken.stderr)
    assert epochs(folder) == 10
    assert not (folder / "result.json").exists()

    first, second = tasks_of_slurm(command)
    assert first.returncode == second.returncode == 0, second.stderr
    assert "recall_at_1" in first.stdout
    assert "step/s" in first.stderr
    assert second.stdout == second.stderr == ""
    assert result(folder)["processes"] == 2
    same([result(each)["history"] for each in (alone[0] / "two_stages", folder)])
    assert {file.name for file in folder.iterdir() if "tfevents" not in file.name} == {
        "recipe.yaml", "last.pt", "best.pt", "result.json",
    }  # fmt: skip
    assert len(list(folder.glob("*tfevents*"))) == 4  # of each start, by the first process alone


@pytest.mark.processes
def test_data_that_one_process_cannot_load_keeps_no_other_waiting(alone, tmp_path):
    """Also without a launcher that ends it."""
    command = ["-m", "rkd_plugin", "run", alone[1]["classification"], "--out", tmp_path]
    waiting, broken = tasks_of_slurm(command, BREAK="1,120,raise")
    assert waited(tmp_path) < 60
    assert epochs(tmp_path) == 2  # of 45 images for each process; of all 90 it would be one
    assert [waiting.returncode, broken.returncode] == [1, 1]
    assert re.fullmatch(r"rkd run, rank 1 of 2: cannot read point \d+\n", broken.stderr)
    assert "Traceback" not in waiting.stderr
    assert re.search(r"rkd run, rank 0 of 2: expected the other processes to continue, .*\n$", waiting.stderr)


@pytest.mark.processes
def test_a_signal_to_one_rank_stops_all_after_the_same_step(alone, tmp_path):
    path, folder = alone[1]["two_stages"], tmp_path / "run"
    command = ["-m", "rkd_plugin", "run", path, "--out", str(folder)]
    stopped = python(*TORCHRUN, *command, BREAK="1,100,term")
    assert stopped.returncode != 0
    kept = read_checkpoint(folder / "last.pt")
    assert (len(kept["history"]), len(kept["part"]["random"])) == (2, 2), stopped.stderr
    assert 0 < kept["part"]["steps"] < 4
    with pytest.raises(ValueError, match="stopped within epoch 3, 2, got 1; start that number until the epoch"):
        many_processes.train(path, folder)
    went_on = python(*TORCHRUN, *command)
    assert went_on.returncode == 0, went_on.stderr
    same([result(where)["history"] for where in (alone[0] / "two_stages", folder)])


# Ranks that differ


def test_a_rank_with_other_values_is_named(monkeypatch):
    ranks = [{"recipe": "a", "torch": "1"}, {"recipe": "a", "torch": "1"}, {"recipe": "b", "torch": "1"}]
    monkeypatch.setattr(processes, "all_gather", lambda _: ranks)
    with pytest.raises(
        ValueError, match=r"^rank 2 of 3: expected the recipe of rank 0, got another one \(b instead of"
    ):
        processes.check_equal(ranks[0])
    monkeypatch.setattr(processes, "all_gather", lambda _: ranks[:2])
    processes.check_equal(ranks[0])


def test_weights_that_differ_in_one_number_are_found(monkeypatch):
    sent = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "barrier", lambda: None)
    monkeypatch.setattr(processes, "all_gather", lambda values: sent.append(values) or sent)
    model = torch.nn.BatchNorm1d(3).bfloat16()
    check_equal_weights(model, "weights of the teacher")
    check_equal_weights(model, "weights of the teacher")
    model.running_mean[2] += 1
    with pytest.raises(ValueError, match="rank 2 of 3: expected the weights of the teacher of rank 0"):
        check_equal_weights(model, "weights of the teacher")


@pytest.mark.processes
def test_ranks_with_other_recipes_all_end_with_an_error(alone, tmp_path):
    command = ["-m", "rkd_plugin", "run", alone[1]["classification"], "--out", tmp_path / "run"]
    done = tasks_of_slurm(command, [*command, "recipe.seed=4"])
    for rank, one in enumerate(done):
        assert one.returncode == 1
        assert re.fullmatch(
            rf"rkd run, rank {rank} of 2: rank 1 of 2: expected the recipe of rank 0, got another one .*\n", one.stderr
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("other", "what"), [(["eval", "--classes", "all"], "option --classes"), (["embed", "--views", "2"], "verb")]
)
def test_ranks_with_another_command_all_end_with_an_error(alone, other, what):
    verb, *options = other
    recipe = alone[1]["classification"]
    out = ["--out", "bank"] if verb == "embed" else []
    done = tasks_of_slurm(["-m", "rkd_plugin", "eval", recipe], ["-m", "rkd_plugin", verb, recipe, *options, *out])
    for one in done:
        assert one.returncode == 1
        assert f"rank 1 of 2: expected the {what}" in one.stderr


@pytest.mark.processes
@pytest.mark.parametrize("verb", ["run", "eval"])
def test_ranks_with_other_weights_all_end_with_an_error(alone, tmp_path, verb):
    """One path on two machines with different files."""
    text = Path(alone[1]["classification"]).read_text()
    source = "{key: Perceptron, src_ckpt: teacher.pt, kwargs: {width: 12, dim: 10}}"
    (tmp_path / "taught.yaml").write_text(text.replace("{key: Perceptron, kwargs: {width: 12, dim: 10}}", source))
    for name in "ab":
        (tmp_path / name).mkdir()
        for file, width in (("teacher.pt", 12), ("student.pt", 5)):
            torch.save({"model": many_processes.Perceptron(width, 10).state_dict()}, tmp_path / name / file)
    ends = {"run": ["--out", tmp_path / "run"], "eval": ["--checkpoint", "student.pt"]}[verb]
    done = tasks_of_slurm(
        ["-m", "rkd_plugin", verb, tmp_path / "taught.yaml", *ends], folders=[tmp_path / "a", tmp_path / "b"]
    )
    for one in done:
        assert one.returncode == 1
        assert "rank 1 of 2: expected the weights " in one.stderr
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("variables", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_what_processes_do_not_share_raises(monkeypatch, capsys, variables):
    for name, value in zip((*variables, "MASTER_ADDR", "MASTER_PORT"), "1234", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # which gains the launcher's
    assert cli.main(["reproduce", "quickstart"]) == 1
    assert capsys.readouterr().err == (
        "rkd reproduce, rank 1 of 2: expected one process, got 2, which can share the work of `rkd run` and `rkd eval` "
        "and `rkd embed` only; start this without torchrun or srun\n"
    )


@pytest.fixture
def slurm(monkeypatch):
    """The environment, without what started this process."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_", "RANK"))
    }
    monkeypatch.setattr(os, "environ", inherited | {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"})
    return os.environ


def test_slurm_says_what_torchrun_would(slurm):
    slurm.update(SLURM_JOB_NODELIST="gpu[07-09,12]", SLURM_JOB_ID="1234567", SLURM_STEP_ID="0")
    assert launched() == (3, 8)
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    assert [slurm[name] for name in names] == ["3", "8", "1", "gpu07", "24567"]
    assert launched() == (3, 8)


def test_the_script_of_a_job_is_one_process(slurm):
    slurm.update(SLURM_JOB_NODELIST="gpu[07-09]", SLURM_JOB_ID="1", SLURM_PROCID="0")
    assert launched() == (0, 1)


def test_a_first_host_without_a_name(slurm):
    with pytest.raises(ValueError, match="the first host in MASTER_ADDR or SLURM_JOB_NODELIST, found neither; export"):
        launched()


@pytest.fixture
def as_if_two(monkeypatch):
    for module in (distributed, processes):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "all_gather", lambda value: [value] * 2)
    monkeypatch.setattr(processes, "rank_zero_first", nullcontext)


def test_wrappers_of_torchdistill_raise(tmp_path, as_if_two):
    path = tmp_path / "wrapped.yaml"
    text = Path(classification(path)).read_text()
    path.write_text(text.replace(HOOKED, f"{HOOKED}, wrapper: DataParallel"))
    with pytest.raises(ValueError, match=r"train\.teacher\.wrapper: expected none, .*, got DataParallel; leave it out"):
        Experiment(read(path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there PyTorch has it")
def test_synchronised_statistics_need_gpus(tmp_path, as_if_two):
    path = tmp_path / "synchronised.yaml"
    text = Path(classification(path)).read_text()
    path.write_text(text.replace("{width: 5, dim: 10}", "{width: 5, dim: 10}, sync_bn: true"))
    with pytest.raises(ValueError, match=r"expected sync_bn on GPUs, .*, got CPUs; set sync_bn to False"):
        Experiment(read(path)).box()


@pytest.mark.processes
@pytest.mark.skipif(find_spec("accelerate") is None, reason="not installed")
def test_accelerate_starts_processes_as_well(alone, tmp_path):
    start = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--num_processes=2"]
    path = alone[1]["classification"]
    done = python(*start, "-m", "rkd_plugin", "run", path, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    same([result(each)["history"] for each in (alone[0] / "classification", tmp_path / "run")])
