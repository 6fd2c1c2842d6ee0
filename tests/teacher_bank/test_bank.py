"""Teacher banks: the numbers of a live teacher, errors, and memory."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils import common_functions as c_f
from safetensors.torch import save_file
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate
from torchvision.transforms import v2

from rkd_plugin import cli
from rkd_plugin.adapters.pml import RKDDALoss, RKDTrainer, TeacherStudentTrunk, from_bank
from rkd_plugin.adapters.torchdistill import WithTeacherBank
from rkd_plugin.components.datasets import Digits
from rkd_plugin.components.samplers import ClassBalancedBatchSampler
from rkd_plugin.experiments.recipe import RecipeError, names, read
from rkd_plugin.experiments.recipe.teacher_bank import teacher_reads
from rkd_plugin.experiments.running import embed as writing
from rkd_plugin.experiments.running import runner
from rkd_plugin.experiments.running.checkpoints import write_checkpoint
from rkd_plugin.experiments.running.embed import embed
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.experiments.support.files import alone_in
from rkd_plugin.teacher_bank import Bank, files, fingerprint, views
from rkd_plugin.teacher_bank.header import FORMAT, VERSION

# The rounding of convolutions depends on the batch, and training steps amplify it.
CLOSE = 1e-4
KWARGS = "{width: 4, embedding_dim: 8, l2_normalize: False}"
STUDENT = f"models.student_model={{key: ConvEmbedding, kwargs: {KWARGS}, src_ckpt: PATH}}"
SHORT = ["recipe.num_epochs=2", "recipe.samples_per_epoch=256", "recipe.batch_size=64"]

MAPS = """
recipe: {task: classification, seed: 0}
dependencies: [rkd_plugin.adapters.torchdistill, rkd_plugin.components.models]
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
    """A checkpoint of an untrained teacher; that of a student is in the same folder."""
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
        path.write_text(text.replace("dependencies: [", "dependencies: ['rkd_plugin.components.samplers', "))
    live = losses(read(path), tmp_path / "live")
    built = []
    build = Experiment._build
    monkeypatch.setattr(Experiment, "_build", lambda self, config: built.append(config["key"]) or build(self, config))
    precomputed = losses(read(path, [f"recipe.teacher_bank={whole}"]), tmp_path / "precomputed")
    assert built == ["BankTeacher", "ConvEmbedding"]
    assert precomputed == pytest.approx(live, rel=CLOSE)
    assert live[1] < live[0]


def step(recipe):
    """The loss of the first training step, and its images."""
    experiment = Experiment(recipe)
    box = experiment.box()
    box.pre_epoch_process(epoch=0)
    experiment.seed(1)
    images, labels, supplement = next(iter(box.train_data_loader))
    box.pre_forward_process()
    return box.forward_process(images, labels, supplement).item(), images


def same_weights(folder):
    """Checkpoints of both models of `MAPS`, and the changes of the recipe that load them."""
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
    # The teacher itself, with the images of the student.
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
        torch.testing.assert_close(supplement["teacher_bank"][0], expected[indices], rtol=CLOSE, atol=1e-6)


def test_modules_that_packaged_recipes_read():
    assert teacher_reads(read("few_shot/omniglot/rkd").data) == {(".", "output"): {"auto"}}
    assert teacher_reads(read("classification/cifar100/hkd").data) == {
        (".", "output"): {None}, ("backbone", "output"): {"auto"},
    }  # fmt: skip
    for name, _, is_suite in names():
        if not is_suite and (data := read(name).data).get("models", {}).get("teacher_model"):
            assert teacher_reads(data), name


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_dtypes(kind, teacher, whole, tmp_path):
    bank = embed(digits(teacher), tmp_path / "bank", dtype=kind)
    exact = Bank(whole).read(range(bank.count))[0]
    read = bank.read(range(bank.count))[0]
    assert read.dtype == torch.float32
    assert torch.equal(read, exact.to(getattr(torch, kind)).float())
    size = (tmp_path / "bank" / "0.npy").stat().st_size
    assert size - 128 == bank.count * 64 * (4 if kind == "float32" else 2)


def test_a_vector_that_overflows_a_dtype_raises(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "encoded", lambda tensor, dtype: files.encoded(tensor * 1e6, dtype))
    with pytest.raises(ValueError, match=r"expected finite vectors, got NaN or Inf .* use --dtype bfloat16 or float32"):
        embed(digits(teacher), tmp_path / "bank", dtype="float16")
    with pytest.raises(ValueError, match="is unfinished; the same `rkd embed` goes on"):
        Bank(tmp_path / "bank")
    embed(digits(teacher), tmp_path / "other", dtype="bfloat16")


