"""The recipes of image classification: the same in torchdistill's own script, and the paper's losses and settings."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.losses.registry import get_high_level_loss

from rkd_plugin import rkd_angle_loss, rkd_distance_loss
from rkd_plugin.components import baselines  # noqa: F401  registers what the recipes name
from rkd_plugin.components.datasets import CIFAR100
from rkd_plugin.components.models import ImageClassifier
from rkd_plugin.experiments.recipe import read, read_suite
from rkd_plugin.experiments.running.metrics import EVALUATORS
from rkd_plugin.experiments.running.runner import run
from tests.adapters.test_torchdistill import (
    build_as_the_example_scripts_do,
    learning_rate_falls_after,
    train_as_the_example_scripts_do,
)
from tests.experiments.test_classification_eval import write_cifar

WITH_RKD = ["recipe.distance_weight=25", "recipe.angle_weight=50"]
ROWS = [
    "teacher", "baseline", "rkd_d", "rkd_a", "rkd_da", "hkd", "hkd_rkd_da", "fitnet", "fitnet_rkd_da", "attention",
    "attention_rkd_da",
]  # fmt: skip


def small(row, *more):
    """A row of the suite of small networks, as `rkd reproduce` reads it."""
    suite = read_suite("classification/small_cifar100")
    found = next(found for found in suite["rows"] if found["name"] == f"small_cifar100_{row}")
    teacher = ["recipe.teacher_checkpoint=runs/small_cifar100/teacher/last.pt"] if "teacher" in found else []
    # A switch of `rkd run`, which rounds in another order.
    switched_off = ["recipe.channels_last=False"]
    return read(found["recipe"], [*suite["overrides"], *found["overrides"], *teacher, *switched_off, *more])


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A folder to work in, with CIFAR-100 where the recipes look for it: one batch to train, one to test."""
    root = tmp_path_factory.mktemp("cifar")
    write_cifar(root / "data" / "cifar100", [index % 100 for index in range(130)], range(100))
    return root


@pytest.fixture
def published(cifar, monkeypatch):
    """The recipes take published data only: these files have to pass for the published ones."""
    folder = cifar / "data" / "cifar100" / "cifar-100-python"
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
    monkeypatch.chdir(cifar)
    run(small("teacher"), cifar / "runs/small_cifar100/teacher")
    return cifar


@torch.no_grad()
def accuracies(student, loader):
    """Of a whole test set, as torchdistill's script adds them up by batches."""
    student.eval()
    outputs, labels = zip(*((student(images), labels) for images, labels, *_ in loader), strict=True)
    return top_1_and_5(torch.cat(outputs), torch.cat(labels))


def top_1_and_5(scores, labels):
    places = scores.topk(5).indices == labels[:, None]
    return {"top1": 100 * places[:, 0].double().mean().item(), "top5": 100 * places.any(1).double().mean().item()}


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] * (row != "fitnet_rkd_da")) for row in ROWS]
)
def test_a_recipe_in_torchdistills_script_gives_the_numbers_of_rkd_run(published, tmp_path, row):
    recipe = small(row)
    result = run(recipe, published / "runs" / "small_cifar100" / row)
    (tmp_path / "recipe.yaml").write_text(recipe.resolved())
    student, teacher, box = build_as_the_example_scripts_do(tmp_path / "recipe.yaml", seed=0)
    before = {key: value.clone() for key, value in (teacher or student).state_dict().items()}
    history = []
    losses = train_as_the_example_scripts_do(box, lambda: history.append(accuracies(student, box.val_data_loader)))
    assert losses == [epoch["loss"] for epoch in result["history"]]  # one step an epoch
    assert history == [
        pytest.approx({key: epoch[key] for key in ("top1", "top5")}, abs=1e-9) for epoch in result["history"]
    ]
    moved = any(not torch.equal(value, before[key]) for key, value in (teacher or student).state_dict().items())
    assert moved == (teacher is None)


