"""Suites: the runs they make, the tables and pictures they write."""

import json
from pathlib import Path

import pytest
from PIL import Image

from rkd_plugin.experiments import suite as suites
from rkd_plugin.experiments.recipe import RecipeError, read_suite

SMALL = ["recipe.num_epochs=2", "recipe.samples_per_epoch=256", "recipe.batch_size=64"]
SUITE = {
    "title": "A small table",
    "metric": "recall_at_1",
    "metric_label": "Recall@1 (%)",
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
    assert (folder / "table.md").read_text() == table
    runs = {
        (row, seed): json.loads((folder / f"{row}-seed{seed}" / "result.json").read_text())
        for row in ("teacher", "rkd_d")
        for seed in (3, 4)
    }
    for row, label in (("teacher", "Teacher"), ("rkd_d", "RKD-D")):
        values = [runs[row, seed]["final"]["recall_at_1"] for seed in (3, 4)]
        mean, std = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
        assert f"| {label} | {mean:.1f} ± {std:.1f} | {values[0]:.1f}, {values[1]:.1f} |" in table
    results = json.loads((folder / "results.json").read_text())
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
    for name in ("learning_curves.png", "retrieval.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 50


def test_what_is_there_is_read(reproduced, monkeypatch):
    name, folder, table = reproduced
    monkeypatch.setattr("rkd_plugin.experiments.runner._train", None)
    assert suites.reproduce(name, folder)[1] == table


def test_one_seed_has_no_spread(reproduced):
    name, folder, _ = reproduced
    _, table = suites.reproduce(name, folder, [3])
    assert "±" not in table.split("\n\n")[1]


def test_a_problem_in_any_recipe_stops_before_the_first_run(tmp_path):
    rows = [SUITE["rows"][0], {**SUITE["rows"][1], "overrides": ["train.optimizer.key=Adm"]}]
    with pytest.raises(RecipeError, match=r"train\.optimizer\.key"):
        suites.reproduce(written(tmp_path, rows=rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_quickstart_names_every_row_of_the_table():
    rows = read_suite("quickstart")["rows"]
    assert [row["name"] for row in rows] == ["teacher", "student", "rkd_d", "rkd_a", "rkd_da"]
    assert len(read_suite("quickstart")["seeds"]) == 3
    assert all(Path(row["recipe"]).parent.name == "quickstart" for row in rows)
