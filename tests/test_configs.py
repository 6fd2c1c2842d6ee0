"""The packaged recipes: each is checked, siblings are compared, and commands in headers and the documentation exist."""

from __future__ import annotations

import copy
import functools
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from test_docs import PAGES, ROOT
from test_docs import commands as commands_in

from rkd_plugin.experiments.recipe import Recipe, Tagged, check, configs_root, find, names, read, read_suite

ENTRIES = names()
SUITES = [entry.name for entry in ENTRIES if entry.is_suite]
TEST_SETS = [entry.name for entry in ENTRIES if "/test_sets/" in entry.name]
RECIPES = [entry.name for entry in ENTRIES if entry.name not in {*SUITES, *TEST_SETS}]
ALL = [*RECIPES, *TEST_SETS]
WITH_TEACHER = [name for name in RECIPES if "src_ckpt:" in find(name).read_text(encoding="utf-8")]


@functools.cache
def recipe(name: str, *overrides: str) -> Recipe:
    return read(name, overrides)


def rows(suite: str) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """The rows of a suite with what each sets, the fast ones after the others."""
    data = read_suite(suite)
    for fast in [None, data["fast"]] if "fast" in data else [None]:
        for row in data["rows"]:
            shorter = [*fast["overrides"], *row.get("fast", ())] if fast else []
            yield row, (*data.get("overrides", ()), *shorter, *row.get("overrides", ()))


# Every file


def test_every_file_is_a_recipe_or_a_suite():
    files = {path.relative_to(configs_root()) for path in configs_root().rglob("*.y*ml")}
    assert {str(path.with_suffix("")) for path in files} == {entry.name for entry in ENTRIES}
    assert (len(files), len(SUITES), len(TEST_SETS), len(RECIPES)) == (64, 18, 4, 42)


def test_the_first_sentence_describes_the_file():
    assert all(entry.summary.endswith(".") and len(entry.summary) > 30 for entry in ENTRIES)


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_is_without_problems(name):
    assert check(recipe(name)) == []


class AtOnce(yaml.FullLoader):
    """Keeps what torchdistill's tags are given at the moment when they would call: a list from above is empty then."""

    # Without the tags that torchdistill registers with FullLoader itself.
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.FullLoader.yaml_constructors.items()
        if tag is None or not tag.startswith("!")
    }


def call(loader: yaml.FullLoader, suffix: str, node: yaml.MappingNode) -> Tagged:
    return Tagged(f"!{suffix}", copy.deepcopy(loader.construct_mapping(node, deep=True)))


AtOnce.add_multi_constructor("!", call)


@pytest.mark.parametrize("name", ALL)
def test_torchdistill_calls_with_what_is_written(name):
    loaded = yaml.load(find(name).read_text(encoding="utf-8"), Loader=AtOnce)
    assert dict(leaves(loaded, "")) == dict(leaves(recipe(name).data, ""))


