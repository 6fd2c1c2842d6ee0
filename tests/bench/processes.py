"""Time and memory of the angle loss of a batch on several processes, compared with all of it on each (gloo, CPU).

Run ``PYTHONPATH=. python tests/bench/processes.py [N ...]`` in the checkout; it prints the table of the guide to many
processes. The variants alternate, in all processes at once. ``predicted`` is the cost model of
``rkd_plugin/distributed.py``; its constants are measured in the same rounds.
"""

import os
import sys
import time
from statistics import median

import torch
from torch import distributed, multiprocessing

from rkd_plugin import rkd_angle_loss
from rkd_plugin.bench import Case, batch
from rkd_plugin.bench.measuring import peak, reset_peak
from rkd_plugin.distributed import gather
from rkd_plugin.environment import environment

ROUNDS, WARM_UPS = 7, 2
HEAD = "N", "W", "each computes all, ms", "shared, ms", "times faster", "predicted, ms", "c2 N^2, ms", "sent, ms", "MB"


def steps(rank, processes, rows):
    """Forward and backward of the whole batch, of one vertex, of one rank's share, and of its communication."""
    student, teacher = batch(Case(rows))
    own = slice(rank * rows // processes, (rank + 1) * rows // processes)

    def sent(student, teacher):
        return gather("bench", student, teacher, True, False).student.sum()

    def step(chosen, loss, **options):
        distributed.barrier()
        learning = student[chosen].clone().requires_grad_()
        started = time.perf_counter()
        loss(learning, teacher[chosen], **options).backward()
        distributed.barrier()
        return (time.perf_counter() - started) * 1e3

    return (
        lambda: step(slice(None), rkd_angle_loss),
        lambda: step(slice(None), rkd_angle_loss, anchors=1),
        lambda: step(own, rkd_angle_loss, gather=True),
        lambda: step(own, sent),
    )


def times(rank, processes, rows, address, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    kinds = steps(rank, processes, rows)
    rounds = [[kind() for kind in kinds] for _ in range(WARM_UPS + ROUNDS)][WARM_UPS:]
    results[rank] = list(zip(*rounds, strict=True))
    distributed.destroy_process_group()


def growth(rank, processes, rows, address, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    shared = steps(rank, processes, rows)[2]
    steps(rank, processes, 512)[2]()  # the memory of compiling is not part of the growth
    reset_peak()
    before = peak()
    shared()
    results[rank] = (peak() - before) / 1e6
    distributed.destroy_process_group()


def measure(kind, processes, rows):
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        address = f"tcp://127.0.0.1:{29500 + rows % 977 + processes}"
        multiprocessing.spawn(kind, (processes, rows, address, results), processes)
        return dict(results)


if __name__ == "__main__":
    sizes = [int(argument) for argument in sys.argv[1:]] or [512, 1024, 2048]
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD), flush=True)
    for rows in sizes:
        for processes in (1, 2, 3):
            every, one, shared, sent = found = measure(times, processes, rows)[0]
            every, one, _, sent = map(median, found)
            os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # as in `rkd bench`: live memory, not its gaps
            memory = max(measure(growth, processes, rows).values())
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
            print(
                f"| {rows} | {processes} | {every:.0f} | {median(shared):.0f} ({min(shared):.0f} to {max(shared):.0f}) "
                f"| {every / median(shared):.2f}x | {(every - one) / processes + one + sent:.0f} | {one:.0f} "
                f"| {sent:.1f} | {memory:.0f} |",
                flush=True,
            )
    print({name: value for name, value in environment("cpu").items() if name != "threads"})
