import importlib
import json
import random
import string
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rkd_plugin.cli import main
from rkd_plugin.experiments.recipe import (
    RecipeError,
    Tagged,
    catalog,
    check,
    configs_root,
    examine,
    find,
    names,
    quoted,
    read,
    read_suite,
)
from rkd_plugin.experiments.recipe.anchors import early_aliases
from rkd_plugin.experiments.recipe.errors import suggest
from rkd_plugin.experiments.recipe.imports import find_modules_of_user, unlisted_module
from rkd_plugin.experiments.recipe.reading import Recipe, parse
from rkd_plugin.experiments.recipe.sections import Task
from rkd_plugin.experiments.recipe.signatures import arguments, mismatch
from rkd_plugin.experiments.running.metrics import EVALUATORS

TEXT = find("quickstart/rkd_da").read_text(encoding="utf-8")


def changed(*changes: tuple[str, str]) -> Recipe:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return parse(text, Path("changed.yaml"))


def problems_of(*changes: tuple[str, str]) -> list[tuple[str, str]]:
    return check(changed(*changes))


# Packaged recipes


# The data of the other recipes are missing.
@pytest.mark.parametrize("name", [entry.name for entry in names() if entry.name.startswith("quickstart/")])
def test_resolved_text_is_what_torchdistill_would_load(name, tmp_path):
    from torchdistill.common.yaml_util import load_yaml_file

    recipe = read(name)
    (tmp_path / "resolved.yaml").write_text(recipe.resolved(), encoding="utf-8")
    resolved, original = load_yaml_file(tmp_path / "resolved.yaml"), load_yaml_file(recipe.path)
    for dataset, expected in zip(resolved.pop("datasets").values(), original.pop("datasets").values(), strict=True):
        assert type(dataset) is type(expected)
        assert dataset.targets == expected.targets
    # Modules are compared by what they print.
    assert repr(resolved) == repr(original)
    assert read(tmp_path / "resolved.yaml").resolved() == recipe.resolved()


def test_names_of_recipes():
    assert find("quickstart/rkd_da") == find("quickstart/rkd_da.yaml") == find(str(find("quickstart/rkd_da")))
    with pytest.raises(RecipeError, match=r"`rkd ls` lists; did you mean quickstart/rkd_da,"):
        find("quickstart/rkd_dat")
    for name in ("", "x" * 5000, "configs", "a\0b"):
        with pytest.raises(RecipeError, match="neither a file nor a packaged recipe"):
            find(name)


def test_an_installed_package_brings_its_recipes(tmp_path, monkeypatch):
    (tmp_path / "rkd_plugin" / "configs").mkdir(parents=True)
    (tmp_path / "configs").mkdir()  # of another package
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path / "rkd_plugin")
    assert configs_root() == tmp_path / "rkd_plugin" / "configs"
    assert names() == []
    (tmp_path / "rkd_plugin" / "configs").rmdir()
    (tmp_path / "configs").rmdir()
    with pytest.raises(RecipeError, match="reinstall rkd-plugin"):
        names()


# Overrides


def test_override_of_an_anchor_reaches_every_alias():
    recipe = read("quickstart/rkd_da", ["recipe.batch_size=16", "recipe.num_epochs=3"])
    train = recipe.section("train")
    assert train["train_data_loader"]["kwargs"]["batch_size"] == 16
    assert train["num_epochs"] == recipe.settings["num_epochs"] == 3
    # From the other end, and for a whole mapping.
    recipe = read("quickstart/rkd_da", ["test.test_data_loader.kwargs={batch_size: 7}"])
    assert recipe.section("train")["val_data_loader"]["kwargs"] == {"batch_size": 7}
    assert yaml.compose(recipe.resolved()) is not None
    assert "batch_size: 7" in recipe.resolved()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2.5E4", 25000.0),
        ("'1e-3'", "1e-3"),
        ("[0.9, 1e-3]", [0.9, 0.001]),
        ("{a: 1, b: x=y}", {"a": 1, "b": "x=y"}),
        ("a=b", "a=b"),
        ("", None),
        ("~", None),
        ("True", True),
        ("'#1: a'", "#1: a"),
    ],
)
def test_values_of_overrides(text, value):
    recipe = read("quickstart/rkd_da", [f"train.optimizer.kwargs.lr={text}"])
    assert recipe.section("train")["optimizer"]["kwargs"]["lr"] == value
    assert parse(recipe.resolved(), recipe.path).data["train"]["optimizer"]["kwargs"]["lr"] == value


def test_override_of_list_items_and_keys_with_slashes_and_dots():
    recipe = read("quickstart/rkd_da", ["datasets.digits/train.init.kwargs.classes.0=9"])
    assert recipe.section("datasets")["digits/train"].value["init"]["kwargs"]["classes"] == [9, 1, 2, 3, 4]
    recipe = parse("a: {b.c: {d: 1}, b: 2}", Path("x.yaml"), ["a.b.c.d=5", "a.b=6"])
    assert recipe.data == {"a": {"b.c": {"d": 5}, "b": 6}}


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("train.num_epoch=2", "train.num_epoch", "train has no key 'num_epoch'; did you mean num_epochs"),
        ("traim.num_epochs=2", "traim.num_epochs", "the recipe has no key 'traim'; did you mean train"),
        ("train.num_epochs.x=2", "train.num_epochs.x", "train.num_epochs has no key 'x'"),
        ("train.num_epochs", "train.num_epochs", "expected an override key.path=value"),
        ("=2", "=2", "expected an override key.path=value"),
        ("train.num_epochs=!import_call {}", "train.num_epochs", "without tags, anchors or aliases"),
        ("train.num_epochs=[!!python/name:os.system]", "train.num_epochs", "without tags, anchors or aliases"),
        ("train.num_epochs=*seed", "train.num_epochs", "without tags, anchors or aliases"),
        ("train.num_epochs=a: 1", "train.num_epochs", "a scalar, a [list] or a {mapping}"),
        ("train.num_epochs=&x 2", "train.num_epochs", "without tags, anchors or aliases"),
        ("train.num_epochs=--- 2", "train.num_epochs", "a scalar, a [list] or a {mapping}"),
        ("train.num_epochs=|\n 2", "train.num_epochs", "a scalar, a [list] or a {mapping}"),
        ("train.num_epochs=2 #3", "train.num_epochs", "YAML reads '#3' as a comment; write a string as"),
        ("train.num_epochs=[2] #3", "train.num_epochs", "YAML reads '#3' as a comment"),
        ("train.num_epochs=# 2", "train.num_epochs", "YAML reads '# 2' as a comment"),
        ("train.num_epochs=runs: 1", "train.num_epochs", """write a string as 'train.num_epochs="runs: 1"'"""),
        ("num_epochs=2", "num_epochs", "the recipe has no key 'num_epochs'; did you mean recipe.num_epochs?"),
        ("recipe.num_epoch=2", "recipe.num_epoch", "did you mean num_epochs"),
        ("train.num_epochs=[", "train.num_epochs", "is not YAML"),
        ("train.num_epochs=\x00", "train.num_epochs", "is not YAML"),
    ],
)
def test_bad_overrides(override, path, message):
    with pytest.raises(RecipeError) as caught:
        read("quickstart/rkd_da", [override])
    assert [place for place, _ in caught.value.problems] == [path]
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["/data/try #2", "a: b", "~", "1e-3", "", '"', "*a", "runs/ä\\n\t", "[1"])
def test_a_quoted_override_is_read_as_it_is(value):
    recipe = read("quickstart/rkd_da", [quoted("recipe.teacher_checkpoint", value)])
    assert recipe.settings["teacher_checkpoint"] == value
    assert parse(recipe.resolved(), recipe.path).data["models"]["teacher_model"]["src_ckpt"] == value