def kinds(overrides: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    """What a check can tell apart: keys, names, and the types of other values."""
    values = [(key, yaml.safe_load(value)) for key, _, value in (override.partition("=") for override in overrides)]
    return frozenset((key, value if isinstance(value, str) else type(value).__name__) for key, value in values)


@pytest.mark.parametrize("one_of", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_rows_of_suites_are_without_problems(one_of):
    """Every row is read, and one of so many kinds of rows is checked."""
    problems, seen = {}, set()
    for suite in SUITES:
        for row, overrides in rows(suite):
            changed = recipe(row["recipe"], *overrides)  # every override names a key
            if (kind := (row["recipe"], kinds(overrides))) in seen:
                continue
            if len(seen) % one_of == 0 and (found := check(changed)):
                problems[suite, row["name"]] = found
            seen.add(kind)
    assert problems == {}
    assert len(seen) > 150


# Where weights come from, what of them trains, and what the input is.
NO_PART = {"weights", "frozen_until", "frozen_batchnorm", "remember", "input_size", "principal_components", "images"}


def model(of: Recipe, side: str) -> dict[str, Any]:
    """What a model is built of."""
    models = of.section("models")
    entry = models.get(side) or models["model"]
    return {"key": entry["key"], **{name: value for name, value in entry["kwargs"].items() if name not in NO_PART}}


@pytest.mark.parametrize("suite", SUITES)
def test_the_teacher_of_every_row_is_the_model_that_its_row_trains(suite):
    trained = {}
    for row, overrides in rows(suite):
        student = recipe(row["recipe"], *overrides)
        if "teacher" in row:
            assert model(student, "teacher_model") == trained[row["teacher"]], row["name"]
        trained[row["name"]] = model(student, "student_model")


def children(node: yaml.MappingNode) -> dict[str, yaml.Node]:
    return {key.value: value for key, value in node.value}


@pytest.mark.parametrize("name", RECIPES)
def test_criterion_of_every_recipe_runs(name):
    recipe(name).validate()
    from torchdistill.common.yaml_util import load_yaml_file
    from torchdistill.losses.registry import get_high_level_loss

    load_yaml_file("/dev/null")  # registers torchdistill's tags
    train = children(recipe(name).root)["train"]
    stages = [value for key, value in children(train).items() if key.startswith("stage")] or [train]
    for stage in stages:
        parts = children(stage)
        config = yaml.load(yaml.serialize(parts["criterion"]), Loader=yaml.FullLoader)  # the criterion, and no data set
        io_dict = {"teacher": {}, "student": {}}
        for side in parts.keys() & {"teacher", "student", "model"}:
            hooks = yaml.load(yaml.serialize(parts[side]), Loader=yaml.FullLoader).get("forward_hook", {})
            paths = {".": ["output"]}
            for io in ("input", "output"):
                for path in hooks.get(io, ()):
                    paths.setdefault(path, []).append(io)
            # Outputs, hints of them and pooled features are vectors; the others are maps.
            vectors = (".", "regressors.embedding", "backbone")
            shapes = {path: (8, 16) if path in vectors else (8, 16, 3, 3) for path in paths}
            io_dict["teacher" if side == "teacher" else "student"] = {
                path: {io: torch.randn(shapes[path], requires_grad=side != "teacher") for io in kinds}
                for path, kinds in paths.items()
            }
        loss = get_high_level_loss(config)(io_dict, {}, torch.arange(8) // 2)
        loss.backward()
        assert loss.isfinite()


# Siblings: what methods on one data set share

# What a method decides alone.
OWN = "dependencies train*.forward_hook.* train*.auxiliary_model_wrapper.* train.hints.criterion.*"
# Settings of some methods only, and places where a recipe names its method; each term of a criterion counts alone.
TERM = "train.criterion.kwargs.sub_terms"
PARTS = {
    "models.teacher_model.key": "recipe.teacher_* models.teacher_model.* train.teacher.*",
    "train.hints.num_epochs": "recipe.hint_epochs recipe.hint_milestones recipe.hint_learning_rate recipe.finetuning_*"
    " train.hints.*",
    f"{TERM}.rkd.weight": "recipe.distance_weight recipe.angle_weight recipe.l2_normalize_features recipe.rkd_on",
    f"{TERM}.attention.weight": "recipe.attention_weight",
    f"{TERM}.hint.weight": "recipe.hint_weight",
    f"{TERM}.relations.weight": "recipe.compared recipe.potential recipe.penalty recipe.scale recipe.temperature"
    " recipe.neighbours recipe.relations_weight",
}


class Apart(NamedTuple):
    """Settings in which some recipes of a folder differ from the others, but not from each other; all, if None."""

    settings: str
    recipes: set[str] | None
    reason: str


WEIGHTS = "recipe.*_weight *.rkd.*_weight"
SMALL = {"small/attention", "small/fitnet"}
METRIC_LEARNING = [
    Apart("recipe.l2_normalize models.student_model.*.l2_normalize", {"rkd", "relational"}, "the paper's best, X"),
    Apart("recipe.num_epochs recipe.milestones", {"triplet"}, "the paper's schedule without a teacher"),
    Apart("train.num_epochs train.scheduler.* train.optimizer.*.lr", {"triplet", "fitnet"}, "and so after the hints"),
    Apart("train.teacher.forward_proc", {"fitnet"}, "triplets after the hints need no teacher"),
]
DIFFERENCES = {
    "classification/cifar100": [
        Apart(WEIGHTS, {"rkd"}, "a method without RKD unless an override says so"),
        Apart("recipe.small_images", {"alone"}, "an anchor for the teacher, which `alone` trains"),
        Apart("recipe.*num_epochs recipe.*milestones train.num_epochs train.scheduler.*", SMALL, "scaled down"),
        Apart("recipe.hint_epochs train.hints.num_epochs train.hints.scheduler.*", SMALL, "scaled down"),
        Apart("recipe.*network models.*.network *teacher*small_images", SMALL, "scaled down"),
        Apart("recipe.teacher_checkpoint models.*_ckpt", SMALL, "scaled down: runs of another suite"),
        Apart("recipe.channels_last *num_workers *num_workers.*", SMALL, "for two cores"),
        Apart("*.at_pairs.*", SMALL, "its networks have three blocks"),
    ],
    "classification/tiny_imagenet": [Apart(WEIGHTS, {"rkd"}, "a method without RKD unless an override says so")],
    "classification/crd_benchmark": [
        Apart("recipe.network models.student_model.*.network", {"alone"}, "the teacher by default"),
        Apart("recipe.small_images", {"alone"}, "an anchor for the teacher, which `alone` trains"),
    ],
    "few_shot/omniglot": [],
    "few_shot/mini_imagenet": [],
    "metric_learning": [
        *METRIC_LEARNING,
        Apart("recipe.head_learning_rate train.optimizer.module_wise_*", None, "a rate of the last layer, where used"),
        Apart("recipe.learning_rate recipe.decay", None, "anchors where a row of a suite sets them"),
        Apart(
            "*.remember *teacher_model*.frozen_until",
            {"triplet", "rkd", "relational"},
            "no hooks inside",
        ),
        Apart("*.principal_components *.images.*", {"triplet"}, "a control"),
    ],
    "metric_learning/small_birds": [
        METRIC_LEARNING[0]._replace(recipes={"rkd"}),
        METRIC_LEARNING[3],
        Apart("recipe.num_epochs recipe.milestones", {"fitnet"}, "half of its steps learn hints"),
        Apart("train.num_epochs train.scheduler.*", {"fitnet"}, "the other half learns triplets"),
        Apart("train.optimizer.*.lr", {"triplet", "darkrank"}, "each chosen on another seed"),
        Apart("recipe.learning_rate", None, "an anchor where a row of the suite sets it"),
        Apart("recipe.widths", {"triplet"}, "an anchor for the teacher, which `triplet` trains"),
    ],
    "metric_learning/test_sets": [
        Apart("recipe.data_root datasets.test.*.dataset.*", None, "each is another data set"),
        Apart("recipe.cache datasets.test.*.folder", {"cifar100"}, "its images are no files"),
    ],
    "text": [
        Apart("recipe.l2_normalize", None, "an anchor of RKD and of the projection, with another default"),
        Apart("recipe.near_*", {"rkd"}, "relations among the nearest"),
        Apart("recipe.pca_bank models.student_model.kwargs.pca_bank", {"rkd"}, "an anchor for the teacher's PCA"),
        Apart("recipe.relational_weight", {"relational"}, "beside the contrastive loss"),
        Apart("recipe.projection_weight recipe.teacher_embedding_dim", {"projection"}, "the layer and its weight"),
    ],
    "quickstart": [
        Apart("recipe.embedding_dim models.student_model.* train.optimizer.*.lr", {"teacher"}, "it is wider"),
        Apart("*.l2_normalize", {"rkd_d", "rkd_a", "rkd_da"}, "the paper's best, X"),
        Apart("*.rkd.criterion.key", None, "an example of each loss"),
        Apart("*.rkd.criterion.*_weight", {"rkd_da"}, "the only loss of two terms"),
    ],
}


def settings(name: str) -> dict[str, Any]:
    """Every value by its path; of two stages the last is ``train``, with the data loaders, and the first the hints."""
    data = dict(recipe(name).data)
    train, models = dict(data.get("train", {})), dict(data.get("models", {}))
    if "stage1" in train:
        hints, last = train.pop("stage1"), train.pop("stage2")
        loaders = {key: hints[key] for key in hints if key.endswith("data_loader")}
        data["train"] = {**train, **loaders, **last, "hints": {k: hints[k] for k in hints.keys() - loaders.keys()}}
    elif "model" in models:
        data["train"] = {("student" if key == "model" else key): value for key, value in train.items()}
        data["models"] = {"student_model": models["model"]}
    data["datasets"] = {key.rpartition("/")[2]: value for key, value in data["datasets"].items()}
    found = dict(leaves(data, ""))
    ids = {path: value.rpartition("/")[2] for path, value in found.items() if path.endswith("dataset_id")}
    stem = name.rpartition("/")[2]
    written = {path: value.replace(f"/{stem}.pt", "") for path, value in found.items() if path.endswith("dst_ckpt")}
    return {**found, **ids, **written}


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tagged):
        yield f"{path}.tag", value.tag
        yield from leaves(value.value, path)
    elif isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(inner, Tagged) for inner in value):
        yield from leaves(dict(enumerate(value)), path)
    else:
        yield path, value


def siblings(folder: str) -> dict[str, dict[str, Any]]:
    """The settings of a folder's recipes; those of CIFAR-100 scaled down are among the others."""
    found = {name.rpartition("/")[2]: settings(name) for name in ALL if name.rpartition("/")[0] == folder}
    if folder == "classification/cifar100":
        found |= {key: settings(f"classification/{key.replace('small', 'small_cifar100')}") for key in SMALL}
    return found


def fits(path: str, patterns: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns.split())


def has_part(of: dict[str, Any], path: str) -> bool:
    """Whether a recipe has the part that a setting belongs to."""
    if term := re.match(rf"{TERM}\.\w+", path):
        return f"{term.group()}.weight" in of
    return all(mark in of for mark, patterns in PARTS.items() if fits(path, patterns))


def differences(recipes: dict[str, dict[str, Any]], allowed: list[Apart]) -> list[str]:
    """The settings in which recipes differ, or that some of them lack."""
    found = []
    for path in dict.fromkeys(path for values in recipes.values() for path in values):
        apart = [entry.recipes for entry in allowed if fits(path, entry.settings)]
        if fits(path, OWN) or None in apart:
            continue
        same: dict[tuple[bool, ...], list[Any]] = {}
        for name, values in recipes.items():
            if has_part(values, path):
                same.setdefault(tuple(name in others for others in apart), []).append(values.get(path, "missing"))
        if any(value != values[0] for values in same.values() for value in values):
            found.append(path)
    return found


@pytest.mark.parametrize("folder", DIFFERENCES)
def test_siblings_differ_only_where_a_reason_is_given(folder):
    recipes, allowed = siblings(folder), DIFFERENCES[folder]
    assert differences(recipes, allowed) == []
    for entry in allowed:  # each is needed
        for pattern in entry.settings.split():
            rest = [*(other for other in allowed if other is not entry)]
            rest.append(entry._replace(settings=entry.settings.replace(pattern, "", 1)))
            assert differences(recipes, rest), (pattern, entry.reason)


def test_every_recipe_has_siblings():
    assert {name.rpartition("/")[0] for name in ALL} == {*DIFFERENCES, "classification/small_cifar100"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("alone", "recipe.num_workers.key"),
        ("alone", "models.student_model.kwargs.num_classes"),
        ("fitnet", "train.optimizer.kwargs.lr"),
        ("fitnet", "train.val_data_loader.kwargs.batch_size"),
        ("hkd", "datasets.train.init.kwargs.transform.init.kwargs.transforms.0.init.kwargs.padding"),
        ("rkd", "test.test_data_loader.sampler.class_or_func.key"),
        ("attention", "models.teacher_model.kwargs.small_images"),
        ("attention", f"{TERM}.rkd.criterion.kwargs.l2_normalize"),
        ("small/fitnet", "recipe.hint_learning_rate"),
    ],
)
def test_a_setting_that_one_sibling_lacks_or_has_otherwise_is_found(name, path):
    recipes, allowed = siblings("classification/cifar100"), DIFFERENCES["classification/cifar100"]
    others = {key: value for key, value in recipes[name].items() if key != path}
    assert len(others) == len(recipes[name]) - 1
    for changed in (others, {**others, path: "another"}):
        assert differences({**recipes, name: changed}, allowed) == [path]


