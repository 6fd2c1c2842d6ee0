"""Teacher banks: the numbers of a live teacher, what is refused, and what is never read."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils import common_functions as c_f
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.transforms import v2

from rkd_plugin import cli
from rkd_plugin.adapters.pml import FromPacked, RKDDALoss, RKDTrainer, TeacherStudentTrunk, from_bank
from rkd_plugin.experiments import runner
from rkd_plugin.experiments.bank import Bank, files, views, writing
from rkd_plugin.experiments.bank.recipes import WithTeacherBank, taught
from rkd_plugin.experiments.bank.writing import embed
from rkd_plugin.experiments.datasets import Digits
from rkd_plugin.experiments.experiment import Experiment
from rkd_plugin.experiments.files import write_checkpoint
from rkd_plugin.experiments.recipe import RecipeError, names, read
from rkd_plugin.experiments.samplers import ClassBalancedBatchSampler

# Convolutions round otherwise in batches of another composition, and a step carries it on.
CLOSE = 1e-4
KWARGS = "{width: 4, embedding_dim: 8, l2_normalize: False}"
STUDENT = f"models.student_model={{key: ConvEmbedding, kwargs: {KWARGS}, src_ckpt: PATH}}"
SHORT = ["recipe.num_epochs=2", "recipe.samples_per_epoch=256", "recipe.batch_size=64"]

MAPS = """
recipe: {task: classification, seed: 0}
dependencies: [rkd_plugin.adapters.torchdistill, rkd_plugin.experiments.models]
datasets:
  train: &train !import_call
    key: torchvision.datasets.FakeData
    init:
      kwargs:
        size: 24
        image_size: [3, 32, 32]
        num_classes: 3
        transform: !import_call
          key: torchvision.transforms.v2.Compose
          init:
            kwargs:
              transforms:
                - !import_call {key: torchvision.transforms.v2.PILToTensor}
                - !import_call
                  key: torchvision.transforms.v2.ToDtype
                  init: {kwargs: {dtype: !import_get {key: torch.float32}, scale: True}}
                # more
  other: *train
models:
  teacher_model: {key: ImageClassifier, kwargs: {network: resnet8, num_classes: 3}}
  student_model: {key: ImageClassifier, kwargs: {network: resnet8, num_classes: 3}}
train:
  num_epochs: 1
  log_freq: 10
  train_data_loader: &loader
    dataset_id: train
    sampler: {class_or_func: !import_get {key: torch.utils.data.SequentialSampler}}
    kwargs: {batch_size: 8}
  val_data_loader: *loader
  teacher: {forward_proc: forward_in_eval_mode, requires_grad: False, forward_hook: {output: [backbone, HOOK]}}
  student: {forward_proc: forward_batch_only, forward_hook: {output: [backbone, HOOK]}}
  optimizer: {key: SGD, kwargs: {lr: 0.01}}
  criterion:
    key: WeightedSumLoss
    kwargs:
      sub_terms:
        kd:
          criterion:
            key: KDLoss
            kwargs: {student_module_path: '.', student_module_io: output, teacher_module_path: '.',
                     teacher_module_io: output, temperature: 4.0, alpha: 0.0}
          weight: 1.0
        rkd:
          criterion:
            key: RKDDALoss
            kwargs: {student_module_path: HOOK, teacher_module_path: HOOK, l2_normalize: True}
          weight: 1.0
test:
  test_data_loader: *loader
"""
FLIP = "# more", "- !import_call {key: torchvision.transforms.v2.RandomHorizontalFlip}"


def maps_recipe(folder, *changes, hook="backbone", overrides=()):
    text = MAPS.replace("HOOK", hook)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "maps.yaml").write_text(text)
    return read(folder / "maps.yaml", overrides)


def digits(teacher, *overrides):
    return read("quickstart/rkd_da", [f"recipe.teacher_checkpoint={teacher}", *SHORT, *overrides])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of a teacher that was not trained, and of a student beside it."""
    folder = tmp_path_factory.mktemp("teacher")
    experiment = Experiment(read("quickstart/teacher"))
    write_checkpoint(folder / "teacher.pt", {"model": experiment.student.state_dict()})
    student = Experiment(read("quickstart/student")).student
    write_checkpoint(folder / "student.pt", {"model": student.state_dict()})
    return folder / "teacher.pt"


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("banks") / "bank"
    embed(digits(teacher), folder)
    return folder


@pytest.fixture
def bank(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "bank"))


def vectors_of(teacher, images):
    model = Experiment(digits(teacher)).teacher().eval()
    with torch.no_grad():
        return model(images)


