"""Memory that is kept between steps."""

import ctypes
import subprocess
import sys

import pytest

from rkd_plugin.experiments.support.memory import keep_memory

PROBE = """
import resource, torch
from rkd_plugin.experiments.support.memory import keep_memory
def faults(steps=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.ones(2**22)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
keep_memory()
faults(3)
print(plain, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_step_takes_the_pages_of_the_one_before():
    output = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout
    plain, kept = map(int, output.split())
    assert plain > 100  # pages have 4 KiB or 2 MiB
    assert kept < plain / 10


def test_without_mallopt_nothing_is_done(monkeypatch):
    requested = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: requested.append(name) or object())
    keep_memory()
    assert requested == [None]
