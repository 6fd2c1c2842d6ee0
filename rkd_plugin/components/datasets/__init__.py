"""Data sets of the recipes: new ones, and those of torchvision and pytorch-metric-learning with checks."""

from rkd_plugin.components.datasets.cached import Cached
from rkd_plugin.components.datasets.cifar import CIFAR100
from rkd_plugin.components.datasets.digits import Digits
from rkd_plugin.components.datasets.folders import ClassFolders
from rkd_plugin.components.datasets.listed import CUB, Cars196, StanfordOnlineProducts
from rkd_plugin.components.datasets.mini_imagenet import MiniImageNet
from rkd_plugin.components.datasets.omniglot import Omniglot
from rkd_plugin.components.datasets.texts import ParallelTexts, ScoredPairs
from rkd_plugin.components.datasets.tiny_imagenet import TinyImageNet

__all__ = [
    "CIFAR100",
    "CUB",
    "Cached",
    "Cars196",
    "ClassFolders",
    "Digits",
    "MiniImageNet",
    "Omniglot",
    "ParallelTexts",
    "ScoredPairs",
    "StanfordOnlineProducts",
    "TinyImageNet",
]
