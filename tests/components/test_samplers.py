"""Class-balanced batches and episodes: their content, their seed, and how ranks share them."""

import random
from collections import Counter
from itertools import chain, zip_longest

import pytest
import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from pytorch_metric_learning.utils.common_functions import EmbeddingDataset
from torch import distributed, multiprocessing
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)
from torchdistill.datasets.util import build_data_loader
from torchdistill.datasets.wrapper import BaseDatasetWrapper

from rkd_plugin.components.samplers import ClassBalancedBatchSampler, EpisodicBatchSampler, SharedBatches

LABELS = [label for label in range(40) for _ in range(3 + label % 5)]  # classes of 3 to 7 images


class Data(torch.utils.data.Dataset):
    targets = LABELS

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        return torch.tensor(float(index)), LABELS[index]


def batches(batch_size=32, images_per_class=5, iterations=4, data=None):
    sampler = SequentialSampler(data or Data())
    return ClassBalancedBatchSampler(sampler, batch_size, images_per_class, iterations)


def test_batches_are_the_authors():
    """Whole classes of up to five images in random order, the last one cut; no image twice."""
    sampler = batches()
    assert len(sampler) == len(list(sampler)) == 4
    for batch in sampler:
        assert len(batch) == len(set(batch)) == 32
        runs = [LABELS[index] for index in batch]
        classes = list(dict.fromkeys(runs))
        assert runs == sorted(runs, key=classes.index)
        counts = Counter(runs)
        assert all(counts[label] == min(5, LABELS.count(label)) for label in classes[:-1])
        assert counts[classes[-1]] <= min(5, LABELS.count(classes[-1]))


def test_every_class_and_image_is_as_likely():
    counts = Counter(index for batch in batches(iterations=4000) for index in batch)
    by_class = Counter(LABELS[index] for index in counts.elements())
    for label in range(40):
        images = [index for index in range(len(LABELS)) if LABELS[index] == label]
        share = [counts[index] / by_class[label] for index in images]
        # About 800 times per class: five standard deviations of an image's share.
        assert max(abs(s - 1 / len(images)) for s in share) < 5 * (1 / len(images) / 800) ** 0.5


def episodes(way=7, shot=2, query=1, count=6, data=None):
    return EpisodicBatchSampler(SequentialSampler(data or Data()), way, shot, query, count)


@pytest.mark.parametrize("kind", [batches, episodes])
def test_the_seed_decides_and_epochs_differ(kind):
    torch.manual_seed(3)
    sampler = kind()
    first, second = list(sampler), list(sampler)
    assert first != second
    torch.manual_seed(3)
    random.seed(99)  # which is not used
    assert list(sampler) == first


def test_in_torchdistills_loader_wrapped_or_not():
    config = {
        "sampler": {"class_or_func": SequentialSampler},
        "batch_sampler": {
            "key": "ClassBalancedBatchSampler",
            "kwargs": {"batch_size": 8, "images_per_class": 2, "iterations": 3},
        },
        "kwargs": {"num_workers": 0},
    }
    for requires_supp in (False, True):
        loader = build_data_loader(Data(), {**config, "requires_supp": requires_supp}, False)
        seen = [batch[1] for batch in loader]
        assert [len(labels) for labels in seen] == [8, 8, 8]
        assert all((Counter(labels.tolist())[int(labels[0])]) == 2 for labels in seen)


def test_labels_of_pytorch_metric_learning():
    data = EmbeddingDataset(torch.randn(12, 2), torch.arange(12) // 3)
    assert all(len(batch) == 6 for batch in batches(6, 3, 2, data))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"images_per_class": -1}, "images_per_class must be at least 1, got -1"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"batch_size": 500, "images_per_class": 3}, "a batch of 500, got 120 from 40 classes with at most 3 each"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        batches(**kwargs)


@pytest.mark.parametrize("kind", [batches, episodes])
def test_a_data_set_without_labels(kind):
    name = type(kind()).__name__
    with pytest.raises(ValueError, match=f"^{name}: expected a data set with labels, got TensorDataset without; give"):
        kind(data=TensorDataset(torch.zeros(9, 1)))
    fractional = TensorDataset(torch.zeros(80, 1), torch.arange(80) / 2)
    with pytest.raises(ValueError, match=f"^{name}: expected labels that are whole numbers, got 0.0, a float"):
        kind(data=fractional)


def test_a_sampler_over_unknown_data_raises():
    """It draws from an unknown part of the data set."""
    with pytest.raises(ValueError, match=r"expected a sampler with its data set .*, got SubsetRandomSampler; use Seq"):
        EpisodicBatchSampler(SubsetRandomSampler([0, 1]), 2, 1, 1, 1)


def parts():
    """Usual splits of the labels above, each also in torchdistill's wrapper."""
    chosen = [index for index, label in enumerate(LABELS) if label % 2]
    for data in (
        Subset(Data(), chosen),
        random_split(Data(), [len(LABELS) - 1, 1], torch.Generator().manual_seed(0))[0],
        ConcatDataset([Subset(Data(), chosen), Data()]),
    ):
        yield from (data, BaseDatasetWrapper(data))


