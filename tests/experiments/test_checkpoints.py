"""Checkpoints of any program are read without running code; what does not fit raises; edited files are one sentence."""

import argparse
import copy
import json
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchdistill.common.main_util import save_ckpt

from rkd_plugin.cli import main
from rkd_plugin.experiments.recipe import read
from rkd_plugin.experiments.recipe.errors import difference
from rkd_plugin.experiments.running import checkpoints, evaluation, experiment, runner
from rkd_plugin.experiments.running.checkpoints import read_checkpoint
from rkd_plugin.experiments.running.tensor_files import DamagedError
from rkd_plugin.experiments.running.weights import load_weights, read_weights

TINY = ["recipe.num_epochs=2", "recipe.samples_per_epoch=256", "recipe.batch_size=64", "models.model.kwargs.width=4"]


def network(width=2):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 3))


def one_sentence(error, match, function, *arguments):
    with pytest.raises(error, match=match) as raised:
        function(*arguments)
    assert str(raised.value).isprintable()
    return str(raised.value)


# Files of other programs

WRAPPED = {
    "plain": lambda model: model,
    "module.": nn.DataParallel,
    "_orig_mod.": torch.compile,
    "_orig_mod.module.": lambda model: torch.compile(nn.DataParallel(model)),
    "module._orig_mod.": lambda model: nn.DataParallel(torch.compile(model)),
    "inside": lambda model: nn.Sequential(torch.compile(model[0]), nn.DataParallel(model[1]), *model[2:]),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_what_torchdistill_saves(wrapped, tmp_path):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    # Torchdistill's scripts save parsed arguments and a value of NumPy.
    args = argparse.Namespace(config=Path("a.yaml"), device=torch.device("cpu"), log=None, seed=[1, {"a": 2.0}])
    save_ckpt(WRAPPED[wrapped](model), optimizer, None, np.float64(0.5), args, str(tmp_path / "host.pt"))
    weights = read_weights(tmp_path / "host.pt")
    for other in (network(), nn.DataParallel(network())):
        load_weights(other, weights, tmp_path / "host.pt", "a.yaml")
        assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))


FORMS = {
    "bare": lambda state, path: torch.save(state, path),
    "state_dict": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
    "beside settings of that name": lambda state, path: torch.save({"model": {"width": 2}, "state_dict": state}, path),
    "nested": lambda state, path: torch.save({"model": {"state_dict": state}}, path),
    "before PyTorch 1.6": lambda state, path: torch.save(
        {"model": state, "args": argparse.Namespace(a=1)}, path, _use_new_zipfile_serialization=False
    ),
    "safetensors": lambda state, path: save_file(state, path),
    "FSDP": lambda state, path: torch.save({f"_fsdp_wrapped_module.{name}": v for name, v in state.items()}, path),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_state_dict(form, tmp_path):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    model, other = network(), network()
    FORMS[form](model.state_dict(), path)
    load_weights(other, read_weights(path), path, "a.yaml")
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_a_model_with_a_part_called_module_keeps_its_names(tmp_path):
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "a": nn.ModuleDict({"module": nn.Linear(2, 2)})})
    model["weight"] = nn.Linear(2, 2)
    torch.save({"module.weight": torch.ones(2), "weight": torch.zeros(2)}, tmp_path / "both.pt")
    assert set(read_weights(tmp_path / "both.pt")) == {"module.weight", "weight"}
    torch.save(model.state_dict(), tmp_path / "a.pt")
    other = copy.deepcopy(model)
    load_weights(other, read_weights(tmp_path / "a.pt"), tmp_path / "a.pt", "a.yaml")
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))