def test_test_sets_are_prepared_as_the_test_data_of_metric_learning():
    def prepared(name):
        kept = "datasets.test.*transform* datasets.test*.key test.* recipe.recall_at"
        left_out = "datasets.test.*.dataset.key datasets.test.*.dataset.tag"
        return {p: v for p, v in settings(name).items() if fits(p, kept) and not fits(p, left_out)}

    expected = prepared("metric_learning/rkd")
    assert len(expected) > 20
    assert all(prepared(name) == expected for name in TEST_SETS)


# Commands in headers and in the documentation

COMMAND = re.compile(r"(?:#   )?rkd (.+)")


class Command(NamedTuple):
    verb: str
    name: str
    overrides: tuple[str, ...]
    options: dict[str, list[str]]


def header(name: str) -> list[str]:
    lines = find(name).read_text(encoding="utf-8").splitlines()
    return lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]


def commands(lines: list[str]) -> list[Command]:
    return [command(shlex.split(match.group(1), comments=True)) for line in lines if (match := COMMAND.match(line))]


def command(words: list[str]) -> Command:
    verb, *rest = words
    options: dict[str, list[str]] = {}
    plain: list[str] = []
    to = plain
    for word in rest:
        if word.startswith("--"):
            to = options.setdefault(word, [])
        elif "=" in word:
            plain.append(word)
        else:
            to.append(word)
    name = next((word for word in plain if "=" not in word), "")
    return Command(verb, name, tuple(word for word in plain if "=" in word), options)


