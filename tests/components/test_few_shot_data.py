"""Data sets of few-shot learning in their layout on disk, and reading whole batches."""

import hashlib
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import SequentialSampler
from torchdistill.datasets.util import build_data_loader
from torchvision.transforms import v2

from rkd_plugin.components.datasets import Cached, MiniImageNet, Omniglot, omniglot
from rkd_plugin.components.samplers import WholeBatches
from tests.components.test_classification_data import Malicious
from tests.components.test_datasets import clutter

ANGLES = (0, 90, 180, 270)
PARTS = ("images_background", "images_evaluation")


def write_omniglot(root, characters=4, drawings=3):
    """Alphabets of two characters in both folders, one-bit drawings as published, and lists of the splits."""
    pixels = np.random.default_rng(0)
    names = []
    for number in range(characters):
        name = f"Alphabet_{number // 2}/character{number % 2 + 1:02}"
        folder = root / "omniglot-py" / PARTS[number // 2 % 2] / name
        folder.mkdir(parents=True)
        shape = pixels.random((105, 105)) < 0.1  # of the character
        for drawing in range(drawings):
            ink = shape ^ (pixels.random((105, 105)) < 0.02)
            Image.fromarray(~ink).save(folder / f"{number:04}_{drawing + 1:02}.png")
        names.append(name)
    half = characters // 2
    lists = {"train": names[:half], "val": names[half - 1 : half], "trainval": names[:half], "test": names[half:]}
    for split, of in lists.items():
        path = root / "omniglot-splits" / "vinyals" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}/rot{angle:03}\n" for name in of for angle in ANGLES))
    return root


def publish(monkeypatch, root):
    """Accept these lists as the published ones."""
    folder = root / "omniglot-splits" / "vinyals"
    md5 = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(Omniglot, "SPLITS", md5)


@pytest.fixture
def drawn(tmp_path):
    return write_omniglot(tmp_path / "omniglot")


def test_omniglots_classes_are_the_lines_of_its_list(drawn):
    data = Omniglot(drawn, "test", published=False)
    assert len(data) == len(data.targets) == len(data.paths) == 2 * 4 * 3
    assert data.classes[:2] == ["Alphabet_1/character01/rot000", "Alphabet_1/character01/rot090"]
    assert data.targets == [label for label in range(8) for _ in range(3)]
    files = [Path(path) for path in data.paths]
    assert [path.name for path in files[:3]] == ["0002_01.png", "0002_02.png", "0002_03.png"]
    assert files[3:6] == files[:3]
    assert all(path.parts[-4] == "images_evaluation" for path in files)
    assert len(Omniglot(drawn, "val", published=False)) == 12


def test_omniglots_images_are_grey_rotated_and_otherwise_those_of_the_file(drawn):
    data = Omniglot(drawn, "trainval", published=False)
    for label, turns in ((0, 0), (1, 1), (2, 2), (3, 3), (5, 1)):
        index = data.targets.index(label)
        image, seen = data[index]
        original = np.asarray(Image.open(data.paths[index]).convert("L"))
        assert seen == label
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), np.rot90(original, turns))
    assert set(np.unique(original)) == {0, 255}


def test_the_recipes_transform_gives_what_snells_code_gives(drawn):
    """Rotated, resized with nearest neighbours and inverted: strokes are 1 on 0."""
    scaled = v2.Compose([v2.Resize([28, 28], interpolation=0), v2.PILToTensor(), v2.RandomInvert(p=1.0)])
    data = Cached(Omniglot(drawn, "test", scaled, published=False), None, v2.ToDtype(torch.float32, scale=True))
    for index in (0, 4, 20):
        theirs = Image.open(data.dataset.paths[index]).rotate(data.dataset.targets[index] % 4 * 90.0).resize((28, 28))
        expected = 1.0 - torch.from_numpy(np.array(theirs, np.float32))
        assert torch.equal(data[index][0], expected[None])
        assert set(expected.unique().tolist()) == {0.0, 1.0}