def test_a_version_of_a_module_is_kept(tmp_path):
    """MNASNet of torchvision raises for weights without a version."""
    model = torchvision.models.mnasnet0_5(num_classes=2)
    torch.save(torch.compile(model).state_dict(), tmp_path / "a.pt")
    load_weights(torchvision.models.mnasnet0_5(num_classes=2), read_weights(tmp_path / "a.pt"), tmp_path, "a.yaml")


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "encoder.", "student.", "model._orig_mod.net."])
def test_a_prefix_of_all_names_is_removed(prefix, tmp_path, capsys):
    """MNASNet of torchvision raises for weights without a version, which PyTorch saves by the name of the module."""
    model, other = (torchvision.models.mnasnet0_5(num_classes=2) for _ in range(2))
    holder = nn.Module()
    inner = holder
    for name in prefix.split(".")[:-2]:
        inner.add_module(name, nn.Module())
        inner = getattr(inner, name)
    inner.add_module(prefix.split(".")[-2], model)
    holder.metric = nn.Linear(2, 2)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": holder.state_dict(), "epoch": 3, "hyper_parameters": {"width": 2}}, path)
    load_weights(other, read_weights(path), path, "a.yaml")
    plain = prefix.replace("_orig_mod.", "")
    printed = f"{path}: reading the weights with the prefix '{plain}', which is removed, and leaving out 2 others\n"
    assert capsys.readouterr().err == printed
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))


def test_prefixes_that_do_not_fit_or_are_several(tmp_path):
    path, state = tmp_path / "a.ckpt", network().state_dict()
    both = {f"{side}.{name}": value for side in ("student", "teacher") for name, value in state.items()}
    match = r"a\.ckpt: expected one prefix without which the names fit, got student\., teacher\.; save one part: torch"
    one_sentence(ValueError, match, load_weights, network(), both, path, "b")
    part = {f"model.{name}": value for name, value in state.items() if name != "3.bias"}
    one_sentence(
        ValueError, r"it lacks 0\.weight, .*it has in addition model\.0", load_weights, network(), part, path, "b"
    )
    more = {**{f"model.{name}": value for name, value in state.items()}, "model.4.weight": state["0.weight"]}
    one_sentence(ValueError, r"it lacks 0\.weight", load_weights, network(), more, path, "b")
    wide = {f"model.{name}": value for name, value in network(6).state_dict().items()}
    one_sentence(ValueError, r"; 0\.weight is|: 0\.weight is \(6", load_weights, network(), wide, path, "b")