def losses(recipe, folder):
    return [epoch["loss"] for epoch in runner.run(recipe, folder)["history"]]


# The same numbers as with the teacher.


@pytest.mark.parametrize("balanced", [False, True], ids=["random", "class-balanced"])
def test_a_run_from_a_bank_has_the_losses_of_one_with_the_teacher(balanced, teacher, whole, tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text(digits(teacher, STUDENT.replace("PATH", str(teacher.with_name("student.pt")))).resolved())
    if balanced:
        sampler = "batch_sampler: {key: ClassBalancedBatchSampler, kwargs: {batch_size: 60, images_per_class: 12, "
        old = re.compile(r"kwargs:\s+batch_size: \*\w+\s+num_workers: 0\s+drop_last: True")
        text, count = old.subn(f"kwargs: {{}}\n    {sampler}iterations: 4}}}}", path.read_text())
        assert count == 1
        path.write_text(text.replace("dependencies: [", "dependencies: ['rkd_plugin.experiments.samplers', "))
    live = losses(read(path), tmp_path / "live")
    built = []
    build = Experiment._build
    monkeypatch.setattr(Experiment, "_build", lambda self, config: built.append(config["key"]) or build(self, config))
    told = losses(read(path, [f"recipe.teacher_bank={whole}"]), tmp_path / "told")
    assert built == ["BankTeacher", "ConvEmbedding"]
    assert told == pytest.approx(live, rel=CLOSE)
    assert live[1] < live[0]


def step(recipe):
    """Loss of the first training step, and the images that it was of."""
    experiment = Experiment(recipe)
    box = experiment.box()
    box.pre_epoch_process(epoch=0)
    experiment.seed(1)
    images, labels, supplement = next(iter(box.train_data_loader))
    box.pre_forward_process()
    return box.forward_process(images, labels, supplement).item(), images


def same_weights(folder):
    """Checkpoints of both models of `MAPS`, and the changes of the text that take them."""
    model = Experiment(maps_recipe(folder)).student
    write_checkpoint(folder / "model.pt", {"model": model.state_dict()})
    name = "{network: resnet8, num_classes: 3}}"
    return name, f"{name[:-1]}, src_ckpt: {folder / 'model.pt'}}}"


@pytest.mark.parametrize("hook", ["backbone", "backbone.layer2"])
@pytest.mark.parametrize("count", [0, 2], ids=["one view", "views"])
def test_several_modules_maps_and_views(hook, count, tmp_path):
    changes = [same_weights(tmp_path), *([FLIP] if count else [])]
    recipe = maps_recipe(tmp_path, *changes, hook=hook)
    bank = embed(recipe, tmp_path / "bank", views=count)
    assert {(array.path, array.io) for array in bank.arrays} == {(".", "output"), (hook, "output")}
    loss, images = step(read(recipe.path, [f"recipe.teacher_bank={tmp_path / 'bank'}"]))
    # The teacher itself, of the images that the student saw.
    experiment = Experiment(recipe)
    box = experiment.box()
    box.pre_epoch_process(epoch=0)
    box.pre_forward_process()
    live = box.forward_process(images, torch.zeros(len(images), dtype=torch.long), {}).item()
    assert loss == pytest.approx(live, rel=CLOSE)
    assert loss > 0


def test_views_are_drawn_again_bit_by_bit_and_each_is_drawn(tmp_path):
    recipe = maps_recipe(tmp_path, FLIP)
    bank = embed(recipe, tmp_path / "bank", views=3)
    experiment = Experiment(recipe)
    data = experiment.config["datasets"]["train"]
    model = experiment.teacher().eval()
    kept = torch.random.get_rng_state()
    again = [
        torch.stack([views.image(x) for x in views.items(data, range(v * 24, (v + 1) * 24), 3, 0)]) for v in range(3)
    ]
    assert torch.equal(torch.random.get_rng_state(), kept)
    flipped = [int((view != again[0]).flatten(1).any(1).sum()) for view in again[1:]]
    assert all(0 < count < 24 for count in flipped)
    with torch.no_grad():
        expected = torch.cat([model(view) for view in again])
    torch.testing.assert_close(bank.read(range(72))[0], expected, rtol=CLOSE, atol=1e-5)
    over = bank.over(data)
    drawn = [views.image(over[5][0]) for _ in range(64)]
    assert {next(v for v in range(3) if torch.equal(image, again[v][5])) for image in drawn} == {
        next(w for w in range(3) if torch.equal(again[v][5], again[w][5])) for v in range(3)
    }


def test_keys_are_indices_of_the_data_set(teacher, bank):
    data = Digits(classes=range(5))
    expected = vectors_of(teacher, data.images)
    wrapped = WithTeacherBank(data, bank)
    sampler = ClassBalancedBatchSampler(torch.utils.data.SequentialSampler(wrapped), 20, 4, 3)
    batches = list(sampler)
    loader = DataLoader(wrapped, batch_sampler=batches, num_workers=2)
    for (images, labels, supplement), indices in zip(loader, batches, strict=True):
        assert torch.equal(images, data.images[indices])
        assert labels.tolist() == [data.targets[index] for index in indices]
        torch.testing.assert_close(supplement["recipe.teacher_bank"][0], expected[indices], rtol=CLOSE, atol=1e-6)


def test_what_packaged_recipes_read_of_their_teachers():
    assert taught(read("few_shot/omniglot/rkd").data) == {(".", "output"): {"avg"}}
    assert taught(read("classification/cifar100/hkd").data) == {
        (".", "output"): {None}, ("backbone", "output"): {"avg"},
    }  # fmt: skip
    for name, _, is_suite in names():
        if not is_suite and (data := read(name).data).get("models", {}).get("teacher_model"):
            assert taught(data), name


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_dtypes(kind, teacher, whole, tmp_path):
    bank = embed(digits(teacher), tmp_path / "bank", dtype=kind)
    exact = Bank(whole).read(range(bank.count))[0]
    read = bank.read(range(bank.count))[0]
    assert read.dtype == torch.float32
    assert torch.equal(read, exact.to(getattr(torch, kind)).float())
    size = (tmp_path / "bank" / "0.npy").stat().st_size
    assert size - 128 == bank.count * 64 * (4 if kind == "float32" else 2)


def test_a_vector_that_a_dtype_cannot_hold_is_said(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "encoded", lambda tensor, dtype: files.encoded(tensor * 1e6, dtype))
    with pytest.raises(
        ValueError, match=r"expected finite vectors, got NaN or Inf .* take --dtype bfloat16 or float32"
    ):
        embed(digits(teacher), tmp_path / "bank", dtype="float16")
    with pytest.raises(ValueError, match="is unfinished; the same `rkd embed` goes on"):
        Bank(tmp_path / "bank")
    embed(digits(teacher), tmp_path / "other", dtype="bfloat16")


# Writing: stopped, shared, told apart.

KILLED = """
import os, signal, sys
from pathlib import Path
from rkd_plugin.experiments.bank import writing
from rkd_plugin.experiments.recipe import read
checksums, left = writing.checksums, [3]
def dying(block):  # between the rows of a batch and their checksums
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return checksums(block)
writing.checksums = dying
writing.embed(read(sys.argv[1]), Path(sys.argv[2]))
"""


def python(program, *arguments, **environment):
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )


