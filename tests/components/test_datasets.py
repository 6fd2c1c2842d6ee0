"""Data sets in their layout on disk: what is read, what raises, and that nothing is downloaded without a request."""

import errno
import hashlib
import io
import os
import pickle
import re
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision.transforms import v2

from rkd_plugin.components.datasets import (
    CUB,
    Cached,
    Cars196,
    ClassFolders,
    Digits,
    StanfordOnlineProducts,
    folders,
    listed,
)
from rkd_plugin.components.datasets import cached as cache
from rkd_plugin.components.datasets.downloads import unpack
from rkd_plugin.components.samplers import WholeBatches
from rkd_plugin.experiments.recipe import read
from rkd_plugin.experiments.running.evaluation import measured_on
from rkd_plugin.experiments.running.experiment import Experiment
from rkd_plugin.storage import allocate


def write_image(path, shade=100, mode="RGB", size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 255 - shade)).save(path)


def write_cub(root):
    """Four images of the classes 1, 2, 101 and 200; one is grey, as eight of the published images."""
    folder = root / "CUB_200_2011"
    names = ["001.Albatross/A.jpg", "002.Auk/B.jpg", "101.Pelican/C.jpg", "200.Yellowthroat/D.jpg"]
    for index, name in enumerate(names):
        write_image(folder / "images" / name, 40 * index, "L" if index == 1 else "RGB")
    (folder / "images.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(names)))
    labels = [int(name[:3]) for name in names]
    (folder / "image_class_labels.txt").write_text("".join(f"{i + 1} {label}\n" for i, label in enumerate(labels)))
    return CUB


def write_cars(root):
    names = [f"Make Model {number}" for number in range(1, 197)]
    names[0] = "Ram C/V Cargo Van"
    root.mkdir(parents=True, exist_ok=True)
    (root / "names.csv").write_text("\n".join(names))
    for split, labels in (("train", [1, 98, 99]), ("test", [1, 196])):
        lines = [f"{number:05}.jpg,10,20,30,40,{label}\n" for number, label in enumerate(labels)]
        (root / f"anno_{split}.csv").write_text("".join(lines))
        for number, label in enumerate(labels):
            write_image(
                root / "car_data" / "car_data" / split / names[label - 1].replace("/", "-") / f"{number:05}.jpg"
            )
    return Cars196


def write_sop(root):
    folder = root / "Stanford_Online_Products"
    for split, classes in (("train", [1, 1, 2]), ("test", [11319, 11320])):
        lines = ["image_id class_id super_class_id path"]
        for number, label in enumerate(classes):
            path = f"bicycle_final/{label}_{number}.JPG"
            write_image(folder / path)
            lines.append(f"{number} {label} 1 {path}")
        (folder / f"Ebay_{split}.txt").write_text("\n".join(lines))
    return StanfordOnlineProducts


RESIZED = v2.Compose([v2.Resize((8, 8)), v2.PILToTensor()])
LAYOUTS = {
    "cub": (write_cub, [1, 2], [101, 200]),
    "cars": (write_cars, [1, 98, 1], [99, 196]),
    "sop": (write_sop, [1, 1, 2], [11319, 11320]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_the_papers_and_images_rgb(layout, tmp_path):
    write, train, test = LAYOUTS[layout]
    data_set = write(tmp_path)
    for split, labels in (("train", train), ("test", test), ("train+test", None)):
        data = data_set(tmp_path, split, transform=v2.PILToTensor())
        assert sorted(data.targets) == sorted(labels or train + test)
        for index in range(len(data)):
            image, label = data[index]
            assert image.shape == (3, 10, 12)
            assert label == data.targets[index]
    with pytest.raises(ValueError, match="train, test"):
        data_set(tmp_path, "validation")


@pytest.mark.parametrize(
    ("layout", "file", "home"),
    [
        ("cub", "CUB_200_2011/images.txt", "data.caltech.edu/records/65de6-vp158"),
        ("cars", "names.csv", "kaggle.com/datasets/jutrera"),
        ("cars", "anno_test.csv", "kaggle.com/datasets/jutrera"),
        ("sop", "Stanford_Online_Products/Ebay_test.txt", "Deep-Metric-Learning-CVPR16"),
    ],
)
def test_a_missing_list_is_named_with_where_to_get_it(layout, file, home, tmp_path):
    data_set = LAYOUTS[layout][0](tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{data_set.__name__}: expected .*{Path(file).name}, found none; .*{home}"
    ):
        data_set(tmp_path, "train+test")
    with pytest.raises(FileNotFoundError, match=f"expected a folder .*nowhere, found none; .*{home}"):
        data_set(tmp_path / "nowhere")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_half_unpacked_archive_raises_before_training(layout, tmp_path):
    data_set = LAYOUTS[layout][0](tmp_path)
    data = data_set(tmp_path, "test")
    Path(data.paths[1]).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"1 of {len(data)} images are missing, the first one is {data.paths[1]}"
    ):
        data_set(tmp_path, "test")


@pytest.mark.parametrize(
    ("layout", "file", "line"),
    [
        ("cub", "CUB_200_2011/images.txt", "2"),
        ("cub", "CUB_200_2011/image_class_labels.txt", "2 Auk"),
        ("cars", "anno_train.csv", "00001.jpg,10,20,30,40"),
        ("sop", "Stanford_Online_Products/Ebay_train.txt", "1 1 1"),
    ],
)
def test_a_malformed_line_is_named(layout, file, line, tmp_path):
    data_set = LAYOUTS[layout][0](tmp_path)
    lines = (tmp_path / file).read_text().splitlines()
    (tmp_path / file).write_text("\n".join([lines[0], line.replace(",40", ",forty"), *lines[2:]]))
    with pytest.raises(
        ValueError, match=rf"{data_set.__name__}: line 2 of {tmp_path / file} is malformed, '{line[:2]}"
    ):
        data_set(tmp_path, "train")


def test_lists_that_are_too_short_raise(tmp_path):
    write_cars(tmp_path / "cars")
    (tmp_path / "cars" / "names.csv").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"a name for each class in .*names\.csv, got fewer"):
        Cars196(tmp_path / "cars")
    write_cub(tmp_path / "cub")
    (tmp_path / "cub" / "CUB_200_2011" / "images.txt").write_text("")
    with pytest.raises(ValueError, match=r"CUB: the lists in .* name no image of split 'test'"):
        CUB(tmp_path / "cub", "test")


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    data = write_cub(tmp_path)(tmp_path, "train")
    Path(data.paths[0]).write_bytes(b"no image")
    Path(data.paths[1]).write_bytes(b"P6 1 x 255 ")  # a header for which PIL raises no OSError, but a bare ValueError
    for index, name in enumerate("AB"):
        with pytest.raises(ValueError, match=rf"expected an image in .*{name}\.jpg, could not read it"):
            data[index]


# Downloads


def archive_of(folder, kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as zipped:
            for path in sorted(folder.rglob("*")):
                zipped.write(path, path.relative_to(folder))
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as tarred:
            tarred.add(folder, ".")
    return buffer.getvalue()


def serve(monkeypatch, web, data_set, content, md5=None):
    folder, address = web
    (folder / "archive").write_bytes(content)
    monkeypatch.setattr(data_set, "DOWNLOAD_URL", f"{address}/archive", raising=False)
    monkeypatch.setattr(data_set, "MD5", md5 or hashlib.md5(content).hexdigest())


@pytest.mark.parametrize(("layout", "kind"), [("cub", "tar"), ("sop", "zip")])
def test_a_download_is_unpacked_once_and_leaves_nothing_else(layout, kind, tmp_path, monkeypatch, web):
    data_set = LAYOUTS[layout][0](tmp_path / "original")
    serve(monkeypatch, web, data_set, archive_of(tmp_path / "original", kind))
    root = tmp_path / "root"
    with pytest.raises(FileNotFoundError):
        data_set(root)
    assert not root.exists()
    assert len(data_set(root, "train+test", download=True)) == len(data_set(tmp_path / "original", "train+test"))
    assert [path.name for path in root.iterdir()] == [data_set.FOLDER]
    monkeypatch.setattr(listed, "fetch", None)
    data_set(root, download=True)  # it exists


def test_a_download_with_another_checksum_is_not_unpacked(tmp_path, monkeypatch, web):
    write_cub(tmp_path / "original")
    serve(monkeypatch, web, CUB, archive_of(tmp_path / "original", "tar"), md5="0" * 32)
    with pytest.raises(ValueError, match=f"CUB: http:.* gave a file whose MD5 is not {'0' * 32}; get CUB_200_2011"):
        CUB(tmp_path / "root", download=True)
    assert list((tmp_path / "root").iterdir()) == []


def test_a_download_that_fails_and_one_that_cannot_be_checked(tmp_path, monkeypatch, web):
    monkeypatch.setattr(CUB, "DOWNLOAD_URL", f"{web[1]}/missing", raising=False)
    with pytest.raises(ConnectionError, match=r"CUB: http:.*missing failed .*404.*; get CUB_200_2011"):
        CUB(tmp_path / "root", download=True)
    assert list((tmp_path / "root").iterdir()) == []
    with pytest.raises(ValueError, match=r"Cars196: no checksum is published .*; get https://www.kaggle"):
        Cars196(tmp_path / "root", download=True)


def archive(path, kind, *members):
    """Names, each with the type of a tar's member."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for name, member in members:
                info = zipfile.ZipInfo("placeholder")
                info.filename = info.orig_filename = name
                mode = {tarfile.SYMTYPE: stat.S_IFLNK, tarfile.CHRTYPE: stat.S_IFCHR, tarfile.FIFOTYPE: stat.S_IFIFO}
                info.external_attr = (mode.get(member, stat.S_IFREG) | 0o644) << 16
                zipped.writestr(info, "evil")
        return path
    with tarfile.open(path, "w:gz") as tarred:
        for name, member in members:
            info = tarfile.TarInfo("data/innocent" if kind == "sparse tar" else name)
            if kind == "sparse tar":  # readers take the name of a sparse file from this header
                info.pax_headers = {"GNU.sparse.name": name}
            info.type, info.linkname = member, "data/target"  # inside, as filters allow it
            info.size = 4 if member == tarfile.REGTYPE else 0
            tarred.addfile(info, io.BytesIO(b"evil"))
    return path


FILE = tarfile.REGTYPE
HOSTILE = {
    "a symbolic link": ([("data/link", tarfile.SYMTYPE)], "is a link or device"),
    "a hard link": ([("data/target", FILE), ("data/link", tarfile.LNKTYPE)], "is a link or device"),
    "a device": ([("data/null", tarfile.CHRTYPE)], "is a link or device"),
    "a pipe": ([("data/pipe", tarfile.FIFOTYPE)], "is a link or device"),
    "climbing": ([("data/../../evil", FILE)], "is not a path below its folder"),
    "climbing and coming back": ([("../data/evil", FILE)], "is not a path below its folder"),
    "absolute": ([("/tmp/evil", FILE)], "is not a path below its folder"),
    "a backslash": ([("data\\..\\evil", FILE)], "is not a path below its folder"),
    "a drive": ([("C:evil", FILE)], "is not a path below its folder"),
    "a duplicate": ([("data/a", FILE), ("data/./a", FILE)], "is in the place of 'data/a'"),
    "another case": ([("data/a", FILE), ("DATA/A", FILE)], "is in the place of"),
    "another accent": ([("data/\u00e9", FILE), ("data/e\u0301", FILE)], "is in the place of"),
    "a file that is a folder": ([("data/a", FILE), ("data/a/b", FILE)], "is in the place of 'data/a'"),
    "no such folder": ([("other/a", FILE)], "it has no folder data"),
}


IN_ZIP = ("a symbolic link", "a pipe", "climbing", "absolute", "a backslash", "another case", "no such folder")
SPARSE = ("climbing", "absolute", "a backslash", "a duplicate", "another case", "a file that is a folder")
IN_KINDS = {"tar": HOSTILE, "zip": IN_ZIP, "sparse tar": SPARSE}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, names in IN_KINDS.items() for name in names])
def test_an_archive_raises_before_a_file_is_written(name, kind, tmp_path, monkeypatch):
    """By our own check of its members, as the filters of Python differ between versions."""
    members, reason = HOSTILE[name]
    path = archive(tmp_path / "archive", kind, *members)
    if name != "no such folder":
        monkeypatch.setattr(tarfile.TarFile, "extractall", None)
        monkeypatch.setattr(zipfile.ZipFile, "extractall", None)
    with pytest.raises(ValueError, match=f"^expected an archive that stays .*, refused it: .*{reason}"):
        unpack(path, tmp_path / "data")
    assert [entry.name for entry in tmp_path.iterdir()] == ["archive"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_that_stays_in_its_folder_is_unpacked(kind, tmp_path):
    names = [("data/b/1.jpg", FILE), ("./data/b/2.jpg", FILE), ("data/a..b", FILE), ("other/c", FILE)]
    unpack(archive(tmp_path / "archive", kind, *names), tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == ["1.jpg", "2.jpg", "a..b", "b"]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_truncated_archive_leaves_nothing(kind, tmp_path):
    path = archive(tmp_path / "archive", kind, ("data/1.jpg", FILE))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"refused it: .*; get it again from its publisher$"):
        unpack(path, tmp_path / "data")
    assert [entry.name for entry in tmp_path.iterdir()] == ["archive"]


# Folders of the user


def write_folders(root, classes=5, images=3, size=(12, 10)):
    for label in range(classes):
        for number in range(images):
            write_image(root / f"{label:03}.class" / f"{number}.png", 20 * label + number, size=size)
    return root


def test_folders_are_split_by_class(tmp_path):
    root = write_folders(tmp_path)
    parts = {split: ClassFolders(root, split).targets for split in ("train", "test", "train+test")}
    assert parts == {
        "train": [0] * 3 + [1] * 3,
        "test": [2] * 3 + [3] * 3 + [4] * 3,
        "train+test": sorted([*range(5)] * 3),
    }
    assert set(ClassFolders(root, "test", train_classes=4).targets) == {4}
    image, label = ClassFolders(root, "test", transform=v2.PILToTensor())[4]
    assert label == 3
    assert image[0, 0, 0] == 20 * 3 + 1


def clutter(*parents):
    """Entries that operating systems, notebooks and network drives add."""
    for parent in parents:
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN"):
            write_image(parent / name / "1.png")
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", "._0.JPEG"):
            (parent / name).write_bytes(b"no image")


def test_hidden_and_system_entries_are_not_data(tmp_path):
    root = write_folders(tmp_path)
    clean = ClassFolders(root, "train"), ClassFolders(root, "test")
    clutter(root, root / "000.class", root / "003.class")
    for data, split in zip(clean, ("train", "test"), strict=True):
        found = ClassFolders(root, split)
        assert (found.classes, found.samples, found.class_count) == (data.classes, data.samples, 5)
        assert [found[index][1] for index in range(len(found))] == data.targets


def test_files_that_are_not_images_are_counted(tmp_path):
    root = write_folders(tmp_path)
    for name in ("000.class/a.gif", "000.class/b.gif", "001.class/readme", "004.class/c.GIF"):
        (root / name).write_bytes(b"")
    (root / "001.class" / "more").mkdir()
    message = rf"^ClassFolders: 4 entries among the images in {root} are skipped \(2 .gif, .*\), as only .jpg, .* read"
    with pytest.warns(UserWarning, match=message) as seen:
        assert len(ClassFolders(root, "train")) == 6
    assert len(seen) == 1
    assert all(part in str(seen[0].message) for part in ("1 files without a suffix", "1 folders"))


@pytest.mark.parametrize("depth", ["class/image", "image"])
def test_splits_are_not_classes(depth, tmp_path):
    for split in ("test", "train", "val"):
        write_folders(tmp_path / split) if depth == "class/image" else write_image(tmp_path / split / "1.png")
    with pytest.raises(ValueError, match=rf"got test, train, val, which are splits; .* {tmp_path}/train$"):
        ClassFolders(tmp_path)
    if depth == "class/image":
        assert len(ClassFolders(tmp_path / "train", "train+test")) == 15


def test_folders_of_folders_are_not_classes(tmp_path):
    for part in ("birds", "fish"):
        write_folders(tmp_path / part)
    found = "000.class, 001.class, 002.class and 2 more"
    with pytest.raises(ValueError, match=f"expected images in {tmp_path}/birds, .*, got folders, {found}; if they"):
        ClassFolders(tmp_path)


def test_all_classes_of_a_data_set(tmp_path):
    folders = ClassFolders(write_folders(tmp_path / "folders"), "test", 3, RESIZED)
    sets = {folders: (5, 5), Digits([5]): (10, 10), Cached(folders, tmp_path / "cache", v2.RandomCrop(4)): (5, None)}
    for layout, count in (("cub", 200), ("cars", 196), ("sop", 22_634)):
        sets[LAYOUTS[layout][0](tmp_path / layout)(tmp_path / layout, "test", v2.PILToTensor())] = (None, count)
    for data, (classes, count) in sets.items():
        whole = data.all_classes()
        assert {*data.targets} < {*whole.targets}
        assert len({*whole.targets}) == (classes or 4)
        assert getattr(whole, "class_count", None) == count
        assert type(whole[0][0]) is type(data[0][0])


def test_what_was_measured_on(tmp_path):
    data = ClassFolders(write_folders(tmp_path), "test", transform=RESIZED)
    for part in (data, Cached(data, None), WholeBatches(Subset(data, range(9)))):
        assert measured_on(part, data.targets) == "9 images of 3 of 5 classes"
    assert measured_on(TensorDataset(torch.zeros(2)), [4, 4]) == "2 images of 1 classes"
    assert measured_on(TensorDataset(torch.zeros(2)), None) == "2 images"


def test_images_of_another_number_of_channels_are_named_before_training(monkeypatch):
    built = Digits.__getitem__
    monkeypatch.setattr(Digits, "__getitem__", lambda self, index: (built(self, index)[0].expand(3, 8, 8), 0))
    with pytest.raises(
        ValueError, match=r"^datasets.digits/train: expected images of 1 channels, .* got 3; .*Grayscale"
    ):
        Experiment(read("quickstart/student")).box()


def test_errors_of_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder per class in .*nowhere, found no such folder"):
        ClassFolders(tmp_path / "nowhere")
    root = write_folders(tmp_path / "root")
    for count in (0, 5, -1):
        with pytest.raises(ValueError, match=f"one class to train and one to test, got {count} of the 5 folders"):
            ClassFolders(root, train_classes=count)
    with pytest.raises(ValueError, match=r"split must be one of train, test, train\+test, got 'val'"):
        ClassFolders(root, "val")
    (root / "000.class" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected an image in .*0\.png, could not read it"):
        ClassFolders(root)[0]
    (root / "001.empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"001\.empty"):
        ClassFolders(root)


# The cache


def cached(root, folder, transform=None, resized=RESIZED):
    return Cached(ClassFolders(root, "train+test", transform=resized), folder, transform)


def test_cached_images_are_the_decoded_ones(tmp_path, monkeypatch):
    root = write_folders(tmp_path / "images")
    plain, fast = cached(root, None), cached(root, tmp_path / "cache")
    monkeypatch.setattr(folders, "open_image", None)
    again = cached(root, tmp_path / "cache")
    monkeypatch.undo()
    assert fast.targets == plain.targets
    assert len(fast) == 15
    for index in range(15):
        for data in (fast, again):
            assert torch.equal(data[index][0], plain[index][0])
            assert data[index][1] == plain[index][1]
    fast[0][0].zero_()  # an access is a copy
    assert torch.equal(fast[0][0], plain[0][0])


def test_the_label_of_the_progress_bar_is_escaped(tmp_path, capsys):
    Cached(ClassFolders(write_folders(tmp_path / "data"), transform=RESIZED), tmp_path / "a\x1b[31m")
    found = capsys.readouterr().err
    assert "a\\x1b[31m" in found
    assert "\x1b[31m" not in found


def test_the_transform_sees_the_cached_image_at_each_access(tmp_path):
    root = write_folders(tmp_path / "images")
    data = cached(root, tmp_path / "cache", v2.Compose([v2.RandomCrop(4), v2.ToDtype(torch.float32, scale=True)]))
    image, _ = data[7]
    assert image.shape == (3, 4, 4)
    assert image.max() <= 1
    torch.testing.assert_close(image[2], torch.full((4, 4), int(cached(root, None)[7][0][2, 0, 0]) / 255))


def test_processes_read_one_cache(tmp_path):
    resized = v2.Compose([v2.Resize((64, 64)), v2.PILToTensor()])
    data = cached(write_folders(tmp_path / "images"), tmp_path / "cache", resized=resized)
    data[0]
    assert len(pickle.dumps(data)) < data.path.stat().st_size / 10
    batches = list(DataLoader(data, batch_size=5, num_workers=2))
    assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack([image for image, _ in data]))


def test_many_images_are_decoded_by_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    root = write_folders(tmp_path / "images")
    data, plain = cached(root, tmp_path / "cache"), cached(root, None)
    assert all(torch.equal(data[index][0], plain[index][0]) for index in range(15))
    (root / "004.class" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"expected an image in .*2\.png") as raised:
        cached(root, tmp_path / "cache")
    assert "\n" not in str(raised.value)  # one sentence, without the traceback of a worker


def test_what_changed_is_decoded_again_in_place_of_what_it_was(tmp_path):
    root, folder = write_folders(tmp_path / "images"), tmp_path / "cache"
    first = cached(root, folder)
    write_image(root / "000.class" / "0.png", 200, size=(30, 30))
    changed = cached(root, folder)
    assert changed[0][0][0, 0, 0] == 200
    assert list(folder.iterdir()) == [changed.path] != [first.path]


def test_data_sets_are_cached_side_by_side(tmp_path):
    folder, other = tmp_path / "cache", v2.Compose([v2.Resize((4, 4)), v2.PILToTensor()])
    roots = [write_folders(tmp_path / name) for name in ("one", "two")]
    caches = [cached(root, folder, resized=resized) for root in roots for resized in (RESIZED, other)]
    caches += [Cached(ClassFolders(roots[0], "train", count, transform=RESIZED), folder) for count in (2, 3)]
    assert {path.name for path in folder.iterdir()} == {data.path.name for data in caches}
    assert len({data.path for data in caches}) == 6
    assert [data[0][0].shape[1] for data in caches] == [8, 4, 8, 4, 8, 8]


def test_what_cannot_be_distinguished_is_not_cached(tmp_path):
    with pytest.raises(
        ValueError, match=r"a transform whose repr is the same in each run, got <function .*folder to None"
    ):
        cached(write_folders(tmp_path / "images"), tmp_path / "cache", resized=lambda image: image)
    with pytest.raises(ValueError, match=r"files in `paths` or `samples`, got Digits without; set folder to"):
        Cached(Digits(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert Cached(Digits(), None)[3][0].shape == (1, 8, 8)


@pytest.mark.parametrize("content", [b"", b"cut", "half", "other", "fewer"])
def test_a_damaged_cache_is_decoded_again(content, tmp_path):
    root, folder = write_folders(tmp_path / "images"), tmp_path / "cache"
    first = cached(root, folder)
    whole = first.path.read_bytes()
    if content in ("other", "fewer"):
        np.save(first.path, np.load(first.path)[:3] if content == "fewer" else np.zeros((3, 2)))
    else:
        first.path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    cached(root, folder)
    assert first.path.read_bytes() == whole


def test_a_cache_has_its_place_on_the_disk_before_it_is_mapped(tmp_path, monkeypatch):
    """Writing a map on a full disk ends the process, without an error that can be caught."""
    root = write_folders(tmp_path / "images")
    allocate(tmp_path / "new", 2**20)
    assert (tmp_path / "new").stat().st_blocks * 512 >= 2**20

    def full(path, size):
        assert size == path.stat().st_size + 15 * 3 * 8 * 8  # all images after the header
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "allocate", full)
    with pytest.raises(OSError, match=r"^expected to write .*\.npy, got: No space left on device; .* make room"):
        cached(root, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("system", ["has it", "has it, the file system not", "lacks it"])
def test_allocating_keeps_what_is_there(system, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if system == "lacks it":
        monkeypatch.delattr("os.posix_fallocate")
    elif system != "has it":
        monkeypatch.setattr("os.posix_fallocate", unsupported)
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    for size in (0, 2, 3, 2**20 + 5):
        allocate(path, size)
        assert path.read_bytes() == b"abc" + bytes(max(size - 3, 0))


def test_a_cache_that_is_truncated_while_it_is_read_is_an_error(tmp_path):
    """Reading a page that is missing ends the process, so that a child process reads it."""
    root = write_folders(tmp_path / "images")
    data = cached(root, tmp_path / "cache", resized=v2.Compose([v2.Resize((64, 64)), v2.PILToTensor()]))
    data[14]
    os.truncate(data.path, 5000)
    with pytest.raises(OSError, match=f"^Cached: expected {re.escape(str(data.path))} to keep its size, got it "):
        data[14]


def test_parts_of_one_data_set_have_caches_of_their_own(tmp_path):
    """Their files can be the same, such as a pickle of all images."""
    whole = ClassFolders(write_folders(tmp_path / "images"), "train+test", transform=RESIZED)
    for data in (Subset(whole, [3, 1]), Subset(whole, [1, 3]), ConcatDataset([whole, Subset(whole, [4])])):
        part = Cached(data, tmp_path / "cache")
        assert part.targets == [data[index][1] for index in range(len(data))]
        assert all(torch.equal(part[index][0], data[index][0]) for index in range(len(data)))
    whole.samples = [(whole.samples[0][0], label) for _, label in whole.samples]
    paths = [Cached(Subset(whole, chosen), tmp_path / "cache").path for chosen in ([3, 1], [1, 3])]
    assert paths[0] != paths[1]


def test_an_interrupted_decoding_leaves_nothing(tmp_path):
    root, folder = write_folders(tmp_path / "images"), tmp_path / "cache"
    (root / "004.class" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="expected an image"):
        cached(root, folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("resized", "got"),
    [
        (v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32)]), r"torch.float32 \(3, 10, 12\) for image 0"),
        (None, r"Image \(\) for image 0"),
        (v2.PILToTensor(), r"torch.uint8 \(3, 30, 30\) for image 3"),
    ],
)
def test_images_that_cannot_be_cached(resized, got, tmp_path):
    root = write_folders(tmp_path / "images")
    write_image(root / "001.class" / "0.png", size=(30, 30))
    with pytest.raises(ValueError, match=f"Cached: expected uint8 tensors of one size, got {got}"):
        cached(root, tmp_path / "cache", resized=resized)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_beside_the_data(tmp_path):
    for name in ("auk", "jay"):
        write_image(tmp_path / "images" / name / "1.png")
    data = ClassFolders(tmp_path / "images", "train+test", transform=v2.Compose([v2.Resize((4, 4)), v2.PILToTensor()]))
    cached = Cached(Subset(data, [0, 1]), True)
    assert cached.path.parent == tmp_path / "images" / ".cache"
    assert ClassFolders(tmp_path / "images", "train+test").classes == ["auk", "jay"]  # the cache is no class
    with pytest.raises(ValueError, match="expected a data set with a root for folder=True, got TensorDataset without"):
        Cached(TensorDataset(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), True)
    assert Cached(data, False).path is None
