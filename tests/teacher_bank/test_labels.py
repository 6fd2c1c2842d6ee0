"""Labels, files and class names are found in data sets that wrap, split or join others, and are never converted."""

import numpy as np
import pytest
import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from pytorch_metric_learning.utils.common_functions import EmbeddingDataset
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split
from torchdistill.datasets.wrapper import BaseDatasetWrapper

from rkd_plugin.components.datasets import Cached, Digits
from rkd_plugin.teacher_bank.labels import check_labels, class_names, files_of, find_labels, item_name, labels_of


class Birds(Dataset):
    """With the attributes of torchvision's ``ImageFolder``."""

    def __init__(self, labels=(0, 1, 2, 1), classes=("auk", "jay", "owl")):
        self.samples = [(f"{index}.png", label) for index, label in enumerate(labels)]
        self.targets = list(labels)
        self.classes = list(classes)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return torch.zeros(1), self.targets[index]


WRAPPED = {
    "itself": lambda data: data,
    "Subset": lambda data: Subset(data, [3, 0, -2]),
    "Subset by tensor": lambda data: Subset(data, torch.tensor([2, 2])),
    "random_split": lambda data: random_split(data, [1, 3], torch.Generator().manual_seed(0))[1],
    "ConcatDataset": lambda data: ConcatDataset([data, Subset(data, [3])]),
    "torchdistill": BaseDatasetWrapper,
    "Cached": lambda data: Cached(data, None),
    "nested": lambda data: BaseDatasetWrapper(
        Subset(ConcatDataset([Subset(data, [2, 3]), Cached(data, None)]), [4, 0])
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_labels_and_files_are_those_of_the_items(name):
    birds = Birds()
    birds.transform = None
    data = WRAPPED[name](birds)
    expected = [data[index][1] for index in range(len(data))]
    assert labels_of(data, "data") == find_labels(data) == expected
    if name != "Cached":
        assert [birds.targets[int(file[0])] for file in files_of(data)] == expected
    assert class_names(data) == {0: "auk", 1: "jay", 2: "owl"}
    assert item_name(data, 0) == f"image 0, {files_of(data)[0]},"


@pytest.mark.parametrize(
    "data",
    [
        Digits([3, 1]),
        TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1])),
        EmbeddingDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1])),
        EmbeddingDataset(torch.zeros(3, 2), np.array([2, 0, 1], np.uint8)),
    ],
    ids=["targets", "tensors", "labels", "numpy"],
)
def test_labels_of_many_kinds_of_data_sets(data):
    found = labels_of(data, "data")
    assert found == [int(data[index][1]) for index in range(len(data))]
    assert all(type(label) is int for label in found)


def test_labels_in_pairs():
    birds = Birds()
    del birds.targets
    assert labels_of(birds, "data") == [0, 1, 2, 1]


def test_the_transform_of_labels_is_applied():
    birds = Birds(["auk", "owl", "auk"])
    birds.target_transform = {"auk": 0, "owl": 1}.get
    assert labels_of(Subset(birds, [1, 2]), "data") == [1, 0]


class Forwarding:
    """A wrapper with all attributes of the data set inside, and other items."""

    def __init__(self, dataset, indices=None):
        self.dataset = dataset
        if indices is not None:
            self.indices = indices
        self.size = 2

    def __len__(self):
        return self.size

    def __getattr__(self, name):
        return getattr(self.__dict__["dataset"], name)


def test_labels_of_other_items_are_not_used():
    """A run would train on labels of other images."""
    assert labels_of(Forwarding(Birds()), "data") is None
    assert labels_of(Forwarding(Birds(), [3, 2]), "data") == [1, 2]
    assert labels_of(ConcatDataset([Birds(), TensorDataset(torch.zeros(2, 1))]), "data") is None
    assert labels_of(object(), "data") is None
    assert files_of(object()) == []
    assert item_name(object(), 4) == "image 4"


def test_contradicting_class_names_are_not_used():
    other = Birds(classes=("owl", "jay", "auk"))
    assert class_names(ConcatDataset([Birds(), Birds(classes=("auk", "jay"))])) == {0: "auk", 1: "jay", 2: "owl"}
    assert class_names(ConcatDataset([Birds(), other])) == {}
    assert class_names(object()) == {}


WRONG = {
    "fractional": ([0, 1.5], "whole numbers, got 1.5, a float, for item 1; number the classes"),
    "float": (torch.tensor([2.0]), "whole numbers, got 2.0, a float, for item 0; number"),
    "text": (["auk"], "whole numbers, got 'auk', a str, for item 0; number"),
    "one-hot": (torch.eye(3)[[1]].long(), r"whole numbers, got \[0, 1, 0\], a list, for item 0; give the argmax"),
    "column": (torch.tensor([[1]]), r"whole numbers, got \[1\], a list, for item 0; number the classes"),
    "negative": (np.array([0, -1]), "from 0, got -1, a int, for item 1; number the classes from 0"),
    "bool": (torch.tensor([True]), "whole numbers, got True, a bool, for item 0"),
    "too large": (np.array([2**63], np.uint64) * 0.5, "whole numbers, got 4.6"),
    "none": ([None], "whole numbers, got None, a NoneType"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_invalid_labels_raise(kind):
    labels, message = WRONG[kind]
    with pytest.raises(ValueError, match=f"^here: expected labels that are {message}"):
        check_labels(labels, "here")


def test_the_file_of_a_wrong_label_is_named():
    with pytest.raises(ValueError, match=r"^birds: .* got 0.5, a float, for image 1, 3.png,; number"):
        labels_of(Subset(Birds([0, 1, 2, 0.5]), [2, 3]), "birds")


def test_labels_on_any_device_and_in_any_container(device):
    labels = torch.tensor([4, 0, 1])
    for given in (labels.to(device), list(labels.to(device)), labels.numpy(), list(labels.numpy()), (4, 0, 1)):
        assert check_labels(given, "here") == [4, 0, 1]
