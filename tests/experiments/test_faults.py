"""Real faults: the messages of a run, the files that remain, and that the run ends as without the fault."""

import ctypes
import errno
import gc
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from children import in_child, result_of_child
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits

from rkd_plugin import rkd_da_loss
from rkd_plugin.components.datasets import Digits
from rkd_plugin.experiments.recipe import RecipeError, read
from rkd_plugin.experiments.running import runner
from rkd_plugin.experiments.running.checkpoints import read_checkpoint, write_checkpoint
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.experiments.running.tensor_files import DamagedError
from rkd_plugin.experiments.support.files import LOCK, alone_in, write_json
from rkd_plugin.experiments.support.signals import stopping
from rkd_plugin.storage import replacing

TINY = ["recipe.num_epochs=4", "recipe.samples_per_epoch=256", "recipe.batch_size=64", "models.model.kwargs.width=4"]


def run(folder, overrides=TINY, recipe="quickstart/student"):
    return runner.run(read(recipe, overrides), folder)


def until(happened, patience=60.0):
    deadline = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.0005)


def without_times(history):
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in history]


def files(folder):
    """All files but the events, and the lock of a killed run."""
    return {path.name for path in folder.iterdir() if "tfevents" not in path.name and path.name != LOCK}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder)


# Two runs in one folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_the_second_run_in_a_folder_raises_until_the_first_is_killed(tmp_path, undisturbed, workers):
    folder = tmp_path / "shared"
    overrides = [*TINY, f"train.train_data_loader.kwargs.num_workers={workers}"]
    first = in_child(run, folder, [*overrides[1:], "recipe.num_epochs=1000"])
    until((folder / "last.pt").is_file)
    before = files(folder)
    with pytest.raises(BlockingIOError, match=r"shared is in use by another run; wait until that one ends, or give"):
        run(folder, [*overrides[1:], "recipe.num_epochs=1000"])
    assert first.is_alive()
    assert {name for name in files(folder) if not name.startswith(".")} >= before
    first.kill()
    first.join()
    # A worker lives for seconds, and must not keep the lock.
    with alone_in(folder):
        pass
    shutil.rmtree(folder)
    assert without_times(run(folder, overrides)["history"]) == without_times(undisturbed[1]["history"])
    assert files(folder) == files(undisturbed[0])
    assert not (folder / LOCK).exists()


