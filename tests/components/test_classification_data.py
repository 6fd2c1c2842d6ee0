"""CIFAR-100 and Tiny ImageNet in their layout on disk: what is read, and what raises."""

import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms import v2

from rkd_plugin.components.datasets import CIFAR100, Cached, TinyImageNet
from tests.components.test_datasets import clutter, write_image

WNIDS = ["n02124075", "n04067472", "n04540053"]
GET_CIFAR = "; get cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it in "
GET_TINY = "; get http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it in that folder$"


@pytest.fixture
def cifar(tmp_path):
    """Three training images and two test images of five classes."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, labels in (("train", [4, 0, 2]), ("test", [1, 3])):
        shades = np.arange(len(labels) * 3072).reshape(-1, 3072).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": shades, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["auk", "bee", "cow", "doe", "eel"]}))
    return tmp_path


@pytest.fixture
def tiny(tmp_path):
    """Tiny ImageNet with three classes, whose list is not sorted by name."""
    root = tmp_path / "tiny-imagenet-200"
    for shade, wnid in enumerate(WNIDS):
        for number in range(2):
            write_image(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 80 * shade)
    for number in range(2):
        write_image(root / "val" / "images" / f"val_{number}.JPEG", 80 * number, size=(8, 8))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    lines = [f"val_0.JPEG\t{WNIDS[0]}\t0\t32\t44\t62\n", f"val_1.JPEG\t{WNIDS[2]}\t1\t2\t3\t4\n"]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


def test_cifar_is_torchvisions(cifar):
    data = CIFAR100(cifar, train=True, transform=v2.PILToTensor(), published=False)
    image, label = data[1]
    assert (len(data), label, data.classes[label], data.targets) == (3, 0, "auk", [4, 0, 2])
    # Rows of 1,024 reds, greens and blues, line by line.
    assert torch.equal(image, torch.arange(3072, 6144).to(torch.uint8).view(3, 32, 32))
    assert CIFAR100(cifar, train=False, published=False).targets == [1, 3]


def test_nothing_of_a_cifar_file_is_executed(cifar, monkeypatch):
    """Not even of a file with the published MD5, which an attacker can produce."""
    publish(monkeypatch, cifar / "cifar-100-python")
    monkeypatch.setattr(pickle, "load", None)
    assert CIFAR100(cifar).targets == [4, 0, 2]


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_missing_cifar_file_is_named_with_where_to_get_it(cifar, name):
    path = cifar / "cifar-100-python" / name
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"CIFAR100: expected a file {path}, found none{GET_CIFAR}"):
        CIFAR100(cifar, published=False)


def publish(monkeypatch, folder):
    """Accept the files as the published ones."""
    train, test, meta = (calculate_md5(folder / name) for name in ("train", "test", "meta"))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", train]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", test]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": meta})


@pytest.mark.parametrize(("name", "published"), [("train", True), ("test", False), ("meta", False)])
def test_a_truncated_cifar_file_raises(cifar, name, published, monkeypatch):
    path = cifar / "cifar-100-python" / name
    publish(monkeypatch, path.parent)
    train = name != "test"
    assert len(CIFAR100(cifar, train, published=published)) == (3 if train else 2)
    path.write_bytes(path.read_bytes()[:-20])
    message = rf"{path} is truncated or changed, its MD5 is not [0-9a-f]{{32}}{GET_CIFAR}.*; or set published to False$"
    if not published:
        message = f"expected a pickle of arrays in {path}, could not read it: "
    with pytest.raises(ValueError, match=message) as error:
        CIFAR100(cifar, train, published=published)
    assert "\n" not in str(error.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["train", "meta"])
def test_a_pickle_that_would_execute_code_raises_and_is_not_executed(cifar, tmp_path, name, monkeypatch):
    path, target = cifar / "cifar-100-python" / name, tmp_path / "executed"
    publish(monkeypatch, path.parent)
    content = {**pickle.loads(path.read_bytes()), "filenames": [Malicious(target)]}  # in addition to valid content
    path.write_bytes(pickle.dumps(content))
    for published, problem in ((False, ", could not read it: it names "), (True, " is truncated or changed")):
        with pytest.raises(ValueError, match=f"{path}{problem}"):
            CIFAR100(cifar, published=published)
        assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # pickle executes it


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train", {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1]}, r"got \(2, 3072\) and 1 labels"),
        ("train", {"data": np.zeros((1, 3000), np.uint8), "fine_labels": [1]}, r"got \(1, 3000\) and 1 labels"),
        ("test", {"data": np.zeros((1, 3072), np.float32), "fine_labels": [1]}, "got None and 1 labels"),
        ("train", {"data": np.zeros((1, 3072), np.uint8), "labels": [1]}, r"got \(1, 3072\) and None labels"),
        ("test", {}, "got None and None labels"),
        ("test", [1, 2], "got list"),
        ("meta", {"fine_label_names": "auk"}, "got str"),
        ("meta", {"fine_label_names": ["auk", 1]}, "got list"),
        ("meta", {}, "got NoneType"),
        ("meta", ["auk"], "got list"),
    ],
)  # fmt: skip
def test_a_cifar_file_of_another_form_raises(cifar, name, content, message):
    path = cifar / "cifar-100-python" / name
    path.write_bytes(pickle.dumps(content))
    form = "a list fine_label_names" if name == "meta" else r"data \(N, 3072\) of uint8 and N fine_labels"
    form = form if isinstance(content, dict) else "a dictionary of arrays"
    with pytest.raises(ValueError, match=f"CIFAR100: expected {form} in {path}, {message}$"):
        CIFAR100(cifar, train=name != "test", published=False)


def test_cifar_is_downloaded_on_request_and_only_if_it_is_the_published_archive(cifar, tmp_path, monkeypatch, web):
    (folder, address), root = web, tmp_path / "root"
    archive = folder / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(cifar / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "url", f"{address}/archive.tar.gz")
    with pytest.raises(FileNotFoundError, match="or delete any cifar-100-python there and set download to True"):
        CIFAR100(root, published=False)
    assert not root.exists()
    archives = f"{address}/archive.tar.gz gave a file whose MD5 is not eb9058c3a382ffc7106e4002c42a8d85{GET_CIFAR}"
    with pytest.raises(ValueError, match=archives):
        CIFAR100(root, download=True, published=False)
    assert not (root / "cifar-100-python").exists()
    monkeypatch.setattr(CIFAR100, "tgz_md5", calculate_md5(archive))
    assert len(CIFAR100(root, download=True, published=False)) == 3
    monkeypatch.setattr(CIFAR100, "url", f"{address}/missing")
    (root / CIFAR100.filename).unlink()
    assert len(CIFAR100(root, download=True, published=False)) == 3  # it exists
    shutil.rmtree(root)
    with pytest.raises(ConnectionError, match=f"CIFAR100: {address}/missing failed .*404.*{GET_CIFAR}"):
        CIFAR100(root, download=True, published=False)


def test_cifars_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch, web):
    folder, address = web
    with tarfile.open(folder / "archive.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../evil"))
    monkeypatch.setattr(CIFAR100, "url", f"{address}/archive.tar.gz")
    monkeypatch.setattr(CIFAR100, "tgz_md5", calculate_md5(folder / "archive.tar.gz"))
    with pytest.raises(ValueError, match=r"expected an archive that stays in its folder in cifar-100-python.tar.gz"):
        CIFAR100(tmp_path / "root", download=True, published=False)
    assert not (tmp_path / "evil").exists()


def test_tiny_imagenets_labels_are_lines_of_its_list(tiny):
    train, val = TinyImageNet(tiny), TinyImageNet(tiny, "val", v2.PILToTensor(), target_transform=lambda label: -label)
    assert train.targets == [0, 0, 1, 1, 2, 2]
    assert [Path(path).name.partition("_")[0] for path, _ in train.samples[::2]] == list(reversed(WNIDS))
    assert val.targets == [2, 0]
    image, label = val[0]
    assert image.shape == (3, 8, 8)
    assert label == -2
    assert train[0][0].mode == "RGB"
    assert train[0][0].getpixel((0, 0))[0] == pytest.approx(160, abs=3)  # JPEG's rounding


def test_hidden_and_system_entries_are_not_images_of_tiny_imagenet(tiny):
    clean = TinyImageNet(tiny).samples
    clutter(tiny / "tiny-imagenet-200" / "train", *(tiny / "tiny-imagenet-200" / "train").glob("*/images"))
    assert TinyImageNet(tiny).samples == clean


def test_tiny_imagenet_is_cached(tiny):
    resized = v2.Compose([v2.Resize((8, 8)), v2.PILToTensor()])
    for split, labels in (("val", [2, 0]), ("train", [0, 0, 1, 1, 2, 2])):
        data = Cached(TinyImageNet(tiny, split, resized), tiny / "cache")
        assert [label for _, label in data] == data.targets == labels
        for index in range(len(labels)):
            assert torch.equal(data[index][0], data.dataset[index][0])
    assert len(list((tiny / "cache").iterdir())) == 2


def test_a_class_of_tiny_imagenet_without_images_is_named(tiny):
    folder = tiny / "tiny-imagenet-200" / "train" / WNIDS[1] / "images"
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=f"TinyImageNet: expected an image or more in {folder}, found nothing"):
        TinyImageNet(tiny)
    folder.rmdir()
    with pytest.raises(FileNotFoundError, match=f"TinyImageNet: expected a folder {folder}, found none{GET_TINY}"):
        TinyImageNet(tiny)


@pytest.mark.parametrize(
    ("split", "gone", "message"),
    [
        ("train", "wnids.txt", "TinyImageNet: expected a file .*wnids.txt, found none"),
        ("val", "val/val_annotations.txt", "expected a file .*val_annotations.txt, found none"),
        ("val", "val/images/val_1.JPEG", "line 2 of .*_annotations.txt names the image .*val_1.JPEG, which is missing"),
    ],
)
def test_what_tiny_imagenet_lacks_is_named(tiny, split, gone, message):
    for path in (tiny / "tiny-imagenet-200").glob(gone):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=message + GET_TINY):
        TinyImageNet(tiny, split)


@pytest.mark.parametrize(("split", "name"), [("train", "wnids.txt"), ("val", "val/val_annotations.txt")])
def test_an_empty_list_of_tiny_imagenet_raises(tiny, split, name):
    path = tiny / "tiny-imagenet-200" / name
    path.write_text("\n")
    with pytest.raises(ValueError, match=f"TinyImageNet: expected lines in {path}, found none{GET_TINY}"):
        TinyImageNet(tiny, split)


@pytest.mark.parametrize("line", [f"val_0.JPEG {WNIDS[0]}", "val_0.JPEG\tn99999999\t1\t2\t3\t4", "val_0.JPEG", "\t"])
def test_an_annotation_without_a_known_class_is_named(tiny, line):
    path = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text(f"val_1.JPEG\t{WNIDS[1]}\t0\t0\t1\t1\n{line}x\n")
    problem = f"line 2 of {path} names no class of wnids.txt, {line + 'x'!r}"
    with pytest.raises(ValueError, match=re.escape(problem) + GET_TINY):
        TinyImageNet(tiny, "val")


def test_other_errors_of_tiny_imagenet(tiny):
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        TinyImageNet(tiny, "test")
    path = Path(TinyImageNet(tiny).samples[0][0])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=f"expected an image in {path}, could not read it: "):
        TinyImageNet(tiny)[0]
