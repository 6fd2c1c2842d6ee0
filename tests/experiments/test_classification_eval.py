"""`rkd eval` of image classification, and the messages about wrong checkpoints and labels."""

import pickle

import numpy as np
import pytest
import torch
import torchvision  # noqa: F401  before torchdistill
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import normalize

from rkd_plugin.cli import main
from rkd_plugin.experiments.recipe import read
from rkd_plugin.experiments.running.checkpoints import read_checkpoint, write_checkpoint
from rkd_plugin.experiments.running.evaluation import evaluate
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.experiments.running.features import compared
from rkd_plugin.experiments.running.metrics import classification
from rkd_plugin.experiments.running.run_folder import recipe_of_run
from rkd_plugin.experiments.running.weights import load_weights
from rkd_plugin.experiments.tables import report

TEACHER, STUDENT = "classification/cifar100/alone", "classification/cifar100/rkd"
NAMES = [f"kind_{label}" for label in range(100)]


def write_cifar(root, train=range(64), test=range(64)):
    """Files of CIFAR-100 with one image per label, whose colours depend on the label."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name, labels in (("train", train), ("test", test)):
        labels = [*labels]
        shades = np.array(labels)[:, None] * 2 + noise.integers(0, 40, (len(labels), 3072))
        content = {"data": shades.astype(np.uint8), "fine_labels": labels}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES}))
    return root


def overrides(root, *more, network="resnet8"):
    return [
        f"recipe.data_root={root}", "recipe.published=False", "recipe.num_epochs=1", "recipe.batch_size=16",
        f"recipe.network={network}", "recipe.channels_last=True", "recipe.num_workers=0", *more,
    ]  # fmt: skip


def with_teacher(teacher):
    network = ["recipe.teacher_network=resnet14", "recipe.teacher_small_images=False"]
    return [*network, f"recipe.teacher_checkpoint={teacher}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with ``data``, and the runs ``teacher`` and ``student``."""
    root = tmp_path_factory.mktemp("classification")
    write_cifar(root / "data")
    assert main(["run", TEACHER, *overrides(root / "data", network="resnet14"), "--out", str(root / "teacher")]) == 0
    student = overrides(root / "data", *with_teacher(root / "teacher" / "last.pt"))
    assert main(["run", STUDENT, *student, "--out", str(root / "student")]) == 0
    return root