@pytest.mark.parametrize("kind", [batches, episodes])
def test_splits_and_joined_data_sets_are_accepted(kind):
    """Each class as often as in the whole data set, and by the indices of the part."""
    for data in parts():
        sampler = kind(8, 2, 3, data=data) if kind is batches else kind(4, 1, 1, 3, data=data)
        for batch in sampler:
            assert Counter(Counter(data[index][1] for index in batch).values()) == {2: 4}


def through_a_loader(sampler):
    return [list(map(int, images)) for images, _ in DataLoader(Data(), batch_sampler=sampler)]


def shared(whole, batch_size=18):
    """Of 199 images in any order: of 18, and one of 1, or of 12, and one of 7."""
    of = {"key": "BatchSampler", "kwargs": {"batch_size": batch_size, "drop_last": False}}
    return SharedBatches(RandomSampler(range(199)), of, whole)


def _process(rank, processes, address, results):
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    sampler = DistributedSampler(Data())
    kinds = {
        "balanced": ClassBalancedBatchSampler(sampler, 30, 5, 3),
        "episodic": EpisodicBatchSampler(sampler, 7, 2, 1, 6),
        "parts": shared(whole=False, batch_size=12),
        "whole": shared(whole=True),
    }
    for name, kind in kinds.items():
        torch.manual_seed(rank)  # processes that were seeded differently still share their batches
        results[name, rank] = through_a_loader(kind)
        assert len(results[name, rank]) == len(kind)
    wrong = {
        "odd": shared(whole=False, batch_size=19),
        "short": shared(whole=False, batch_size=18),
        "unbalanced": ClassBalancedBatchSampler(sampler, 31, 5, 3),
    }
    for name, kind in wrong.items():
        with pytest.raises(ValueError, match=f"expected batches that {processes} processes share evenly") as error:
            list(kind)
        results[name, rank] = str(error.value)
    distributed.destroy_process_group()


@pytest.mark.processes
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one(processes, tmp_path):
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_process, (processes, f"file://{tmp_path}/store", results), processes)
        found = {kind: [results[kind, rank] for rank in range(processes)] for kind, _ in sorted(results.keys())}
    parts, turns = found["balanced"], found["episodic"]
    torch.manual_seed(0)
    assert [list(chain(*shares)) for shares in zip(*parts, strict=True)] == through_a_loader(batches(30, iterations=3))
    assert {len(share) for part in parts for share in part} == {30 // processes}
    torch.manual_seed(0)  # an episode is never divided
    assert [episode for turn in zip(*turns, strict=True) for episode in turn] == through_a_loader(episodes())
    torch.manual_seed(0)
    *expected, rest = through_a_loader(shared(whole=False, batch_size=12))
    assert len(rest) == 7
    joined = [list(chain(*shares)) for shares in zip(*found["parts"], strict=True)]
    assert joined == [*expected, rest[:6]]
    assert {len(share) for part in found["parts"] for share in part[:-1]} == {12 // processes}
    torch.manual_seed(0)
    whole = [batch for turn in zip_longest(*found["whole"]) for batch in turn if batch]
    assert whole == through_a_loader(shared(whole=True))
    assert len(set(chain(*whole))) == 199
    for name, size in (("odd", 19), ("short", 1), ("unbalanced", 31)):
        assert all(f"got one of {size} images; change recipe.batch_size" in text for text in found[name])


# Episodes


def test_an_episode_is_class_by_class_without_repetition():
    sampler = episodes()
    assert len(sampler) == len(list(sampler)) == 6
    for episode in sampler:
        assert len(episode) == len(set(episode)) == 7 * 3
        by_class = torch.tensor([LABELS[index] for index in episode]).view(7, 3)
        assert (by_class == by_class[:, :1]).all()
        assert len(by_class[:, 0].unique()) == 7


def test_every_class_is_as_likely_and_every_image_in_every_place():
    drawn = torch.tensor(list(episodes(way=4, count=5000))).view(5000, 4, 3)
    classes = torch.bincount(torch.tensor(LABELS)[drawn[:, :, 0]].flatten(), minlength=40) / 5000
    assert (classes - 0.1).abs().max() < 5 * (0.1 * 0.9 / 5000) ** 0.5
    for place in range(3):
        counts = Counter(drawn[:, :, place].flatten().tolist())
        for label in range(40):
            images = [index for index in range(len(LABELS)) if LABELS[index] == label]
            total = sum(counts[index] for index in images)
            spread = (1 / len(images) / total) ** 0.5
            assert max(abs(counts[index] / total - 1 / len(images)) for index in images) < 5 * spread


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"way": 0}, "way must be at least 1, got 0"),
        ({"shot": 0}, "shot must be at least 1, got 0"),
        ({"query": -1}, "query must be at least 1, got -1"),
        ({"count": 0}, "episodes must be at least 1, got 0"),
        (
            {"way": 41},
            "expected 41 classes or more with 2 . 1 images or more each, got 40 classes, the smallest with 3",
        ),
        (
            {"query": 2},
            "expected 7 classes or more with 2 . 2 images or more each, got 40 classes, the smallest with 3",
        ),
    ],
)
def test_episodes_that_cannot_be(kwargs, message):
    with pytest.raises(ValueError, match=f"EpisodicBatchSampler: {message}"):
        episodes(**kwargs)


def test_episodes_that_processes_cannot_share(monkeypatch):
    sampler = episodes(count=7)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="a number of episodes that 2 processes share evenly, got 7"):
        len(sampler)
