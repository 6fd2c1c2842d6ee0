"""The recipes of few-shot learning: the paper's losses, the same in torchdistill's loop, early stopping, and tables."""

import json

import pytest
import torch
from torch.nn.functional import mse_loss
from torchdistill.losses.mid_level import ATLoss

from rkd_plugin import rkd_angle_loss, rkd_distance_loss
from rkd_plugin.components.few_shot import PrototypicalLoss
from rkd_plugin.experiments.recipe import RecipeError, read, read_suite
from rkd_plugin.experiments.running.episodes import episode_accuracies
from rkd_plugin.experiments.running.evaluation import evaluate
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.experiments.running.run_folder import recipe_of_run
from rkd_plugin.experiments.running.runner import run
from rkd_plugin.experiments.running.steps import steps_of
from rkd_plugin.experiments.tables import suite as suites
from tests.adapters.test_torchdistill import build_as_the_example_scripts_do, train_as_the_example_scripts_do
from tests.components.test_few_shot_data import SIZES, write_mini, write_omniglot

SMALL = [
    "recipe.published=False", "recipe.way=3", "recipe.query=2", "recipe.episodes=3", "recipe.num_epochs=2",
    "recipe.halve_after=1", "recipe.test_tasks=[[3, 1], [2, 2]]", "recipe.test_queries=2", "recipe.test_episodes=20",
]  # fmt: skip
# A row's method, and what it sets.
METHODS = {
    "teacher": ("prototypical", []),
    "rkd_d": ("rkd", ["recipe.distance_weight=50", "recipe.angle_weight=0"]),
    "rkd_a": ("rkd", ["recipe.distance_weight=0", "recipe.angle_weight=100"]),
    "rkd_da": ("rkd", []),
    "fitnet": ("fitnet", []),
    "attention": ("attention", []),
}
ROWS = {"omniglot": [*METHODS][:4], "mini_imagenet": [*METHODS]}
# One of each kind of loss; the others are in the slow tier.
IN_BOTH_LOOPS = [
    ("omniglot", "teacher"),
    ("omniglot", "rkd_da"),
    ("mini_imagenet", "fitnet"),
    ("mini_imagenet", "attention"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few_shot")
    write_omniglot(folder / "data" / "omniglot", drawings=5)
    write_mini(folder / "data" / "mini_imagenet", "by class", images=4, sizes=dict.fromkeys(SIZES, 3))
    return folder


@pytest.fixture
def recipe(root, monkeypatch):
    """name -> a small version of a recipe; its teacher, if it has one, was trained."""
    monkeypatch.chdir(root)

    def small(data, row, *overrides):
        if row != "teacher":
            run(small(data, "teacher"), root / "runs" / data / "teacher")
        method, changes = METHODS[row]
        return read(f"few_shot/{data}/{method}", [*SMALL, *changes, *overrides])

    return small


def test_a_module_path_inside_an_episodes_loss_is_checked():
    inner = "train.criterion.kwargs.sub_terms.rkd.criterion.kwargs.criterion.kwargs.teacher_module_path"
    with pytest.raises(RecipeError) as raised:
        read("few_shot/omniglot/rkd", [f"{inner}=encoder"]).validate()
    problem = "the output of 'encoder' is not kept; list it in train.teacher.forward_hook.output"
    assert raised.value.problems == [(inner, problem)]


@pytest.mark.parametrize(
    ("data", "row"),
    [
        pytest.param(data, row, marks=[pytest.mark.slow] * ((data, row) not in IN_BOTH_LOOPS))
        for data, rows in ROWS.items()
        for row in rows
    ],
)
def test_the_losses_are_those_of_torchdistills_loop(recipe, root, tmp_path, data, row):
    small = recipe(data, row, "recipe.channels_last=False")  # which rounds in another order
    result = run(small, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(small.resolved())
    student, teacher, box = build_as_the_example_scripts_do(tmp_path / "recipe.yaml", seed=0)
    before = {key: value.clone() for key, value in (teacher or student).state_dict().items()}
    losses = train_as_the_example_scripts_do(box)
    assert [sum(losses[:3]) / 3, sum(losses[3:]) / 3] == [epoch["loss"] for epoch in result["history"]]
    assert [epoch["lr"] for epoch in result["history"]] == [1e-3, 5e-4]
    moved = any(not torch.equal(value, before[key]) for key, value in (teacher or student).state_dict().items())
    assert moved == (teacher is None)


def by_the_paper(row, student, teacher, labels, rows, maps):
    """The sum of a row of Tables 5 and 6, from its terms."""
    task = PrototypicalLoss(1)({".": {"output": student}}, {}, labels)
    relations = {"rkd_d": (50.0, 0.0), "rkd_a": (0.0, 100.0), "rkd_da": (25.0, 50.0)}
    if row in relations:
        near, angles = relations[row]
        s, t = student[rows], teacher[rows]
        return task + near * rkd_distance_loss(s, t) + angles * rkd_angle_loss(s, t)
    if row == "fitnet":
        return task + mse_loss(student, teacher)
    places = {"student": {"io": "output", "path": "block4"}, "teacher": {"io": "output", "path": "block4"}}
    hooked = [{"block4": {"output": side}} for side in maps]
    return task + 10.0 * ATLoss({"block4": places}, mode="code")(*hooked)


@pytest.mark.parametrize(
    ("data", "row", "part"),
    [
        *((data, row, "all") for data, rows in ROWS.items() for row in rows[1:]),
        *(("omniglot", "rkd_da", part) for part in ("support", "query")),
        *(("mini_imagenet", row, "query") for row in ("rkd_d", "fitnet", "attention")),
    ],
)
def test_the_loss_is_the_papers(recipe, data, row, part):
    if row in ("fitnet", "attention") and part != "all":
        with pytest.raises(RecipeError, match=r"recipe.rkd_on"):
            recipe(data, row, f"recipe.rkd_on={part}").validate()
        return
    experiment = Experiment(recipe(data, row, *([f"recipe.rkd_on={part}"] if row.startswith("rkd") else [])))
    box = experiment.box()
    box.pre_epoch_process(epoch=0)
    experiment.seed(1)
    images, labels, _ = next(iter(box.train_data_loader))
    rows = [3 * start + place for start in range(3) for place in {"support": [0], "query": [1, 2]}.get(part, range(3))]
    networks = box.student_model.train(), box.teacher_model.eval()
    maps = [network.block4(network.block3(network.block2(network.block1(images)))) for network in networks]
    student, teacher = (side.flatten(1) for side in maps)
    expected = by_the_paper(row, student, teacher.detach(), labels, rows, maps)
    assert len(images) == 9
    experiment.seed(1)
    first = next(iter(steps_of(experiment, box)))
    assert first == pytest.approx(expected.item(), rel=1e-4)


def test_a_run_ends_as_one_that_was_stopped(recipe, tmp_path):
    whole = run(recipe("omniglot", "rkd_da"), tmp_path / "whole")
    box = Experiment.box

    def stopping(self):
        built = box(self)
        built.num_epochs = 1
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "box", stopping)
        run(recipe("omniglot", "rkd_da"), tmp_path / "stopped")
    (tmp_path / "stopped" / "result.json").unlink()
    resumed = run(recipe("omniglot", "rkd_da"), tmp_path / "stopped")
    assert [epoch["loss"] for epoch in resumed["history"]] == [epoch["loss"] for epoch in whole["history"]]
    assert resumed["final"] == whole["final"]


def test_metrics_are_those_of_the_test_episodes(recipe, tmp_path):
    result = run(recipe("omniglot", "teacher"), tmp_path)
    evaluation = evaluate(recipe_of_run(tmp_path), tmp_path / "last.pt")
    options = {"test_tasks": [[3, 1], [2, 2]], "test_queries": 2, "test_episodes": 20}
    accuracies = episode_accuracies(evaluation.outputs, evaluation.labels, 0, **options)
    assert list(result["final"]) == ["3way_1shot", "3way_1shot_ci95", "2way_2shot", "2way_2shot_ci95"]
    for task, values in accuracies.items():
        assert result["final"][task] == evaluation.metrics[task] == pytest.approx(values.mean().item())
        half = 1.96 * values.std().item() / 20**0.5
        assert result["final"][f"{task}_ci95"] == pytest.approx(half)


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 6), (3, 8), ("null", 8)])
def test_early_stopping_goes_by_the_first_metric(recipe, tmp_path, monkeypatch, patience, epochs):
    values = iter([50.0, 60.0, 60.0, 61.0, 60.0, 59.0, 70.0, 10.0])
    monkeypatch.setattr(Experiment, "measure", lambda *_: {"first": next(values), "second": 1.0})
    small = recipe("omniglot", "teacher", "recipe.num_epochs=8", "recipe.episodes=1", f"recipe.patience={patience}")
    result = run(small, tmp_path)
    assert len(result["history"]) == epochs
    (tmp_path / "result.json").unlink()
    assert len(run(small, tmp_path)["history"]) == epochs  # it has ended