def trained(by: Command) -> dict[Path, Recipe]:
    """The folders that a command writes, each with its recipe; a `RecipeError` if anything that it names is missing."""
    if by.verb in ("run", "embed"):
        folder = Path(*by.options.get("--out", ["/".join(["runs", *by.name.split("/")[-2:]])]))
        return {folder: recipe(by.name, *by.overrides)}
    suite = read_suite(by.name)
    chosen = by.options.get("--rows", [row["name"] for row in suite["rows"]])
    assert {*chosen} <= {row["name"] for row in suite["rows"]}
    assert "--fast" not in by.options or "fast" in suite
    seeds = by.options.get("--seeds", suite["seeds"])
    return {
        Path("runs", by.name.split("/")[-2] if "/" in by.name else by.name, f"{row['name']}-seed{seed}"): recipe(
            row["recipe"], *overrides, *by.overrides
        )
        for row, overrides in rows(by.name)
        if row["name"] in chosen
        for seed in seeds
    }


@pytest.mark.parametrize("name", [*RECIPES, *SUITES])
def test_a_header_has_a_command_and_a_result(name):
    found = commands(header(name))
    assert {by.verb for by in found} <= {"run", "reproduce", "embed"}
    assert name in {by.name for by in found}
    assert all(trained(by) for by in found)
    assert re.search(r"\bResults?\b|Not yet run|not yet run", " ".join(header(name)))