def test_all_bad_overrides_are_reported():
    with pytest.raises(RecipeError) as caught:
        read("quickstart/rkd_da", ["a=1", "recipe.seed=1", "b=1"])
    assert [path for path, _ in caught.value.problems] == ["a", "b"]


# Reading


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("a: [1,\nb", "line 2, column 2", "expected ',' or ']', but got '<stream end>' in 'b'"),
        ("a:\n\t- b: 1", "line 2, column 1", "in '- b: 1'; indent with spaces, not with tabs"),
        ("a: b: c", "line 1, column 5", "in 'a: b: c'; correct the indentation, or quote"),
        ("a:\n  b: 1\n c: 2", "line 3, column 2", "in 'c: 2'; correct the indentation"),
        ("a: @b", "line 1, column 4", "quote a value that begins with it"),
        ("!a {b: 1}", "", "expected a mapping without a tag at the top, got !a"),
        ("!!set {a}", "", "expected a mapping without a tag at the top"),
        ("? !join [a, b]\n: 1\n? ab\n: 2", "ab", "duplicate key"),
        ("? !import_get [a]\n: 1", "", "expected scalars as keys"),
        ("a: 1\nb: {a: 1, a: 2}", "b.a", "duplicate key"),
        ("a: 1\na: 2", "a", "duplicate key"),
        ("a: &x [1, *x]", "a.1", "an anchor contains itself"),
        ("a: &x {b: 1, b: 2}\nc: [*x, *x]", "a.b", "duplicate key"),
        ("[a]: 1", "", "expected scalars as keys"),
        ("- a", "", "expected a mapping of sections"),
        ("", "", "expected a mapping of sections"),
        ("a: 2001-13-13", "line 1, column 4", "not a value of type timestamp"),
        ("a: !!int x", "line 1, column 4", "not a value of type int"),
        ("a: " + "[" * 5000, "", "nested too deeply"),
        ("a: \x00", "", "not YAML"),
        (b"a: \xff", "", "not YAML"),
        ("--- a\n--- b", "line 2, column 1", "but found another document"),
    ],
)
def test_malformed_text(text, path, message):
    with pytest.raises(RecipeError) as caught:
        parse(text, Path("bad.yaml"))
    assert [place for place, _ in caught.value.problems] == [path]
    assert message in str(caught.value)


def test_reading_executes_nothing():
    recipe = parse("a: !import_call {key: os.abort}\nb: !!python/object/apply:os.abort []", Path("x.yaml"))
    assert isinstance(recipe.data["a"], Tagged)
    assert recipe.data["b"].tag == "tag:yaml.org,2002:python/object/apply:os.abort"


def test_texts_that_tags_join_are_joined():
    text = "a: &a x\n? !join [*a, /, 1]\n: !pathjoin [d, *a]\n? !join [*a, y]\n: !join [!import_call {}, a]"
    data = parse(text, Path("x.yaml")).data
    assert list(data) == ["a", "x/1", "xy"]
    assert data["x/1"] == "d/x"
    assert data["xy"].tag == "!join"  # what it joins is not known
    doubled = "\n".join(
        ["a0: &a0 !join [abcdefgh]", *(f"a{i}: &a{i} !join [*a{i - 1}, *a{i - 1}]" for i in range(1, 12))]
    )
    texts = list(parse(doubled, Path("x.yaml")).data.values())
    assert [isinstance(text, str) for text in texts] == [True] * 11 + [False]


def test_settings_are_required_where_they_are_used():
    assert (read("quickstart/rkd_da").task, read("quickstart/rkd_da", ["recipe.seed=3"]).seed) == ("metric_learning", 3)
    with pytest.raises(RecipeError, match=r"recipe\.seed: expected int"):
        _ = read("quickstart/rkd_da", ["recipe.seed=x"]).seed
    with pytest.raises(RecipeError, match=r"recipe\.task: expected str"):
        _ = parse("a: 1", Path("x.yaml")).task