def contents(folder):
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    header = json.loads(held.pop("bank.json"))
    return held, {name: value for name, value in header.items() if name not in ("environment", "checksum")}


def test_killed_in_the_middle_it_goes_on(teacher, whole, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(digits(teacher).resolved())
    folder = tmp_path / "bank"
    assert python(KILLED, recipe, folder).returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="is unfinished"):
        Bank(folder)
    # What the third batch had of rows is there, and is not taken for whole; nor is a row that was changed since.
    vectors, sums = files.maps(folder, 0, "r+")
    assert vectors[128:192].any()
    assert not sums[128:].any()
    vectors[70, 3] += 1
    written = []
    monkeypatch.setattr(
        writing, "encoded", lambda tensor, dtype: written.append(len(tensor)) or files.encoded(tensor, dtype)
    )
    embed(read(recipe), folder)
    assert sum(written) == 901 - 64
    assert contents(folder) == contents(whole)
    written.clear()
    embed(read(recipe), folder)
    assert not written


def test_another_bank_is_never_written_over(teacher, bank):
    before = contents(bank)
    with pytest.raises(FileExistsError, match=re.escape(f"{bank} holds another teacher bank, of other dtype; give")):
        embed(digits(teacher), bank, dtype="float16")
    assert contents(bank) == before


PROCESS = """
import sys
from pathlib import Path
from torch import distributed
from rkd_plugin.experiments.bank.writing import embed
from rkd_plugin.experiments.recipe import read
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
embed(read(sys.argv[3]), Path(sys.argv[4]))
distributed.destroy_process_group()
"""


def test_processes_take_turns_with_shards(teacher, whole, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(digits(teacher).resolved())
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), tmp_path / "store", recipe, tmp_path / "bank"],
            env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert contents(tmp_path / "bank") == contents(whole)
    # Fifteen shards of 64 rows, the last of 5: the first process, which alone has a bar, takes eight of them.
    assert [max(map(int, re.findall(r"/(\d+) ", text)), default=0) for text in said] == [7 * 64 + 5, 0]