def error_of(capsys, *arguments):
    """The message of a command that fails: one sentence in one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    # Progress bars also write to stderr, and end with a carriage return.
    line = error.rpartition("\r")[2].strip()
    assert line.startswith(f"rkd {arguments[0]}: ")
    assert "\n" not in line
    return line.removeprefix(f"rkd {arguments[0]}: ")


def test_eval_prints_what_the_run_ended_with(runs, capsys):
    assert main(["eval", str(runs / "student")]) == 0
    measured, *metrics = capsys.readouterr().out.splitlines()
    assert measured == "measured on 64 images of 64 of 100 classes"
    printed = dict(line.split() for line in metrics)
    evaluation = evaluate(recipe_of_run(runs / "student"), runs / "student" / "last.pt")
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(evaluation.metrics, rel=1e-3)
    assert list(printed) == ["top1", "top5"]
    assert evaluation.metrics == classification(evaluation.outputs, evaluation.labels)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("teacher", ["confusion", "embedding_map", "distances"]),
        ("student", ["confusion", "embedding_map", "distances", "relations"]),
    ],
)
def test_pictures(runs, name, expected, tmp_path, capsys):
    assert main(["eval", str(runs / name), "--pictures", "--out", str(tmp_path)]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert printed == [str(tmp_path / f"{picture}.png") for picture in expected]
    assert all((tmp_path / f"{picture}.png").stat().st_size > 10_000 for picture in expected)
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert EventAccumulator(str(events)).Reload().Tags()["images"] == expected


def test_pictures_show_features_and_each_model_sees_the_data_once(runs, tmp_path, monkeypatch):
    seen, drawn = [], {}
    monkeypatch.setattr(
        Experiment,
        "embed",
        lambda self, model, *args, real=Experiment.embed: seen.append(model) or real(self, model, *args),
    )
    monkeypatch.setattr(report.draw, "confusion", lambda *args: drawn.update(confusion=args))
    monkeypatch.setattr(report.draw, "relations", lambda *args: drawn.update(relations=args))
    monkeypatch.setattr(report.draw, "save", lambda figures, *_: list(figures))
    evaluation = evaluate(recipe_of_run(runs / "student"), runs / "student" / "last.pt")
    report.evaluation_pictures(evaluation, tmp_path)
    student, teacher = seen
    images = torch.stack([image for image, _ in evaluation.loader.dataset])
    with torch.no_grad():
        for model, features in zip((student, teacher), drawn["relations"], strict=True):
            # The recipe normalises what it compares.
            expected = normalize(model.eval().backbone(images))
            assert expected.shape == (64, 64)
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    scores, labels, names = drawn["confusion"]
    assert scores.shape == (64, 100)
    assert labels.tolist() == [*range(64)]
    assert names == dict(enumerate(NAMES))


BACKBONE = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 4)})
RESNET = torch.nn.ModuleDict({"layer4": torch.nn.Conv2d(2, 3, 1), "fc": torch.nn.Linear(3, 4)})
RKD = {"key": "RKDDistanceLoss", "kwargs": {"student_module_path": "fc", "student_module_io": "input",
       "teacher_module_path": "layer4", "l2_normalize": True}}  # fmt: skip


def config(*criteria, task="classification"):
    terms = {f"term{n}": {"criterion": criterion, "weight": 1.0} for n, criterion in enumerate(criteria)}
    return {
        "recipe": {"task": task},
        "train": {"criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}}},
    }


def test_which_features_are_shown():
    entropy = {"key": "CrossEntropyLoss", "kwargs": {}}
    assert compared(config(RKD, task="metric_learning"), RESNET, "student") is None
    # The logits, if neither a loss nor a module called backbone gives another layer.
    assert compared(config(entropy), RESNET, "student") is None
    layer = compared(config(entropy), BACKBONE, "student")
    assert (layer.module, layer.io) == (BACKBONE["backbone"], "output")
    assert layer.rows(torch.ones(5, 3, 4, 4)).tolist() == torch.ones(5, 3).tolist()
    # Only the wrapper of training has `fc`.
    assert compared(config(entropy, RKD), BACKBONE, "student").module is BACKBONE["backbone"]
    student, teacher = (compared(config(entropy, RKD), RESNET, side) for side in ("student", "teacher"))
    assert (student.module, student.io) == (RESNET["fc"], "input")
    assert (teacher.module, teacher.io) == (RESNET["layer4"], "output")
    torch.testing.assert_close(teacher.rows(torch.ones(5, 4, 2, 2)), torch.full((5, 4), 0.5))


# Checkpoints


def test_a_checkpoint_of_another_network(runs, capsys, tmp_path):
    checkpoint = runs / "student" / "last.pt"
    evaluated = error_of(capsys, "eval", runs / "teacher", "--checkpoint", checkpoint)
    lacks = (
        f"{checkpoint} holds another model than {runs / 'teacher' / 'recipe.yaml'} describes, ImageClassifier: "
        "it lacks backbone.layer1.1.conv1.weight, backbone.layer1.1.bn1.weight, backbone.layer1.1.bn1.bias and 33 "
        "more; give the checkpoint of that model, or change the recipe's model"
    )
    assert evaluated == lacks
    out = tmp_path / "out"
    trained = error_of(capsys, "run", STUDENT, *overrides(runs / "data", *with_teacher(checkpoint)), "--out", out)
    assert trained.startswith(f"{checkpoint} holds another model than ")
    assert trained.partition("rkd.yaml describes")[2] == lacks.partition("recipe.yaml describes")[2]
    assert not out.exists()
    # The other way round, and with other widths.
    more = error_of(capsys, "eval", runs / "student", "--checkpoint", runs / "teacher" / "last.pt")
    assert "ImageClassifier: it has in addition backbone.layer1.1.conv1.weight" in more
    wider = error_of(capsys, "eval", runs / "student", "recipe.network=resnet8x4", "--checkpoint", checkpoint)
    assert "backbone.conv1.weight is (16, 3, 3, 3) instead of (32, 3, 3, 3), backbone.bn1.weight is (16,)" in wider


def test_a_checkpoint_of_other_classes(runs, capsys, tmp_path):
    checkpoint = runs / "teacher" / "last.pt"
    ten = "models.teacher_model.kwargs.num_classes=10"
    sentence = (
        "describes, ImageClassifier: its last layer, linear, has 100 outputs instead of 10; give "
        "models.{}.kwargs.num_classes=100, or use a checkpoint of 10"
    )
    trained = error_of(
        capsys, "run", STUDENT, *overrides(runs / "data", *with_teacher(checkpoint), ten), "--out", tmp_path / "out"
    )
    assert trained.startswith(f"{checkpoint} holds another model than ")
    assert trained.endswith(sentence.format("teacher_model"))
    evaluated = error_of(
        capsys, "eval", TEACHER, *overrides(runs / "data", "models.model.kwargs.num_classes=10", network="resnet14"),
        "--checkpoint", checkpoint,
    )  # fmt: skip
    assert evaluated.endswith(sentence.format("model"))


def test_a_file_that_is_no_checkpoint_of_ours(runs, capsys, tmp_path):
    weights = read_checkpoint(runs / "student" / "last.pt", "model")["model"]
    paths = {name: tmp_path / f"{name}.pt" for name in ("text", "cut", "executed", "tensor", "empty")}
    paths["text"].write_text("no checkpoint")
    paths["cut"].write_bytes((runs / "student" / "last.pt").read_bytes()[:5000])
    torch.save({"model": tmp_path}, paths["executed"])
    torch.save(weights["linear.bias"], paths["tensor"])
    write_checkpoint(paths["empty"], {})
    messages = {
        "text": "could not read it, as it is of another kind; if you trust the file, load it with its own",
        "cut": "could not read it, as it is truncated or changed; give an intact copy",
        "executed": r"expected the weights of a model in .*, got model \(an object of pathlib(._local)?.PosixPath\)",
        "tensor": "expected the weights of a model in .*, got Tensor; if you",
        "empty": "expected the weights of a model in .*, got nothing; if you",
    }  # fmt: skip
    for name, path in paths.items():
        evaluated = error_of(capsys, "eval", runs / "student", "--checkpoint", path)
        assert str(path) in evaluated
        with pytest.raises(ValueError, match=messages[name]):
            raise ValueError(evaluated)
    missing = with_teacher(tmp_path / "none.pt")
    trained = error_of(capsys, "run", STUDENT, *overrides(runs / "data", *missing), "--out", tmp_path / "out")
    assert trained == (
        f"expected a checkpoint at {tmp_path / 'none.pt'}, found none; train that model first with "
        f"`rkd run RECIPE --out {tmp_path}`"
    )


def test_weights_of_another_kind(tmp_path):
    layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    given = layers.state_dict() | {"1.bias": "text"}
    with pytest.raises(
        ValueError, match=r"a\.pt holds .* than b describes, Sequential: 1\.bias is str instead of \(4,\)"
    ):
        load_weights(layers, given, tmp_path / "a.pt", "b")
    with pytest.raises(ValueError, match=r"Sequential: it lacks 0\.weight, 0\.bias, 1\.weight and 1 more; give"):
        load_weights(layers, None, tmp_path / "a.pt", "b")


def test_a_run_whose_checkpoint_was_replaced(runs, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes((runs / "teacher" / "last.pt").read_bytes())
    more = overrides(runs / "data", *with_teacher(runs / "teacher" / "last.pt"))
    error = error_of(capsys, "run", STUDENT, *more, "--out", tmp_path / "run")
    assert f"{tmp_path / 'run' / 'last.pt'} holds another model than" in error
    torch.save({"model": {}}, tmp_path / "run" / "last.pt")
    error = error_of(capsys, "run", STUDENT, *more, "--out", tmp_path / "run")
    assert "expected a checkpoint with model, trained, optimizer, lr_scheduler, steps, history at" in error


# Labels


@pytest.mark.parametrize(
    ("train", "test", "where", "found"),
    [
        (range(37, 101), range(64), "cifar100/train", "37 to 100"),
        (range(64), range(90, 120), "cifar100/test", "90 to 119"),
    ],
)
def test_labels_that_are_no_classes_stop_a_run_before_it_starts(train, test, where, found, capsys, tmp_path):
    root = write_cifar(tmp_path / "data", train, test)
    error = error_of(capsys, "run", TEACHER, *overrides(root), "--out", tmp_path / "out")
    assert error == (
        f"datasets.{where}: expected labels from 0 to 99, as the model has 100 outputs, got {found}; set num_classes "
        "to the number of classes of the data"
    )
    assert not (tmp_path / "out").exists()


def test_labels_that_are_no_classes_in_evaluation(runs, capsys, tmp_path):
    root = write_cifar(tmp_path / "data", test=range(90, 101))
    error = error_of(capsys, "eval", runs / "student", f"recipe.data_root={root}")
    assert error == (
        "classification: expected labels from 0 to 99, as the model has 100 outputs, got 90 to 100; set num_classes to "
        "the number of classes of the data"
    )


def test_all_classes_of_data_that_are_not_split_by_class(runs, capsys):
    error = error_of(capsys, "eval", runs / "student", "--classes", "all")
    assert error == (
        "datasets.cifar100/test: expected a data set that is split by class, got CIFAR100, of which all classes are "
        "measured already; leave out --classes all"
    )


def test_the_check_of_labels_changes_nothing(runs, monkeypatch):
    recipe = read(TEACHER, overrides(runs / "data"))
    checked = Experiment(recipe)
    checked.box()
    monkeypatch.setattr("rkd_plugin.experiments.running.experiment.check_images", lambda *_: None)
    unchecked = Experiment(recipe)
    unchecked.box()
    assert checked.student.training
    expected = unchecked.student.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in checked.student.state_dict().items())


def test_test_data_of_another_task(runs, capsys):
    error = error_of(capsys, "eval", runs / "student", "--data", "quickstart/teacher")
    assert error.startswith("expected test data of the model's task, classification, got metric_learning in ")