# Checking


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module whose function writes a file when it is called."""
    mark = tmp_path / "called"
    (tmp_path / "recipe_trap.py").write_text(f"def spring(size=1):\n    open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    sys.modules.pop("recipe_trap", None)


def test_all_mistakes_are_reported_at_once_and_nothing_is_executed(trap):
    recipe = changed(
        ("angle_weight: 2.0", "huber: 2.0"),  # a misspelt argument
        ("key: 'Adam'", "key: 'Adma'"),  # an unknown component
        ("num_epochs: *num_epochs", "num_epochs: 'two'"),  # a wrong type
        ("    dataset_id: 'digits/test'\n", ""),  # a missing key
        (
            "forward_proc: 'forward_batch_only'",
            "forward_proc: 'forward_batch_only'\n    forward_hook: {output: ['blocks.1']}",
        ),
        ("'rkd_plugin.components.datasets.Digits'", "'recipe_trap.spring'"),
        ("        classes: [0, 1, 2, 3, 4]", "        size: 2"),
    )
    with pytest.raises(RecipeError) as caught:
        recipe.validate()
    assert dict(caught.value.problems) == {
        "train.num_epochs": "expected an integer, got the string 'two'",
        "train.val_data_loader.dataset_id": "required, but missing",
        "train.criterion.kwargs.sub_terms.rkd.criterion.kwargs.huber": "RKDDALoss has no such argument; did you mean "
        "huber_delta?",
        "train.optimizer.key": "no optimizer is registered as 'Adma'; did you mean Adamax, Adam, RAdam?",
        "train.student.forward_hook.output.0": caught.value.problems[-1][1],
    }
    assert "ConvEmbedding has no module 'blocks.1'" in caught.value.problems[-1][1]
    assert str(caught.value).count("\n") == 5
    assert not trap.exists()
    assert "recipe_trap" in sys.modules  # it was imported


def test_checking_leaves_random_numbers_and_files_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state(), random.getstate()
    recipe = changed(("key: 'ConvEmbedding'", "key: 'resnet18'"), ("width: 32", "weights: IMAGENET1K_V1"))
    paths = [path for path, _ in check(recipe)]
    assert paths == ["models.teacher_model.kwargs.embedding_dim", "models.teacher_model.kwargs.l2_normalize"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert list(tmp_path.iterdir()) == []


CRITERION = "train.criterion.kwargs.sub_terms.rkd"
LOSS = f"{CRITERION}.criterion.kwargs"
MISTAKES = {
    "no section": ("datasets:\n", "data:\n", "datasets", "required, but missing"),
    "other section": ("dependencies: [", "depends: [", "depends", "unknown key; did you mean dependencies?"),
    "task": ("task: metric_learning", "task: metric", "recipe.task", "'text', got"),
    "seed": ("seed: &seed 0", "seed: &seed zero", "recipe.seed", "expected an integer, got the string 'zero'"),
    "dependency": ("'rkd_plugin.components.models'", "nowhere", "dependencies.1", "cannot be imported"),
    "misspelt dependency": (
        "'rkd_plugin.components.models'",
        "'torchvison.models'",
        "dependencies.1",
        "No module named 'torchvison'; did you mean torchvision",
    ),
    "misspelt module": ("datasets.Digits", "dataset.Digits", "datasets.digits/train.key", "did you mean datasets"),
    "other case": ("key: 'Adam'", "key: 'adam'", "train.optimizer.key", "did you mean Adam?"),
    "no batch": ("batch_size: 1000", "batch_size: 0", "train.val_data_loader.kwargs.batch_size", "at least 1"),
    "no processes": ("num_workers: 0", "num_workers: -1", "train.train_data_loader.kwargs.num_workers", "at least 0"),
    "number as text": ("lr: 0.003", "lr: 3e-3", "train.optimizer.kwargs.lr", "got the string '3e-3'; write 3.0e-3"),
    "boolean as number": ("batch_size: 1000", "batch_size: yes", "train.val_data_loader.kwargs.batch_size", "got True"),
    "unknown tag": ("!import_call", "!import_cal", "datasets.digits/train", "did you mean !import_call"),
    "tag of Python": ("!import_call", "!!python/name:os.abort", "datasets.digits/train", "unknown tag"),
    "module of a call": ("datasets.Digits", "dataset.Digits", "datasets.digits/train.key", "cannot be imported"),
    "member of a call": ("datasets.Digits", "datasets.Digit", "datasets.digits/train.key", "did you mean Digits"),
    "argument of a call": ("classes: [0", "klasses: [0", "datasets.digits/train.init.kwargs.klasses", "mean classes?"),
    "type of a call": ("[0, 1, 2, 3, 4]", "some", "datasets.digits/train.init.kwargs.classes", "expected a list, got"),
    "items of a call": ("[0, 1, 2, 3, 4]", "[0, a]", "datasets.digits/train.init.kwargs.classes", "an integer"),
    "kwargs outside init": ("    init:\n", "    ini:\n", "datasets.digits/train.ini", "did you mean init"),
    "model": ("key: 'ConvEmbedding'", "key: 'resnet'", "models.teacher_model.key", "no model is registered"),
    "model argument": ("      width: 32\n", "", "models.teacher_model.kwargs.width", "required by ConvEmbedding"),
    "model kwargs": ("kwargs:\n      width: 32", "args:\n      width: 32", "models.teacher_model.kwargs", "kwargs: {}"),
    "epochs": ("num_epochs: *num_epochs", "num_epochs: 0", "train.num_epochs", "expected at least 1, got 0"),
    "log_freq": ("log_freq: 10", "log_freq: 1.5", "train.log_freq", "expected an integer, got 1.5"),
    "data set": ("'digits/train'\n", "'digits'\n", "train.train_data_loader.dataset_id", "did you mean digits/test"),
    "sampler": ("sampler:", "sample:", "train.train_data_loader.sampler", "required, but missing"),
    "sampler as text": (
        "!import_get\n        key: 'torch.utils.data.RandomSampler'",
        "RandomSampler",
        "train.train_data_loader.sampler.class_or_func",
        "(`!import_get`), got",
    ),
    "sampler argument": ("replacement:", "replace:", "train.train_data_loader.sampler.kwargs.replace", "replacement"),
    "loader argument": ("drop_last: True", "dataset: 1", "train.train_data_loader.kwargs.dataset", "already"),
    "two batch sizes": (
        "    sampler:",
        "    batch_sampler: {key: BatchSampler, kwargs: {batch_size: 2, drop_last: True}}\n    sampler:",
        "train.train_data_loader.kwargs.batch_size",
        "the sampler decides this",
    ),
    "batch sampler": (
        "    sampler:",
        "    batch_sampler: {key: BatchSampler, kwargs: {batch_size: 2}}\n    sampler:",
        "train.train_data_loader.batch_sampler.kwargs.drop_last",
        "required by BatchSampler",
    ),
    "collate": ("    sampler:", "    collate_fn: x\n    sampler:", "train.train_data_loader.collate_fn", "no collate"),
    "wrapper": (
        "    sampler:",
        "    dataset_wrapper: {key: CRDDatasetWrapper, kwargs: {mode: a, ratio: 1}}\n    sampler:",
        "train.train_data_loader.dataset_wrapper.kwargs.num_negative_samples",
        "required by CRDDatasetWrapper",
    ),
    "teacher in training mode": (
        "    forward_proc: 'forward_in_eval_mode'\n",
        "",
        "train.teacher.forward_proc",
        "leaves the teacher in training mode",
    ),
    "forward process": ("'forward_batch_only'", "x", "train.student.forward_proc", "no forward process"),
    "process": ("  log_freq", "  pre_epoch_process: x\n  log_freq", "train.pre_epoch_process", "no pre-epoch process"),
    "teacher of nobody": ("  teacher_model:", "  model:", "train.teacher", "unknown key"),
    "loss of no teacher": ("  teacher_model:", "  model:", f"{LOSS}.teacher_module_path", "expected a teacher"),
    "scheduler": (
        "  criterion:\n    key: 'W",
        "  scheduler: {key: MultiStepLR, kwargs: {}}\n  criterion:\n    key: 'W",
        "train.scheduler.kwargs.milestones",
        "required by MultiStepLR",
    ),
    "criterion": ("'WeightedSumLoss'", "SumLoss", "train.criterion.key", "did you mean WeightedSumLoss"),
    "loss": ("'RKDDALoss'", "'RKDDA'", f"{CRITERION}.criterion.key", "did you mean RKDDALoss"),
    "loss kwargs": ("angle_weight: 2.0", "pool: max", f"{LOSS}.pool", "one of 'auto', 'avg'"),
    "weight": ("weight: 1.0\n\ntest", "weight: '1'\n\ntest", f"{CRITERION}.weight", "expected a number"),
    "no module path": ("              student_module_path: '.'\n", "", f"{LOSS}.student_module_path", "required"),
    "no hook": (
        "student_module_path: '.'",
        "student_module_path: '1'",
        f"{LOSS}.student_module_path",
        "list it in train.student.forward_hook.output",
    ),
    "wrong end": (
        "teacher_module_path: '.'",
        "teacher_module_path: '.'\n              teacher_module_io: input",
        f"{LOSS}.teacher_module_path",
        "list it in train.teacher.forward_hook.input",
    ),
    "frozen": (
        "    forward_proc: 'forward_b",
        "    frozen_modules: ['0.9']\n    forward_proc: 'forward_b",
        "train.student.frozen_modules.0",
        "ConvEmbedding has no module '0.9'; did you mean",
    ),
    "frozen class": (
        "    forward_proc: 'forward_b",
        "    frozen_modules: ['instance(BatchNorm)']\n    forward_proc: 'forward_b",
        "train.student.frozen_modules.0",
        "torch.nn has no 'BatchNorm'",
    ),
    "sequential": (
        "    forward_proc: 'forward_b",
        "    sequential: ['0', '+x', 'y']\n    forward_proc: 'forward_b",
        "train.student.sequential.1",
        "'x' is not in train.student.adaptations",
    ),
    "parameter group": (
        "    kwargs:\n      lr: 0.003",
        "    kwargs: {}\n    module_wise_configs: [{module: '10', kwargs: {lr: 0.1}}]",
        "train.optimizer.module_wise_configs.0.module",
        "ConvEmbedding has no module '10'",
    ),
    "wrapped loss": (
        "          criterion:\n            key: 'RKDDALoss'",
        "          criterion_wrapper: {key: SimpleLossWrapper, kwargs: {input: {module_path: '3', io: output}}}\n"
        "          criterion:\n            key: 'RKDDALoss'",
        f"{CRITERION}.criterion_wrapper.kwargs.input.module_path",
        "list it in train.student.forward_hook.output",
    ),
    "plain loss": (
        "'RKDDALoss'",
        "'MSELoss'",
        f"{CRITERION}.criterion_wrapper",
        "`key: SimpleLossWrapper` passes two tensors to MSELoss",
    ),
    "model that cannot be built": (
        "key: 'ConvEmbedding'\n    kwargs:\n      width: 32\n      embedding_dim: 64\n      l2_normalize: True",
        "key: 'resnet18'\n    kwargs: {replace_stride_with_dilation: [True]}",
        "models.teacher_model",
        "cannot be built: replace_stride_with_dilation should be None or a 3-element tuple",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    old, new, path, message = MISTAKES[name]
    found = dict(problems_of((old, new)))
    assert path in found
    assert message in found[path]


COMPONENTS, ADAPTER = "rkd_plugin.components", "rkd_plugin.adapters.torchdistill"


@pytest.mark.parametrize(
    ("listed", "missing"),
    [
        ([f"{COMPONENTS}.models"], {f"{CRITERION}.criterion.key": ADAPTER, "train.teacher.forward_proc": ADAPTER}),
        ([f"{COMPONENTS}.models", f"{COMPONENTS}.samplers"], {f"{CRITERION}.criterion.key": ADAPTER}),
        ([ADAPTER], {"models.student_model.key": f"{COMPONENTS}.models"}),
        ([f"{COMPONENTS}.baselines", f"{COMPONENTS}.models"], {}),  # it imports the adapter
        ([f"{{name: .torchdistill, package: {ADAPTER[:-13]}}}", f"{COMPONENTS}.models"], {}),
    ],
)
def test_a_component_without_its_dependency_names_the_module_to_add(listed, missing):
    """Whatever this process has imported for itself, torchdistill imports only the dependencies."""
    found = dict(check(read("quickstart/rkd_da", [f"dependencies=[{', '.join(listed)}]"])))
    assert bool(found) == bool(missing)
    for path, module in missing.items():
        assert found[path].endswith(f"; add '{module}' to `dependencies`")


def test_every_registered_component_has_a_module_to_add():
    from torchdistill.core.interfaces import registry as procs
    from torchdistill.datasets import registry as datasets
    from torchdistill.losses import registry as losses
    from torchdistill.models import registry as models
    from torchdistill.optim import registry as optim

    for name in ("models", "baselines", "few_shot", "samplers"):
        importlib.import_module(f"{COMPONENTS}.{name}")
    registries = [value for m in (procs, datasets, losses, models, optim) for value in vars(m).values()]
    ours = {
        key: getattr(component, "__module__", "")
        for registry in registries
        if isinstance(registry, dict)
        for key, component in registry.items()
        if str(getattr(component, "__module__", "")).startswith("rkd_plugin.")
    }
    assert {"RKDDALoss", "ConvEmbedding", "DarkRankLoss", "PrototypicalLoss", "EpisodicBatchSampler"} <= ours.keys()
    for key, place in ours.items():
        assert f"{place}.".startswith(f"{unlisted_module(key, None, [])}."), key


def test_stages_are_checked_like_train():
    recipe = read("quickstart/rkd_da").data
    one = {key: value for key, value in recipe["train"].items() if key != "log_freq"}
    two = {key: value for key, value in one.items() if key in ("num_epochs", "teacher", "student", "criterion")}
    two = two | {"teacher": {"forward_proc": "forward_in_eval_mode"}, "optimizer": {"key": "Adma", "kwargs": {}}}
    data = recipe | {"train": {"log_freq": 10, "stage1": one, "stage2": two}}
    found = check(Recipe(Path("x.yaml"), yaml.compose("{}"), data))
    assert [path for path, _ in found] == ["train.stage2.optimizer.key"]


IDIOMS = """
recipe: {task: metric_learning, seed: 0}
dependencies:
  - name: rkd_plugin.adapters.torchdistill
