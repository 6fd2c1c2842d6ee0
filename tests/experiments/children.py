"""Processes that are forked from one that has imported everything and computed nothing, which is quick and safe."""

from __future__ import annotations

import multiprocessing
import os
import sys

import torch

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["rkd_plugin.experiments.running.runner", "rkd_plugin.components.models", "torch.utils.tensorboard", "pytest"]
)


def in_child(function, *args):
    """A process that calls ``function`` without output."""
    process = FORKED.Process(target=_quietly, args=(function, *args))
    process.start()
    return process


def result_of_child(function, *args):
    """What ``function`` returns in a process of its own."""
    here, there = FORKED.Pipe()
    process = in_child(_send, there, function, *args)
    there.close()  # so that the end of the process ends the wait
    value = here.recv()
    process.join()
    return value


def _send(pipe, function, *args):
    pipe.send(function(*args))


def _quietly(function, *args):
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of workers, which inherit open files
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    function(*args)