def test_what_omniglot_lacks_is_named(drawn):
    path = drawn / "omniglot-splits" / "vinyals" / "test.txt"
    with pytest.raises(ValueError, match="split must be one of train, val, trainval, test, got 'evaluation'"):
        Omniglot(drawn, "evaluation")
    with pytest.raises(
        ValueError, match=f"{path} is truncated or changed, its MD5 is not 43534.*set published to False$"
    ):
        Omniglot(drawn, "test")
    shutil.rmtree(drawn / "omniglot-py" / "images_evaluation" / "Alphabet_1" / "character02")
    missing = r"test.txt names Alphabet_1/character02, expected a folder .*images_background.* with its images"
    with pytest.raises(FileNotFoundError, match=missing):
        Omniglot(drawn, "test", published=False)
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=f"expected a list {path}, found none; get images_background.zip and .*"
    ):
        Omniglot(drawn, "test", published=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Alphabet_1/character01/rot045\n", "line 1 of .* is malformed, 'Alphabet_1/character01/rot045'"),
        ("Alphabet_1/character01/rot000\ncharacter01\n", "line 2 of .* is malformed"),
        ("../secret/rot000\n", "line 1 of .* is malformed"),
        ("Alphabet_1/character01/rot000\n" * 2, "expected distinct lines in .*, got 1 distinct of 2"),
        ("", "expected distinct lines in .*, got 0 distinct of 0"),
    ],
)
def test_a_malformed_list_raises(drawn, text, message):
    (drawn / "omniglot-splits" / "vinyals" / "test.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        Omniglot(drawn, "test", published=False)


def test_a_damaged_drawing_is_named(drawn):
    data = Omniglot(drawn, "test", published=False)
    Path(data.paths[0]).write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=f"expected an image in {data.paths[0]}, could not read it"):
        data[0]


def test_omniglot_is_downloaded_on_request_and_only_if_it_is_the_published_one(drawn, tmp_path, monkeypatch, web):
    (folder, address), root = web, tmp_path / "root"
    md5 = {}
    for part in PARTS:
        shutil.make_archive(str(folder / part), "zip", drawn / "omniglot-py", part)
        md5[part] = hashlib.md5((folder / f"{part}.zip").read_bytes()).hexdigest()
    shutil.copytree(drawn / "omniglot-splits" / "vinyals", folder / "vinyals")
    monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", address)
    monkeypatch.setattr(omniglot, "LISTS", f"{address}/vinyals")
    publish(monkeypatch, drawn)
    with pytest.raises(FileNotFoundError, match="or set download to True"):
        Omniglot(root, "test")
    assert not root.exists()
    with pytest.raises(ValueError, match=r"images_background\.zip gave a file whose MD5 is not 68d2efa1"):
        Omniglot(root, "test", download=True)
    assert not (root / "omniglot-py" / "images_background").exists()
    monkeypatch.setattr(Omniglot, "PARTS", md5)
    assert len(Omniglot(root, "test", download=True)) == 24
    shutil.rmtree(folder)
    assert len(Omniglot(root, "test", download=True)) == 24  # it exists
    with pytest.raises(ConnectionError, match=r"val\.txt failed .*404"):
        Omniglot(root, "val", download=True)


