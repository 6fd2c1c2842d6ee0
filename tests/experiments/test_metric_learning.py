"""The recipes of metric learning run on tiny data in the layout on disk, and train the right modules."""

import json

import pytest
import torch
from PIL import Image

from rkd_plugin.cli import main
from rkd_plugin.experiments.recipe import read, read_suite
from rkd_plugin.experiments.running import experiment, runner
from rkd_plugin.experiments.running.checkpoints import read_checkpoint
from tests.adapters.test_torchdistill import learning_rate_falls_after

# Rows of Table 1 as their suites set them.
RKD = {
    "rkd_d": ["recipe.angle_weight=0"],
    "rkd_a": ["recipe.distance_weight=0", "recipe.angle_weight=1"],
    "rkd_da": [],
}
STUDENTS = ("triplet", "fitnet", "attention", "darkrank", *RKD)
TEACHERS = {
    "small_birds": ["recipe.embedding_dim=512", "recipe.widths=[32, 64, 128, 256]"],
    "paper": ["recipe.backbone=resnet50", "recipe.embedding_dim=512"],
}


def images(folder, classes, count=4):
    """Noise that differs by class, in a folder a class."""
    generator = torch.Generator().manual_seed(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        base = torch.rand(3, 1, 1, generator=generator)
        for number in range(count):
            pixels = (200 * base + 55 * torch.rand(3, 40, 30, generator=generator)).byte()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name / f"{number}.jpg")


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Three runs' worth of folders: small birds, and a teacher for them."""
    root = tmp_path_factory.mktemp("birds")
    images(root / "images", [f"{label:03}" for label in range(8)])
    run("small_birds", "teacher", root)
    return root


def run(networks, row, root, *overrides):
    """`rkd run` for two epochs with two iterations each."""
    method = "triplet" if row == "teacher" else "rkd" if row in RKD else row
    folder = "metric_learning/small_birds" if networks == "small_birds" else "metric_learning"
    shared = [
        f"recipe.data_root={root / 'images'}", f"recipe.cache={root / 'cache'}", "recipe.iterations=2",
        "recipe.batch_size=8", "recipe.num_epochs=2", "recipe.num_workers=0",
    ]  # fmt: skip
    shared += TEACHERS[networks] if row == "teacher" else RKD.get(row, [])
    if row == "fitnet":
        shared.append("recipe.finetuning_epochs=2")
    if method != "triplet":
        shared.append(f"recipe.teacher_checkpoint={root / networks}_teacher/last.pt")
    return runner.run(read(f"{folder}/{method}", [*shared, *overrides]), root / f"{networks}_{row}")