# What is refused, with the path and the reason.


def flipped(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def header_with(folder, **changes):
    """A header that is whole, as one that someone else wrote."""
    header = json.loads((folder / "bank.json").read_text())
    header.pop("checksum")
    header |= changes
    (folder / "bank.json").write_text(json.dumps({**header, "checksum": files.digest(header)}))


BROKEN = {
    "rows flipped": (lambda b: flipped(b / "0.npy", -1), "row 900 of 0.npy is not the one that was written"),
    "rows cut": (lambda b: os.truncate(b / "0.npy", 5000), "cannot be used as a teacher bank: mmap length"),
    "rows empty": (lambda b: os.truncate(b / "0.npy", 0), "cannot be used as a teacher bank: "),
    "rows of another shape": (lambda b: np.save(b / "0.npy", np.zeros((9, 64))), r"\(9, 64\) float64, not \(901, 64\)"),
    "rows gone": (lambda b: (b / "0.npy").unlink(), "expected a file .*0.npy of a teacher bank, found none"),
    "rows that would be executed": (lambda b: np.save(b / "0.npy", np.array([print], object)), "Python objects"),
    "checksums flipped": (lambda b: flipped(b / "0.crc.npy", -1), "0.crc.npy is cut or changed"),
    "checksums cut": (lambda b: os.truncate(b / "0.crc.npy", 1000), "cannot be used as a teacher bank: mmap length"),
    "header flipped": (lambda b: flipped(b / "bank.json", 60), "bank.json cannot be used: it is "),
    "header cut": (lambda b: os.truncate(b / "bank.json", 400), "it is cut or changed, no JSON"),
    "header of another kind": (lambda b: (b / "bank.json").write_text("[]"), "it is no header of a teacher bank"),
    "another version": (lambda b: header_with(b, version=2), "its version is 2, this package reads 1"),
    "header gone": (lambda b: (b / "bank.json").unlink(), "expected a teacher bank at .*, found none; write it with"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name, bank):
    damage, reason = BROKEN[name]
    damage(bank)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as raised:
        sum(Bank(bank).verify())
    assert str(bank) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_flipped_bit_of_the_header_is_refused(bank):
    size = (bank / "bank.json").stat().st_size
    for at in range(0, size, 7):
        flipped(bank / "bank.json", at)
        with pytest.raises(ValueError, match=r"bank\.json cannot be used"):
            Bank(bank)
        flipped(bank / "bank.json", at)
    Bank(bank)


def test_a_row_is_held_against_its_checksum_whenever_it_is_read(bank):
    flipped(bank / "0.npy", 128 + 5 * 256)
    opened = Bank(bank)
    opened.read([4, 6])
    for rows in ([5], [4, 5, 6]):
        with pytest.raises(ValueError, match=r"row 5 of 0\.npy is not the one that was written"):
            opened.read(rows)


class Relabelled(Digits):
    def __init__(self):
        super().__init__(classes=range(5))
        self.targets = self.targets[1:] + self.targets[:1]


class Inverted(Digits):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return 1 - image, label


OTHER = {
    "count": (lambda: Digits(classes=range(6)), "it has 901 images, the data set 1083"),
    "labels": (Relabelled, "its labels differ"),
    "images": (lambda: Inverted(classes=range(5)), "image 0 looks otherwise"),
    "order": (lambda: Subset(Digits(range(5)), range(900, -1, -1)), "its labels differ"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_data_is_refused(name, bank):
    data, reason = OTHER[name]
    with pytest.raises(ValueError, match=re.escape(f"the teacher bank {bank} is of other data: {reason}")):
        Bank(bank).over(data())
    Bank(bank).over(Subset(Digits(range(5)), range(901)))


def test_names_of_files_and_transforms_tell_data_apart(tmp_path):
    def folders(order, transform=None):
        data = Inverted(classes=[0])
        data.samples = [(f"/there/{at}/x.png", 0) for at in order]
        data.transform = transform
        return data

    count = len(Digits(classes=[0]))
    held = views.described(folders(range(count)), 0)
    assert views._difference(held, views.described(folders(range(count)), 0)) == ""
    assert (
        views._difference(held, views.described(folders(reversed(range(count))), 0))
        == "its files, or their order, differ"
    )
    resized = views.described(folders(range(count), v2.Resize(8)), 0)
    assert views._difference(held, resized).startswith("its transform was none, the data set's is Resize(")


def test_another_teacher_is_refused(teacher, whole, tmp_path):
    torch.manual_seed(5)
    other = Experiment(read("quickstart/teacher", ["recipe.seed=5"])).student
    write_checkpoint(tmp_path / "other.pt", {"model": other.state_dict()})
    recipe = digits(tmp_path / "other.pt", f"recipe.teacher_bank={whole}")
    recipe.validate()
    with pytest.raises(
        ValueError, match=f"{whole} is of another teacher: its weights are not those of .*other.pt; write"
    ):
        Experiment(recipe).box()
    wider = digits(teacher, f"recipe.teacher_bank={whole}", "models.teacher_model.kwargs.width=16")
    with pytest.raises(
        RecipeError, match=f"the teacher bank {whole} is of another teacher: its key or its kwargs differ"
    ):
        wider.validate()
    # Who has the vectors need not have the network.
    Experiment(digits(tmp_path / "none.pt", f"recipe.teacher_bank={whole}")).box()


def problem(*overrides, name="quickstart/rkd_da"):
    with pytest.raises(RecipeError) as raised:
        read(name, overrides).validate()
    return dict(raised.value.problems)


def test_check_tells_what_is_wrong_and_opens_the_header_alone(bank, tmp_path, capsys):
    assert (
        "expected a teacher bank at nowhere, found none"
        in problem("recipe.teacher_bank=nowhere")["recipe.teacher_bank"]
    )
    assert "a text was expected" in problem("recipe.teacher_bank=3")["recipe.teacher_bank"]
    alone = problem(f"recipe.teacher_bank={bank}", name="quickstart/student")["recipe.teacher_bank"]
    assert alone.startswith("there is no teacher that it could stand for")
    hooked = problem(
        f"recipe.teacher_bank={bank}", "train.criterion.kwargs.sub_terms.rkd.criterion.kwargs.teacher_module_path=x"
    )
    assert "lacks what the losses read of the teacher, the output of 'x'" in hooked["recipe.teacher_bank"]
    for path in bank.glob("*.npy"):
        path.unlink()
    assert cli.main(["check", "quickstart/rkd_da", f"recipe.teacher_bank={bank}"]) == 0
    assert "no problems" in capsys.readouterr().out


def test_what_a_bank_cannot_stand_for_is_a_problem(tmp_path):
    wrapped = (
        "kwargs: {batch_size: 8}",
        "kwargs: {batch_size: 8}\n    dataset_wrapper: {key: SSKDDatasetWrapper, kwargs: {transform: 1}}",
    )
    collated = "kwargs: {batch_size: 8}", "kwargs: {batch_size: 8}\n    collate_fn: default_collate_w_supp"
    for change, place in ((wrapped, "dataset_wrapper"), (collated, "collate_fn")):
        recipe = maps_recipe(tmp_path, change, overrides=["recipe.teacher_bank=nowhere"])
        with pytest.raises(RecipeError) as raised:
            recipe.validate()
        assert "with a teacher bank there can be no" in dict(raised.value.problems)[f"train.train_data_loader.{place}"]


def test_what_cannot_be_embedded_is_said_before_anything_is_written(teacher, whole, tmp_path):
    kd_of_maps = "teacher_module_path: '.',", "teacher_module_path: backbone.layer2,"
    cases = [
        (read("quickstart/student"), {}, "expected a loss that reads a teacher, found none"),
        (digits(teacher, f"recipe.teacher_bank={whole}"), {}, "recipe.teacher_bank: expected none"),
        (digits(teacher), {"dtype": "int8"}, "expected a dtype out of float32, float16, bfloat16, got 'int8'"),
        (digits(teacher), {"dataset_id": "x"}, "expected a data set out of digits/train, digits/test, got 'x'"),
        (
            maps_recipe(tmp_path, kd_of_maps, hook="backbone.layer2"),
            {},
            "expected vectors for a bank, or maps that every",
        ),
    ]
    for recipe, options, reason in cases:
        with pytest.raises(ValueError, match=reason):
            embed(recipe, tmp_path / "bank", **options)
    assert not (tmp_path / "bank").exists()


def test_a_named_data_set(teacher, tmp_path):
    bank = embed(digits(teacher), tmp_path / "bank", "digits/test")
    assert bank.count == len(Digits(classes=range(5, 10)))


# Random transforms.


def test_a_random_transform_needs_views_and_a_bank_that_holds_them(tmp_path):
    plain, random = maps_recipe(tmp_path), maps_recipe(tmp_path, FLIP)
    with pytest.raises(
        ValueError, match=r"draws no random numbers, got one that does \(RandomHorizontalFlip\); give --views"
    ):
        embed(random, tmp_path / "bank")
    embed(plain, tmp_path / "plain")
    data = Experiment(random).config["datasets"]["train"]
    with pytest.raises(
        ValueError, match=r"holds one view of each image, .* \(RandomHorizontalFlip\); write a bank with"
    ):
        Bank(tmp_path / "plain").over(data)
    embed(random, tmp_path / "views", views=1)
    with pytest.raises(ValueError, match="its transform was Compose"):
        Bank(tmp_path / "views").over(Experiment(plain).config["datasets"]["train"])
    np.save(tmp_path / "theirs.npy", np.zeros((24, 5), np.float32))
    with pytest.raises(ValueError, match="holds one view of each image"):
        Bank(tmp_path / "theirs.npy").over(data)


DRAWING = [kind for kind in vars(v2).values() if isinstance(kind, type) and issubclass(kind, v2.Transform)]
STILL = [
    v2.Resize,
    v2.CenterCrop,
    v2.Normalize,
    v2.ToDtype,
    v2.PILToTensor,
    v2.Compose,
    v2.Pad,
    v2.Grayscale,
    v2.ToImage,
]


def test_torchvisions_random_transforms_are_known_by_name():
    drawing = [
        kind for kind in DRAWING if kind.make_params is not v2.Transform.make_params or "Random" in kind.__name__
    ]
    assert len(drawing) > 25
    assert [kind for kind in drawing if not views._is_random(kind.__new__(kind))] == []
    assert [kind for kind in STILL if views._is_random(kind.__new__(kind))] == []
    old = [
        kind for kind in vars(torchvision.transforms).values() if isinstance(kind, type) and hasattr(kind, "get_params")
    ]
    assert len(old) > 5
    assert [kind for kind in old if not views._is_random(kind.__new__(kind))] == []


class Noisy(Digits):
    """Draws random numbers in ``__getitem__``, of one kind."""

    def __init__(self, draw):
        super().__init__(classes=range(3))
        self.draw = draw

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + self.draw(), label


def test_randomness_is_seen_where_no_name_tells_it():
    import random

    for draw in (lambda: torch.rand(()), lambda: float(np.random.rand()), random.random):
        data = Noisy(draw)
        assert views.draws(data) == "an image looks otherwise with other random numbers"
        views.check_repeats(data, 0)
        first, again = views.items(data, [7, 7], 1, 0)
        assert torch.equal(first[0], again[0])
    assert views.draws(Noisy(lambda: 0.5)) == ""
    with pytest.raises(ValueError, match="expected views that the seed decides, got another image 0"):
        views.check_repeats(Noisy(iter(range(10**6)).__next__), 0)


def test_random_transforms_are_found_inside_whatever_wraps_them():
    inner = Digits()
    inner.transform = v2.Compose([torch.nn.Sequential(v2.RandomErasing(p=0.001))])
    for data in (inner, Subset(inner, [0, 1]), Subset(Subset(inner, range(9)), [3])):
        assert views.draws(data) == "RandomErasing"


# Arrays that others made.


def safetensors(path, array, dtype="F32", cut=0, names=("image_embeds",)):
    data = array.tobytes()
    tensors = {name: {"dtype": dtype, "shape": array.shape, "data_offsets": [0, len(data)]} for name in names}
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    content = struct.pack("<Q", len(header)) + header + data
    path.write_bytes(content[: len(content) - cut])


@pytest.mark.parametrize("form", ["npy", "npy float16", "safetensors", "safetensors bfloat16"])
def test_arrays_of_others(form, teacher, whole, tmp_path):
    exact = Bank(whole).read(range(901))[0]
    path = tmp_path / f"dino.{form.split()[0]}"
    kept = exact
    if form == "safetensors":
        safetensors(path, exact.numpy())
    elif form == "safetensors bfloat16":
        kept = exact.bfloat16()
        safetensors(path, kept.view(torch.uint16).numpy(), "BF16")
    else:
        kept = exact.half() if "16" in form else exact
        np.save(path, kept.numpy())
    bank = Bank(path)
    assert torch.equal(bank.read([900, 3])[0], kept[[900, 3]].float())
    recipe = digits(teacher, f"recipe.teacher_bank={path}")
    recipe.validate()
    own = digits(teacher, f"recipe.teacher_bank={whole}")
    assert step(recipe)[0] == pytest.approx(step(own)[0], rel=CLOSE if kept.dtype == torch.float32 else 0.1)
    with pytest.raises(ValueError, match="it has 901 images, the data set 896"):
        bank.over(Digits(classes=range(5, 10)))


FOREIGN = {
    "three dimensions": ("x.npy", lambda p: np.save(p, np.zeros((4, 2, 2))), r"\(N, D\) of floats was expected"),
    "integers": ("x.npy", lambda p: np.save(p, np.zeros((4, 2), np.uint16)), "of floats was expected, got .* uint16"),
    "objects": ("x.npy", lambda p: np.save(p, np.array([print], object)), "Python objects"),
    "cut": ("x.npy", lambda p: np.save(p, np.zeros((99, 2), np.float32)) or os.truncate(p, 300), "mmap length"),
    "text": ("x.npy", lambda p: p.write_text("hello"), "cannot be used as a teacher bank"),
    "cut tensors": ("x.safetensors", lambda p: safetensors(p, np.zeros((4, 2), np.float32), cut=3), "mmap length"),
    "no tensors": ("x.safetensors", lambda p: p.write_text("hello"), "it is cut, or no file of safetensors"),
    "two tensors": ("x.safetensors", lambda p: safetensors(p, np.zeros((4, 2)), names="ab"), "expected, got a, b"),
    "whole numbers": ("x.safetensors", lambda p: safetensors(p, np.zeros((4, 2)), "I32"), "was expected, got I32"),
    "nothing": ("x.npy", lambda p: None, "expected a file .*x.npy of a teacher bank, found none"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_bad_arrays_of_others_are_refused(name, tmp_path):
    file, write, reason = FOREIGN[name]
    write(tmp_path / file)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as raised:
        Bank(tmp_path / file)
    assert str(tmp_path / file) in str(raised.value)


def test_one_array_does_not_stand_for_two_modules(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((24, 5), np.float32))
    recipe = maps_recipe(tmp_path, overrides=[f"recipe.teacher_bank={tmp_path / 'x.npy'}"])
    with pytest.raises(
        RecipeError, match=r"is one array, but the losses read the output of '\.', the output of 'backbone'"
    ):
        recipe.validate()


# Large banks.

GROWTH = """
import sys, time
from pathlib import Path
import numpy as np
from rkd_plugin.experiments.bank import Bank
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before, started = resident(), time.perf_counter()
bank = Bank(sys.argv[1])
rows = np.random.default_rng(0).integers(0, bank.count, 256).tolist()
bank.read(rows[:1])
seconds = time.perf_counter() - started
vectors, = bank.read(rows)
print(resident() - before, seconds, int(vectors.count_nonzero()))
"""


def sparse(folder, rows, width):
    """A bank of zeros that takes no room on the disk, and is whole in every other respect."""
    folder.mkdir()
    _, sums = files.maps(folder, 0, "w+", dtype=np.float32, shape=(rows, width))
    sums[:] = zlib.crc32(bytes(4 * width))
    header = {
        "format": files.FORMAT, "version": files.VERSION, "dtype": "float32", "views": 0, "seed": 0,
        "arrays": [{"path": ".", "io": "output", "pool": None, "width": width}],
        "data": {"count": rows}, "sums": [files.digest(sums)],
    }  # fmt: skip
    (folder / "bank.json").write_text(json.dumps({**header, "checksum": files.digest(header)}))
    return folder


def test_a_large_bank_is_not_loaded(tmp_path):
    rows, width = 2**18, 1024
    folder = sparse(tmp_path / "bank", rows, width)
    said = python(GROWTH, folder)
    grown, seconds, nonzero = said.stdout.split()
    assert int(grown) < 4 * rows * width / 10, said.stderr
    assert float(seconds) < 1
    assert nonzero == "0"


# pytorch-metric-learning.


class Items(Dataset):
    """Vectors and labels, as PML's trainers take them."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 6, generator=generator)
        self.labels = [index // 4 for index in range(40)]

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self.x[index], self.labels[index]


def trained(data, teacher=None, bank=None, trunk=False, **options):
    """The student's weights after PML's trainer with a trunk that packs, or `RKDTrainer`; of a teacher or its bank."""
    torch.manual_seed(1)
    student = torch.nn.Linear(6, 3)
    options = {"dataset": data, **options}
    if trunk:
        kind, models, loss = (
            MetricLossOnly,
            {"trunk": TeacherStudentTrunk(student, teacher)},
            {"metric_loss": FromPacked(3, RKDDALoss())},
        )
        if bank:
            own = {name: options.pop(name) for name in ("collate_fn", "data_and_label_getter") if name in options}
            options |= from_bank(bank, data, **own)
    else:
        kind, models, loss = RKDTrainer, {"trunk": student}, {"rkd_loss": RKDDALoss()}
        models |= {"teacher": teacher} if teacher else {}
        options |= {"teacher_bank": bank} if bank else {}
    trainer = kind(
        models=models,
        optimizers={"trunk_optimizer": torch.optim.SGD(student.parameters(), lr=0.1)},
        batch_size=20,
        loss_funcs=loss,
        sampler=MPerClassSampler(data.labels, 2, 20, 40),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        **options,
    )
    np.random.seed(3)
    trainer.train(num_epochs=2)
    return student.weight.detach()


def middle(embeddings, labels):
    assert embeddings.shape == (20, 3)
    return torch.arange(5, 15)


OPTIONS = {
    "nothing else": {},
    "own collate": {
        "collate_fn": lambda batch: default_collate(batch)[::-1],
        "data_and_label_getter": lambda b: b[::-1],
    },
    "mined batches": {"mining_funcs": {"subset_batch_miner": middle}},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("trunk", [False, True], ids=["trainer", "trunk"])
def test_pmls_trainers_learn_the_same_from_a_bank(trunk, name, tmp_path):
    data, options = Items(), OPTIONS[name]
    torch.manual_seed(0)
    teacher = torch.nn.Linear(6, 5)
    np.save(tmp_path / "teacher.npy", teacher(data.x).detach().numpy())
    live = trained(data, teacher, trunk=trunk, **options)
    told = trained(data, bank=Bank(tmp_path / "teacher.npy"), trunk=trunk, **options)
    torch.testing.assert_close(told, live, rtol=CLOSE, atol=1e-6)
    np.save(tmp_path / "teacher.npy", teacher(data.x.flip(0)).detach().numpy())
    other = trained(data, bank=Bank(tmp_path / "teacher.npy"), trunk=trunk, **options)
    assert not torch.allclose(other, live, rtol=CLOSE)


def test_a_batch_with_vectors_is_moved_and_cast_as_one(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((40, 5), np.float32))
    arguments = from_bank(Bank(tmp_path / "x.npy"), Items())
    batch = arguments["collate_fn"]([arguments["dataset"][index] for index in range(4)])
    data, labels = arguments["data_and_label_getter"](batch)
    assert labels.tolist() == [0, 0, 0, 0]
    moved = c_f.to_device(data, device=torch.device("meta"), dtype=torch.float64)
    assert [(x.device.type, x.dtype) for x in moved] == [("meta", torch.float64)] * 2


def test_what_pmls_trainers_refuse_beside_a_bank(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((40, 5), np.float32))
    bank, teacher = Bank(tmp_path / "x.npy"), torch.nn.Linear(6, 5)
    with pytest.raises(ValueError, match="RKDTrainer: expected no teacher beside a teacher_bank"):
        trained(Items(), teacher, bank)
    with pytest.raises(ValueError, match=r"TeacherStudentTrunk: expected either .* got both"):
        trained(Items(), teacher, bank, trunk=True)
    with pytest.raises(ValueError, match=r"TeacherStudentTrunk: expected either .* got neither; .* \*\*from_bank"):
        trained(Items(), trunk=True)

    for trunk in (False, True):
        with pytest.raises(
            TypeError, match=r"expected a teacher_bank such as Bank\('dino.npy'\), got str; open it with"
        ):
            trained(Items(), bank=str(bank.path), trunk=trunk)

    class OfTwoModules:
        def over(self, data):
            return [(data[index], [torch.zeros(5)] * 2) for index in range(len(data))]

    with pytest.raises(ValueError, match="expected a teacher_bank of one module, got 2"):
        trained(Items(), bank=OfTwoModules())


# The command.


def test_the_command(teacher, tmp_path, capsys):
    folder = tmp_path / "bank"
    command = ["embed", "quickstart/rkd_da", f"recipe.teacher_checkpoint={teacher}", "--out", str(folder)]
    assert cli.main(command) == 0
    assert f"learn from it with recipe.teacher_bank={folder}" in capsys.readouterr().out
    assert cli.main(["embed", "--verify", str(folder)]) == 0
    assert "901 rows are as they were written" in capsys.readouterr().out
    flipped(folder / "0.npy", -1)
    assert cli.main(["embed", "--verify", str(folder)]) == 1
    assert "row 900 of 0.npy is not the one that was written" in capsys.readouterr().err
    assert cli.main(["embed", "quickstart/rkd_da"]) == 1
    assert "expected a recipe and --out BANK, or --verify BANK" in capsys.readouterr().err


def test_only_the_bank_may_be_added_by_an_override():
    assert read("quickstart/rkd_da", ["recipe.teacher_bank=x"]).settings["teacher_bank"] == "x"
    assert "teacher_bank: 'x'" in read("quickstart/rkd_da", ["recipe.teacher_bank='x'"]).resolved()
    for override in ("recipe.teacher_banc=x", "train.teacher_bank=x", "teacher_bank=x"):
        with pytest.raises(RecipeError, match="no key"):
            read("quickstart/rkd_da", [override])