def test_an_archive_that_writes_elsewhere_leaves_no_part_of_omniglot(tmp_path, monkeypatch, web):
    (folder, address), root = web, tmp_path / "root"
    with tarfile.open(folder / "images_background.zip", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../../evil"))
    monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", address)
    md5 = hashlib.md5((folder / "images_background.zip").read_bytes()).hexdigest()
    monkeypatch.setattr(Omniglot, "PARTS", {"images_background": md5})
    with pytest.raises(ValueError, match="expected an archive that stays in its folder"):
        Omniglot(root, "test", download=True)
    assert [path.name for path in (root / "omniglot-py").iterdir()] == ["images_background.zip"]
    assert not list(tmp_path.rglob("evil"))


def test_a_truncated_archive_of_omniglot_leaves_no_images(drawn, tmp_path, monkeypatch, web):
    (folder, address), root = web, tmp_path / "root"
    shutil.make_archive(str(folder / "images_background"), "zip", drawn / "omniglot-py", "images_background")
    content = (folder / "images_background.zip").read_bytes()
    (folder / "images_background.zip").write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", address)
    monkeypatch.setattr(Omniglot, "PARTS", {"images_background": hashlib.md5(content).hexdigest()})
    with pytest.raises(ValueError, match="gave a file whose MD5 is not"):
        Omniglot(root, "test", download=True)
    assert [path.name for path in (root / "omniglot-py").iterdir()] == ["images_background.zip"]


# miniImageNet

SIZES = {"train": 3, "val": 2, "test": 2}  # classes


def shade(split, label, number):
    return 10 * list(SIZES).index(split) + 60 * label + number


def write_mini(root, form, images=2, sizes=SIZES):
    """The same images in one of the four forms; images of one colour are distinct after JPEG."""
    root.mkdir(parents=True, exist_ok=True)
    for split, classes in sizes.items():
        names = [f"n{list(sizes).index(split)}{label:03}" for label in range(classes)]
        of = [(label, number) for label in range(classes) for number in range(images)]
        pixels = np.stack([np.full((84, 84, 3), shade(split, *place), np.uint8) for place in of])
        if form == "lists":
            lines = [f"{names[label]}{number:08}.jpg,{names[label]}" for label, number in of]
            (root / f"{split}.csv").write_text("\n".join(["filename,label", *lines]) + "\n")
            for line, image in zip(lines, pixels, strict=True):
                path = root / "images" / line.partition(",")[0]
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(image).save(path, quality=95)
        elif form == "folders":
            for (label, number), image in zip(of, pixels, strict=True):
                path = root / split / names[label] / f"{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path, format="JPEG", quality=95)
        elif form == "by class":
            rows = {name: [i for i, (label, _) in enumerate(of) if label == at] for at, name in enumerate(names)}
            content = pickle.dumps({"image_data": pixels, "class_dict": rows}, protocol=2)
            (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(content)
        else:
            phase = "train_phase_train" if split == "train" else split
            first = sum(list(sizes.values())[: list(sizes).index(split)])
            content = {"data": pixels, "labels": [first + label for label, _ in of], "catname2label": {}}
            (root / f"miniImageNet_category_split_{phase}.pickle").write_bytes(pickle.dumps(content))
    return root


def test_hidden_and_system_entries_are_not_drawings_or_classes(drawn, tmp_path):
    clean = Omniglot(drawn, "test", published=False)
    clutter(*(path for path in (drawn / "omniglot-py").rglob("character*")))
    assert Omniglot(drawn, "test", published=False).paths == clean.paths
    root = write_mini(tmp_path / "mini", "folders")
    clean = MiniImageNet(root, "test", published=False)
    clutter(root, root / "test", *(root / "test").iterdir())
    assert MiniImageNet(root, "test", published=False).paths == clean.paths


FORMS = ("lists", "by class", "labelled", "folders")


@pytest.mark.parametrize("form", FORMS)
def test_mini_imagenet_is_the_same_in_every_form(tmp_path, form):
    root = write_mini(tmp_path, form)
    for split, count in {**SIZES, "trainval": 5}.items():
        data = MiniImageNet(root, split, published=False)
        assert data.targets == [label for label in range(count) for _ in range(2)]
        assert len(data) == len(data.paths) == 2 * count
        assert len(data.classes) == count
        parts = ["train", "val"] if split == "trainval" else [split]
        expected = [shade(p, label, number) for p in parts for label in range(SIZES[p]) for number in range(2)]
        for (image, _), value in zip((data[index] for index in range(len(data))), expected, strict=True):
            assert image.mode == "RGB"
            assert image.size == (84, 84)
            assert abs(np.asarray(image).astype(float) - value).max() <= 1


@pytest.mark.parametrize("form", FORMS)
def test_mini_imagenet_is_decoded_once(tmp_path, form):
    root = write_mini(tmp_path / "root", form)
    small = v2.Compose([v2.Resize([8, 8]), v2.PILToTensor()])
    whole = Cached(MiniImageNet(root, "trainval", small, published=False), None)
    cached = Cached(MiniImageNet(root, "trainval", small, published=False), tmp_path / "cache")
    assert all(torch.equal(cached[index][0], whole[index][0]) for index in range(10))
    assert cached.targets == whole.targets


@pytest.mark.parametrize("form", FORMS)
def test_a_split_of_another_size_raises_unless_it_is_requested(tmp_path, form):
    root = write_mini(tmp_path, form)
    sizes = r"expected 20 classes of 600 images in split test of .*, got 2 of \[2\]; complete them, or set published"
    with pytest.raises(ValueError, match=sizes):
        MiniImageNet(root, "test")


def test_the_published_size_is_accepted(tmp_path):
    for split, count in MiniImageNet.CLASSES.items():
        content = {
            "image_data": np.zeros((600 * count, 1, 1, 3), np.uint8),
            "class_dict": {f"n{label}": list(range(600 * label, 600 * label + 600)) for label in range(count)},
        }
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    assert len(MiniImageNet(tmp_path, "test")) == 12_000
    (tmp_path / "mini-imagenet-cache-test.pkl").rename(tmp_path / "mini-imagenet-cache-train.pkl")
    with pytest.raises(ValueError, match=r"expected 64 classes of 600 images in split train of .*, got 20"):
        MiniImageNet(tmp_path, "trainval")


def test_what_mini_imagenet_lacks_is_named(tmp_path):
    forms = "expected one of test.csv, mini-imagenet-cache-test.pkl, miniImageNet_category_split_test.pickle, test in"
    with pytest.raises(
        FileNotFoundError, match=f"{forms} {tmp_path}, found none; get the lists from https://github.com/"
    ):
        MiniImageNet(tmp_path, "test")
    with pytest.raises(ValueError, match="split must be one of train, val, test, trainval, got 'base'"):
        MiniImageNet(tmp_path, "base")
    root = write_mini(tmp_path, "lists")
    (root / "images" / "n200100000001.jpg").unlink()
    gone = f"line 5 of {root / 'test.csv'} names the image {root / 'images' / 'n200100000001.jpg'}, which is missing"
    with pytest.raises(FileNotFoundError, match=re.escape(gone)):
        MiniImageNet(root, "test", published=False)
    (root / "test.csv").write_text("filename,label\nn200000000000.jpg\n")
    with pytest.raises(ValueError, match=r"line 2 of .*test.csv is malformed, expected filename,label, got \['n2000"):
        MiniImageNet(root, "test", published=False)
    (root / "test.csv").write_text("filename,label\n")
    with pytest.raises(ValueError, match=r"in split test of .*, got 0 of \[\]"):
        MiniImageNet(root, "test", published=False)


IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mini-imagenet-cache-test.pkl", {"image_data": IMAGES, "class_dict": {"a": [0]}}, "class_dict .* each row"),
        ("mini-imagenet-cache-test.pkl", {"image_data": IMAGES, "class_dict": {"a": [0, 0]}}, "class_dict .* each row"),
        ("mini-imagenet-cache-test.pkl", {"image_data": IMAGES}, "class_dict .* each row"),
        ("mini-imagenet-cache-test.pkl", {"image_data": IMAGES, "class_dict": {"a": "01"}}, "class_dict .* each row"),
        ("mini-imagenet-cache-test.pkl", {"image_data": IMAGES, "class_dict": {"a": [0, 1.0]}}, "got 1.0, a float"),
        (
            "miniImageNet_category_split_test.pickle",
            {"data": IMAGES, "labels": [[1], [2]]},
            "names or numbers",
        ),
        ("mini-imagenet-cache-test.pkl", {"image_data": IMAGES[..., 0], "class_dict": {}}, r"\(N, H, W, 3\) of uint8"),
        ("mini-imagenet-cache-test.pkl", {"image_data": IMAGES * 1.0, "class_dict": {}}, r"\(N, H, W, 3\) of uint8"),
        ("miniImageNet_category_split_test.pickle", {"data": IMAGES, "labels": [1]}, "labels in .* one for each row"),
        ("miniImageNet_category_split_test.pickle", {"data": IMAGES}, "labels in .* one for each row"),
        ("miniImageNet_category_split_test.pickle", [IMAGES], "expected a dictionary of arrays in .*, got list"),
    ],
)
def test_a_pickle_of_another_form_raises(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"MiniImageNet: .*{message}"):
        MiniImageNet(tmp_path, "test", published=False)