datasets:
  &train_id images/train: !import_call
    _name: &name 'images'
    _root: &root !join ['~/data/', *name]
    key: 'torchvision.datasets.ImageFolder'
    init:
      kwargs:
        root: !join [*root, '/train']
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call
                  key: 'torchvision.transforms.RandomResizedCrop'
                  init:
                    kwargs:
                      size: [224, 224]
                - !import_call
                  key: 'torchvision.transforms.ToTensor'
                  init:
models:
  teacher_model:
    key: &teacher_key 'resnet50'
    _weights: &weights !import_get
      key: 'torchvision.models.resnet.ResNet50_Weights'
    kwargs:
      num_classes: 1000
      weights: !getattr [*weights, 'IMAGENET1K_V1']
    src_ckpt:
  student_model:
    key: 'resnet18'
    kwargs: {weights: IMAGENET1K_V1}
    dst_ckpt: !join ['runs/', *teacher_key, '.pt']
train:
  log_freq: 50
  num_epochs: 1
  train_data_loader: &loader
    dataset_id: *train_id
    sampler:
      class_or_func: !import_get
        key: 'torch.utils.data.SequentialSampler'
      kwargs:
    kwargs: {batch_size: 4, num_workers: 0, pin_memory: True}
  teacher:
    forward_proc: 'forward_batch_only'
    sequential: []
    forward_hook: {input: [fc], output: ['layer3', 'layer4.0.bn1']}
    wrapper:
    requires_grad: False
  student:
    forward_proc: 'forward_batch_only'
    adaptations:
      regressor:
        key: Conv2d
        kwargs: {in_channels: 256, out_channels: 1024, kernel_size: 1}
    sequential: [conv1, bn1, layer1, layer2, layer3, '+regressor']
    forward_hook: {output: ['+regressor', 'layer3']}
    frozen_modules: ['instance(BatchNorm2d)', 'conv1']
  optimizer: {key: SGD, kwargs: {lr: 0.1, momentum: 0.9}, max_grad_norm: 1}
  scheduler: {key: MultiStepLR, kwargs: {milestones: [1, 2]}, scheduling_step: 1}
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        ce:
          criterion: {key: 'CrossEntropyLoss', kwargs: {label_smoothing: 0.1}}
          criterion_wrapper:
            key: 'SimpleLossWrapper'
            kwargs:
              input: {is_from_teacher: False, module_path: '.', io: 'output'}
              target: {uses_label: True}
          weight: 1.0
        rkd:
          criterion:
            key: 'RKDDistanceLoss'
            kwargs: {student_module_path: '+regressor', teacher_module_path: fc, teacher_module_io: input}
          weight: 1
        at:
          criterion:
            key: 'ATLoss'
            kwargs:
              at_pairs:
                one:
                  teacher: {io: output, path: layer3}
                  student: {io: output, path: layer3}
                  weight: 1
          weight: 1000.0
