"""Runs: what they write, how they end, and that a stopped run ends as one that was not stopped."""

import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from rkd_plugin import cli
from rkd_plugin.adapters.torchdistill import PMLLoss
from rkd_plugin.experiments.recipe import read
from rkd_plugin.experiments.running import evaluation, runner
from rkd_plugin.experiments.running.checkpoints import read_checkpoint, write_checkpoint
from rkd_plugin.experiments.running.run_folder import recipe_of_run
from rkd_plugin.storage import replacing

TINY = ["recipe.num_epochs=4", "recipe.samples_per_epoch=256", "recipe.batch_size=64", "models.model.kwargs.width=4"]


def run(folder, recipe="quickstart/student", overrides=TINY):
    return runner.run(read(recipe, overrides), folder)


def without_times(history):
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in history]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder)


def test_what_a_run_leaves(undisturbed):
    folder, result = undisturbed
    assert {path.name for path in folder.iterdir() if "tfevents" not in path.name} == {
        "recipe.yaml", "last.pt", "best.pt", "result.json",
    }  # fmt: skip
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert json.loads((folder / "result.json").read_text()) == result
    assert [epoch["epoch"] for epoch in result["history"]] == [1, 2, 3, 4]
    assert result["final"]["recall_at_1"] == result["history"][-1]["recall_at_1"]
    assert result["best"]["recall_at_1"] == max(epoch["recall_at_1"] for epoch in result["history"])
    assert result["history"][-1]["loss"] < result["history"][0]["loss"]
    assert set(result["environment"]) >= {"commit", "device", "cores", "torch", "torchdistill"}


def test_checkpoints_hold_the_epochs_they_claim(undisturbed):
    folder, result = undisturbed
    recipe = recipe_of_run(folder)
    assert evaluation.evaluate(recipe, folder / "last.pt").metrics == result["final"]
    best = evaluation.evaluate(recipe, folder / "best.pt").metrics
    assert best == {name: value for name, value in result["best"].items() if name != "epoch"}
    assert len(read_checkpoint(folder / "best.pt")["history"]) == result["best"]["epoch"]


def test_a_finished_run_is_read_not_repeated(undisturbed, monkeypatch):
    folder, result = undisturbed
    monkeypatch.setattr(runner, "Experiment", None)
    assert run(folder) == result


def test_the_seed_decides_everything(undisturbed, tmp_path):
    _, result = undisturbed
    assert without_times(run(tmp_path / "same")["history"]) == without_times(result["history"])
    other = run(tmp_path / "other", overrides=[*TINY, "recipe.seed=1"])
    assert without_times(other["history"]) != without_times(result["history"])


