"""The modules store the options of the functions and add nothing."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re

import pytest
import torch

from rkd_plugin import (
    RelationalLoss,
    RKDAngleLoss,
    RKDDALoss,
    RKDDistanceLoss,
    relational_loss,
    rkd_angle_loss,
    rkd_da_loss,
    rkd_distance_loss,
)

FUNCTIONS = {
    RKDDistanceLoss: rkd_distance_loss,
    RKDAngleLoss: rkd_angle_loss,
    RKDDALoss: rkd_da_loss,
    RelationalLoss: relational_loss,
}
OPTIONS = {"reduction": "sum", "huber_delta": 0.1, "impl": "reference"}
GATHER, ANCHORS = {"gather": True}, {"anchors": 0.5}  # not for calls: one needs several processes, the other is random
OWN = {
    RKDDALoss: {"distance_weight": 25.0, "angle_weight": 50.0},
    RelationalLoss: {
        "potential": "cosine",
        "penalty": "mse",
        "scale": "softmax",
        "temperature": 0.5,
        "neighbours": 3,
        "references": None,
    },
}

every_module = pytest.mark.parametrize("module", FUNCTIONS, ids=lambda m: m.__name__)


def other_options(module, called=False):
    """Options that all differ from the defaults."""
    options = OPTIONS | OWN.get(module, {})
    return options if called else options | GATHER | (ANCHORS if module is not RKDDistanceLoss else {})


@every_module
@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "options"])
def test_module(module, changed, monkeypatch):
    options = other_options(module, called=True) if changed else {}
    student, teacher = torch.randn(6, 3, requires_grad=True), torch.randn(6, 4)
    ours, expected = module(**options)(student, teacher), FUNCTIONS[module](student, teacher, **options)
    assert ours == expected
    assert all(
        torch.equal(*pair) for pair in zip(*(torch.autograd.grad(x, student) for x in (ours, expected)), strict=True)
    )


@every_module
@pytest.mark.parametrize("option", [*OPTIONS, *GATHER, *ANCHORS, *(option for own in OWN.values() for option in own)])
def test_every_option_reaches_the_function(module, option, monkeypatch):
    options = other_options(module)
    if option not in options:
        with pytest.raises(TypeError, match=option):
            module(**{option: 1.0})
        return
    received = {}
    monkeypatch.setattr(module, "_function", staticmethod(lambda *_, **options: received.update(options)))
    module(**{option: options[option]})(None, None)
    assert received[option] == options[option]


@every_module
def test_same_options_as_the_function(module):
    """The defaults too; index tuples belong to a batch, and so to the function only."""
    function = {
        name: p.default
        for name, p in inspect.signature(FUNCTIONS[module]).parameters.items()
        if name not in ("student", "teacher", "pairs", "triplets")
    }
    assert {name: p.default for name, p in inspect.signature(module).parameters.items()} == function


@every_module
def test_repr_names_every_option(module):
    options = other_options(module)
    text = repr(module(**options))
    assert text.startswith(f"{module.__name__}(")
    for name, value in options.items():
        assert f"{name}={value!r}" in text
    assert repr(eval(text, {module.__name__: module})) == text


@every_module
def test_copies(module):
    original = module(**other_options(module, called=True))
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert repr(copied) == repr(original)
        student, teacher = torch.randn(5, 2), torch.randn(5, 3)
        assert copied(student, teacher) == original(student, teacher)


@every_module
def test_no_state(module):
    loss = module()
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    assert list(loss.buffers()) == []


def test_no_loss_is_a_subclass_of_another():
    assert not any(issubclass(*pair) for pair in itertools.permutations(FUNCTIONS, 2))


@every_module
def test_an_option_that_changes_is_checked_again(module):
    loss = module()
    loss.huber_delta = -1.0
    with pytest.raises(ValueError, match=f"{FUNCTIONS[module].__name__}: expected huber_delta to be positive"):
        loss(torch.zeros(3, 2), torch.zeros(3, 2))


@every_module
def test_a_loss_of_two_tensors_in_a_trainer_of_pml(module):
    """Such a trainer passes labels and mined tuples too."""
    with pytest.raises(TypeError) as caught:
        module()(torch.zeros(3, 2), torch.arange(3), None)
    name = module.__name__
    assert str(caught.value) == (
        f"{name}: expected student and teacher, got 3 arguments; for pytorch-metric-learning, import {name} from "
        "rkd_plugin.adapters.pml"
    )


@every_module
def test_help_names_every_argument(module):
    for public in (module, FUNCTIONS[module]):
        arguments = public.__doc__.split("Args:")[1].split("\n\n")[0]
        documented = re.findall(r"^ {8}(\w+): ", arguments, re.MULTILINE)
        assert documented == list(inspect.signature(public).parameters)