HOLDS = """
import os, sys, time
from pathlib import Path
from rkd_plugin.experiments.support.files import alone_in
with alone_in(Path(sys.argv[1])):
    if not os.fork():
        print("holds", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_run_even_if_a_forked_process_lives_on(tmp_path):
    folder = tmp_path / "shared"
    first = subprocess.Popen([sys.executable, "-c", HOLDS, folder], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert first.stdout.readline() == b"holds\n"
        with pytest.raises(BlockingIOError, match=r"shared is in use by another run; wait"), alone_in(folder):
            pass
        first.kill()
        first.wait()
        with alone_in(folder):
            assert files(folder) == set()
        assert list(folder.iterdir()) == []
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        first.stdout.close()


def test_a_folder_is_locked_while_it_is_locked_by_this_process(tmp_path):
    with alone_in(tmp_path / "a"):
        with pytest.raises(BlockingIOError, match="in use by another run"), alone_in(tmp_path / "a"):
            pass
        # The run that raised has deleted nothing.
        with pytest.raises(BlockingIOError, match="in use by another run"), alone_in(tmp_path / "a"):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_a_file_system_without_locks_stops_no_run(error, tmp_path, monkeypatch):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with alone_in(tmp_path), alone_in(tmp_path):
        pass


def test_only_temporary_files_of_killed_processes_are_deleted(tmp_path, undisturbed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    (folder / "result.json").unlink()
    with replacing(folder / "c.pt") as temporary:
        temporary.touch()
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        ours = str(os.getpid())
        left = [folder / temporary.name.replace(ours, str(ended.pid)), folder / ".a.png.rkd-tmp-00000000-1.png"]
        left[1].touch()
        os.utime(left[1], (0, 0))
        others = [".notes.tmp.bak", ".last.pt.tmp77.pt", ".a.rkd-tmp-notes", ".a.png.rkd-tmp-00000000-2.png"]
        for path in [left[0], *(folder / name for name in others)]:
            path.touch()
        (folder / ".x.tmp9").mkdir()
        (folder / f".y.rkd-tmp-00000000-{ended.pid}").mkdir()
        (folder / f".z.rkd-tmp-00000000-{ended.pid}").symlink_to(folder / "recipe.yaml")
        write_json(folder / "b.json", {})
        assert temporary.exists()
        assert not any(path.exists() for path in left)
    assert run(folder) == json.loads((folder / "result.json").read_text())
    # In a locked folder no other process writes.
    assert not (folder / others[-1]).exists()
    kept = [*others[:-1], ".x.tmp9", f".y.rkd-tmp-00000000-{ended.pid}", f".z.rkd-tmp-00000000-{ended.pid}"]
    assert all((folder / name).exists() for name in kept)


def test_a_picture_that_a_kill_cut_short_goes_with_the_next(tmp_path):
    process = in_child(_draw, tmp_path)
    until(lambda: any(tmp_path.glob(".*.png")))
    process.kill()
    process.join()
    assert len(list(tmp_path.iterdir())) == 1
    with replacing(tmp_path / "other.png") as temporary:
        temporary.touch()
    assert files(tmp_path) == {"other.png"}


def _draw(folder):
    with replacing(folder / "map.png") as temporary:
        temporary.write_bytes(b"half")
        time.sleep(60)


def test_a_finished_run_is_read_while_another_one_reads_it(undisturbed):
    folder, result = undisturbed
    with alone_in(folder):
        assert run(folder) == result


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint at /nowhere"):
        run(tmp_path / "out", ["recipe.teacher_checkpoint=/nowhere/last.pt"], "quickstart/rkd_da")
    assert list(tmp_path.iterdir()) == []


# Checkpoints


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder of a run without its last epoch."""
    stop_before_epoch(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    monkeypatch.undo()
    return tmp_path / "stopped"


def before_epoch(monkeypatch, epoch, happens):
    seed = runner.Experiment.seed

    def seeded(self, at):
        if at == epoch:
            happens()
        seed(self, at)

    monkeypatch.setattr(runner.Experiment, "seed", seeded)


def stop_before_epoch(monkeypatch, epoch):
    def stop():
        raise KeyboardInterrupt

    before_epoch(monkeypatch, epoch, stop)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit, in a weight."""
    content = bytearray(path.read_bytes())
    weight = read_checkpoint(path)["model"]
    place = content.index(next(value for value in weight.values() if value.numel() > 20).numpy().tobytes())
    content[place + 9] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_checkpoint_is_reported_and_the_best_one_used(stopped, undisturbed, damage):
    damage(stopped / "last.pt")
    epoch = len(read_checkpoint(stopped / "best.pt")["history"])
    reason = rf"at .*last\.pt, could not read it, as it is truncated or changed;.* after .*best\.pt, epoch {epoch}$"
    with pytest.warns(UserWarning, match=reason):
        assert without_times(run(stopped)["history"]) == without_times(undisturbed[1]["history"])
    assert files(stopped) == files(undisturbed[0])
    assert read_checkpoint(stopped / "last.pt")["history"]


def test_a_damaged_checkpoint_without_an_earlier_one_raises_and_stays(stopped):
    for name in ("last.pt", "best.pt"):
        flip(stopped / name)
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(
        DamagedError, match=r"expected a checkpoint .* at .*last\.pt, could not read it, as it is truncated"
    ):
        run(stopped)
    assert {path: path.read_bytes() for path in before} == before


def test_any_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "a.pt"
    content = {"model": {"weight": torch.arange(100.0)}, "history": [{"epoch": 1, "loss": 0.5}]}
    write_checkpoint(path, content)
    whole = path.read_bytes()
    draw = random.Random(0)
    noticed = 0
    for _ in range(300):
        place = draw.randrange(8 * len(whole))
        path.write_bytes(whole[: place // 8] + bytes([whole[place // 8] ^ 1 << place % 8]) + whole[place // 8 + 1 :])
        try:
            found = read_checkpoint(path, "model", "history")
        except ValueError:
            noticed += 1
        else:
            assert torch.equal(found["model"]["weight"], content["model"]["weight"])
            assert found["history"] == content["history"]
    # The rest are the bytes between the parts, which pad them to whole blocks.
    assert noticed > 150


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (torch.save, r"names .*pathlib\S+, which reading would execute"),
        (lambda content, path: path.write_bytes(pickle.dumps(content)), "is of another kind"),
    ],
)
def test_a_checkpoint_that_would_execute_code_stops_the_run_and_stays(stopped, tmp_path, monkeypatch, save, reason):
    monkeypatch.chdir(tmp_path)
    save({"model": Malicious()}, stopped / "last.pt")
    planted = (stopped / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=rf"last\.pt, could not read it, as it {reason}"):
        run(stopped)
    assert not Path("executed").exists()
    assert (stopped / "last.pt").read_bytes() == planted


def test_a_checkpoint_of_another_model_stops_the_run_and_stays(stopped, undisturbed, tmp_path):
    run(tmp_path / "other", [*TINY[:3], "models.model.kwargs.width=6", "recipe.num_epochs=1"])
    shutil.copy(tmp_path / "other" / "last.pt", stopped / "last.pt")
    other = (stopped / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"last\.pt holds another model than .*recipe\.yaml describes, ConvEmbedding"):
        run(stopped)
    assert (stopped / "last.pt").read_bytes() == other


def test_a_checkpoint_of_another_optimizer_raises(stopped):
    checkpoint = read_checkpoint(stopped / "last.pt")
    checkpoint["optimizer"]["param_groups"] *= 2
    write_checkpoint(stopped / "last.pt", checkpoint)
    with pytest.raises(ValueError, match=r"last\.pt holds the state of another optimizer than .*recipe\.yaml"):
        run(stopped)


# Data, and numbers that are not finite

GREY = """!import_call
          key: torchvision.transforms.Compose
          init:
            kwargs:
              transforms:
                - !import_call {key: torchvision.transforms.Grayscale, init: {kwargs: {}}}
                - !import_call {key: torchvision.transforms.ToTensor, init: {kwargs: {}}}
"""


@pytest.fixture
def pictures(tmp_path):
    """A folder of images per class, and the student's recipe on it."""
    root = tmp_path / "birds"
    for name in "abcd":
        (root / name).mkdir(parents=True)
        for number in range(40):
            pixels = torch.randint(1, 256, (8, 8), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    text = Path(read("quickstart/student").path).read_text().replace("datasets.Digits", "datasets.ClassFolders")
    for split, classes in (("train", "[0, 1, 2, 3, 4]"), ("test", "[5, 6, 7, 8, 9]")):
        lines = f"root: {root}\n        split: {split}\n        transform: {GREY}"
        text = text.replace(f"classes: {classes}", lines.rstrip())
    (tmp_path / "birds.yaml").write_text(text)
    return root, tmp_path / "birds.yaml"


def raises(error, match, *arguments, **options):
    """The one sentence of a run that raises."""
    with pytest.raises(error, match=match) as raised:
        run(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(pictures, tmp_path, workers):
    root, recipe = pictures
    for path in sorted(root.glob("a/*.png"))[1:]:  # the first one is read before the run has a folder
        path.write_bytes(path.read_bytes()[:60])
    overrides = [*TINY, f"train.train_data_loader.kwargs.num_workers={workers}"]
    raises(ValueError, r"^expected an image in .*/a/\d\d\.png, could not read it: ", tmp_path / "o", overrides, recipe)
    assert files(tmp_path / "o") == {"recipe.yaml"}


def test_an_empty_class_is_named(pictures, tmp_path):
    root, recipe = pictures
    shutil.rmtree(root / "b")
    (root / "b").mkdir()
    match = r"^ClassFolders: expected an image or more in .*/birds/b, found nothing, none of .*; add some, or"
    raises(FileNotFoundError, match, tmp_path / "o", TINY, recipe)
    assert not (tmp_path / "o").exists()


def test_one_image_is_too_few(pictures, tmp_path):
    root, recipe = pictures
    for path in [*root.glob("c/*.png"), *root.glob("d/*.png")][1:]:
        path.unlink()
    shutil.rmtree(root / "d")
    shutil.rmtree(root / "b")
    match = r"^datasets\.digits/test: expected two images or more, got 1; relations are between two$"
    raises(ValueError, match, tmp_path / "o", TINY, recipe)
    (root / "d").mkdir()
    shutil.copy(next(root.glob("c/*.png")), root / "d" / "1.png")
    (root / "b").mkdir()
    shutil.copy(next(root.glob("c/*.png")), root / "b" / "1.png")
    match = (
        r"^datasets\.digits/test: expected a class with two images or more, .* got 2 images of as many classes; test"
    )
    raises(ValueError, match, tmp_path / "o", TINY, recipe)


def test_an_epoch_without_a_step_raises(pictures, tmp_path):
    """Before the run where the recipe says how many images there are, else at its first epoch."""
    overrides = ["recipe.samples_per_epoch=32", "recipe.batch_size=64"]
    with pytest.raises(RecipeError, match=r"batch_size: an epoch of 32 images has no batch of 64, and drop_last"):
        run(tmp_path / "o", overrides)
    _, recipe = pictures
    sampler = "      kwargs:\n        replacement: True\n        num_samples: *samples_per_epoch\n"
    assert sampler in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(sampler, ""))
    match = r"^train\.train_data_loader: expected a batch or more in an epoch, got none of 80 images; use a smaller"
    raises(ValueError, match, tmp_path / "o", ["recipe.batch_size=81"], recipe)


@pytest.mark.parametrize(("label", "kind"), [("jay", "str"), (0.5, "float"), (None, "NoneType")])
def test_labels_of_the_wrong_type_are_named(tmp_path, monkeypatch, label, kind):
    def digits(self, *args, **kwargs):
        built(self, *args, **kwargs)
        self.targets[3] = label

    built = Digits.__init__
    monkeypatch.setattr(Digits, "__init__", digits)
    match = (
        rf"^datasets\.digits/train: expected labels that are whole numbers, got {label!r}, a {kind}, for image 3; numb"
    )
    raises(ValueError, match, tmp_path / "o", TINY)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("row", "split", "number"), [(7, "test", 2), (0, "train", 0)])
def test_an_image_with_a_pixel_that_is_no_number_is_named(tmp_path, monkeypatch, row, split, number):
    def load():
        loaded = load_digits()
        assert (loaded.target[row] >= 5) == (split == "test")
        loaded.images[row, 1, 1] = torch.nan
        return loaded

    monkeypatch.setattr("sklearn.datasets.load_digits", load)
    message = raises(FloatingPointError, r"^epoch 1: ", tmp_path / "o", [*TINY, "recipe.samples_per_epoch=6400"])
    assert f", as image {number} of datasets.digits/{split} has pixels that are; repair that image" in message
    assert ("through its term triplet" in message) == (split == "train")
    assert files(tmp_path / "o") == {"recipe.yaml"}


def test_of_an_image_that_a_transform_breaks_the_file_is_named(pictures, tmp_path):
    root, recipe = pictures
    whole = "- !import_call {key: torchvision.transforms.ToTensor, init: {kwargs: {}}}"
    assert whole in recipe.read_text()
    # The logarithm of a black image.
    Image.new("L", (8, 8)).save(root / "b" / "05.png")
    recipe.write_text(recipe.read_text().replace(whole, f"{whole}\n{16 * ' '}- !import_get {{key: torch.log}}"))
    message = raises(FloatingPointError, r"^epoch 1: the loss became nan in step \d ", tmp_path / "o", TINY, recipe)
    assert f", as image 45, {root / 'b' / '05.png'}, of datasets.digits/train has pixels that are" in message


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_term(stopped):
    """A learning rate that destroys the weights of a run with a checkpoint."""
    kept = (stopped / "last.pt").read_bytes()
    checkpoint = read_checkpoint(stopped / "last.pt")
    checkpoint["optimizer"]["param_groups"][0]["lr"] = 1e30
    write_checkpoint(stopped / "last.pt", checkpoint)
    kept = (stopped / "last.pt").read_bytes()
    match = (
        r"^epoch 4: the loss became nan in step \d through its term triplet, although the images are finite; "
        r"lower the learning rate, .*; the checkpoint of epoch 3 is kept$"
    )
    raises(FloatingPointError, match, stopped)
    assert (stopped / "last.pt").read_bytes() == kept


def test_of_two_terms_the_one_that_is_not_finite_is_named(undisturbed, tmp_path):
    overrides = [
        *TINY[:3],
        f"recipe.teacher_checkpoint={undisturbed[0] / 'last.pt'}",
        "models.teacher_model.kwargs={width: 4, embedding_dim: 8, l2_normalize: True}",
        "train.criterion.kwargs.sub_terms.rkd.criterion.kwargs.distance_weight=1.0e+308",
    ]
    text = Path(read("quickstart/rkd_da").path).read_text()
    rkd = text[text.index("        rkd:\n") : text.index("\ntest:")]
    (tmp_path / "two.yaml").write_text(text.replace(rkd, rkd + rkd.replace(" rkd:", " second:")))
    raises(
        FloatingPointError,
        r"in step 1 through its term rkd, although",
        tmp_path / "o",
        overrides,
        tmp_path / "two.yaml",
    )


def test_a_process_that_inherits_nothing_reads_the_data():
    loader = Experiment(read("quickstart/student")).box().train_data_loader
    assert result_of_child(len, loader.dataset) == len(loader.dataset) > 0


@pytest.mark.slow
def test_a_loader_process_that_is_not_forked_reads_the_data(tmp_path):
    """As on Windows and macOS, and on Linux from Python 3.14 on."""
    loader = Experiment(read("quickstart/student")).box().train_data_loader
    path = tmp_path / "dataset.pickle"
    path.write_bytes(pickle.dumps(loader.dataset))
    done = subprocess.run(
        [sys.executable, "-c", f"import pickle; print(len(pickle.load(open({str(path)!r}, 'rb'))))"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{len(loader.dataset)}\n", "")


# Kills and signals


@pytest.mark.parametrize(
    ("kills", "epochs"), [(4, 6), pytest.param(30, 12, marks=pytest.mark.slow)], ids=["four", "thirty"]
)
def test_killed_at_any_moment_ends_as_undisturbed(tmp_path, kills, epochs):
    overrides = [*TINY[1:], f"recipe.num_epochs={epochs}"]
    started = time.monotonic()
    in_child(run, tmp_path / "undisturbed", overrides).join()
    lasts = time.monotonic() - started
    expected = json.loads((tmp_path / "undisturbed" / "result.json").read_text())
    folder = tmp_path / "killed"
    draw = random.Random(0)
    killed = cut_short = 0

    def ended():
        result = json.loads((folder / "result.json").read_text())
        assert without_times(result["history"]) == without_times(expected["history"])
        assert (result["final"], result["best"]) == (expected["final"], expected["best"])
        assert files(folder) == files(tmp_path / "undisturbed")

    def is_writing(or_not=None):
        return any(folder.glob(".*.pt.rkd-tmp*")) or (or_not is not None and not or_not.is_alive())

    while killed < kills:
        process = in_child(run, folder, overrides)
        if killed % 2:
            process.join(draw.uniform(0, lasts))
        else:
            # While a checkpoint is written, after some earlier ones.
            for _ in range(draw.randrange(2 * epochs // 3)):
                until(partial(is_writing, or_not=process))
                until(lambda: not is_writing())
            until(partial(is_writing, or_not=process))
        process.kill()
        process.join()
        if process.exitcode == 0:
            ended()
            shutil.rmtree(folder)
            continue
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        cut_short += is_writing()
        for path in folder.glob("[!.]*.pt"):
            assert read_checkpoint(path)["history"]
    assert cut_short > 0
    in_child(run, folder, overrides).join()
    ended()


def accumulating(path):
    """The student's recipe with an update every three steps, four steps an epoch."""
    text = Path(read("quickstart/student").path).read_text()
    path.write_text(text.replace("    key: 'Adam'\n", "    key: 'Adam'\n    grad_accum_step: 3\n"))
    return path


@pytest.mark.parametrize(
    ("after", "workers"), [(1, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, 2), (6, 0)]), (7, 2)]
)
def test_interrupted_after_any_step_ends_as_undisturbed(tmp_path, monkeypatch, after, workers):
    recipe = accumulating(tmp_path / "accumulating.yaml")
    overrides = [*TINY[1:], "recipe.num_epochs=3", f"train.train_data_loader.kwargs.num_workers={workers}"]
    expected = run(tmp_path / "undisturbed", overrides, recipe)["history"]

    steps, count = runner.steps_of, itertools.count(1)

    def interrupted(*args):
        for loss in steps(*args):
            if next(count) == after:
                signal.raise_signal(signal.SIGINT)
            yield loss

    with monkeypatch.context() as patch:
        patch.setattr(runner, "steps_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", overrides, recipe)
    kept = read_checkpoint(tmp_path / "stopped" / "last.pt")
    assert (len(kept["history"]), kept["part"]["steps"]) == ((after - 1) // 4, (after - 1) % 4 + 1)
    assert without_times(run(tmp_path / "stopped", overrides, recipe)["history"]) == without_times(expected)


def test_the_end_of_an_epoch_keeps_gradients_that_wait_for_their_update(tmp_path, monkeypatch):
    recipe = accumulating(tmp_path / "accumulating.yaml")
    overrides = [*TINY[1:], "recipe.num_epochs=3"]
    expected = run(tmp_path / "undisturbed", overrides, recipe)["history"]
    stop_before_epoch(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", overrides, recipe)
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "stopped" / "last.pt")["gradients"]
    assert without_times(run(tmp_path / "stopped", overrides, recipe)["history"]) == without_times(expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_signal_from_outside_stops_between_two_steps(tmp_path, number, code):
    overrides = [*TINY[2:], "recipe.num_epochs=2", "recipe.samples_per_epoch=64000"]
    process = in_child(run, tmp_path / "stopped", overrides)
    until(lambda: any((tmp_path / "stopped").glob("events.*")))  # they are opened just before the first step
    time.sleep(0.2)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    assert read_checkpoint(tmp_path / "stopped" / "last.pt")["part"]["steps"] in range(1, 1000)
    assert files(tmp_path / "stopped") == {"recipe.yaml", "last.pt"}


def test_a_second_signal_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    reached = []

    def twice():
        with stopping() as recorded:
            signal.raise_signal(signal.SIGINT)
            reached.extend(recorded)
            signal.raise_signal(signal.SIGINT)
            reached.append("too far")

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert reached == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


def test_ignored_signals_stay_ignored_and_threads_do_not_change_them():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping() as recorded:
            signal.raise_signal(signal.SIGINT)
        assert recorded == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def threaded():
        with stopping():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=threaded)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


# Endurance


class Mallinfo2(ctypes.Structure):
    """What glibc knows about its memory; in use are ``hblkhd``, in large blocks, and ``uordblks``."""

    names = "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def _watched(folder, teacher, warm, epochs, steps, leak):
    """Bytes in use, open files, threads and Python's objects before the first epoch that is warm and the last."""
    seen, kept = [], []
    per_step, mallinfo2 = runner.steps_of, ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2

    def leaking(*args):
        for loss in per_step(*args):
            kept.append(bytes(leak))
            yield loss

    def look():
        gc.collect()
        memory = mallinfo2()
        counts = [len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task")]
        seen.append((memory.hblkhd + memory.uordblks, *counts, len(gc.get_objects())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "steps_of", leaking if leak else per_step)
        for epoch in (warm, epochs):
            before_epoch(patch, epoch, look)
        overrides = [
            f"recipe.num_epochs={epochs}", f"recipe.samples_per_epoch={16 * steps}", "recipe.batch_size=16",
            "models.student_model.kwargs.width=4",
            f"recipe.teacher_checkpoint={teacher}",
            "models.teacher_model.kwargs={width: 4, embedding_dim: 8, l2_normalize: True}",
        ]  # fmt: skip
        result = run(folder, overrides, "quickstart/rkd_da")
    assert len(result["history"]) == epochs
    return seen


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs Linux and glibc 2.33")
@pytest.mark.parametrize(
    ("warm", "epochs", "steps", "leak"),
    [(8, 24, 10, 0), (8, 24, 10, 2_000), pytest.param(21, 100, 100, 0, marks=pytest.mark.slow)],
    ids=["240 steps", "240 steps with a leak", "ten thousand steps"],
)
def test_many_steps_leave_nothing_behind(tmp_path, undisturbed, warm, epochs, steps, leak):
    """By what the allocator has in use: the pages that it takes and gives back depend on more than the steps."""
    early, late = result_of_child(_watched, tmp_path / "long", undisturbed[0] / "last.pt", warm, epochs, steps, leak)
    per_step = (late[0] - early[0]) / (epochs - warm) / steps
    assert (per_step < 1_000) == (not leak), per_step  # with a leak, the test can fail
    assert late[1:3] == early[1:3]
    assert late[3] - early[3] < epochs - warm  # one for each epoch


# Disks


@pytest.fixture
def disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_a_full_disk_is_one_sentence_and_the_checkpoint_stays(disk, undisturbed, monkeypatch):
    folder, kept = disk / "run", {}

    def fill():
        kept.update((path, path.read_bytes()) for path in folder.glob("*.pt"))
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass

    before_epoch(monkeypatch, 3, fill)
    match = (
        r"^expected to write .*/(best|last)\.pt, got: No space left on device; what was there before is as it was: make"
    )
    raises(OSError, match, folder)
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(kept) == 2
    assert files(folder) == {"recipe.yaml", "last.pt", "best.pt"}
    monkeypatch.undo()
    (disk / "filler").unlink()
    assert without_times(run(folder)["history"]) == without_times(undisturbed[1]["history"])


@pytest.mark.root
def test_a_disk_that_cannot_be_written_is_one_sentence(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    raises(OSError, rf"^expected to write {disk}/run, got: Read-only file system; what was there before", disk / "run")
    assert list(disk.iterdir()) == []


def _error_without_rights(folder):
    # The modes of folders limit root only without its capabilities.
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    try:
        run(folder)
    except OSError as error:
        return type(error), str(error)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_permission_is_one_sentence(exists, tmp_path):
    folder = tmp_path / "outer" / "run"
    folder.parent.mkdir()
    if exists:
        folder.mkdir()
    closed = folder if exists else folder.parent
    closed.chmod(0o555)
    error, message = result_of_child(_error_without_rights, folder)
    closed.chmod(0o755)
    assert error is PermissionError
    assert message == (
        f"expected to write {folder}, got: Permission denied; what was there before is as it was: make room, or give "
        "another folder"
    )
    assert list(closed.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_disappears_is_one_sentence_and_the_checkpoint_stays(pictures, tmp_path, monkeypatch, workers):
    root, recipe = pictures
    overrides = [*TINY, f"train.train_data_loader.kwargs.num_workers={workers}"]
    expected = run(tmp_path / "undisturbed", overrides, recipe)["history"]
    before_epoch(monkeypatch, 3, lambda: root.rename(tmp_path / "elsewhere"))
    match = r"^expected an image in .*/birds/[ab]/\d\d\.png, could not read it: .*No such file or directory"
    raises(ValueError, match, tmp_path / "o", overrides, recipe)
    assert len(read_checkpoint(tmp_path / "o" / "last.pt")["history"]) == 2
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(root)
    assert without_times(run(tmp_path / "o", overrides, recipe)["history"]) == without_times(expected)


# A student that has collapsed


def test_a_collapsed_student_is_reported_once_and_rkd_does_not_move_it(undisturbed, tmp_path):
    text = Path(read("quickstart/rkd_da").path).read_text()
    student = "      width: 4\n      embedding_dim: *embedding_dim\n      l2_normalize: *l2_normalize\n"
    recipe = tmp_path / "collapsed.yaml"
    recipe.write_text(text.replace(student, f"{student}    src_ckpt: {tmp_path / 'collapsed.pt'}\n"))
    weights = read_checkpoint(undisturbed[0] / "last.pt")["model"]
    weights["6.weight"].zero_()
    write_checkpoint(tmp_path / "collapsed.pt", {"model": weights})
    overrides = [
        *TINY[1:3], "recipe.num_epochs=3", f"recipe.teacher_checkpoint={undisturbed[0] / 'last.pt'}",
        "models.teacher_model.kwargs={width: 4, embedding_dim: 8, l2_normalize: True}",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="^epoch 1: the student has the same output for all 896 test images") as warned:
        run(tmp_path / "o", overrides, recipe)
    assert sum(warning.category is UserWarning for warning in warned) == 1
    trained = read_checkpoint(tmp_path / "o" / "last.pt")["model"]
    assert all(torch.equal(trained[name], weights[name]) for name in ("0.0.weight", "6.weight", "6.bias"))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_rows_that_are_all_equal_have_a_gradient_of_exactly_zero(impl):
    student = torch.full((9, 4), 1 / 3, requires_grad=True)
    rkd_da_loss(student, torch.randn(9, 7), impl=impl).backward()
    assert torch.equal(student.grad, torch.zeros(9, 4))
