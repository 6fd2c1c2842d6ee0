"""What tests/test_many_processes.py starts in several processes: small recipes in float64, and parts that break."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from torch import nn
from torchdistill.models.registry import register_model

from rkd_plugin.experiments import experiment, processes, runner
from rkd_plugin.experiments.recipe import read


class Points(torch.utils.data.Dataset):
    """Points around the centres of ten classes; one process may fail to read them."""

    def __init__(self, count, seed, fails_in=None, after=0):
        drawn = torch.Generator().manual_seed(seed)
        self.targets = (torch.arange(count) % 10).tolist()
        centres = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.points = centres[self.targets] + torch.randn(count, 6, generator=drawn, dtype=torch.float64)
        self.fails_in, self.left = fails_in, after

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if self.fails_in == processes.rank():
            self.left -= 1
            if self.left < 0:
                raise OSError(f"cannot read point {index}")
        return self.points[index], self.targets[index]


@register_model
class Perceptron(nn.Sequential):
    """An unused layer in it, as stages leave some behind."""

    def __init__(self, width, dim):
        super().__init__(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, dim))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self[2](self[1](self[0](x)))


def train(path, folder, *overrides):
    torch.set_default_dtype(torch.float64)
    return runner.run(read(path, overrides), Path(folder))


def measure(path, checkpoint):
    """Test outputs and metrics, of this process."""
    torch.set_default_dtype(torch.float64)
    return experiment.evaluate(read(path), Path(checkpoint))


if __name__ == "__main__":
    with processes.joined():
        for arguments in json.loads(sys.argv[1]):
            train(*arguments)
