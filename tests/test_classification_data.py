"""CIFAR-100 and Tiny ImageNet in their true layout on disk: what is read, and what is refused in words."""

import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms import v2

from rkd_plugin.experiments.datasets import CIFAR100, Cached, TinyImageNet
from tests.test_datasets import write_image

WNIDS = ["n02124075", "n04067472", "n04540053"]


@pytest.fixture
def cifar(tmp_path):
    """Three images to train, two to test, of five classes."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, labels in (("train", [4, 0, 2]), ("test", [1, 3])):
        shades = np.arange(len(labels) * 3072).reshape(-1, 3072).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": shades, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["auk", "bee", "cow", "doe", "eel"]}))
    return tmp_path


@pytest.fixture
def tiny(tmp_path):
    """Tiny ImageNet of three classes, whose list is in another order than their names."""
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


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_missing_cifar_file_is_named_with_where_to_get_it(cifar, name):
    path = cifar / "cifar-100-python" / name
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"expected a file {path}, found none; get cifar-100-python.tar.gz from"
    ):
        CIFAR100(cifar, published=False)


@pytest.mark.parametrize("published", [True, False])
def test_a_cut_cifar_file_is_refused(cifar, published, monkeypatch):
    path = cifar / "cifar-100-python" / "train"
    for table in ("train_list", "test_list"):
        name = table.removesuffix("_list")
        monkeypatch.setattr(CIFAR100, table, [[name, calculate_md5(path.with_name(name))]])
    path.write_bytes(path.read_bytes()[:-500])
    message = "is cut or changed, its MD5 is not" if published else "expected a pickle of arrays in .*, could not read"
    with pytest.raises(ValueError, match=message) as error:
        CIFAR100(cifar, published=published)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_execute_code_is_refused_unexecuted(cifar, tmp_path):
    target = tmp_path / "executed"
    (cifar / "cifar-100-python" / "meta").write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(ValueError, match=r"meta, could not read it: it names pathlib"):
        CIFAR100(cifar, published=False)
    assert not target.exists()
    pickle.loads((cifar / "cifar-100-python" / "meta").read_bytes())
    assert target.exists()  # it would have


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train", {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1]}, r"got \(2, 3072\) and 1 labels"),
        ("train", {"data": np.zeros((1, 3000), np.uint8), "fine_labels": [1]}, r"got \(1, 3000\) and 1 labels"),
        ("test", {"data": np.zeros((1, 3072), np.float32), "fine_labels": [1]}, "got None and 1 labels"),
        ("test", [1, 2], "got None and None labels"),
        ("meta", {"fine_label_names": "auk"}, "expected a list fine_label_names in .*meta, got str"),
    ],
)  # fmt: skip
def test_a_cifar_file_of_another_form_is_refused(cifar, name, content, message):
    (cifar / "cifar-100-python" / name).write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        CIFAR100(cifar, published=False)


def test_cifar_is_downloaded_when_asked_and_only_if_it_is_the_published_archive(cifar, tmp_path, monkeypatch, web):
    (folder, address), root = web, tmp_path / "root"
    archive = folder / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(cifar / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "url", f"{address}/archive.tar.gz")
    with pytest.raises(FileNotFoundError, match="or delete any cifar-100-python there and set download to True"):
        CIFAR100(root, published=False)
    with pytest.raises(ValueError, match="gave an archive whose MD5 is not eb9058c3a382ffc7106e4002c42a8d85"):
        CIFAR100(root, download=True, published=False)
    assert not (root / "cifar-100-python").exists()
    monkeypatch.setattr(CIFAR100, "tgz_md5", calculate_md5(archive))
    assert len(CIFAR100(root, download=True, published=False)) == 3
    shutil.rmtree(root)
    monkeypatch.setattr(CIFAR100, "url", f"{address}/missing")
    with pytest.raises(ConnectionError, match=r"failed .*404.*; get cifar-100-python.tar.gz from"):
        CIFAR100(root, download=True, published=False)


def test_tiny_imagenets_labels_are_lines_of_its_list(tiny):
    train, val = TinyImageNet(tiny), TinyImageNet(tiny, "val", v2.PILToTensor(), target_transform=lambda label: -label)
    assert train.targets == [0, 0, 1, 1, 2, 2]
    assert [Path(path).name.partition("_")[0] for path, _ in train.samples[::2]] == list(reversed(WNIDS))
    assert val.targets == [2, 0]
    image, label = val[0]
    assert image.shape == (3, 8, 8)
    assert label == -2
    assert train[0][0].mode == "RGB"


def test_tiny_imagenet_is_cached(tiny):
    data = Cached(TinyImageNet(tiny, "val", v2.PILToTensor()), tiny / "cache")
    for index in range(2):
        assert torch.equal(data[index][0], data.dataset[index][0])
    assert data.targets == [2, 0]


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("split", "gone", "message"),
    [
        ("train", "wnids.txt", "expected a file .*wnids.txt, found none; get http://cs231n"),
        ("val", "val/val_annotations.txt", "expected a file .*val_annotations.txt, found none; get http://cs231n"),
        ("train", f"train/{WNIDS[1]}/images", rf"expected images \*.JPEG in .*{WNIDS[1]}/images, found none; get"),
        ("val", "val/images/val_1.JPEG", "line 2 of .*val_annotations.txt names the image .*val_1.JPEG, which is miss"),
    ],
)
def test_what_tiny_imagenet_lacks_is_named(tiny, split, gone, message):
    remove(tiny / "tiny-imagenet-200" / gone)
    with pytest.raises(FileNotFoundError, match=message):
        TinyImageNet(tiny, split)


@pytest.mark.parametrize("line", ["val_0.JPEG n02124075", "val_0.JPEG\tn99999999\t1\t2\t3\t4", "\tn02124075x"])
def test_a_malformed_annotation_is_named(tiny, line):
    (tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .*val_annotations.txt names no class of wnids.txt"):
        TinyImageNet(tiny, "val")


def test_other_errors_of_tiny_imagenet(tiny):
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        TinyImageNet(tiny, "test")
    path = Path(TinyImageNet(tiny).samples[0][0])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=path.name):
        TinyImageNet(tiny)[0]