test:
  test_data_loader: *loader
"""


def test_idioms_of_torchdistills_own_recipes_are_no_problems():
    assert check(parse(IDIOMS, Path("idioms.yaml"))) == []


TERMS = "train.criterion.kwargs.sub_terms"
ACCEPTED = {
    ("kwargs: {weights: IMAGENET1K_V1}", "kwargs: {pretrained: True}"): (
        "models.student_model.kwargs.pretrained", "torchvision has replaced it; set weights, to a name or to None",
    ),
    ("              at_pairs:", "              mod: paper\n              at_pairs:"): (
        f"{TERMS}.at.criterion.kwargs.mod", "ATLoss ignores this argument; did you mean mode?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", ACCEPTED)
def test_what_torchdistill_accepts_and_ignores_is_a_note(change):
    findings = examine(parse(IDIOMS.replace(*change), Path("idioms.yaml")))
    assert findings.problems == []
    assert ACCEPTED[change] in findings.notes


@pytest.mark.parametrize("legacy", ["pretrained: true, num_clases: 3", "pretrained: true, weights: x"])
def test_arguments_beside_a_legacy_one_are_checked(legacy):
    override = f"models.student_model.kwargs={{{legacy}}}"
    assert check(parse(IDIOMS, Path("idioms.yaml"), [override]))


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("train.teacher.forward_hook.output=[layer5]", "train.teacher.forward_hook.output.0"),
        ("train.student.forward_hook.output=['+regresor', layer3]", "train.student.forward_hook.output.0"),
        ("train.student.sequential.1=bn", "train.student.sequential.1"),
        ("train.student.adaptations.regressor.kwargs={}", "train.student.adaptations.regressor.kwargs.in_channels"),
        ("train.criterion.kwargs.sub_terms.at.criterion.kwargs.at_pairs.one.teacher.path=layer1", ".teacher.path"),
        ("models.student_model.kwargs={num_clases: 2}", "models.student_model.kwargs.num_clases"),
        ("train.scheduler.kwargs={}", "train.scheduler.kwargs.milestones"),
        ("dependencies=[{name: nowhere}]", "dependencies.0"),
    ],
)
def test_mistakes_in_idioms(override, path):
    found = check(parse(IDIOMS, Path("idioms.yaml"), [override]))
    assert found[0][0].endswith(path)


# A YAML for torchdistill alone, which its scripts run.
HOST = """
datasets:
  ? &train_id !join [&name fake, /train]
  : !import_call
    key: torchvision.datasets.FakeData
    init: {kwargs: {size: 16, num_classes: 4, image_size: [3, 8, 8], transform: &f !import_call {key: custom.scaled}}}
  ? &test_id !join [*name, /test]
  : !import_call
    key: torchvision.datasets.FakeData
    init: {kwargs: {size: 8, image_size: [3, 8, 8], num_classes: 4, transform: *f}}