class Touch:
    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "call", [(os.system, "touch executed"), (eval, "open('executed', 'w')"), (open, "executed", "w")]
)
@pytest.mark.parametrize("beside", [True, False])
def test_nothing_is_executed(call, beside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = network().state_dict()
    torch.save({"model": model, "args": Touch(*call)} if beside else {"model": Touch(*call)}, "a.pt")
    if beside and call[0] is not os.system:  # PyTorch never loads names of that module
        assert read_weights(Path("a.pt")).keys() == model.keys()
    else:
        one_sentence(ValueError, r"a\.pt", read_weights, Path("a.pt"))
    assert not Path("executed").exists()


class Replaced:
    """An `OrderedDict` that is pickled with numbers as methods."""

    def __reduce__(self):
        return OrderedDict, (), dict.fromkeys(("items", "keys", "get"), 5), None, iter([("w", torch.zeros(2))])


@pytest.mark.parametrize("form", [Replaced(), {"model": Replaced()}], ids=["bare", "model"])
def test_a_dictionary_whose_methods_were_replaced(form, tmp_path):
    torch.save(form, tmp_path / "a.pt")
    one_sentence(ValueError, "expected the weights of a model", read_weights, tmp_path / "a.pt")
    torch.save({"model": form}, tmp_path / "a.pt")
    model = read_checkpoint(tmp_path / "a.pt")["model"]
    one_sentence(ValueError, "it lacks", load_weights, network(), model, tmp_path / "a.pt", "b")


def program(path):
    """The record that only programs of TorchScript have."""
    torch.save(network().state_dict(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("script/constants.pkl", b"")


def test_what_cannot_be_read_names_how_to_convert_it(tmp_path):
    model = network()
    (tmp_path / "folder").mkdir()
    cases = {
        "whole.pt": (lambda path: torch.save(model, path), r"got an object of torch\S+Sequential; if you trust"),
        "two.pt": (
            lambda path: torch.save({"student": model.state_dict(), "teacher": model.state_dict()}, path),
            r"got student, teacher; save one of them: torch\.save\(torch\.load\(FILE\)\['student'\], NEW\)",
        ),
        "protocol.pt": (lambda path: torch.save(model.state_dict(), path, pickle_protocol=4), "another kind; if you"),
        "script.pt": (
            program,
            r"a program of TorchScript; save torch\.save\(torch\.jit\.load\(FILE\)\.state_dict\(\), NEW\)",
        ),
        "folder": (lambda _: None, "got the folder .*folder; .*format_utils dcp_to_torch"),
        "sparse.pt": (lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path), "dense weights .*, got w with"),
        "none.pt": (lambda path: torch.save({"epoch": 3}, path), "expected the weights of a model in .*, got epoch; "),
    }  # fmt: skip
    for name, (save, match) in cases.items():
        save(tmp_path / name)
        sentence = one_sentence(ValueError, match, read_weights, tmp_path / name)
        assert str(tmp_path / name) in sentence


def test_truncated_files_are_damaged(tmp_path):
    save_file(network().state_dict(), tmp_path / "a.safetensors")
    torch.save(network().state_dict(), tmp_path / "a.pt")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        path.write_bytes(path.read_bytes()[:-100])
        one_sentence(DamagedError, "truncated or changed; give an intact copy", read_weights, path)


# Files that claim a larger size


def packed(path, change=lambda name, content: content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def test_a_small_file_that_unpacks_to_a_large_one(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(10**6)}, path)
    packed(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(torch, "load", None)
    one_sentence(ValueError, "its records are compressed; unpack it and save it again", read_weights, path)


def test_records_that_share_their_bytes(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(10**5)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        large = max(archive.infolist(), key=lambda record: record.file_size)
        for number in range(50):
            again = copy.copy(large)
            again.filename = f"a/data/{number + 1}"
            archive.filelist.append(again)
        archive._didModify = True
    assert path.stat().st_size < 2 * 4 * 10**5
    monkeypatch.setattr(torch, "load", None)
    one_sentence(ValueError, "truncated or changed|compressed", read_weights, path)


def test_views_that_repeat_a_number(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(1).expand(10**10), "v": torch.zeros(2)}, path)
    one_sentence(ValueError, r"stored in .*, got w of shape \(10000000000,\); save its contig", read_weights, path)
    # A view that is no larger than the file is allowed.
    torch.save({"w": torch.zeros(1).expand(3)}, path)
    assert read_weights(path)["w"].shape == (3,)


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    torch.save(network().state_dict(), tmp_path / "a.pt")
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")):

        def load(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", load)
        one_sentence(MemoryError, "^expected memory for .*, got too little; end", read_weights, tmp_path / "a.pt")


# Weights that do not fit


@pytest.mark.parametrize(("kind", "raises"), [
    (torch.int8, True), (torch.bool, True), (torch.complex64, True),
    (torch.float16, False), (torch.bfloat16, False), (torch.float64, False),
])  # fmt: skip
def test_kinds_of_numbers(kind, raises):
    model = network()
    state = {name: v.to(kind) if v.is_floating_point() else v for name, v in model.state_dict().items()}
    if raises:
        match = rf"^a\.pt: expected floating-point numbers for 0\.weight of Sequential, got {kind}; give"
        one_sentence(ValueError, match, load_weights, model, state, Path("a.pt"), "b")
    else:
        load_weights(model, state, Path("a.pt"), "b")
        assert model[0].weight.dtype == torch.float32
    counter = {**model.state_dict(), "1.num_batches_tracked": torch.tensor(2.5)}
    match = r"expected integers for 1\.num_batches_tracked of Sequential, got torch\.float32"
    one_sentence(ValueError, match, load_weights, model, counter, Path("a.pt"), "b")


def test_a_model_of_another_width_names_the_override():
    settings = {"models.model.kwargs.width": 2, "models.model.kwargs.pretrained": True, "models.model.kwargs.depth": 7}
    match = r"0\.weight is \(6, 1, 3, 3\) instead of \(2, 1, 3, 3\).*; give models\.model\.kwargs\.width=6, or change"
    one_sentence(ValueError, match, load_weights, network(2), network(6).state_dict(), Path("a.pt"), "b", settings)
    # Another number of layers is not a question of width.
    deeper = {**network(6).state_dict(), "9.weight": torch.zeros(2)}
    arguments = network(2), deeper, Path("a.pt"), "b", settings
    sentence = one_sentence(ValueError, "it has in addition", load_weights, *arguments)
    assert "width" not in sentence


def test_names_are_escaped_in_messages(tmp_path):
    torch.save({"\x1b[2J\n\u202efc": torch.zeros(2), "a" * 10_000: torch.zeros(2)}, tmp_path / "a.pt")
    weights = read_weights(tmp_path / "a.pt")
    sentence = one_sentence(ValueError, "it has in addition", load_weights, network(), weights, tmp_path / "a.pt", "b")
    assert r"\x1b[2J\n\u202efc" in sentence
    assert len(sentence) < 1000
    torch.save({"\x1b[2J": 3}, tmp_path / "a.pt")
    assert r"got \x1b[2J" in one_sentence(ValueError, "expected the weights", read_weights, tmp_path / "a.pt")


# In a recipe


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended") / "run"
    return folder, runner.run(read("quickstart/student", TINY), folder)


def test_teacher_and_student_of_other_programs(ended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, result = ended
    model = experiment.Experiment(read(folder / "recipe.yaml")).student
    load_weights(model, read_weights(folder / "last.pt"), folder, "a")
    save_ckpt(torch.compile(model), torch.optim.SGD(model.parameters()), None, 1.0, argparse.Namespace(), "host.pt")
    save_file(model.state_dict(), "host.safetensors")
    for name in ("host.pt", "host.safetensors"):
        assert evaluation.evaluate(read(folder / "recipe.yaml"), Path(name)).metrics == result["final"]
        taught = [
            f"recipe.teacher_checkpoint={name}",
            "models.teacher_model.kwargs={width: 4, embedding_dim: 8, l2_normalize: True}",
        ]
        teacher = experiment.Experiment(read("quickstart/rkd_da", taught)).teacher()
        assert all(map(torch.equal, teacher.state_dict().values(), model.state_dict().values()))


def test_a_missing_teacher_names_the_command_that_trains_it(tmp_path, monkeypatch, capsys):
    """As after `rkd reproduce quickstart`, whose folders are named after row and seed."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", "quickstart/rkd_da", "recipe.num_epochs=2"]) == 1
    sentence = capsys.readouterr().err
    assert sentence.endswith(
        "runs/quickstart/teacher/last.pt, found none; train that model first with `rkd run quickstart/teacher`\n"
    )
    trained = Path("runs/quickstart/teacher-seed0/last.pt")
    runner.run(read("quickstart/teacher", [*TINY[:3]]), trained.parent)
    assert main(["run", "quickstart/rkd_da", "recipe.num_epochs=2"]) == 1
    override = re.search(r", or give (\S+), which exists$", capsys.readouterr().err)[1]
    assert override == f"recipe.teacher_checkpoint={trained}"
    assert main(["run", "quickstart/rkd_da", *TINY[1:3], "recipe.num_epochs=1", override]) == 0


def test_the_teacher_of_another_width_names_its_override(ended, tmp_path):
    overrides = [f"recipe.teacher_checkpoint={ended[0] / 'last.pt'}", "models.teacher_model.kwargs.embedding_dim=8"]
    match = r"last\.pt holds another model than .*; give models\.teacher_model\.kwargs\.width=4, or change"
    one_sentence(ValueError, match, lambda: experiment.Experiment(read("quickstart/rkd_da", overrides)).teacher())


# Files of a run that were edited


def test_which_key_differs():
    old = "recipe: {seed: &seed 0, epochs: 2}\ntrain: {a: *seed, b: [1, {c: x}]}"
    assert difference(old, old.replace("seed 0", "seed 1")) == "recipe.seed is 0 there and 1 here"
    assert difference(old, old.replace("epochs: 2, ", "")) == "only the notation differs"
    assert difference(old, old.replace(", epochs: 2", "")) == "recipe.epochs is 2 there and missing here"
    assert difference(old, old.replace("c: x", "c: y")) == "train.b.1.c is x there and y here"
    assert difference(old, old.replace("{c: x}", "3")).startswith("train.b.1 is a mapping there and 3 here")
    assert "\n" not in difference("a: [", old)
    many = ", ".join(f"k{i}: 1" for i in range(9))
    assert difference(f"{{{many}}}", f"{{{many.replace(': 1', ': 2')}}}").endswith(
        "k2 is 1 there and 2 here and 6 more"
    )


RESULTS = {
    "cut": lambda text: text[:100],
    "no text": lambda text: "\ud800",
    "list": lambda text: "[1]",
    "deep": lambda text: "[" * 100_000,
    "null": lambda text: "null",
    **{
        name: lambda text, edit=edit: json.dumps(edit(json.loads(text)))
        for name, edit in {
            "no final": lambda r: {key: value for key, value in r.items() if key != "final"},
            "final is a list": lambda r: r | {"final": [1]},
            "NaN as text": lambda r: r | {"final": dict.fromkeys(r["final"], "NaN")},
            "another metric": lambda r: r | {"best": {"epoch": 1, "recall": 3.0}},
            "epoch is text": lambda r: r | {"best": r["best"] | {"epoch": "1"}},
            "another metric is a list": lambda r: r | {"final": r["final"] | {"another": [1]}},
            "larger than any float": lambda r: r | {"final": dict.fromkeys(r["final"], 10**400)},
            "no epochs": lambda r: r | {"history": []},
            "an epoch is a number": lambda r: r | {"history": [*r["history"], 3]},
            "seconds are null": lambda r: r | {"seconds": None},
            "environment is a list": lambda r: r | {"environment": []},
            "true": lambda r: r | {"seed": True},
        }.items()
    },
}


@pytest.mark.parametrize("edit", RESULTS)
def test_an_edited_result_is_one_sentence_and_written_again(edit, ended, tmp_path):
    folder, result = ended
    for name in ("recipe.yaml", "last.pt", "best.pt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    path = tmp_path / "result.json"
    path.write_text(RESULTS[edit]((folder / "result.json").read_text()), encoding="utf-8", errors="surrogatepass")
    edited = path.read_bytes()
    recipe = read("quickstart/student", TINY)
    one_sentence(ValueError, r"result\.json.*; delete that file, and the same", runner.run, recipe, tmp_path)
    assert path.read_bytes() == edited
    path.unlink()
    again = runner.run(recipe, tmp_path)
    assert (again["final"], again["history"]) == (result["final"], result["history"])


def within(state, *places, value=None):
    """The state with another value at a place, or without it."""
    inner = state
    for place in places[:-1]:
        inner = inner[place]
    if value is None:
        del inner[places[-1]]
    else:
        inner[places[-1]] = value
    return state


STATES = {
    "a list": lambda state: [state],
    "no optimizer": lambda state: within(state, "optimizer"),
    "optimizer is a list": lambda state: within(state, "optimizer", value=[1]),
    "no groups": lambda state: within(state, "optimizer", "param_groups"),
    "a group is text": lambda state: within(state, "optimizer", "param_groups", 0, value="group"),
    "no lr": lambda state: within(state, "optimizer", "param_groups", 0, "lr"),
    "lr is text": lambda state: within(state, "optimizer", "param_groups", 0, "lr", value="NaN"),
    "model is a list": lambda state: within(state, "model", value=[1]),
    "a weight is a list": lambda state: within(state, "model", "0.0.weight", value=[1.0]),
    "steps is text": lambda state: within(state, "steps", value="three"),
    "steps is negative": lambda state: within(state, "steps", value=-1),
    "history is a dictionary": lambda state: within(state, "history", value={"epoch": 1}),
    "a loss is text": lambda state: within(state, "history", 0, "loss", value="nan"),
    "an epoch lacks a metric": lambda state: within(state, "history", 1, "recall_at_1"),
    "part is text": lambda state: within(state, "part", value="half"),
    "no random numbers": lambda state: within(state, "part", "steps", value=2),
    "a gradient of nothing": lambda state: within(state, "gradients", "9.weight", value=torch.zeros(2)),
    "a gradient is a number": lambda state: within(state, "gradients", "6.weight", value=1.0),
}


@pytest.mark.parametrize("edit", STATES)
def test_an_edited_checkpoint_is_one_sentence_and_stays(edit, ended, tmp_path):
    folder, _ = ended
    (tmp_path / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes())
    state = STATES[edit](read_checkpoint(folder / "last.pt"))
    torch.save(state, tmp_path / "last.pt")
    edited = (tmp_path / "last.pt").read_bytes()
    sentence = one_sentence(ValueError, r"last\.pt", runner.run, read("quickstart/student", TINY), tmp_path)
    assert "; " in sentence
    assert (tmp_path / "last.pt").read_bytes() == edited


def scheduled(path):
    text = Path(read("quickstart/student").path).read_text()
    schedule = "  scheduler:\n    key: 'MultiStepLR'\n    kwargs:\n      milestones: [1]\n"
    path.write_text(text.replace("  criterion:\n", f"{schedule}  criterion:\n", 1))
    return read(path, TINY)


def test_an_edited_schedule_is_one_sentence(tmp_path, monkeypatch):
    recipe, folder = scheduled(tmp_path / "scheduled.yaml"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_stops_early", lambda history, _: len(history) == 1)
        runner.run(recipe, folder)
    (folder / "result.json").unlink()
    state = read_checkpoint(folder / "last.pt")
    schedule = state["lr_scheduler"]
    for edited in (
        [], schedule | {"last_epoch": "1"}, schedule | {"base_lrs": {}}, schedule | {"milestones": [1]},
        {name: value for name, value in schedule.items() if name != "gamma"},
    ):  # fmt: skip
        torch.save(state | {"lr_scheduler": edited}, folder / "last.pt")
        one_sentence(ValueError, r"last\.pt: expected .* lr_scheduler", runner.run, recipe, folder)
    # Unknown values are ignored.
    torch.save(state | {"lr_scheduler": schedule | {"step": 5, "verbose": False}}, folder / "last.pt")
    assert [epoch["lr"] for epoch in runner.run(recipe, folder)["history"]] == pytest.approx([0.003, 0.0003])


def test_every_part_of_a_checkpoint_is_in_the_example(ended):
    state = read_checkpoint(ended[0] / "last.pt")
    assert state.keys() == checkpoints.STATE.keys() | {"gradients", "part"}
    assert ended[1].keys() == checkpoints.RESULT.keys()


def test_what_was_measured_is_measured_again_where_it_was_edited(tmp_path):
    path, example = tmp_path / "a.json", {"final": {"r": 0.0}}
    for text in ("", "[]", '{"described": 1, "final": {"r": "NaN"}}', '{"described": 2, "final": {"r": 1.0}}'):
        path.write_text(text)
        assert checkpoints.read_measured(path, 1, example) is None
    path.write_text('{"described": 1, "final": {"r": 1.0}}')
    assert checkpoints.read_measured(path, 1, example)["final"] == {"r": 1.0}
    assert checkpoints.read_measured(tmp_path / "none.json", 1, example) is None