@pytest.mark.parametrize("name", ["mini-imagenet-cache-test.pkl", "miniImageNet_category_split_test.pickle"])
def test_a_pickle_of_mini_imagenet_that_would_execute_code_raises_and_is_not_executed(tmp_path, name):
    target = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps({"data": IMAGES, "image_data": IMAGES, "labels": [Malicious(target)]}))
    with pytest.raises(ValueError, match="could not read it: it names "):
        MiniImageNet(tmp_path, "test", published=False)
    assert not target.exists()


def test_rows_may_be_an_array(tmp_path):
    content = {"image_data": IMAGES, "class_dict": {"a": np.array([1]), "b": np.array([0])}}
    (tmp_path / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps(content))
    assert MiniImageNet(tmp_path, "test", published=False).classes == ["a", "b"]


def test_decoding_takes_no_random_numbers(drawn, tmp_path):
    """A run with decoded images must not differ from the first one."""
    scaled = v2.Compose([v2.Resize([8, 8]), v2.PILToTensor(), v2.RandomInvert(p=1.0)])
    following = []
    for _ in range(2):
        torch.manual_seed(3)
        Cached(Omniglot(drawn, "test", scaled, published=False), tmp_path / "cache")
        following.append(torch.rand(()))
    assert following[0] == following[1]


