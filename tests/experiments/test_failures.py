"""Errors whose message is for the user are reported in one sentence; faults of the program keep their traceback."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from rkd_plugin.cli import main
from rkd_plugin.experiments.running.experiment import batches
from rkd_plugin.experiments.support.failures import PACKAGE, is_for_user
from rkd_plugin.functional import rkd_da_loss
from rkd_plugin.printing import printable
from rkd_plugin.teacher_bank.views import image

RUN = ["run", "quickstart/rkd_d", "models.teacher_model.src_ckpt=null", "recipe.num_epochs=1"]
LOSS = "train.criterion.kwargs.sub_terms.rkd.criterion.kwargs"


def caught(action):
    with pytest.raises((TypeError, ValueError, RuntimeError, AssertionError)) as info:
        action()
    return info.value


@pytest.mark.parametrize(
    ("statement", "file", "expected"),
    [
        ("raise TypeError('f: expected a, got b')", PACKAGE / "losses.py", True),
        ("raise RuntimeError('f: expected a, got b')", PACKAGE / "a" / "b.py", True),
        ("raise TypeError('f: expected a, got b')", "/elsewhere/losses.py", False),
        ("raise NotImplementedError", PACKAGE / "losses.py", False),
        ("None + 1", PACKAGE / "losses.py", False),
        ("assert None, 'f: expected a, got b'", PACKAGE / "losses.py", False),
        ("raise ValueError('f: expected a, got b')", "/elsewhere/losses.py", True),
    ],
)
def test_raise_statements_of_the_package_are_for_the_user(statement, file, expected):
    assert is_for_user(caught(lambda: exec(compile(statement, str(file), "exec")))) is expected


def test_errors_of_losses_are_for_the_user_and_faults_are_not():
    x = torch.randn(4, 3, requires_grad=True)
    assert is_for_user(caught(lambda: rkd_da_loss(x, None)))
    assert is_for_user(caught(lambda: rkd_da_loss(x, x, gather=3)))
    # An error that autograd passes through C++.
    (gradient,) = torch.autograd.grad(rkd_da_loss(x, torch.randn(4, 3), impl="chunked"), x, create_graph=True)
    assert is_for_user(caught(lambda: torch.autograd.grad(gradient.sum(), x)))
    assert not is_for_user(caught(lambda: rkd_da_loss()))
    assert not is_for_user(caught(lambda: printable(None)))


class Failing(Dataset):
    def __init__(self, fails):
        self.fails = fails

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return image(object()) if self.fails == "sentence" else None + 1


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers(workers):
    error = caught(lambda: next(batches(DataLoader(Failing("sentence"), num_workers=workers))))
    assert str(error).startswith("expected items that are or begin with an image, got object; ")
    assert is_for_user(error)
    error = caught(lambda: next(batches(DataLoader(Failing("fault"), num_workers=workers))))
    assert isinstance(error, TypeError)
    assert not is_for_user(error)


def test_a_kernel_that_cannot_run_here_is_one_sentence(tmp_path, capsys):
    kwargs = "{student_module_path: '.', teacher_module_path: '.', impl: fused}"
    assert main([*RUN, f"{LOSS}={kwargs}", "--out", str(tmp_path / "run")]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "rkd run" in line)
    assert "for impl 'fused', got cpu" in line
    assert line.endswith("use impl='chunked'")


def test_a_type_error_of_a_loss_is_one_sentence_and_one_of_the_program_is_not(tmp_path, monkeypatch, capsys):
    command = [*RUN, "--out", str(tmp_path / "run")]
    place = "rkd_plugin.adapters.torchdistill.losses.HookedLoss.embeddings"
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *_: None)
        assert main(command) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("rkd run: RKDDistanceLoss(")
    assert line.endswith("rkd_distance_loss: expected student to be a tensor, got NoneType")
    monkeypatch.setattr(place, lambda *_: None + 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        main(command)