SMALLER = ["recipe.num_epochs=1", "recipe.batch_size=65", "recipe.num_workers=0"]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("cifar100/fitnet", 4, marks=pytest.mark.slow),
        pytest.param("cifar100/attention", 2, marks=pytest.mark.slow),
        pytest.param("crd_benchmark/kd", 2, marks=pytest.mark.slow),
        ("crd_benchmark/rkd", 2),
    ],
)
def test_the_papers_networks_train_in_torchdistills_script(published, name, steps, tmp_path):
    """For two steps of each stage: every hooked module is there, and the shapes of hints and maps fit."""
    kwargs = read(f"classification/{name}").section("models")["teacher_model"]["kwargs"]
    torch.save({"model": ImageClassifier(**kwargs).state_dict()}, tmp_path / "teacher.pt")
    changes = [*SMALLER, f"recipe.teacher_checkpoint={tmp_path / 'teacher.pt'}"]
    changes += WITH_RKD if name.startswith("cifar100") else []
    changes += ["recipe.hint_epochs=1"] if name.endswith("fitnet") else []
    (tmp_path / "recipe.yaml").write_text(read(f"classification/{name}", changes).resolved())
    _, _, box = build_as_the_example_scripts_do(tmp_path / "recipe.yaml", seed=0)
    losses = train_as_the_example_scripts_do(box)
    assert len(losses) == steps
    assert all(np.isfinite(losses))


def test_compiled_models_are_seen_by_the_hooks_of_every_stage(published, monkeypatch):
    """Traced as for a compiler, which is left out: it would take a minute."""
    plain = published / "runs" / "small_cifar100" / "fitnet_rkd_da"
    compiled = []

    def traced(module, **options):
        compiled.append(type(module).__name__)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    expected = run(small("fitnet_rkd_da"), plain)
    assert compiled == []
    result = run(small("fitnet_rkd_da", "recipe.compile=True"), plain.with_name("compiled"))
    assert compiled == ["ImageClassifier"] * 2
    assert [epoch["loss"] for epoch in result["history"]] == pytest.approx(
        [epoch["loss"] for epoch in expected["history"]], rel=1e-4
    )


# The paper's sums, by hand


def criterion(name, *overrides):
    load_yaml_file("/dev/null")  # registers torchdistill's tags
    return get_high_level_loss(read(name, overrides).section("train")["criterion"])


def vectors(paths):
    return {path: {"output": torch.randn(12, width, dtype=torch.float64)} for path, width in paths.items()}


@pytest.mark.parametrize("data", ["cifar100", "tiny_imagenet"])
@pytest.mark.parametrize("l2_normalize", [True, False])
def test_hkd_with_rkd_da_is_the_papers_sum(data, l2_normalize):
    """Cross-entropy, 16 times the divergence at temperature 4 (16 is its square), 25 RKD-D, 50 RKD-A."""
    student, teacher = vectors({".": 100, "backbone": 32}), vectors({".": 100, "backbone": 64})
    labels = torch.randint(100, (12,))
    overrides = [*WITH_RKD, f"recipe.l2_normalize_features={l2_normalize}"]
    loss = criterion(f"classification/{data}/hkd", *overrides)({"student": student, "teacher": teacher}, {}, labels)
    (scores, features), (soft, taught) = (
        (side["."]["output"], side["backbone"]["output"]) for side in (student, teacher)
    )
    if l2_normalize:
        features, taught = normalize(features), normalize(taught)
    p, log_q = (soft / 4).softmax(1), (scores / 4).log_softmax(1)
    divergence = (p * (p.log() - log_q)).sum(1).mean()
    relations = 25 * rkd_distance_loss(features, taught) + 50 * rkd_angle_loss(features, taught)
    torch.testing.assert_close(loss, cross_entropy(scores, labels) + 16 * divergence + relations, rtol=1e-6, atol=0)