# Whole batches


@pytest.fixture
def cached(drawn, tmp_path):
    def open_data(folder=tmp_path / "cache", **kwargs):
        scaled = v2.Compose([v2.Resize([28, 28], interpolation=0), v2.PILToTensor()])
        return Cached(Omniglot(drawn, "trainval", scaled, published=False), folder, **kwargs)

    return open_data


@pytest.mark.parametrize("folder", ["cache", None])
def test_a_batch_at_once_is_the_images_one_by_one(cached, tmp_path, folder):
    path = folder and tmp_path / folder
    scale = v2.ToDtype(torch.float32, scale=True)
    whole, single = cached(path, transform=scale, batched=True), cached(path, transform=scale)
    places = [5, 0, 23, 5]
    for one, other in zip(whole.__getitems__(places), single.__getitems__(places), strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1] == other[1]
    assert all(torch.equal(whole[i][0], single[i][0]) and whole[i][1] == single[i][1] for i in places)


def test_the_transform_is_called_once_a_batch(cached):
    shapes = []
    data = cached(transform=lambda images: shapes.append(images.shape) or images, batched=True)
    loader = {"sampler": {"class_or_func": SequentialSampler}, "kwargs": {"batch_size": 10}}
    for extra in ({"dataset_wrapper": {"key": "WholeBatches"}}, {}):
        shapes.clear()
        labels = [label for batch in build_data_loader(data, {**loader, **extra}, False) for label in batch[1].tolist()]
        assert shapes == [(10, 1, 28, 28), (10, 1, 28, 28), (4, 1, 28, 28)]
        assert labels == data.targets


def test_the_wrapper_gives_what_torchdistills_gives(cached):
    data = cached(transform=v2.ToDtype(torch.float32, scale=True), batched=True)
    loader = {"sampler": {"class_or_func": SequentialSampler}, "kwargs": {"batch_size": 10}}
    ours = build_data_loader(data, {**loader, "dataset_wrapper": {"key": "WholeBatches"}}, False)
    for a, b in zip(ours, build_data_loader(data, {**loader, "requires_supp": True}, False), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert a[2] == b[2] == {}
    plain = torch.utils.data.TensorDataset(torch.arange(3), torch.arange(3))  # without __getitems__
    assert WholeBatches(plain).__getitems__([2, 0]) == [(2, 2, {}), (0, 0, {})]