def test_a_folder_of_another_recipe_raises_and_is_unchanged(undisturbed):
    folder, _ = undisturbed
    before = {path: path.read_bytes() for path in folder.iterdir()}
    match = r"holds a run of another recipe: recipe\.seed is 0 there and 1 here; give .* folder with --out, or delete"
    with pytest.raises(FileExistsError, match=match):
        run(folder, overrides=[*TINY, "recipe.seed=1"])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_recipe_that_was_changed_since_is_named_before_anything_is_imported(
    undisturbed, tmp_path, monkeypatch, capsys
):
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('imported').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    path.write_text(path.read_text().replace("dependencies: [", "dependencies: [evil, "))
    assert cli.main(["eval", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "recipe.yaml: expected the recipe that the run wrote, got a changed one" in error
    with pytest.raises(FileExistsError, match=r"holds a run of another recipe: dependencies"):
        run(tmp_path / "run")
    assert not (tmp_path / "imported").exists()
    # The command in the message works.
    command = error.strip().rpartition(": rkd ")[2].split()
    assert cli.main(command) == 0
    assert (tmp_path / "imported").exists()


def test_the_line_with_the_digest_is_part_of_it(undisturbed, tmp_path):
    folder, _ = undisturbed
    text = (folder / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.partition("\n")[2])
    with pytest.raises(ValueError, match="got a changed one"):
        recipe_of_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    assert recipe_of_run(tmp_path).settings["seed"] == 0


def interrupt_before_epoch(monkeypatch, epoch):
    seed = runner.Experiment.seed

    def stop(self, at):
        if at == epoch:
            raise KeyboardInterrupt
        seed(self, at)

    monkeypatch.setattr(runner.Experiment, "seed", stop)


def two_stages(path):
    """The student's recipe in two stages: a smaller learning rate in the second."""
    recipe = yaml.compose(Path(read("quickstart/student").path).read_text(), Loader=yaml.SafeLoader)
    sections = {key.value: (key, value) for key, value in recipe.value}
    _, train = sections["train"]
    shared = [(key, value) for key, value in train.value if key.value == "log_freq"]
    train.value = [pair for pair in train.value if pair not in shared]
    first = yaml.serialize(train)
    stages = [yaml.compose(first, Loader=yaml.SafeLoader) for _ in range(2)]
    train.value = shared + [
        (yaml.ScalarNode("tag:yaml.org,2002:str", f"stage{i + 1}"), stage) for i, stage in enumerate(stages)
    ]
    path.write_text(yaml.serialize(recipe))
    small = {
        "num_epochs": 2,
        "train_data_loader.sampler.kwargs.num_samples": 256,
        "train_data_loader.kwargs.batch_size": 64,
    }
    overrides = [f"train.stage{i}.{key}={value}" for i in (1, 2) for key, value in small.items()]
    return read(path, [*overrides, "train.stage1.optimizer.kwargs.lr=0.01", "train.stage2.optimizer.kwargs.lr=0.0001"])


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_interrupted_in_any_stage_ends_as_undisturbed(tmp_path, monkeypatch, epoch):
    recipe = two_stages(tmp_path / "two_stages.yaml")
    expected = runner.run(recipe, tmp_path / "undisturbed")["history"]
    assert [step["lr"] for step in expected] == [0.01, 0.01, 0.0001, 0.0001]
    with monkeypatch.context() as patch:
        interrupt_before_epoch(patch, epoch)
        with pytest.raises(KeyboardInterrupt):
            runner.run(recipe, tmp_path / "stopped")
    assert without_times(runner.run(recipe, tmp_path / "stopped")["history"]) == without_times(expected)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_before_epoch(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    kept = (tmp_path / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(PMLLoss, "forward", lambda *_, **__: torch.tensor(math.nan))
        with pytest.raises(
            FloatingPointError, match=r"^epoch 3: the loss became nan in step 1 through its term triplet"
        ):
            run(tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == kept


def test_a_missing_teacher_is_reported_and_nothing_is_trained(tmp_path):
    overrides = ["recipe.teacher_checkpoint=/nowhere/last.pt", "recipe.num_epochs=1"]
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint at /nowhere/last\.pt, found none; train that"):
        run(tmp_path, "quickstart/rkd_da", overrides)
    assert not (tmp_path / "last.pt").exists()


def test_the_teacher_of_a_run_does_not_change_and_the_student_learns_from_it(undisturbed, tmp_path, monkeypatch):
    folder, _ = undisturbed
    overrides = [
        "recipe.num_epochs=2", "recipe.samples_per_epoch=512", "recipe.batch_size=64",
        f"recipe.teacher_checkpoint={folder / 'last.pt'}",
        "models.teacher_model.kwargs={width: 4, embedding_dim: 8, l2_normalize: True}",
    ]  # fmt: skip
    boxes, steps_of = [], runner.steps_of
    monkeypatch.setattr(runner, "steps_of", lambda _, box, part: (boxes.append(box), steps_of(_, box, part))[1])
    result = run(tmp_path, "quickstart/rkd_d", overrides)
    teacher = read_checkpoint(folder / "last.pt")["model"]
    assert all(torch.equal(value, teacher[name]) for name, value in boxes[0].teacher_model.state_dict().items())
    assert not boxes[0].teacher_model.training
    assert result["history"][1]["loss"] < result["history"][0]["loss"]


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_checkpoint_that_would_execute_code_raises_and_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("last.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match=r"expected a checkpoint of tensors and plain values at last\.pt"):
        read_checkpoint(Path("last.pt"))
    assert not Path("executed").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "last.pt"
    write_checkpoint(path, {"epoch": 1})

    def fill_the_disk():
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert read_checkpoint(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_eval_of_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder of `rkd run` with recipe\.yaml"):
        recipe_of_run(tmp_path)


def test_best_is_kept_apart_from_last(undisturbed, tmp_path):
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "best.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint at .*best\.pt"):
        evaluation.evaluate(recipe_of_run(tmp_path / "copy"), tmp_path / "copy" / "best.pt")


def test_a_checkpoint_of_another_model_raises(undisturbed):
    folder, _ = undisturbed
    with pytest.raises(ValueError, match=r"last\.pt holds another model than .*teacher\.yaml describes"):
        evaluation.evaluate(read("quickstart/teacher"), folder / "last.pt")


def test_without_a_checkpoint_the_model_is_measured_as_it_is_built(undisturbed):
    folder, result = undisturbed
    first, second = (evaluation.evaluate(recipe_of_run(folder)) for _ in range(2))
    assert first.metrics == second.metrics
    assert first.metrics["recall_at_1"] < result["final"]["recall_at_1"]


def switched(path, *settings):
    """The student's recipe with further settings."""
    text = Path(read("quickstart/student").path).read_text()
    path.write_text(text.replace("recipe:\n", "recipe:\n" + "".join(f"  {setting}\n" for setting in settings), 1))
    return path


def test_bf16_and_channels_last_train_close_to_float32(undisturbed, tmp_path):
    _, result = undisturbed
    recipe = read(switched(tmp_path / "fast.yaml", "precision: bf16", "channels_last: True"), TINY)
    fast = runner.run(recipe, tmp_path / "fast")
    assert without_times(fast["history"]) != without_times(result["history"])
    # bfloat16 has three digits; the two trainings part slowly.
    assert fast["history"][0]["loss"] == pytest.approx(result["history"][0]["loss"], rel=0.1)
    assert fast["final"]["recall_at_1"] == pytest.approx(result["final"]["recall_at_1"], abs=15)


@pytest.mark.parametrize(("setting", "where"), [("precision: fp8", "precision"), ("recall_at: 1", "recall_at")])
def test_switches_are_checked(tmp_path, setting, where):
    with pytest.raises(ValueError, match=f"recipe.{where}: "):
        runner.run(read(switched(tmp_path / "wrong.yaml", setting)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recall_at_what_the_recipe_says(tmp_path):
    result = run(tmp_path / "out", switched(tmp_path / "k.yaml", "recall_at: [1, 4]"), TINY)
    assert list(result["final"]) == ["recall_at_1", "recall_at_4", "map_at_r"]
    assert result["final"]["recall_at_4"] > result["final"]["recall_at_1"] > result["final"]["map_at_r"]