def test_kd_of_the_benchmark_is_repdistillers_sum():
    student, teacher, labels = vectors({".": 100}), vectors({".": 100}), torch.randint(100, (12,))
    loss = criterion("classification/crd_benchmark/kd")({"student": student, "teacher": teacher}, {}, labels)
    scores = student["."]["output"]
    p, log_q = (teacher["."]["output"] / 4).softmax(1), (scores / 4).log_softmax(1)
    expected = 0.1 * cross_entropy(scores, labels) + 0.9 * 16 * (p * (p.log() - log_q)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_attention_with_rkd_da_is_the_papers_sum():
    paths = [f"backbone.layer{block}" for block in (2, 3, 4)]
    student, teacher = vectors({".": 200, "backbone": 32}), vectors({".": 200, "backbone": 64})
    maps = {path: [torch.randn(12, 5, 4, 4, dtype=torch.float64) for _ in "st"] for path in paths}
    for side, io_dict in enumerate((student, teacher)):
        io_dict.update({path: {"output": both[side]} for path, both in maps.items()})
    labels = torch.randint(200, (12,))
    io_dict = {"student": student, "teacher": teacher}
    loss = criterion("classification/tiny_imagenet/attention", *WITH_RKD)(io_dict, {}, labels)
    attention = [normalize(x.square().mean(1).flatten(1)) for both in maps.values() for x in both]
    transfer = sum((s - t).square().mean() for s, t in zip(attention[::2], attention[1::2], strict=True))
    features = [normalize(side["backbone"]["output"]) for side in (student, teacher)]
    relations = 25 * rkd_distance_loss(*features) + 50 * rkd_angle_loss(*features)
    expected = cross_entropy(student["."]["output"], labels) + 50 * transfer + relations
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


# The paper's settings

SCHEDULES = {
    "cifar100": ("resnet50", "vgg11_bn", 200, [60, 120, 160], 0.1, 128, 0.2, 5e-4),
    "tiny_imagenet": ("resnet101", "resnet18", 300, [60, 120, 160, 200, 250], 0.1, 128, 0.2, 0.0),
    "crd_benchmark": ("wrn_40_2", "wrn_16_2", 240, [150, 180, 210], 0.05, 64, 0.1, 5e-4),
}


@pytest.mark.parametrize("data", SCHEDULES)
def test_schedules_are_the_published_ones(data):
    if data == "crd_benchmark":
        recipes = [read(f"classification/crd_benchmark/{method}") for method in ("kd", "rkd")]
    else:
        rows = read_suite(f"classification/table4_{data}")["rows"]
        recipes = [read(row["recipe"], row["overrides"]) for row in rows if "teacher" in row]
        assert len(recipes) == len(ROWS) - 2
    for recipe in recipes:
        train, settings = recipe.section("train"), recipe.settings
        last = train.get("stage2", train)
        optimizer, scheduler = last["optimizer"]["kwargs"], last["scheduler"]["kwargs"]
        assert SCHEDULES[data] == (
            settings["teacher_network"], settings["network"], last["num_epochs"], learning_rate_falls_after(scheduler),
            optimizer["lr"], settings["batch_size"], scheduler["gamma"], optimizer["weight_decay"],
        )  # fmt: skip
        assert optimizer["momentum"] == 0.9


def test_tables_have_every_published_number():
    for data, teacher, best in (("cifar100", 77.76, 74.66), ("tiny_imagenet", 61.55, 58.15)):
        rows = {row["name"]: row for row in read_suite(f"classification/table4_{data}")["rows"]}
        assert list(rows) == [f"{data}_{row}" for row in ROWS]
        numbers = {name: row["paper"]["top1"] for name, row in rows.items() if "paper" in row}
        assert rows.keys() - numbers.keys() == {f"{data}_rkd_a"}
        assert numbers.pop(f"{data}_teacher") == teacher
        assert max(numbers, key=numbers.get) == f"{data}_hkd_rkd_da"
        assert max(numbers.values()) == best


# Sums of the published columns, where a digit that was copied wrongly shows; alone are 6 teachers and 9 students.
KINDS = {"alone": 1090.88, "kd": 941.06, "rkd": 917.78}


def test_the_benchmark_has_its_13_pairs():
    rows = {row["name"]: row for row in read_suite("classification/crd_benchmark")["rows"]}
    kinds = [Path(row["recipe"]).stem for row in rows.values()]
    assert [kinds.count(kind) for kind in ("alone", "kd", "rkd")] == [15, 13, 13]
    for row in rows.values():
        recipe = read(row["recipe"], row["overrides"])
        low = recipe.settings["network"].startswith(("small_mobilenet", "small_shufflenet"))
        assert recipe.settings["learning_rate"] == (0.01 if low else 0.05)
        if "teacher" in row:
            taught_by = read(rows[row["teacher"]]["recipe"], rows[row["teacher"]]["overrides"])
            models = recipe.section("models"), taught_by.section("models")
            assert models[0]["teacher_model"]["kwargs"] == models[1]["model"]["kwargs"]
    numbers = [row["paper"]["top1"] for row in rows.values()]
    sums = {each: sum(top1 for top1, kind in zip(numbers, kinds, strict=True) if kind == each) for each in KINDS}
    assert {kind: round(value, 2) for kind, value in sums.items()} == KINDS


def test_top_1_and_top_5_are_those_of_the_script():
    scores, labels = torch.randn(200, 10), torch.randint(10, (200,))
    assert EVALUATORS["classification"](scores, labels) == pytest.approx(top_1_and_5(scores, labels))
