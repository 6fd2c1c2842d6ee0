"""Suites: their runs, tables and pictures."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from rkd_plugin.experiments.recipe import RecipeError, configs_root, read, read_suite
from rkd_plugin.experiments.running.evaluation import evaluate
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.experiments.running.run_folder import recipe_of_run
from rkd_plugin.experiments.tables import suite as suites

SMALL = ["recipe.num_epochs=2", "recipe.samples_per_epoch=256", "recipe.batch_size=64"]
SUITE = {
    "title": "A small table",
    "metrics": {"recall_at_1": "Recall@1 (%)"},
    "seeds": [3, 4],
    "panels": ["teacher", "rkd_d"],
    "rows": [
        {"name": "teacher", "label": "Teacher", "recipe": "quickstart/teacher", "overrides": SMALL},
        {"name": "rkd_d", "label": "RKD-D", "recipe": "quickstart/rkd_d", "teacher": "teacher", "overrides": SMALL},
    ],
}


def written(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(json.dumps({"suite": {**SUITE, **changes}}))
    return str(path)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    name = written(folder)
    return name, *suites.reproduce(name, folder / "out")


def test_the_table_holds_what_the_runs_gave(reproduced):
    _, folder, table = reproduced
    assert (folder / "small.md").read_text() == table
    runs = {
        (row, seed): json.loads((folder / f"{row}-seed{seed}" / "result.json").read_text())
        for row in ("teacher", "rkd_d")
        for seed in (3, 4)
    }
    for row, label in (("teacher", "Teacher"), ("rkd_d", "RKD-D")):
        cells = []
        for when in ("final", "best"):
            values = [runs[row, seed][when]["recall_at_1"] for seed in (3, 4)]
            cells.append(f"{sum(values) / 2:.1f} ± {abs(values[0] - values[1]) / 2**0.5:.1f}")
        each = ", ".join(f"{runs[row, seed]['final']['recall_at_1']:.1f}" for seed in (3, 4))
        assert f"| {label} | {cells[0]} | {cells[1]} | {each} |" in table
    assert "| last epoch | best test epoch | last epoch, each seed |" in table
    results = json.loads((folder / "small.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["teacher", "rkd_d"]
    assert results["runs"]["rkd_d"] == [runs["rkd_d", 3], runs["rkd_d", 4]]
    for key in ("commit", "device", "torch"):
        assert f"{key} {runs['teacher', 3]['environment'][key]}" in table


def test_every_student_had_the_teacher_of_its_seed(reproduced):
    _, folder, _ = reproduced
    for seed in (3, 4):
        recipe = (folder / f"rkd_d-seed{seed}" / "recipe.yaml").read_text()
        assert f"{folder}/teacher-seed{seed}/last.pt" in recipe


def test_pictures_show_something(reproduced):
    _, folder, _ = reproduced
    for name in ("small_learning_curves.png", "small_retrieval.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 50


def test_what_is_there_is_read(reproduced, monkeypatch):
    name, folder, table = reproduced
    monkeypatch.setattr("rkd_plugin.experiments.running.runner._Training", None)
    assert suites.reproduce(name, folder)[1] == table


def test_an_interrupted_suite_goes_on_and_ends_with_the_same_table(reproduced, tmp_path, monkeypatch):
    name, _, table = reproduced
    seed = Experiment.seed

    def stop(self, epoch):
        if epoch == 2 and self.settings["seed"] == 4:
            raise KeyboardInterrupt
        seed(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "seed", stop)
        with pytest.raises(KeyboardInterrupt):
            suites.reproduce(name, tmp_path)
    assert not (tmp_path / "small.md").exists()
    _, resumed = suites.reproduce(name, tmp_path)

    def without_times(text):
        return [[cell for head, cell in line.items() if head != "seconds a run"] for line in cells_of(text)]

    assert without_times(resumed) == without_times(table)


def test_one_seed_has_no_spread(reproduced):
    name, folder, _ = reproduced
    _, table = suites.reproduce(name, folder, [3])
    assert all("±" not in line["last epoch"] for line in cells_of(table))


def cells_of(table):
    lines = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_papers_number_is_beside_ours(reproduced, tmp_path):
    _, folder, _ = reproduced
    rows = [{**SUITE["rows"][0], "paper": {"recall_at_1": 50}}, SUITE["rows"][1]]
    metrics = {"recall_at_1": "Recall@1 (%)", "map_at_r": "MAP@R (%)"}
    _, table = suites.reproduce(written(tmp_path, rows=rows, metrics=metrics), folder, [3])
    teacher, missing, *_ = cells_of(table)
    result = json.loads((folder / "teacher-seed3" / "result.json").read_text())
    assert teacher["metric"] == "Recall@1 (%)"
    assert teacher["paper"] == "50.00"
    assert teacher["last epoch"] == f"{result['final']['recall_at_1']:.1f}"
    assert teacher["last epoch - paper"] == f"{result['final']['recall_at_1'] - 50:+.1f}"
    assert teacher["best test epoch - paper"] == f"{result['best']['recall_at_1'] - 50:+.1f}"
    assert missing["metric"] == "MAP@R (%)"
    assert missing["last epoch"] == f"{result['final']['map_at_r']:.1f}"
    assert missing["paper"] == missing["last epoch - paper"] == ""


def test_some_rows_and_the_teachers_they_need(reproduced, monkeypatch):
    name, folder, _ = reproduced
    monkeypatch.setattr("rkd_plugin.experiments.running.runner._Training", None)
    _, table = suites.reproduce(name, folder, rows=["rkd_d"])
    assert [line[""] for line in cells_of(table)] == ["Teacher", "RKD-D"]
    _, table = suites.reproduce(name, folder, rows=["teacher"])
    assert [line[""] for line in cells_of(table)] == ["Teacher"]
    with pytest.raises(RecipeError, match="the suite has no row 'rkd_dd'; did you mean rkd_d"):
        suites.reproduce(name, folder, rows=["rkd_dd"])


def test_overrides_reach_every_row_and_are_named(tmp_path):
    rows = [{**row, "overrides": SMALL[1:]} for row in SUITE["rows"]]
    _, table = suites.reproduce(written(tmp_path, rows=rows), tmp_path, [3], overrides=["recipe.num_epochs=1"])
    assert "the seeds 3, with recipe.num_epochs=1;" in table
    for row in ("teacher", "rkd_d"):
        assert len(json.loads((tmp_path / f"{row}-seed3" / "result.json").read_text())["history"]) == 1


def test_overrides_of_a_suite_reach_every_row_and_all_others_have_priority(tmp_path):
    teacher, student = ({**row, "overrides": []} for row in SUITE["rows"])
    rows = [teacher, {**student, "overrides": ["recipe.num_epochs=2"]}]
    fast = {"label": "less", "overrides": ["recipe.samples_per_epoch=128"]}
    name = written(tmp_path, rows=rows, fast=fast, overrides=["recipe.num_epochs=1", *SMALL[1:]])

    def settings(*overrides, **options):
        folder, table = suites.reproduce(name, **{"out": tmp_path / "out", **options}, seeds=[3], overrides=overrides)
        assert (" with recipe." in table) == bool(overrides)  # the suite's own are no news
        found = [recipe_of_run(folder / f"{row}-seed3").settings for row in ("teacher", "rkd_d")]
        return [(each["num_epochs"], each["samples_per_epoch"], each["batch_size"]) for each in found]

    assert settings() == [(1, 256, 64), (2, 256, 64)]
    assert settings(fast=True) == [(1, 128, 64), (2, 128, 64)]
    assert settings("recipe.batch_size=32", out=tmp_path / "other") == [(1, 256, 32), (2, 256, 32)]


def test_an_override_of_a_suite_that_names_no_key_stops_before_the_first_run(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.num_epoch: recipe has no key 'num_epoch'"):
        suites.reproduce(written(tmp_path, overrides=["recipe.num_epoch=1"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match=r"suite\.overrides"):
        read_suite(written(tmp_path, overrides="recipe.num_epochs=1"))


def test_fast_is_the_stated_fraction_of_the_schedule(tmp_path):
    rows = [{**SUITE["rows"][0], "overrides": SMALL[2:], "fast": ["recipe.samples_per_epoch=128"]}]
    fast = {"label": "one epoch of twenty", "overrides": ["recipe.num_epochs=1", "recipe.samples_per_epoch=256"]}
    name = written(tmp_path, rows=rows, panels=["teacher"], fast=fast)
    folder, table = suites.reproduce(name, tmp_path, [3], fast=True)
    assert folder == tmp_path / "fast"
    assert "A small table (one epoch of twenty)" in table
    recipe = recipe_of_run(folder / "teacher-seed3")
    assert recipe.settings["num_epochs"] == 1
    assert recipe.settings["samples_per_epoch"] == 128
    folder, _ = suites.reproduce(name, tmp_path / "two", [3], overrides=["recipe.num_epochs=2"], fast=True)
    assert len(json.loads((folder / "teacher-seed3" / "result.json").read_text())["history"]) == 2
    with pytest.raises(RecipeError, match=r"suite\.fast: expected a fast schedule, found none"):
        suites.reproduce(written(tmp_path), tmp_path, fast=True)


def test_models_are_tested_on_other_data(reproduced, tmp_path, monkeypatch):
    """As in Figure 3: each row on each set of test data, with one row without training."""
    _, folder, _ = reproduced
    untrained = {"name": "untrained", "label": "Untrained", "recipe": "quickstart/teacher", "trained": False}
    sevens = (configs_root() / "quickstart" / "teacher.yaml").read_text()
    kept = [part for part in re.split(r"\n(?=\w)", sevens) if not part.startswith(("models", "train", "test"))]
    test = "test:\n  test_data_loader:\n    dataset_id: digits/test\n    sampler: {class_or_func: !import_get {key: "
    test += "torch.utils.data.SequentialSampler}}\n    kwargs: {batch_size: 100}\n"
    (tmp_path / "sevens.yaml").write_text("\n".join([*kept, test]).replace("[5, 6, 7, 8, 9]", "[7, 8]"))
    sets = {"own": "quickstart/teacher", "sevens": str(tmp_path / "sevens.yaml")}
    rows = [*SUITE["rows"], {**untrained, "paper": {"sevens": 12.5}}]
    _, table = suites.reproduce(written(tmp_path, rows=rows, test_sets=sets), folder, [3])
    lines = cells_of(table)
    assert [(line[""], line["tested on"]) for line in lines] == [
        (label, where) for label in ("Teacher", "RKD-D", "Untrained") for where in sets
    ]
    result = json.loads((folder / "teacher-seed3" / "result.json").read_text())
    assert lines[0]["last epoch"] == f"{result['final']['recall_at_1']:.1f}"
    assert lines[0]["best test epoch"] == f"{result['best']['recall_at_1']:.1f}"
    expected = evaluate(
        recipe_of_run(folder / "teacher-seed3"), folder / "teacher-seed3" / "last.pt", read(sets["sevens"])
    )
    assert lines[1]["last epoch"] == f"{expected.metrics['recall_at_1']:.1f}"
    assert set(expected.labels.tolist()) == {7, 8}
    assert lines[5]["paper"] == "12.50"
    assert lines[5]["last epoch"] == lines[5]["best test epoch"]
    monkeypatch.setattr("rkd_plugin.experiments.tables.suite.evaluate", None)
    assert suites.reproduce(written(tmp_path, rows=rows, test_sets=sets), folder, [3])[1] == table


def test_a_problem_in_any_recipe_stops_before_the_first_run(tmp_path):
    rows = [SUITE["rows"][0], {**SUITE["rows"][1], "overrides": ["train.optimizer.key=Adm"]}]
    with pytest.raises(RecipeError, match=r"train\.optimizer\.key"):
        suites.reproduce(written(tmp_path, rows=rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_are_looked_up_from_the_folder_of_the_suite(tmp_path, monkeypatch):
    (tmp_path / "suites").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for folder in ("suites", "elsewhere"):
        (tmp_path / folder / "mine.yaml").write_text((configs_root() / "quickstart" / "teacher.yaml").read_text())
    name = written(tmp_path / "suites", rows=[{**SUITE["rows"][0], "recipe": "mine.yaml"}], panels=[])
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given in (name, "../suites/small.yaml"):
        (row,) = read_suite(given)["rows"]
        assert Path(row["recipe"]).samefile(tmp_path / "suites" / "mine.yaml")
    (tmp_path / "suites" / "mine.yaml").unlink()
    with pytest.raises(RecipeError, match=r"suite\.rows\.0\.recipe: 'mine\.yaml' is neither a file nor a packaged"):
        read_suite(name)


@pytest.mark.parametrize("folder", ["try #2", "a: b", "1e-3", "[x]", "~", "quo'te\"s"])
def test_paths_reach_the_recipe_as_they_are(tmp_path, monkeypatch, folder):
    plans = []
    monkeypatch.setattr(suites, "_results", lambda plan: plans.append(plan) or {})
    monkeypatch.setattr(suites, "_write", lambda *_: "")
    suites.reproduce(written(tmp_path), tmp_path / folder, [3])
    (teacher, student) = plans[0].runs
    assert student.recipe.settings["teacher_checkpoint"] == str(teacher.folder / "last.pt")
    assert teacher.folder.parent == tmp_path / folder


def test_the_quickstart_names_every_row_of_the_table():
    rows = read_suite("quickstart")["rows"]
    assert [row["name"] for row in rows] == ["teacher", "student", "rkd_d", "rkd_a", "rkd_da"]
    assert len(read_suite("quickstart")["seeds"]) == 3
    assert all(Path(row["recipe"]).parent.name == "quickstart" for row in rows)


def test_a_row_may_have_fewer_seeds_or_no_training(tmp_path, monkeypatch):
    untrained = {"name": "untrained", "label": "Untrained", "recipe": "quickstart/student", "trained": False}
    rows = [{**untrained, "overrides": SMALL, "seeds": [4]}, SUITE["rows"][0]]
    name = written(tmp_path, rows=rows, seeds=[3, 4], panels=[])
    folder, table = suites.reproduce(name, tmp_path / "out")
    results = json.loads((folder / "small.json").read_text())["runs"]
    assert [run["seed"] for run in results["untrained"]] == [4]
    assert [run["seed"] for run in results["teacher"]] == [3, 4]
    found = evaluate(read("quickstart/student", [*SMALL, "recipe.seed=4"])).metrics
    assert results["untrained"][0]["final"] == found
    assert "over the seeds 3, 4" in table
    monkeypatch.setattr(suites, "evaluate", None)  # it is measured once
    assert suites.reproduce(name, tmp_path / "out") == (folder, table)
    _, table = suites.reproduce(name, tmp_path / "out", seeds=[3])
    assert "Untrained" not in table
