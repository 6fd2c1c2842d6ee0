"""`rkd balance`: the gradients of loss terms, and weights that equalise them."""

import re

import pytest
import torch

from rkd_plugin import rkd_angle_loss, rkd_distance_loss
from rkd_plugin.cli import main
from rkd_plugin.experiments.recipe import read
from rkd_plugin.experiments.running import runner
from rkd_plugin.experiments.running.balance import balance
from rkd_plugin.experiments.running.experiment import Experiment
from tests.experiments.test_classification_eval import write_cifar

TERMS = "train.criterion.kwargs.sub_terms"
SHORT = ["recipe.num_epochs=1", "recipe.samples_per_epoch=256", "recipe.batch_size=32"]


def rows_of(printed):
    """Name of a weight -> its value, its gradient, the ratio and the value for equal gradients."""
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines() if "weight" in line and "+-" in line]
    return {name: [float(cell.split()[0]) for cell in numbers] for name, *numbers in cells}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Overrides of a quickstart recipe, with a teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    runner.run(read("quickstart/teacher", SHORT), folder)
    return [*SHORT, f"recipe.teacher_checkpoint={folder / 'last.pt'}"]


@pytest.fixture
def two_terms(tmp_path):
    """`quickstart/student`, which learns from a triplet loss, with the terms of `quickstart/rkd_da` as well."""
    text = read("quickstart/rkd_da").path.read_text()
    student = read("quickstart/student").path.read_text()
    triplet = re.search(r"( +)triplet:\n(?:\1 .*\n)*", student).group()
    path = tmp_path / "both.yaml"
    path.write_text(text.replace("        rkd:\n", f"{triplet}        rkd:\n"))
    return str(path)


def test_the_gradients_are_those_of_the_terms(taught):
    """Computed again for the first batch, with the functions."""
    recipe = read("quickstart/rkd_da", taught)
    rows = rows_of(balance(recipe, 1))
    experiment = Experiment(recipe)
    box = experiment.box()
    box.pre_epoch_process(epoch=0)
    experiment.seed(1)
    images, *_ = next(iter(box.train_data_loader))
    student = experiment.student(images)
    teacher = box.teacher_model.eval()(images)
    for name, loss, weight in (("distance", rkd_distance_loss, 1.0), ("angle", rkd_angle_loss, 2.0)):
        (gradient,) = torch.autograd.grad(loss(student, teacher), student, retain_graph=True)
        assert rows[f"rkd.{name}_weight"][0] == weight
        assert rows[f"rkd.{name}_weight"][1] == pytest.approx(weight * float(gradient.norm()), rel=5e-3)  # as printed


def test_the_printed_weights_equalise_the_gradients(taught, two_terms):
    rows = rows_of(balance(read(two_terms, taught), 3))
    assert list(rows) == ["triplet.weight", "rkd.distance_weight", "rkd.angle_weight"]
    ratios = [ratio for _, _, ratio, _ in rows.values()]
    assert max(ratios) > 1.5 * min(ratios)  # otherwise there is nothing to equalise
    inner = f"{TERMS}.rkd.criterion.kwargs"
    overrides = [
        f"{inner}.{name.removeprefix('rkd.')}={equal}" for name, (*_, equal) in rows.items() if name.startswith("rkd")
    ]
    equal = rows_of(balance(read(two_terms, [*taught, *overrides]), 3))
    assert all(ratio == pytest.approx(1, rel=1e-2) for _, _, ratio, _ in equal.values())
    # The weight of the whole term is a factor of both parts.
    halved = rows_of(balance(read(two_terms, [*taught, *overrides, f"{TERMS}.rkd.weight=0.5"]), 3))
    assert [ratio for _, _, ratio, _ in halved.values()] == pytest.approx([1, 0.5, 0.5], rel=1e-2)
    assert halved["rkd.angle_weight"][3] == pytest.approx(2 * equal["rkd.angle_weight"][3], rel=1e-2)


def test_a_term_that_is_switched_off_gets_a_weight(taught, two_terms):
    off = f"{TERMS}.rkd.criterion.kwargs.angle_weight=0"
    before, after = (rows_of(balance(read(two_terms, [*taught, *more]), 2)) for more in ([], [off]))
    assert after["rkd.angle_weight"][:3] == [0, 0, 0]
    assert after["rkd.angle_weight"][3] == pytest.approx(before["rkd.angle_weight"][3], rel=1e-2)


def test_a_recipe_of_classification(tmp_path, monkeypatch, capsys):
    """All terms depend on the last block: cross-entropy, attention maps and relations."""
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "data" / "cifar100", [index % 100 for index in range(130)], range(100))
    overrides = [
        *("recipe.batch_size=32", "recipe.published=False", "models.teacher_model.src_ckpt=null"),
        *("recipe.distance_weight=25", "recipe.angle_weight=50", "recipe.teacher_network=resnet8"),
    ]
    before = sorted(tmp_path.rglob("*"))
    assert main(["balance", "classification/small_cifar100/attention", *overrides, "--batches", "2"]) == 0
    printed = capsys.readouterr().out
    assert list(rows_of(printed)) == [
        "cross_entropy.weight", "attention.weight", "rkd.distance_weight", "rkd.angle_weight",
    ]  # fmt: skip
    assert printed.endswith("with respect to the output of 'backbone.layer3', mean and deviation of 2 batches\n")
    assert sorted(tmp_path.rglob("*")) == before
    command = ["balance", "classification/small_cifar100/attention", *overrides, "--at"]
    assert main([*command, "backbone.layer1"]) == 0
    assert "the output of 'backbone.layer1', mean" in capsys.readouterr().out
    assert main([*command, "backbone"]) == 1  # the maps come before it
    assert re.search(
        r"expected 'backbone' on which all terms depend, got only .*attention\.weight: backbone\.layer1,",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    ("name", "overrides", "count", "message"),
    [
        ("rkd_da", [], 0, "balance: expected 1 batch or more, got 0; set --batches"),
        ("rkd_d", [], 1, r"two terms or more with a gradient, got rkd\.weight; a recipe has them under train\.crit"),
        ("rkd_da", [f"{TERMS}.rkd.weight=0"], 1, "expected a weight and a gradient other than 0, got none; set a weig"),
        ("rkd_da", ["recipe.batch_size=512"], 1, "has no batch of 512"),
    ],
)
def test_what_cannot_be_balanced(name, overrides, count, message, taught):
    with pytest.raises(ValueError, match=message):
        balance(read(f"quickstart/{name}", [*taught, *overrides]), count)


def test_gradients_that_are_not_finite_name_the_term(taught, monkeypatch):
    from rkd_plugin.components.datasets import Digits

    get = Digits.__getitem__
    monkeypatch.setattr(Digits, "__getitem__", lambda self, index: (get(self, index)[0] * torch.inf, 0))
    with pytest.raises(FloatingPointError, match=r"balance: the gradient of rkd\.distance_weight is nan; check"):
        balance(read("quickstart/rkd_da", taught), 1)