models:
  teacher_model:
    key: &teacher_key Tiny
    kwargs: {width: 8}
    src_ckpt:
  student_model:
    key: &student_key Tiny
    kwargs: {width: 4}
    _experiment: &experiment !join [*student_key, _from_, *teacher_key]
    dst_ckpt: !join [./ckpt/, *experiment, .pt]
train:
  log_freq: 10
  num_epochs: 1
  train_data_loader:
    dataset_id: *train_id
    sampler:
      class_or_func: !import_get {key: torch.utils.data.RandomSampler}
      kwargs:
    kwargs: {batch_size: 8, num_workers: 0, drop_last: False}
    cache_output:
  val_data_loader: &test_data_loader
    dataset_id: *test_id
    sampler:
      class_or_func: !import_get {key: torch.utils.data.SequentialSampler}
      kwargs:
    kwargs: {batch_size: 8, num_workers: 0}
  teacher: {forward_proc: forward_batch_only, sequential: [], wrapper: DataParallel}
  student:
    forward_proc: forward_batch_only
    adaptations:
    sequential: []
    frozen_modules: []
    wrapper: DistributedDataParallel
    requires_grad: True
  optimizer: {key: SGD, kwargs: {lr: 0.1}}
  criterion:
    key: WeightedSumLoss
    kwargs:
      sub_terms:
        kd:
          criterion:
            key: KDLoss
            kwargs:
              {student_module_path: ., student_module_io: output, teacher_module_path: ., teacher_module_io: output,
               temperature: 4.0, alpha: 0.5}
          weight: 1.0
test:
  test_data_loader: *test_data_loader
"""
CUSTOM = """
from torch import nn
from torchdistill.models.registry import register_model
import torchvision

def scaled():
    return torchvision.transforms.ToTensor()