@pytest.mark.parametrize("changed", ["recipe.test_queries=5", "recipe.test_tasks=[[30, 1]]"])
def test_a_split_too_small_for_its_episodes_is_known_before_anything_is_trained(recipe, tmp_path, changed):
    with pytest.raises(ValueError, match=r"few_shot: expected .* classes or more with"):
        run(recipe("omniglot", "teacher", changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tasks", "problem"), [("[[5]]", "0: expected a pair of way and shot, got 1 numbers"), ("[5]", "0: ")]
)
def test_a_task_that_is_no_pair_is_a_problem_of_the_recipe(recipe, tasks, problem):
    with pytest.raises(RecipeError, match=f"recipe.test_tasks.{problem}"):
        recipe("omniglot", "teacher", f"recipe.test_tasks={tasks}").validate()


SEARCH = ["recipe.train_split=train", "recipe.val_split=val", "recipe.patience=1", "recipe.num_epochs=4"]
SHORT = [override for override in SMALL if "num_epochs" not in override]
SUITE = {
    "title": "A small table",
    "metrics": {"3way_1shot": "3-way 1-shot (%)", "2way_2shot": "2-way 2-shot (%)"},
    "decimals": 2,
    "seeds": [1, 2],
    "fast": {"label": "one epoch", "overrides": ["recipe.num_epochs=1"]},
    "rows": [
        {
            "name": "search",
            "label": "Search",
            "recipe": "few_shot/omniglot/prototypical",
            "overrides": [*SHORT, *SEARCH],
        },
        {
            "name": "teacher",
            "label": "Teacher",
            "recipe": "few_shot/omniglot/prototypical",
            "overrides": SHORT,
            "epochs_of": "search",
            "metrics": ["3way_1shot"],
            "paper": {"3way_1shot": 98.55},
            "others": {"Snell et al.": {"3way_1shot": 98.8}},
        },
        {
            "name": "long",
            "label": "Teacher, longer",
            "recipe": "few_shot/omniglot/prototypical",
            "overrides": SHORT,
            "epochs_of": "search",
            "times": 2,
            "fast": ["recipe.num_epochs=2"],
            "against": ["teacher"],
            "metrics": ["3way_1shot"],
        },
        {
            "name": "rkd_d",
            "label": "RKD-D",
            "recipe": "few_shot/omniglot/rkd",
            "teacher": "teacher",
            "overrides": [*SHORT, *METHODS["rkd_d"][1]],
            "epochs_of": "search",
            "against": ["teacher", "long"],
        },
    ],
}


@pytest.fixture
def small_suite(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    # Two epochs of the search are better than one or three, whatever the weights.
    measure = Experiment.measure
    values = {1: 10.0, 2: 20.0, 3: 5.0}
    seen = []

    def scripted(self, *rest):
        metrics = measure(self, *rest)
        if self.settings["val_split"] == "val":
            seen.append(None)
            metrics["3way_1shot"] = values[(len(seen) - 1) % 3 + 1]
        return metrics

    monkeypatch.setattr(Experiment, "measure", scripted)

    def written(**changes):
        path = tmp_path / "small.yaml"
        path.write_text(json.dumps({"suite": {**SUITE, **changes}}))
        return str(path)

    return written


def epochs_of(folder, row, seed):
    return len(json.loads((folder / f"{row}-seed{seed}" / "result.json").read_text())["history"])


def test_the_schedule_comes_from_early_stopping_on_validation_classes(small_suite, tmp_path):
    folder, table = suites.reproduce(small_suite(), tmp_path / "out")
    for seed in (1, 2):
        assert [epochs_of(folder, row, seed) for row in ("search", "teacher", "long", "rkd_d")] == [3, 2, 4, 2]
        assert recipe_of_run(folder / f"search-seed{seed}").settings["train_split"] == "train"
        assert recipe_of_run(folder / f"teacher-seed{seed}").settings["train_split"] == "trainval"
    head = next(line for line in table.splitlines() if line.startswith("|"))
    for column in ("Snell et al.", "paper", "± 95 % of episodes", "over Teacher", "over Teacher, longer"):
        assert f"| {column} |" in head
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert sum(line.startswith("| Teacher |") for line in lines) == 1
    assert "| Teacher | 3-way 1-shot (%) | 98.80 | 98.55 |" in table
    assert sum(line.startswith("| RKD-D |") for line in lines) == 2
    assert suites.reproduce(small_suite(), tmp_path / "out")[1] == table  # all files exist


def test_differences_are_paired_by_episode(small_suite, tmp_path):
    folder, table = suites.reproduce(small_suite(), tmp_path / "out", seeds=[1], rows=["rkd_d"])
    accuracies = {}
    for row in ("teacher", "rkd_d"):
        evaluation = evaluate(recipe_of_run(folder / f"{row}-seed1"), folder / f"{row}-seed1" / "last.pt")
        options = {"test_tasks": [[3, 1], [2, 2]], "test_queries": 2, "test_episodes": 20}
        accuracies[row] = episode_accuracies(evaluation.outputs, evaluation.labels, 1, **options)
    results = json.loads((folder / "small.json").read_text())
    row = next(row for row in results["rows"] if row["name"] == "rkd_d")
    for task in ("3way_1shot", "2way_2shot"):
        difference = accuracies["rkd_d"][task] - accuracies["teacher"][task]
        found = row["against"]["teacher"][task]
        assert found["mean"] == pytest.approx(difference.mean().item(), abs=1e-9)
        assert found["ci95"] == pytest.approx(1.96 * difference.std().item() / 20**0.5)
        assert f"| {found['mean']:+.2f} ± {found['ci95']:.2f} |" in table


def test_only_test_episodes_can_be_paired(small_suite, tmp_path):
    row = {"label": "A row", "recipe": "quickstart/student"}
    rows = [{**row, "name": "one"}, {**row, "name": "two", "against": ["one"]}]
    with pytest.raises(RecipeError, match=r"two.against: expected a few_shot recipe, .*, got metric_learning"):
        suites.reproduce(small_suite(rows=rows, metrics={"recall_at_1": "R"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_seeds_halve_the_interval_as_their_episodes_differ():
    results = [{"against": {"teacher": {"t": [mean, half]}}, "final": {"t": 1.0}} for mean, half in ((1, 3), (2, 4))]
    row = {"name": "r", "label": "R", "against": ["teacher"], "trained": False}
    results = [{**result, "best": result["final"]} for result in results]
    assert suites._summary(row, results, ["t"])["against"] == {"teacher": {"t": {"mean": 1.5, "ci95": 2.5}}}


def test_a_fast_schedule_needs_no_search(small_suite, tmp_path):
    folder, _ = suites.reproduce(small_suite(), tmp_path / "out", seeds=[1], fast=True)
    assert not (folder / "search-seed1").exists()
    assert [epochs_of(folder, row, 1) for row in ("teacher", "long", "rkd_d")] == [1, 2, 1]
    with pytest.raises(RecipeError, match="the suite has no row 'search'"):
        suites.reproduce(small_suite(), tmp_path / "out", rows=["search"], fast=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"epochs_of": "later"}, "epochs_of: expected the name of a row above, got 'later'"),
        ({"against": ["teacher"]}, "against.0: expected the name of a row above, got 'teacher'"),
        ({"others": {"S": {"4way_1shot": 1.0}}}, "others.S.4way_1shot: expected one of 3way_1shot, 2way_2shot"),
        ({"metrics": ["4way_1shot"]}, "metrics.0: expected one of 3way_1shot, 2way_2shot"),
        ({"times": 0}, "times: "),
    ],
)
def test_what_a_row_cannot_refer_to(small_suite, changes, problem):
    first = {**SUITE["rows"][0], "name": "first", "overrides": []}
    rows = [first, {**SUITE["rows"][1], "overrides": [], "epochs_of": "first", **changes}]
    with pytest.raises(RecipeError, match=f"suite.rows.1.{problem}"):
        read_suite(small_suite(rows=rows))


@pytest.mark.parametrize(
    ("data", "row"), [("omniglot", "rkd_da"), pytest.param("mini_imagenet", "attention", marks=pytest.mark.slow)]
)
def test_a_resnet12_teaches_the_small_network(recipe, root, tmp_path, data, row):
    shorter = ["recipe.num_epochs=1", "recipe.episodes=1"]
    teacher = run(recipe(data, "teacher", "recipe.network=resnet12", *shorter), tmp_path / "teacher")
    taught = f"recipe.teacher_checkpoint={tmp_path / 'teacher' / 'last.pt'}"
    result = run(recipe(data, row, "recipe.teacher_network=resnet12", taught, *shorter), tmp_path / "student")
    assert teacher["parameters"] > 12e6
    assert result["parameters"] < 0.2e6
    assert torch.isfinite(torch.tensor(result["history"][0]["loss"]))