# Writing: interrupted, and by several processes.

KILLED = """
import os, signal, sys
from pathlib import Path
from rkd_plugin.experiments.running.embed import embed
from rkd_plugin.experiments.recipe import read
from rkd_plugin.teacher_bank import files
checksum, left = files.checksum, [3]
def dying(block):  # between the rows of a shard and their checksum
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return checksum(block)
files.checksum = dying
embed(read(sys.argv[1]), Path(sys.argv[2]))
"""


def python(program, *arguments, **environment):
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )


def interrupt():
    raise KeyboardInterrupt


def contents(folder):
    arrays = {path.name: path.read_bytes() for path in folder.iterdir()}
    header = json.loads(arrays.pop("bank.json"))
    return arrays, {name: value for name, value in header.items() if name not in ("environment", "checksum")}


@pytest.mark.parametrize("how", ["interrupted", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_stopped_embed_resumes(teacher, whole, tmp_path, monkeypatch, how):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(digits(teacher).resolved())
    folder = tmp_path / "bank"
    if how == "killed":
        assert python(KILLED, recipe, folder).returncode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patched:
            left = [files.checksum] * 2
            patched.setattr(files, "checksum", lambda block: left.pop()(block) if left else interrupt())
            with pytest.raises(KeyboardInterrupt):
                embed(read(recipe), folder)
    with pytest.raises(ValueError, match="is unfinished"):
        Bank(folder)
    # The rows of the third batch are there, but incomplete: they are written again, as is a row that has changed.
    vectors, sums = (np.load(folder / name, mmap_mode="r+") for name in ("0.npy", "checksums.npy"))
    assert vectors[128:192].any()
    assert sums[:2].all()
    assert not sums[2:].any()
    vectors[70, 3] += 1
    vectors.flush()
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


def test_another_bank_is_never_overwritten(teacher, bank):
    before = contents(bank)
    with pytest.raises(
        FileExistsError, match=re.escape(f"{bank} contains another teacher bank, which differs in dtype;")
    ):
        embed(digits(teacher), bank, dtype="float16")
    assert contents(bank) == before


PROCESS = """
import sys
from pathlib import Path
from torch import distributed
from rkd_plugin.experiments.running.embed import embed
from rkd_plugin.experiments.recipe import read
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
try:
    embed(read(sys.argv[4 + rank]), Path(sys.argv[3]))
except ValueError as error:
    sys.exit("raised: " + str(error))
distributed.destroy_process_group()
"""


def two_processes(tmp_path, *recipes):
    """Exit codes and standard errors of two processes that write one bank, each from its own recipe."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    written = [tmp_path / f"{rank}.yaml" for rank in range(2)]
    for path, recipe in zip(written, recipes, strict=True):
        path.write_text(recipe.resolved())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), tmp_path / "store", tmp_path / "bank", *written],
            env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in started]
    return [process.returncode for process in started], errors


@pytest.mark.processes
def test_processes_take_turns_with_shards(teacher, whole, tmp_path):
    codes, errors = two_processes(tmp_path, digits(teacher), digits(teacher))
    assert codes == [0, 0], errors
    assert contents(tmp_path / "bank") == contents(whole)
    # Fifteen shards of 64 rows, the last of 5: rank 0, which alone prints a progress bar, writes eight of them.
    assert [max(map(int, re.findall(r"/(\d+) ", text)), default=0) for text in errors] == [7 * 64 + 5, 0]


@pytest.mark.processes
def test_processes_with_other_teachers_write_no_bank(teacher, tmp_path):
    model = Experiment(read("quickstart/teacher", ["recipe.seed=5"])).student
    write_checkpoint(tmp_path / "other.pt", {"model": model.state_dict()})
    codes, errors = two_processes(tmp_path, digits(teacher), digits(tmp_path / "other.pt"))
    assert codes == [1, 1], errors
    for text in errors:
        assert "rank 1 of 2: expected the recipe of rank 0, got another one" in text  # it names the checkpoint
    assert not (tmp_path / "bank").exists()


def test_only_one_embed_writes_to_a_folder(teacher, tmp_path):
    with alone_in(tmp_path / "bank"), pytest.raises(BlockingIOError, match="is in use by another run"):
        embed(digits(teacher), tmp_path / "bank")


def test_other_arrays_are_not_overwritten(teacher, tmp_path):
    np.save(tmp_path / "0.npy", np.ones(3))
    with pytest.raises(FileExistsError, match=r"expected no arrays in .*, found 0\.npy, of no bank; give"):
        embed(digits(teacher), tmp_path)
    assert np.load(tmp_path / "0.npy").tolist() == [1, 1, 1]


def test_a_full_disk_is_one_sentence_before_anything_is_computed(teacher, whole, tmp_path, monkeypatch):
    def full(path, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files, "allocate", full)
        with pytest.raises(OSError, match=r"expected room for \d+ bytes in .*0\.npy, got: No space left on device"):
            embed(digits(teacher), tmp_path / "bank")
    assert not list((tmp_path / "bank").glob("*.npy"))
    embed(digits(teacher), tmp_path / "bank")
    assert contents(tmp_path / "bank") == contents(whole)


def test_disk_space_is_allocated_at_the_start(tmp_path):
    layout = files.Layout(5000, [64], "float32", 64)
    files.ShardWriter(tmp_path, layout).allocate()
    # A file without allocated blocks ends the process with SIGBUS when the disk is full.
    assert (tmp_path / "0.npy").stat().st_blocks * 512 >= 5000 * 64 * 4


def test_a_checksum_of_0_is_valid(tmp_path):
    layout = files.Layout(2, [1], "float32", 1)
    block = np.array([[0x6DD90A9D], [1]], np.uint32).view(np.float32)  # four bytes whose CRC-32 is 0
    assert zlib.crc32(block[0].tobytes()) == 0
    writer = files.ShardWriter(tmp_path, layout)
    writer.allocate()
    assert not files.ShardReader(tmp_path, layout).is_whole(0)
    writer.write(0, [block])
    assert all(map(files.ShardReader(tmp_path, layout).is_whole, range(2)))


# Errors, with the path and the reason.


def flipped(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def header_with(folder, **changes):
    """A valid header with other values, as another program may write it."""
    header = json.loads((folder / "bank.json").read_text())
    header.pop("checksum")
    header |= changes
    (folder / "bank.json").write_text(json.dumps({**header, "checksum": fingerprint.digest(header)}))


def nested(header, place, value):
    """A header with one value replaced, given by its keys."""
    *keys, last = place.split(".")
    part = header
    for key in keys:
        part = part[int(key) if key.isdigit() else key]
    part[last] = value
    return {place.split(".")[0]: header[place.split(".")[0]]}


def header_changed(folder, place, value):
    header_with(folder, **nested(json.loads((folder / "bank.json").read_text()), place, value))


BROKEN = {
    "rows flipped": (lambda b: flipped(b / "0.npy", -1), "rows 896 to 900 of 0.npy are not what was written; delete"),
    "rows cut": (lambda b: os.truncate(b / "0.npy", 5000), "cannot be used as a teacher bank: .*mmap length"),
    "rows empty": (lambda b: os.truncate(b / "0.npy", 0), "cannot be used as a teacher bank: "),
    "rows of another shape": (lambda b: np.save(b / "0.npy", np.zeros((9, 64))), r"\(9, 64\) float64, not \(901, 64\)"),
    "rows gone": (lambda b: (b / "0.npy").unlink(), "expected a file .*0.npy of a teacher bank, found none"),
    "rows that would be executed": (lambda b: np.save(b / "0.npy", np.array([print], object)), "Python objects"),
    "rows a pipe": (lambda b: (b / "0.npy").unlink() or os.mkfifo(b / "0.npy"), "expected a regular file .*0.npy"),
    "checksums flipped": (lambda b: flipped(b / "checksums.npy", -8), "checksums.npy is cut or changed"),
    "checksums cut": (lambda b: os.truncate(b / "checksums.npy", 200), "bank: checksums.npy .*mmap length"),
    "header flipped": (lambda b: flipped(b / "bank.json", 60), "bank.json cannot be used: it"),
    "header cut": (lambda b: os.truncate(b / "bank.json", 400), "it is cut or changed, or no header of a teacher bank"),
    "header of another kind": (lambda b: (b / "bank.json").write_text("[]"), "or no header of a teacher bank"),
    "header deep": (lambda b: (b / "bank.json").write_text("[" * 10**5), "or no header of a teacher bank"),
    "header a pipe": (lambda b: (b / "bank.json").unlink() or os.mkfifo(b / "bank.json"), "expected a regular file"),
    "header large": (lambda b: os.truncate(b / "bank.json", 2**30), "or no header of a teacher bank"),
    "another version": (lambda b: header_with(b, version=1), "its version is 1, not 2; delete the bank"),
    "header gone": (lambda b: (b / "bank.json").unlink(), "found a folder without bank.json; write it with"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_raise(name, bank):
    damage, reason = BROKEN[name]
    damage(bank)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as raised:
        sum(Bank(bank).verify())
    assert str(bank) in str(raised.value)
    assert "\n" not in str(raised.value)


WRONG = {
    "count": [None, "901", True, -1, 901.0],
    "views": [None, -1, [], 1.5],
    "shard_rows": [0, "64", None],
    "dtype": ["float64", 3, None],
    "seed": ["0", None],
    "checksums": [None, []],
    "arrays": [[], {}, None, [3], [{"path": "."}]],
    "arrays.0.width": [0, "64", -64],
    "arrays.0.io": ["inside", 3],
    "arrays.0.pool": [3],
    "data": [None, [], {"count": 901}],
    "data.labels": [3],
    "data.images": [{}, [3], [{"index": 0, "shape": None, "mean": 0.0, "std": 0.0}]],
    "teacher": [None, [], {"weights": None}],
}


@pytest.mark.parametrize("place", WRONG)
def test_a_header_of_wrong_types_is_one_sentence(place, bank):
    place, name = ("data.count" if place == "count" else place), place
    before = (bank / "bank.json").read_text()
    for value in WRONG[name]:
        header_changed(bank, place, value)
        with pytest.raises(ValueError, match=r"bank\.json cannot be used: its values are not those of a teacher bank"):
            Bank(bank)
        (bank / "bank.json").write_text(before)


def test_other_images_of_a_header_are_other_data(bank):
    header_changed(bank, "data.images", [{"index": 0, "shape": [1, 8, 8], "mean": float("nan"), "std": 0.1}])
    with pytest.raises(ValueError, match="is of other data: image 0 looks different"):
        Bank(bank).over(Digits(classes=range(5)))


def test_every_flipped_bit_of_the_header_raises(bank):
    size = (bank / "bank.json").stat().st_size
    for at in range(0, size, 7):
        flipped(bank / "bank.json", at)
        with pytest.raises(ValueError, match=r"bank\.json cannot be used"):
            Bank(bank)
        flipped(bank / "bank.json", at)
    Bank(bank)


def test_a_shard_is_checked_at_its_first_read(bank):
    flipped(bank / "0.npy", 128 + 5 * 256)
    opened = Bank(bank)
    opened.read([64, 900])
    for rows in ([5], [63], [64, 6]):
        with pytest.raises(ValueError, match=r"rows 0 to 63 of 0\.npy are not what was written"):
            opened.read(rows)


CUT = """
import os, sys
from rkd_plugin.teacher_bank import Bank
for path in sys.argv[1:]:
    bank = Bank(path)
    bank.read([0])
    os.truncate(path + "/0.npy" if os.path.isdir(path) else path, 4096)
    try:
        bank.read([bank.count - 1])
    except ValueError as error:
        print(error)
"""


def test_a_file_that_is_truncated_while_it_is_read_raises(bank, tmp_path):
    paths = [bank, *(saved(tmp_path, form, torch.ones(2**12, 64)) for form in ("npy", "safetensors", "pt"))]
    done = python(CUT, *paths)  # reading the memory map of a truncated file ends the process
    assert done.returncode == 0, (done.returncode, done.stderr)
    for path, text in zip(paths, done.stdout.splitlines(), strict=True):
        name = "0.npy" if path == bank else path.name
        assert text.startswith(f"{path} cannot be used as a teacher bank: {name} was cut while it was read; ")


def test_rows_from_the_end_and_beyond(bank):
    opened = Bank(bank)
    assert torch.equal(opened.read([-1])[0], opened.read([900])[0])
    for row in (901, -902):
        with pytest.raises(IndexError):
            opened.read([row])


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
    "images": (lambda: Inverted(classes=range(5)), "image 0 looks different"),
    "order": (lambda: Subset(Digits(range(5)), range(900, -1, -1)), "its labels differ"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_data_raises(name, bank):
    data, reason = OTHER[name]
    with pytest.raises(ValueError, match=re.escape(f"the teacher bank {bank} is of other data: {reason}")):
        Bank(bank).over(data())
    Bank(bank).over(Subset(Digits(range(5)), range(901)))


def test_data_sets_differ_by_file_names_and_transforms(tmp_path):
    def folders(order, transform=None):
        data = Inverted(classes=[0])
        data.samples = [(f"/there/{at}/x.png", 0) for at in order]
        data.transform = transform
        return data

    count = len(Digits(classes=[0]))
    found = fingerprint.of_data(folders(range(count)), 0)
    assert fingerprint.difference(found, fingerprint.of_data(folders(range(count)), 0)) == ""
    turned = fingerprint.of_data(folders(reversed(range(count))), 0)
    assert fingerprint.difference(found, turned) == "its files, or their order, differ"
    resized = fingerprint.of_data(folders(range(count), v2.Resize(8)), 0)
    assert fingerprint.difference(found, resized).startswith("its transform was none, the data set's is Resize(")


def test_joined_data_sets_differ_by_their_parts(whole):
    parts = Digits(classes=range(2)), Digits(classes=range(2, 5))
    joined = ConcatDataset(parts)
    found = fingerprint.of_data(joined, 0)
    assert found["labels"] is not None
    assert fingerprint.difference(found, fingerprint.of_data(Subset(joined, range(len(joined))), 0)) == ""
    assert fingerprint.difference(found, fingerprint.of_data(ConcatDataset(parts[::-1]), 0)) == "its labels differ"


def test_another_teacher_raises(teacher, whole, tmp_path):
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
        RecipeError,
        match=f"the teacher bank {whole} is of another teacher: .*kwargs.width was .* and is 16",
    ):
        wider.validate()
    # With the vectors, the network itself is not needed.
    Experiment(digits(tmp_path / "none.pt", f"recipe.teacher_bank={whole}")).box()


def problem(*overrides, name="quickstart/rkd_da"):
    with pytest.raises(RecipeError) as raised:
        read(name, overrides).validate()
    return dict(raised.value.problems)


def test_check_reports_problems_and_opens_only_the_header(bank, tmp_path, capsys):
    assert (
        "expected a teacher bank at nowhere, found none"
        in problem("recipe.teacher_bank=nowhere")["recipe.teacher_bank"]
    )
    assert "expected a string, got" in problem("recipe.teacher_bank=3")["recipe.teacher_bank"]
    alone = problem(f"recipe.teacher_bank={bank}", name="quickstart/student")["recipe.teacher_bank"]
    assert alone.startswith("expected a teacher that it replaces, found none")
    hooked = problem(
        f"recipe.teacher_bank={bank}", "train.criterion.kwargs.sub_terms.rkd.criterion.kwargs.teacher_module_path=x"
    )
    assert "lacks what the losses read of the teacher, the output of 'x'" in hooked["recipe.teacher_bank"]
    for path in bank.glob("*.npy"):
        path.unlink()
    assert cli.main(["check", "quickstart/rkd_da", f"recipe.teacher_bank={bank}"]) == 0
    assert "no problems" in capsys.readouterr().out.splitlines()[-1]


def test_modules_that_a_bank_does_not_have_are_a_problem(tmp_path):
    wrapped = (
        "kwargs: {batch_size: 8}",
        "kwargs: {batch_size: 8}\n    dataset_wrapper: {key: SSKDDatasetWrapper, kwargs: {transform: 1}}",
    )
    collated = "kwargs: {batch_size: 8}", "kwargs: {batch_size: 8}\n    collate_fn: default_collate_w_supp"
    for change, place in ((wrapped, "dataset_wrapper"), (collated, "collate_fn")):
        recipe = maps_recipe(tmp_path, change, overrides=["recipe.teacher_bank=nowhere"])
        with pytest.raises(RecipeError) as raised:
            recipe.validate()
        assert "expected none with a teacher bank, " in dict(raised.value.problems)[f"train.train_data_loader.{place}"]


def test_embed_raises_before_it_writes(teacher, whole, tmp_path):
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


def test_a_random_transform_needs_a_bank_of_views(tmp_path):
    plain, random = maps_recipe(tmp_path), maps_recipe(tmp_path, FLIP)
    with pytest.raises(
        ValueError, match=r"draws no random numbers, got one that does \(it draws .* PyTorch\); give --views"
    ):
        embed(random, tmp_path / "bank")
    embed(plain, tmp_path / "plain")
    data = Experiment(random).config["datasets"]["train"]
    with pytest.raises(
        ValueError, match=r"holds one view of each image, .* \(it draws random numbers of PyTorch\); write a bank"
    ):
        Bank(tmp_path / "plain").over(data)
    embed(random, tmp_path / "views", views=1)
    with pytest.raises(ValueError, match="its transform was Compose"):
        Bank(tmp_path / "views").over(Experiment(plain).config["datasets"]["train"])
    np.save(tmp_path / "theirs.npy", np.zeros((24, 5), np.float32))
    with pytest.raises(ValueError, match="holds one view of each image"):
        Bank(tmp_path / "theirs.npy").over(data)


class Noisy(Digits):
    """Draws random numbers of one library in ``__getitem__``."""

    def __init__(self, draw):
        super().__init__(classes=range(3))
        self.draw = draw

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + self.draw(), label


class Transformed(Digits):
    def __init__(self, transform):
        super().__init__(classes=range(3))
        self.transform = transform

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return self.transform(image), label


def test_random_numbers_are_noticed_even_if_they_rarely_change_an_image():
    draws = {
        "PyTorch": lambda: torch.rand(()).item() > 1,
        "NumPy": lambda: np.random.rand() > 1,
        "Python's random": lambda: random.random() > 1,
    }
    for library, draw in draws.items():
        assert views.draws(Noisy(draw)) == f"it draws random numbers of {library}"
    assert views.draws(Noisy(iter(range(10**6)).__next__)) == "image 0 is another one each time"
    assert views.draws(Noisy(lambda: 0.5)) == ""
    rare, still = Transformed(v2.RandomErasing(p=0.001)), Transformed(v2.CenterCrop(6))
    for data in (rare, Subset(rare, [0, 1]), ConcatDataset([still, rare])):
        assert views.draws(data) == "it draws random numbers of PyTorch"
    assert views.draws(still) == ""


def test_views_are_drawn_again_from_every_generator():
    for draw in (lambda: torch.rand(()), lambda: float(np.random.rand()), random.random):
        data = Noisy(draw)
        views.check_repeats(data, 0)
        first, again = views.items(data, [7, 7], 1, 0)
        assert torch.equal(first[0], again[0])
    with pytest.raises(ValueError, match="expected views that the seed decides, got another image 0"):
        views.check_repeats(Noisy(iter(range(10**6)).__next__), 0)


# Arrays of other programs.


def saved(folder, form, tensor):
    """A file of one format with a tensor."""
    path = folder / f"dino.{form}"
    if form.lower() == "npy":
        with path.open("wb") as file:
            np.save(file, tensor.numpy())
    elif form == "npz":
        np.savez(path, tensor.numpy())
    elif form == "safetensors":
        save_file({"image_embeds": tensor}, path, {"format": "pt"})
    else:
        torch.save({"image_embeds": tensor} if form == "pth" else tensor, path)
    return path


FORMS = {
    "npy": torch.float32, "NPY": torch.float32, "npz": torch.float32, "pt": torch.bfloat16, "pth": torch.float16,
    "safetensors": torch.bfloat16,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_external_arrays(form, tmp_path, monkeypatch):
    kept = torch.randn(40, 5).to(FORMS[form])
    path = saved(tmp_path, form, kept)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (path, f"~/{path.name}"):
        bank = pickle.loads(pickle.dumps(Bank(source)))
        assert bank.count == 40
        assert torch.equal(bank.read([39, 3])[0], kept[[39, 3]].float())
    with pytest.raises(ValueError, match="it has 40 images, the data set 896"):
        bank.over(Digits(classes=range(5, 10)))


def test_arrays_in_memory_and_in_other_orders():
    kept = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    array = kept.detach().numpy()
    for source in (kept, array, array.astype(">f4"), np.asfortranarray(array)):
        bank = pickle.loads(pickle.dumps(Bank(source)))
        assert torch.equal(bank.read([5, 0])[0], kept[[5, 0]].detach().float())
    with pytest.raises(TypeError, match="Bank: expected a path, a tensor or an array, got list; give one"):
        Bank(array.tolist())
    with pytest.raises(ValueError, match=r"in memory cannot be used as a teacher bank: an array \(N, D\)"):
        Bank(torch.zeros(4, 2, 2))


def test_a_run_learns_from_an_external_array(teacher, whole, tmp_path):
    path = saved(tmp_path, "safetensors", Bank(whole).read(range(901))[0])
    recipe = digits(teacher, f"recipe.teacher_bank={path}")
    recipe.validate()
    own = digits(teacher, f"recipe.teacher_bank={whole}")
    assert step(recipe)[0] == pytest.approx(step(own)[0], rel=CLOSE)


def raw_safetensors(path, header, data=bytes(48)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def one(shape=(4, 3), offsets=(0, 48), dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def raw_npy(path, described):
    text = described.encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(96)
    if path.suffix == ".npz":
        ZipFile(path, "w").writestr("a.npy", content)
    else:
        path.write_bytes(content)


def raw_pytorch(path, rows):
    """A file with 512 rows that describes another number of them."""
    torch.save(torch.ones(512, 1), path)
    with ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with ZipFile(path, "w") as archive:
        for name, content in records.items():
            described = content.replace(b"M\x00\x02", b"J" + struct.pack("<i", rows))
            archive.writestr(name, described if name.endswith("data.pkl") else content)


FLOATS = np.zeros((4, 3), np.float32)
EXTERNAL = {
    "three dimensions": ("x.npy", lambda p: np.save(p, np.zeros((4, 2, 2))), r"\(N, D\) of floats was expected"),
    "integers": ("x.npy", lambda p: np.save(p, np.zeros((4, 2), np.uint16)), "of floats was expected, got .* uint16"),
    "objects": ("x.npy", lambda p: np.save(p, np.array([print], object)), "Python objects"),
    "cut": ("x.npy", lambda p: np.save(p, np.zeros((99, 2), np.float32)) or os.truncate(p, 300), "mmap length"),
    "text": ("x.npy", lambda p: p.write_text("hello"), "cannot be used as a teacher bank"),
    "negative": ("x.npy", lambda p: raw_npy(p, "{'descr': '<f4', 'fortran_order': 0, 'shape': (-4, -3)}\n"), "x.npy"),
    "endless": ("x.npy", lambda p: raw_npy(p, "{'descr': '<f4', 'fortran_order': 0, 'shape': (10**9, 1)}\n"), "x.npy"),
    "wrong types": ("x.npy", lambda p: raw_npy(p, "{'descr': 3, 'fortran_order': False, 'shape': 'x'}\n"), "x.npy"),
    "structured": ("x.npy", lambda p: np.save(p, np.zeros((4, 3), "f4,f4")), "of floats was expected"),
    "a pipe": ("x.npy", os.mkfifo, "expected a regular file .* found something else"),
    "a device": ("x.npy", lambda p: p.symlink_to("/dev/zero"), "expected a regular file .* found something else"),
    "nothing": ("x.npy", lambda p: None, "expected a file .*x.npy of a teacher bank, found none"),
    "two arrays": ("x.npz", lambda p: np.savez(p, FLOATS, FLOATS), "one array was expected, got 'arr_0', 'arr_1'"),
    "compressed": ("x.npz", lambda p: np.savez_compressed(p, FLOATS), "an archive without compression was expected"),
    # A system that allows any allocation finds the end of the file instead.
    "endless in an archive": (
        "x.npz", lambda p: raw_npy(p, "{'descr': '<f4', 'fortran_order': False, 'shape': (274877906944, 1)}\n"),
        "x.npz cannot be used .*(describes an array that does not fit into memory|EOF.*); give the whole file, or",
    ),
    "endless tensor": ("x.pt", lambda p: raw_pytorch(p, 2**31 - 1), "x.pt could not be read: .*; give the whole file"),
    "objects in an archive": ("x.npz", lambda p: np.savez(p, np.array([print], object)), "cannot be used as a teacher"),
    "a text in an archive": ("x.npz", lambda p: ZipFile(p, "w").writestr("x", "hello"), "expected, got bytes"),
    "without memory": ("x.pt", lambda p: torch.save(torch.ones(4, 3, device="meta"), p), "of floats was expected, got"),
    "code": ("x.pt", lambda p: torch.save(print, p), "x.pt could not be read: "),
    "a list": ("x.pt", lambda p: torch.save([1], p), "one tensor was expected, got list"),
    "old kind": ("x.pt", lambda p: torch.save(torch.ones(2, 2), p, _use_new_zipfile_serialization=False), "x.pt"),
    "another kind": ("x.h5", lambda p: p.write_text("hello"), r"a file of the kinds \.npy, .* got \.h5; give .* numpy"),
    "no kind": ("dino", lambda p: p.write_text("hello"), "got no suffix"),
    "cut tensors": ("x.safetensors", lambda p: raw_safetensors(p, one(), bytes(45)), "x.safetensors could not be read"),
    "more tensors": ("x.safetensors", lambda p: raw_safetensors(p, one(), bytes(49)), "could not be read"),
    "no tensors": ("x.safetensors", lambda p: raw_safetensors(p, {}, b""), "one array was expected, got none"),
    "two tensors": ("x.safetensors", lambda p: save_file({"a": torch.ones(2), "b": torch.ones(2)}, p), "got 'a', 'b'"),
    "whole numbers": ("x.safetensors", lambda p: raw_safetensors(p, one(dtype="I32")), "floats was expected, got I32"),
    "offsets below 0": ("x.safetensors", lambda p: raw_safetensors(p, one(offsets=(-8, 40))), "could not be read"),
    "other offsets": ("x.safetensors", lambda p: raw_safetensors(p, one(offsets=(0, 44))), "could not be read"),
    "a hole": ("x.safetensors", lambda p: raw_safetensors(p, one(offsets=(8, 56)), bytes(56)), "could not be read"),
    "no header": ("x.safetensors", lambda p: raw_safetensors(p, b"[]"), "could not be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTERNAL)
def test_bad_external_arrays_raise(name, tmp_path):
    file, write, reason = EXTERNAL[name]
    write(tmp_path / file)
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as raised:
        Bank(tmp_path / file)
    assert str(tmp_path / file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "; give" in str(raised.value)


def test_one_array_is_not_used_for_two_modules(tmp_path):
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
from rkd_plugin.teacher_bank import Bank
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
    """A valid bank of zeros that uses no disk space."""
    folder.mkdir()
    layout = files.Layout(rows, [width], "float32", files.shard_rows([width], "float32"))
    np.lib.format.open_memmap(folder / "0.npy", "w+", np.float32, (rows, width))
    sums = np.full((layout.shards, 1), files.checksum(np.zeros((layout.shard_rows, width), np.float32)), np.uint64)
    np.save(folder / "checksums.npy", sums)
    header = {
        "format": FORMAT, "version": VERSION, "dtype": "float32", "views": 0, "seed": 0,
        "shard_rows": layout.shard_rows, "arrays": [{"path": ".", "io": "output", "pool": None, "width": width}],
        "data": {"count": rows, "labels": None, "files": None, "transform": "", "images": []},
        "teacher": {"model": {}, "weights": "", "precision": "float32"}, "checksums": fingerprint.digest(sums),
    }  # fmt: skip
    (folder / "bank.json").write_text(json.dumps({**header, "checksum": fingerprint.digest(header)}))
    return folder


def test_a_large_bank_is_not_loaded(tmp_path):
    rows, width = 2**18, 1024
    folder = sparse(tmp_path / "bank", rows, width)
    done = python(GROWTH, folder)
    grown, seconds, nonzero = done.stdout.split()
    assert int(grown) < 4 * rows * width / 10, done.stderr
    assert float(seconds) < 1
    assert nonzero == "0"


# pytorch-metric-learning.


class Items(Dataset):
    """Vectors and labels for PML's trainers."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 6, generator=generator)
        self.labels = [index // 4 for index in range(40)]

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self.x[index], self.labels[index]


def trained(data, teacher=None, bank=None, trunk=False, **options):
    """The student's weights after PML's trainer with a trunk, or `RKDTrainer`, with a teacher or its bank."""
    torch.manual_seed(1)
    student = torch.nn.Linear(6, 3)
    options = {"dataset": data, **options}
    if trunk:
        kind, models, loss = (
            MetricLossOnly,
            {"trunk": TeacherStudentTrunk(student, teacher)},
            {"metric_loss": RKDDALoss()},
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
    precomputed = trained(data, bank=Bank(tmp_path / "teacher.npy"), trunk=trunk, **options)
    torch.testing.assert_close(precomputed, live, rtol=CLOSE, atol=1e-6)
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
    assert (moved.device.type, moved.dtype) == ("meta", torch.float64)
    assert torch.equal(moved.teacher, torch.zeros(4, 5))  # the loss moves it


def test_pmls_trainers_raise_for_a_bank_that_does_not_fit(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((40, 5), np.float32))
    bank, teacher = Bank(tmp_path / "x.npy"), torch.nn.Linear(6, 5)
    with pytest.raises(ValueError, match="RKDTrainer: expected a teacher or a teacher_bank, got both"):
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

    class OfTwoModules(Bank):
        def read(self, rows):
            return 2 * super().read(rows)

    with pytest.raises(ValueError, match="expected a teacher_bank of one module, got 2"):
        trained(Items(), bank=OfTwoModules(bank.path))


# The command.


def test_the_command(teacher, tmp_path, capsys):
    folder = tmp_path / "bank"
    command = ["embed", "quickstart/rkd_da", f"recipe.teacher_checkpoint={teacher}", "--out", str(folder)]
    assert cli.main(command) == 0
    assert f'recipe.teacher_bank="{folder}"' in capsys.readouterr().out
    assert cli.main(["embed", "--verify", str(folder)]) == 0
    assert "901 rows are unchanged" in capsys.readouterr().out
    flipped(folder / "0.npy", -1)
    assert cli.main(["embed", "--verify", str(folder)]) == 1
    assert "rows 896 to 900 of 0.npy are not what was written" in capsys.readouterr().err
    assert cli.main(["embed", "quickstart/rkd_da"]) == 1
    assert "expected a recipe and --out BANK, or --verify BANK" in capsys.readouterr().err


def test_only_the_bank_can_be_added_by_an_override():
    assert read("quickstart/rkd_da", ["recipe.teacher_bank=x"]).settings["teacher_bank"] == "x"
    assert "teacher_bank: 'x'" in read("quickstart/rkd_da", ["recipe.teacher_bank='x'"]).resolved()
    for override in ("recipe.teacher_banc=x", "train.teacher_bank=x", "teacher_bank=x"):
        with pytest.raises(RecipeError, match="no key"):
            read("quickstart/rkd_da", [override])