@register_model
class Tiny(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Flatten(), nn.Linear(192, width), nn.BatchNorm1d(width), nn.Linear(width, 4))
"""
GIVEN = ["recipe.task=classification", "recipe.seed=0", "train.teacher.requires_grad=False", "dependencies=[custom]"]


@pytest.fixture
def host_recipe(tmp_path, monkeypatch):
    """A file for torchdistill in the current folder, with a module that it names."""
    from torchdistill.models.registry import MODEL_DICT

    (tmp_path / "host.yaml").write_text(HOST)
    (tmp_path / "custom.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield "host.yaml"
    sys.modules.pop("custom", None)
    MODEL_DICT.pop("Tiny", None)


def test_what_torchdistill_runs_is_no_problem_and_rkd_run_takes_the_rest_from_its_command_line(host_recipe, capsys):
    assert main(["check", host_recipe, "dependencies=[custom]"]) == 0
    printed = capsys.readouterr().out
    needed = printed.partition("`rkd run` needs in addition")[2].splitlines()[1:4]
    assert [line.split(": ")[0].strip() for line in needed] == [
        "train.teacher.requires_grad",
        "recipe.task",
        "recipe.seed",
    ]
    assert main(["run", host_recipe, *GIVEN[:2], GIVEN[3]]) == 1
    assert "train.teacher.requires_grad: missing; write `False`" in capsys.readouterr().err
    assert main(["run", host_recipe, *GIVEN]) == 0
    assert "top1" in capsys.readouterr().out


def test_modules_beside_the_user_come_after_installed_ones(host_recipe, tmp_path):
    (tmp_path / "yaml.py").write_text("raise SystemExit")
    main(["check", host_recipe])
    assert sys.path[-1] == str(tmp_path)


def test_tasks_are_those_that_can_be_measured():
    assert set(get_args(Task)) == set(EVALUATORS)


LOADER = "train.train_data_loader"
STUDENT, TEACHER = "models.student_model", "models.teacher_model"
SEQUENTIAL = "class_or_func: !import_get {key: torch.utils.data.SequentialSampler}"
# What is changed in the file, overrides, what kind of finding it is, its path and a part of its sentence.
READINESS = {
    "too few outputs": (
        (), f"{STUDENT}={{key: resnet18, kwargs: {{num_classes: 3}}}}",
        "problems", f"{STUDENT}.kwargs.num_classes", "expected 4 outputs for the classes of fake/train, got 3",
    ),
    "too many outputs": (
        (), f"{STUDENT}={{key: resnet18, kwargs: {{num_classes: 5}}}}",
        "notes", f"{STUDENT}.kwargs.num_classes", "expected 4 outputs for the classes of fake/train, got 5",
    ),
    "no batch": (
        (), f"{LOADER}.kwargs={{batch_size: 17, drop_last: True}}",
        "problems", f"{LOADER}.kwargs.batch_size", "an epoch of 16 images has no batch of 17",
    ),
    "one image in front of BatchNorm1d": (
        (), f"{LOADER}.kwargs={{batch_size: 5}}",
        "problems", f"{LOADER}.kwargs", "the last batch of 16 images is one image, for which BatchNorm1d",
    ),
    "always one image": (
        (), f"{LOADER}.kwargs={{batch_size: 1}}",
        "problems", f"{LOADER}.kwargs", "every batch is one image, for which BatchNorm1d",
    ),
    "one image": (
        ("batch_size: 8, num_workers: 0, drop_last: False", "batch_size: 5"),
        f"{STUDENT}={{key: resnet18, kwargs: {{num_classes: 4}}}}",
        "notes", f"{LOADER}.kwargs", "which has no relation to another, and too few for BatchNorm2d",
    ),
    "one image of a sample": (
        ("data.RandomSampler}\n      kwargs:", "data.RandomSampler}\n      kwargs: {num_samples: 6}"),
        f"{LOADER}.kwargs={{batch_size: 5}}",
        "problems", f"{LOADER}.kwargs", "the last batch of 6 images",
    ),
    "no such weights": (
        (), f"{STUDENT}={{key: resnet18, kwargs: {{weights: IMAGENET1K_V9}}}}",
        "problems", f"{STUDENT}.kwargs.weights", "resnet18 has no weights 'IMAGENET1K_V9'; did you mean IMAGENET1K_V1",
    ),
    "weights that are not there": (
        (), f"{TEACHER}={{key: resnet18, kwargs: {{weights: IMAGENET1K_V1}}}}",
        "notes", f"{TEACHER}.kwargs.weights", "not in PyTorch's cache; they will be downloaded to",
    ),
    "no checkpoint": (
        ("datasets:\n", "recipe: {teacher: no.pt, task: classification, seed: 0}\ndatasets:\n"),
        f"{TEACHER}.src_ckpt=no.pt",
        "missing", f"{TEACHER}.src_ckpt", "there is no file 'no.pt'; train that model first, or set recipe.teacher",
    ),
    "no data": (
        ("FakeData\n    init: {kwargs: {size: 16, ", "ImageFolder\n    init: {kwargs: {root: nowhere, "),
        "dependencies=[custom]",
        "missing", "datasets.fake/train.init.kwargs.root", "there is no folder 'nowhere'",
    ),
    "classes of a folder": (
        ("FakeData\n    init: {kwargs: {size: 16, ", "ImageFolder\n    init: {kwargs: {root: data, "),
        f"{STUDENT}={{key: resnet18, kwargs: {{num_classes: 2}}}}",
        "problems", f"{STUDENT}.kwargs.num_classes", "expected 3 outputs for the classes of fake/train, got 2",
    ),
    "images that are not counted": (
        ("FakeData\n    init: {kwargs: {size: 16, ", "ImageFolder\n    init: {kwargs: {root: data, "),
        "dependencies=[custom]",
        "unchecked", LOADER, "the number of batches in an epoch",
    ),
    "shuffled test data": (
        (SEQUENTIAL, SEQUENTIAL.replace("Sequential", "Random")), "dependencies=[custom]",
        "notes", "train.val_data_loader.sampler", "RandomSampler shuffles test images",
    ),
    "dropped test data": (
        (), "train.val_data_loader.kwargs={batch_size: 8, drop_last: True}",
        "notes", "train.val_data_loader.kwargs.drop_last", "the last images are not measured",
    ),
    "augmented test data": (
        ("custom.scaled", "torchvision.transforms.RandomHorizontalFlip"), "dependencies=[custom]",
        "notes", "test.test_data_loader.dataset_id", "RandomHorizontalFlip changes test images at random",
    ),
    "teacher in training mode": (
        (), "dependencies=[custom]",
        "notes", "train.teacher.forward_proc", "so that its BatchNorm1d change its outputs",
    ),
    "cache of an older torchdistill": (
        (), f"{LOADER}.cache_output=ckpt",
        "notes", f"{LOADER}.cache_output", "torchdistill 1.1.5 ignores it",
    ),
    "no test data": (
        ("val_data_loader: &test", "_val_data_loader: &test"), "dependencies=[custom]",
        "needs", "train.val_data_loader", "the student is measured after every epoch",
    ),
    "checkpoint that torchdistill would execute": (
        ("requires_grad: True", "src_ckpt: a.pt"), "dependencies=[custom]",
        "needs", "train.student.src_ckpt", "name it under `models:`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READINESS)
def test_what_is_known_before_data_is_loaded(name, host_recipe, tmp_path):
    changes, override, kind, path, message = READINESS[name]
    for label in "abc":
        (tmp_path / "data" / label).mkdir(parents=True)
    find_modules_of_user()
    text = HOST.replace(*changes) if changes else HOST
    overrides = dict.fromkeys([*GIVEN, override])
    findings = examine(parse(text, Path(host_recipe), list(overrides)))._asdict()
    assert any(place == path and message in sentence for place, sentence in findings.pop(kind)), findings
    assert all(path not in dict(others) for others in findings.values())


def test_a_host_recipe_whose_teacher_stands_still_has_nothing_to_note(host_recipe):
    still = [
        "dependencies=[custom, rkd_plugin.adapters.torchdistill]",
        "train.teacher.forward_proc=forward_in_eval_mode",
    ]
    find_modules_of_user()
    assert examine(parse(HOST, Path(host_recipe), [*GIVEN[:3], *still])) == ([], [], [], [], [])


def test_a_key_that_is_an_alias_is_followed():
    key = "rkd_plugin.components.datasets.Digits"
    text = TEXT.replace("  seed: &seed 0", f"  seed: &seed 0\n  dataset: &dataset {key}")
    text = text.replace(f"key: '{key}'", "key: *dataset")
    assert check(parse(text, Path("x.yaml"))) == []
    found = dict(check(parse(text, Path("x.yaml"), ["recipe.dataset=torchvision.datasets.MNIST"])))
    assert found["datasets.digits/train.init.kwargs.root"] == "required by MNIST, but missing"
    assert found["datasets.digits/test.init.kwargs.classes"].startswith("MNIST has no such argument")
    ((path, message), *_) = check(parse(text, Path("x.yaml"), ["recipe.dataset=torchvision.datasets.MNITS"]))
    assert path == "datasets.digits/train.key"
    assert "did you mean MNIST" in message


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("resnet_18", ["ResNet18", "vgg"], "; did you mean ResNet18?"),
        ("adam", ["Adam", "AdamW"], "; did you mean Adam?"),
        ("Compose", ["torchvision.transforms.Compose"], "; did you mean torchvision.transforms.Compose?"),
        ("transforms.compose", ["Compose", "Resize"], "; did you mean Compose?"),
        ("digit", ["Digits", "digits"], "; did you mean Digits, digits?"),
        ("q" * 10**6, ["a" * 10**6, *map(str, range(10**5))], ""),
    ],
)
def test_suggestions(name, known, hint):
    assert suggest(name, known) == hint


MODULES = ["x.__main__", "torch.__main__", "__main__", "rkd_plugin.__main__", "antigravity", "this", "idlelib.idle"]
MODULES += ["-m pip", "a b", "a/b", "", ".", ".adapters", "..x", "torch..nn", "torch.nn."]


@pytest.mark.parametrize("name", MODULES)
def test_programs_and_what_is_no_module_are_not_imported(name, monkeypatch):
    imported = []
    monkeypatch.setattr("importlib.import_module", lambda name, *_: imported.append(name))
    named = json.dumps(name)
    key = json.dumps(f"{name}.x")
    for text in (
        f"dependencies: {named}",
        f"dependencies: [[{named}]]",
        f"datasets: {{a: !import_get {{key: {key}}}}}",
    ):
        assert any("expected" in message for _, message in check(parse(text, Path("x.yaml"))))
    assert imported == []


def test_relative_modules_are_imported_from_their_package():
    good, bad = ("{name: .torchdistill, package: rkd_plugin.adapters}", "{name: .__main__, package: rkd_plugin}")
    assert check(read("quickstart/rkd_da", [f"dependencies=[{good}, rkd_plugin.components.models]"])) == []
    ((path, message), *_) = check(read("quickstart/rkd_da", [f"dependencies=[{bad}, rkd_plugin.components.models]"]))
    assert path == "dependencies.0"
    assert "got 'rkd_plugin.__main__', which runs a program" in message


def test_a_suite_is_not_a_recipe():
    assert check(read("quickstart"))[0][0] == "suite"


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("suite.seeds=[a]", "suite.seeds"),
        ("suite.rows.1.recipe=quickstart/nobody", "suite.rows.1.recipe"),
        ("suite.rows.1.name=teacher", "suite.rows.1.name"),
        ("suite.rows.2.teacher=rkd_da", "suite.rows.2.teacher"),
        ("suite.panels=[nobody]", "suite.panels.0"),
    ],
)
def test_mistakes_of_suites(override, path, tmp_path):
    (tmp_path / "suite.yaml").write_text(read("quickstart", [override]).resolved(), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_suite(tmp_path / "suite.yaml")
    assert caught.value.problems[0][0] == path


def test_arguments_are_followed_through_keywords():
    import torchvision
    from pytorch_metric_learning.losses import ProxyAnchorLoss
    from torchdistill.losses.mid_level import KDLoss, RKDLoss

    resnet = arguments(torchvision.models.resnet18)
    assert {"weights", "num_classes", "zero_init_residual"} <= resnet.named.keys()
    assert not {"block", "layers"} & resnet.named.keys()  # given by resnet18 itself
    assert not resnet.is_open
    # Upwards through the MRO, required ones included.
    proxy = arguments(ProxyAnchorLoss).named
    assert proxy["num_classes"].required
    assert not proxy["distance"].required
    # KDLoss passes its keywords to a loss; RKDLoss ignores them.
    assert "label_smoothing" in arguments(KDLoss).named
    assert arguments(RKDLoss).named.keys().isdisjoint({"kwargs", "impl"})
    assert arguments(dict).is_open


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, None),
        (True, float, "a number"),
        (None, int | None, None),
        ("x", torch.Tensor | float, "an object of type Tensor (`!import_call`) or a number"),
        ([1, 2], tuple[int, int], None),
        ([1], tuple[int, int], "a list of 2"),
        ({}, dict[str, int], None),
        ("x", object, None),
        (Tagged("!join", []), int, None),
    ],
)
def test_mismatch(value, hint, expected):
    assert mismatch(value, hint) == expected


# Whatever the text, the answer is a RecipeError or a list of problems.

KEYS = st.sampled_from(
    ["recipe.seed", "train.num_epochs", "datasets.digits/train", "test", "models.student_model", "x"]
)


@settings(max_examples=100, deadline=None)
@given(key=st.one_of(KEYS, st.text(max_size=20)), equals=st.sampled_from(["=", "==", ""]), value=st.text(max_size=20))
def test_any_override(key, equals, value):
    try:
        recipe = read("quickstart/rkd_da", [f"{key}{equals}{value}"])
    except RecipeError:
        return
    assert isinstance(check(recipe), list)
    assert parse(recipe.resolved(), recipe.path).data.keys() == recipe.data.keys()


@settings(max_examples=100, deadline=None)
@given(
    start=st.integers(0, len(TEXT)),
    length=st.integers(0, 40),
    new=st.text(string.punctuation + " \n0e-", max_size=6),
    end=st.one_of(st.none(), st.integers(0, len(TEXT))),
)
def test_any_text(start, length, new, end):
    text = (TEXT[:start] + new + TEXT[start + length :])[:end]
    try:
        recipe = parse(text, Path("mutated.yaml"))
    except RecipeError:
        return
    assert isinstance(check(recipe), list)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("recipe: {a: &a [8, 8]}\ndatasets: {train: !import_call {size: *a}}", ["datasets.train.size"]),
        ("recipe: {a: &a {b: 1}}\ndatasets: {train: !import_call {x: [*a]}}", ["datasets.train.x.0"]),
        ("recipe: {a: &a [[1, 2]]}\nd: {t: {u: !import_get {size: *a}}}", ["d.t.u.size.0"]),
        ("recipe: {a: &a [8, 8]}\ntrain: {b: {c: {d: !import_call {size: *a}}}}", []),  # filled by then
        ("recipe: {a: &a []}\ndatasets: {train: !import_call {size: *a}}", []),
        ("datasets: {a: !import_call {size: &a [8, 8]}, b: !import_call {size: *a}}", []),
    ],
)
def test_an_alias_that_torchdistill_would_meet_empty(text, places):
    class Called(yaml.SafeLoader):
        """Calls at once, as torchdistill does."""

    met = []
    Called.add_multi_constructor(
        "!", lambda loader, _, node: met.append(str(loader.construct_mapping(node, deep=True)))
    )
    yaml.load(text, Loader=Called)
    assert [path for path, _ in early_aliases(yaml.compose(text))] == places
    assert any("[]" in value or "{}" in value for value in met) == (bool(places) or "&a []" in text)


def test_an_override_that_makes_an_anchor_a_list_is_a_problem():
    found = check(read("metric_learning/rkd", ["recipe.resized_to=[8, 8]"]))
    early = [path for path, message in found if message.startswith("expected the values of the alias, got an empty")]
    assert early
    assert all("transforms.0.init.kwargs.size." in path for path in early)


def test_a_transform_that_always_applies_is_no_random_one():
    notes = examine(read("few_shot/omniglot/rkd")).notes  # RandomInvert with p=1
    assert [message for _, message in notes if "at random" in message] == []
