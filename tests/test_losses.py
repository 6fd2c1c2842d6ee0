"""The modules keep the options of the functions and add nothing."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re

import pytest
import torch

from rkd_plugin import RKDAngleLoss, RKDDALoss, RKDDistanceLoss, rkd_angle_loss, rkd_da_loss, rkd_distance_loss

TWINS = {RKDDistanceLoss: rkd_distance_loss, RKDAngleLoss: rkd_angle_loss, RKDDALoss: rkd_da_loss}
OPTIONS = {"reduction": "sum", "huber_delta": 0.1, "impl": "reference"}
GATHER, ANCHORS = {"gather": True}, {"anchors": 0.5}  # not for calls: one needs processes, the other draws
WEIGHTS = {"distance_weight": 25.0, "angle_weight": 50.0}

every_module = pytest.mark.parametrize("module", TWINS, ids=lambda m: m.__name__)


def others(module, called=False):
    """Options that all differ from the defaults."""
    options = OPTIONS | (WEIGHTS if module is RKDDALoss else {})
    return options if called else options | GATHER | (ANCHORS if module is not RKDDistanceLoss else {})


@every_module
@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "options"])
def test_module(module, changed, monkeypatch):
    options = others(module, called=True) if changed else {}
    student, teacher = torch.randn(6, 3, requires_grad=True), torch.randn(6, 4)
    ours, expected = module(**options)(student, teacher), TWINS[module](student, teacher, **options)
    assert ours == expected
    assert all(
        torch.equal(*pair) for pair in zip(*(torch.autograd.grad(x, student) for x in (ours, expected)), strict=True)
    )


@every_module
@pytest.mark.parametrize("option", [*OPTIONS, *GATHER, *ANCHORS, *WEIGHTS])
def test_every_option_reaches_the_function(module, option, monkeypatch):
    options = others(module)
    if option not in options:
        with pytest.raises(TypeError, match=option):
            module(**{option: 1.0})
        return
    received = {}
    monkeypatch.setattr(f"rkd_plugin.losses.{TWINS[module].__name__}", lambda *_, **options: received.update(options))
    module(**{option: options[option]})(None, None)
    assert received[option] == options[option]


@every_module
def test_same_options_as_the_function(module):
    """The defaults too; index tuples belong to a batch, and so to the function only."""
    function = {
        name: p.default
        for name, p in inspect.signature(TWINS[module]).parameters.items()
        if p.kind is p.KEYWORD_ONLY and name not in ("pairs", "triplets")
    }
    assert {name: p.default for name, p in inspect.signature(module).parameters.items()} == function


@every_module
def test_repr_names_every_option(module):
    options = others(module)
    text = repr(module(**options))
    assert text.startswith(f"{module.__name__}(")
    for name, value in options.items():
        assert f"{name}={value!r}" in text
    assert repr(eval(text, {module.__name__: module})) == text


@every_module
def test_copies(module):
    original = module(**others(module, called=True))
    for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert repr(twin) == repr(original)
        student, teacher = torch.randn(5, 2), torch.randn(5, 3)
        assert twin(student, teacher) == original(student, teacher)


@every_module
def test_no_state(module):
    loss = module()
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    assert list(loss.buffers()) == []


def test_no_loss_is_another_loss():
    """So that `isinstance` tells them apart."""
    assert not any(issubclass(*pair) for pair in itertools.permutations(TWINS, 2))


@every_module
def test_an_option_that_changes_is_checked_again(module):
    loss = module()
    loss.huber_delta = -1.0
    with pytest.raises(ValueError, match=f"{TWINS[module].__name__}: expected huber_delta to be positive"):
        loss(torch.zeros(3, 2), torch.zeros(3, 2))


@every_module
def test_help_names_every_argument(module):
    for public in (module, TWINS[module]):
        arguments = public.__doc__.split("Args:")[1].split("\n\n")[0]
        documented = re.findall(r"^ {8}(\w+): ", arguments, re.MULTILINE)
        assert documented == list(inspect.signature(public).parameters)