@pytest.mark.parametrize("row", STUDENTS)
def test_every_row_trains_on_folders_of_images(birds, row):
    result = run("small_birds", row, birds)
    assert list(result["final"]) == ["recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "map_at_r"]
    assert [epoch["epoch"] for epoch in result["history"]] == list(range(1, 5 if row == "fitnet" else 3))
    # Modules that train with the student are not part of it.
    student, teacher = (
        read_checkpoint(birds / f"small_birds_{name}" / "last.pt")["model"] for name in (row, "teacher")
    )
    assert student.keys() == teacher.keys()


def test_fitnet_learns_hints_and_then_triplets(birds, monkeypatch, tmp_path):
    seen = []
    build = experiment.get_distillation_box

    def spied(*args):
        box = build(*args)
        process = box.forward_process
        box.forward_process = lambda *a: (seen.append((box.stage_number, len(box.criterion.term_dict))), process(*a))[1]
        return box

    monkeypatch.setattr(experiment, "get_distillation_box", spied)
    monkeypatch.setattr(runner, "_result", lambda *args: {})
    root = tmp_path / "copy"
    root.mkdir()
    (root / "images").symlink_to(birds / "images")
    (root / "small_birds_teacher").symlink_to(birds / "small_birds_teacher")
    run("small_birds", "fitnet", root)
    # Three blocks and the embedding, for two epochs of two iterations; then one term.
    assert seen == [(1, 4)] * 4 + [(2, 1)] * 4


def test_anchors_reach_the_student():
    recipe = read("metric_learning/small_birds/rkd", ["recipe.embedding_dim=5", "recipe.l2_normalize=True"])
    kwargs = recipe.section("models")["student_model"]["kwargs"]
    assert kwargs["embedding_dim"] == 5
    assert kwargs["l2_normalize"] is True
    assert recipe.section("models")["teacher_model"]["kwargs"]["embedding_dim"] == 512


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    """CUB-200-2011 in its layout on disk, with three classes of each split, and the teacher of the paper."""
    root = tmp_path_factory.mktemp("cub")
    classes = [1, 2, 3, 101, 102, 103]
    folder = root / "images" / "CUB_200_2011"
    images(folder / "images", [f"{label:03}.Bird" for label in classes])
    files = sorted(path.relative_to(folder / "images").as_posix() for path in (folder / "images").rglob("*.jpg"))
    (folder / "images.txt").write_text("".join(f"{index} {name}\n" for index, name in enumerate(files, 1)))
    labels = "".join(f"{index} {int(name[:3])}\n" for index, name in enumerate(files, 1))
    (folder / "image_class_labels.txt").write_text(labels)
    run("paper", "teacher", root, "recipe.weights=null", "recipe.num_epochs=1", "recipe.iterations=1")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("row", ["fitnet", "attention", "rkd_da"])
def test_the_papers_networks_train_as_the_recipe_says(cub, row):
    short = ["recipe.weights=null", "recipe.num_epochs=1", "recipe.iterations=1"]
    short += ["recipe.finetuning_epochs=1"] if row == "fitnet" else []
    result = run("paper", row, cub, *short)
    # ResNet-18 without its head, and a linear layer of 128.
    assert result["parameters"] == 11_176_512 + 512 * 128 + 128
    assert result["history"][0]["lr"] == (1e-5 if row == "fitnet" else 1e-4)


def test_recipes_of_the_paper_differ_only_where_the_paper_does():
    """Same row, other data: models, losses and optimisers are the same but for the schedule on Online Products."""
    found = {data: {} for data in ("cub200", "cars196", "sop")}
    for suite in ("table1_cub200", "table1_cars196", "table2", "table3", "table3_sop"):
        common = read_suite(f"metric_learning/{suite}").get("overrides", [])
        for row in read_suite(f"metric_learning/{suite}")["rows"]:
            data, _, name = row["name"].partition("_")
            recipe = read(row["recipe"], [*common, *row["overrides"]])
            models = recipe.section("models")
            models.get("model", {"kwargs": {}})["kwargs"].pop("images", None)  # of a control, which no table has
            sections = [json.dumps(section, default=repr) for section in (recipe.section("train"), models)]
            found[data].setdefault((suite.removesuffix(f"_{data}"), name), sections)
    for row, (train, models) in found["cub200"].items():
        assert found["cars196"][row] == [train, models]
        assert row[0] == "table1" or found["sop"][row][1] == models
    assert len(found["cub200"]) == 41 + 4 + 4
    assert len(found["sop"]) == 4 + 4


# What sources confirm: learning rate, milestones, factor, epochs, iterations.
SCHEDULES = {
    ("table1_cub200", "cub200_teacher"): (1e-5, [25, 30, 35], 0.5, 40, 100),
    ("table1_cars196", "cars196_triplet_64_o"): (1e-5, [25, 30, 35], 0.5, 40, 100),
    ("table3_sop", "sop_teacher"): (1e-5, [25, 30, 35], 0.5, 40, 1000),
    ("table1_cub200", "cub200_rkd_da_64_x"): (1e-4, [40, 60], 0.1, 80, 100),
    ("table1_cars196", "cars196_darkrank_64_o"): (1e-4, [40, 60], 0.1, 80, 100),
    ("table2", "sop_generation1"): (1e-4, [40, 80], 0.1, 120, 500),
}


@pytest.mark.parametrize(("suite", "row"), SCHEDULES)
def test_schedules_are_the_papers(suite, row):
    table = read_suite(f"metric_learning/{suite}")
    found = next(found for found in table["rows"] if found["name"] == row)
    recipe = read(found["recipe"], [*table.get("overrides", []), *found["overrides"]])
    train = recipe.section("train")
    scheduler = train["scheduler"]["kwargs"]
    sampler = train["train_data_loader"]["batch_sampler"]["kwargs"]
    found = (
        train["optimizer"]["kwargs"]["lr"], learning_rate_falls_after(scheduler), scheduler["gamma"],
        train["num_epochs"], sampler["iterations"],
    )  # fmt: skip
    assert found == SCHEDULES[suite, row]
    modules = [train["optimizer"].pop(key) for key in list(train["optimizer"]) if key.startswith("module_wise")]
    rates = [module["kwargs"]["lr"] for listed in modules for module in listed]
    assert set(rates) <= {found[0]}
    assert train["optimizer"] == {"key": "Adam", "kwargs": {"lr": found[0], "weight_decay": 1e-5}}
    assert (sampler["batch_size"], sampler["images_per_class"]) == (128, 5)


def test_table_1_has_every_cell_of_the_paper():
    for data, teacher, best in (("cub200", 61.24, 60.92), ("cars196", 77.17, 82.50)):
        rows = read_suite(f"metric_learning/table1_{data}")["rows"]
        assert len(rows) == 1 + 4 * 10
        values = [row["paper"]["recall_at_1"] for row in rows]
        assert values[0] == teacher
        assert max(values[1:]) == best
        assert all(row.get("teacher") == f"{data}_teacher" for row in rows if "rkd" in row["name"])


def test_generations_learn_from_each_other():
    rows = {row["name"]: row for row in read_suite("metric_learning/table2")["rows"]}
    assert rows["sop_generation3"]["teacher"] == "sop_generation2"
    recipe = read(rows["sop_generation3"]["recipe"], rows["sop_generation3"]["overrides"])
    teacher, student = (recipe.section("models")[f"{side}_model"]["kwargs"] for side in ("teacher", "student"))
    assert {name: teacher[name] for name in ("backbone", "embedding_dim", "l2_normalize")} == {
        name: student[name] for name in ("backbone", "embedding_dim", "l2_normalize")
    }


def test_eval_on_other_test_data_that_is_not_there(birds, capsys):
    overrides = ["--data", "metric_learning/test_sets/cub200"]
    assert main(["eval", str(birds / "small_birds_teacher"), *overrides]) == 1
    assert "CUB: expected a folder data, found none; get CUB_200_2011.tgz" in capsys.readouterr().err