@pytest.mark.parametrize("name", TEST_SETS)
def test_the_header_of_a_test_set_names_itself(name):
    assert [(by.verb, by.options["--data"]) for by in commands(header(name))] == [("eval", [name])]


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_of_a_recipe_is_what_its_header_trains(name):
    runs = {folder: of for by in commands(header(name)) for folder, of in trained(by).items()}
    student = recipe(name)
    teacher = runs[Path(student.settings["teacher_checkpoint"]).parent]
    assert model(student, "teacher_model") == model(teacher, "student_model")


def commands_of_page(path: Path) -> list[Command]:
    found = [command(words) for words in commands_in(path.read_text(encoding="utf-8"))]
    return [by for by in found if by.verb in ("run", "reproduce", "bench") and "/" in by.name]


@pytest.mark.parametrize(
    "path", [path for path in PAGES if commands_of_page(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_commands_of_the_documentation_exist(path):
    for by in commands_of_page(path):  # a benchmark takes the steps of a run
        assert trained(by._replace(verb="run") if by.verb == "bench" else by)


def test_every_key_that_a_header_or_page_names_is_one_of_a_recipe():
    key = re.compile(r"\brecipe\.([a-z_0-9]+)")
    for name in ALL:
        prose = " ".join(line for line in header(name) if not line.startswith("#   "))
        assert {*key.findall(prose)} <= recipe(name).settings.keys(), name
    known = {setting for name in ALL for setting in recipe(name).settings}
    for path in PAGES:
        assert {*key.findall(path.read_text(encoding="utf-8"))} <= known | {"teacher_bank", "yaml"}, (
            path
        )  # `recipe.yaml` is a file


def test_lines_of_headers_are_short():
    long = [(name, line) for name in [*ALL, *SUITES] for line in header(name) if len(line) > 120]
    assert [line for _, line in long if not line.startswith("#   rkd ")] == []
