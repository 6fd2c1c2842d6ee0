"""External recipes and checkpoints run no code."""

from __future__ import annotations

import os
import signal
import sys
import weakref

import pytest
import torch
from torch import nn
from torchdistill.models.registry import MODEL_DICT

from rkd_plugin.cli import main
from rkd_plugin.experiments.recipe import building, check, examine, read
from rkd_plugin.experiments.recipe.building import NotBuiltError


class Folder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def mine(tmp_path):
    """A checkpoint that makes the folder ``made`` if it is executed."""
    torch.save({"model": {}, "args": Folder(tmp_path / "made")}, tmp_path / "mine.pt")
    yield tmp_path / "mine.pt"
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "mine.pt", weights_only=False)
    assert (tmp_path / "made").is_dir()  # the check can fail


def side(name, process, path):
    return f"train.{name}={{forward_proc: {process}, requires_grad: False, src_ckpt: '{path}'}}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["run", "quickstart/rkd_da", "recipe.teacher_checkpoint={}"],
            "posix.mkdir, which reading would execute",
        ),
        (["eval", "quickstart/student", "--checkpoint", "{}"], "posix.mkdir, which reading would execute"),
        (
            ["run", "quickstart/rkd_da", side("student", "forward_batch_only", "{}")],
            "name it under `models:",
        ),
        (["run", "quickstart/rkd_da", side("teacher", "forward_in_eval_mode", "{}")], "name it under `models:"),
    ],
)
def test_no_checkpoint_is_executed(command, message, mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("{}", str(mine)) for word in command]) == 1
    assert message in capsys.readouterr().err


def test_of_what_a_recipe_names_only_its_models_are_called_by_check(monkeypatch):
    built = []

    class Mine(nn.Linear):
        def __init__(self, weights="published", pretrained=True):
            super().__init__(2, 2)
            built.append((self.weight.device.type, weights, pretrained))

    monkeypatch.setitem(MODEL_DICT, "Mine", Mine)
    assert check(read("quickstart/student", ["models.model={key: Mine, kwargs: {}}"])) == []
    assert built == [("meta", None, None)]
    # The functions of torchvision that take a name would download weights.
    for key in ("get_model", "get_weight", "list_models"):
        ((path, _),) = check(
            read("quickstart/student", [f"models.model={{key: {key}, kwargs: {{name: fcn_resnet50}}}}"])
        )
        assert path == "models.model.key"
    # It has no weights, but its backbone would have.
    model = "{key: BackboneEmbedding, kwargs: {backbone: fcn_resnet50, embedding_dim: 2, l2_normalize: False}}"
    ((path, message),) = check(read("quickstart/student", [f"models.model={model}"]))
    assert path == "models.model"
    assert "expected a network of torchvision" in message


@pytest.mark.parametrize(
    "layers",
    [
        lambda count: nn.Sequential(*[nn.ReLU() for _ in range(count)]),
        lambda count: nn.Sequential(*[nn.Linear(2, 2) for _ in range(count)]),
        lambda count: [str(index) for index in iter(int, 1)],  # for ever
    ],
)
def test_a_model_that_takes_too_long_to_build_is_not_built_to_the_end(layers, monkeypatch):
    monkeypatch.setattr(building, "_SECONDS", 0.2)
    monkeypatch.setitem(MODEL_DICT, "Large", layers)
    findings = examine(read("quickstart/student", ["models.model={key: Large, kwargs: {count: 1000000}}"]))
    assert findings.problems == []
    expected = "its module paths, as building the model takes longer than 0.2 seconds"
    assert findings.unchecked == [("models.model", expected)]


def without_gradients(count):
    torch.set_grad_enabled(False)  # as `no_grad` has it, between two lines of its own
    while True:
        pass


def in_callbacks(count):
    references = []
    while True:
        layer = nn.ReLU()
        references.append(weakref.WeakKeyDictionary({layer: 0}))
        del layer  # which calls back


def in_callbacks_of_its_own(count):
    references = []
    while True:
        layer = nn.ReLU()
        references.append(weakref.ref(layer, lambda _: sum(range(2_000))))
        del layer


@pytest.mark.parametrize("build", [without_gradients, in_callbacks, in_callbacks_of_its_own])
def test_a_model_that_is_stopped_anywhere_leaves_nothing_behind(build, monkeypatch):
    monkeypatch.setattr(building, "_SECONDS", 0.05)
    handler, hook = signal.getsignal(signal.SIGPROF), sys.unraisablehook
    for _ in range(5):
        with pytest.raises(NotBuiltError, match="longer than"):
            building._build.__wrapped__(build, '{"count": 0}')
        assert torch.is_grad_enabled()
        assert torch.get_default_device() == torch.device("cpu")
        assert signal.getsignal(signal.SIGPROF) is handler
        assert sys.unraisablehook is hook
        assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_a_model_of_a_number_that_fills_the_memory_is_not_built(monkeypatch):
    built = []
    monkeypatch.setitem(MODEL_DICT, "Large", lambda count: built.append([0] * count))
    findings = examine(read("quickstart/student", ["models.model={key: Large, kwargs: {count: 1000001}}"]))
    assert findings.unchecked == [
        ("models.model", "its module paths, as an argument of the model is larger than 1,000,000")
    ]
    assert built == []
