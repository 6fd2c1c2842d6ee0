"""Data, models and losses in float64, and a script, which test_many_processes.py starts in several processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torchvision  # noqa: F401  before torchdistill, whose registries look for it in sys.modules
from pytorch_metric_learning.losses import ProxyNCALoss
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchdistill.models.registry import register_model

from rkd_plugin import distributed, rkd_da_loss
from rkd_plugin.experiments.recipe import read
from rkd_plugin.experiments.running import evaluation, runner
from rkd_plugin.experiments.support import processes


class Points(torch.utils.data.Dataset):
    """Points around the centres of ten classes; BREAK=rank,after,how breaks a process at a point that it requests."""

    def __init__(self, count, seed):
        drawn = torch.Generator().manual_seed(seed)
        self.targets = (torch.arange(count) % 10).tolist()
        centres = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.points = centres[self.targets] + torch.randn(count, 6, generator=drawn, dtype=torch.float64)
        self.requested = 0

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        rank, after, how = os.environ.get("BREAK", "-1,0,").split(",")
        self.requested += 1
        if int(rank) == distributed.rank() and self.requested > int(after):
            if how == "raise":
                raise OSError(f"cannot read point {index}")
            if how == "kill" or self.requested == int(after) + 1:
                os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)
        return self.points[index], self.targets[index]


@register_model
class Perceptron(nn.Sequential):
    """With a layer that is never used, as after a stage."""

    def __init__(self, width, dim):
        super().__init__(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, dim))
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, x):
        return self[2](self[1](self[0](x)))


class Proxies(ProxyNCALoss):
    def __init__(self):
        super().__init__(num_classes=10, embedding_size=10)
        self.double()


def train(path, folder, *overrides):
    return runner.run(read(path, overrides), Path(folder))


def measure(path, checkpoint):
    measured = evaluation.evaluate(read(path), Path(checkpoint))
    return {name: getattr(measured, name) for name in ("metrics", "outputs", "labels")}


def gradients_of_fsdp():
    """Gradients of the global loss through a sharded student, and through a plain one."""
    torch.manual_seed(0)
    images, teacher = torch.randn(14, 6, dtype=torch.float64), torch.randn(14, 7, dtype=torch.float64)
    student, sharded = Perceptron(9, 4), Perceptron(9, 4)
    sharded.load_state_dict(student.state_dict())
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    for module in (sharded[0], sharded[2], sharded):
        fully_shard(module, mesh=mesh)
    own = slice(0, 5) if distributed.rank() == 0 else slice(5, 14)
    rkd_da_loss(sharded(images[own]), teacher[own], gather=True).backward()
    rkd_da_loss(student(images), teacher).backward()
    shards = [parameter.grad for parameter in sharded.parameters() if parameter.grad is not None]
    whole = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    return [shard.full_tensor() for shard in shards], whole, [shard.to_local().numel() for shard in shards]


def mean_gradients():
    """Gradients of parameters that both processes use (one in float32), that only this one uses, and that none uses."""
    used, narrow, first, second, none = (torch.ones((), requires_grad=True) for _ in range(5))
    used, narrow = used.detach().double().requires_grad_(), narrow
    mine = (first, second)[distributed.rank()]
    loss = (distributed.rank() + 1) * (used * 2 + narrow + mine)
    processes.average_gradients(loss, [used, narrow, first, second, none])
    loss.backward()
    return [parameter.grad for parameter in (used, narrow, first, second, none)]


def main():
    todo = json.loads(sys.argv[1])
    with processes.process_group():
        for arguments in todo["train"]:
            train(*arguments)
        found = {path: measure(path, checkpoint) for path, checkpoint in todo["measure"]}
        found |= {"fsdp": gradients_of_fsdp(), "mean": mean_gradients()}
        torch.save(found, Path(todo["out"]) / f"{distributed.rank()}.pt")
