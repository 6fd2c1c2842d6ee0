"""Memory that is kept between steps."""

import ctypes
import resource

import pytest
import torch
from children import result_of_child

from rkd_plugin.experiments.support.memory import keep_memory


def _faults(steps=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.ones(2**22)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _faults_before_and_after():
    plain = _faults()
    keep_memory()
    _faults(3)
    return plain, _faults()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_step_takes_the_pages_of_the_one_before():
    plain, kept = result_of_child(_faults_before_and_after)
    assert plain > 100  # pages have 4 KiB or 2 MiB
    assert kept < plain / 10


def test_without_mallopt_nothing_is_done(monkeypatch):
    requested = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: requested.append(name) or object())
    keep_memory()
    assert requested == [None]
