"""The benchmark runs, prints everything, and gives a wrong kernel no speed. Nothing here depends on a duration."""

from __future__ import annotations

import json

import pytest
import torch

from rkd_plugin import bench
from rkd_plugin.cli import main
from rkd_plugin.kernels import chunked

SIZE = 6


@pytest.fixture
def quick_memory(monkeypatch):
    """No process per contender."""
    monkeypatch.setattr(bench, "peak_growth", lambda name, *_: {"chunked": 2_000_000}.get(name, 8_000_000))


def lines(capsys):
    head, rule, *rows, environment = capsys.readouterr().out.strip().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    assert set(rule) == set("| -")
    return cells, environment


def test_table(capsys, quick_memory):
    assert bench.main([SIZE, 7], repeats=2, device="cpu") == 0
    (head, *rows), environment = lines(capsys)
    assert head == [
        "N", "loss", "forward ms", "backward ms", "both ms", "IQR ms", "peak growth MB",
        "times faster than torchdistill", "times less memory",
    ]  # fmt: skip
    assert [row[:2] for row in rows] == [[n, c] for n in ("6", "7") for c in ("chunked", "reference", "torchdistill")]
    for row in rows:
        assert len(row) == len(head)
        assert all(float(cell.rstrip("x").replace(",", "")) >= 0 for cell in row[2:])
        assert row[6] == ("2" if row[1] == "chunked" else "8")
        assert row[8] == ("4x" if row[1] == "chunked" else "1x")
    for word in ("commit", "device", "cores", "threads", "torch", "torchdistill"):
        assert f"{word} " in environment
    assert torch.__version__ in environment


def test_peer_that_needs_too_much_memory_is_estimated(capsys, quick_memory):
    estimate = bench.peer_bytes(SIZE)
    assert bench.main([SIZE], repeats=1, peer_limit_gb=estimate / 1e9 * 0.99, device="cpu") == 0
    (_, *rows), _ = lines(capsys)
    peer = rows[-1]
    assert peer == ["6", "torchdistill", "-", "-", "-", "-", f"~{estimate / 1e6:.3g}", "-", "1x"]
    assert rows[0][7] == "-"
    assert bench.main([SIZE], repeats=1, peer_limit_gb=estimate / 1e9, device="cpu") == 0
    assert lines(capsys)[0][-1][2] != "-"


def test_reference_has_no_row_where_it_is_too_large(capsys, quick_memory, monkeypatch):
    monkeypatch.setattr(bench, "REFERENCE_ROWS", SIZE - 1)
    bench.main([SIZE], repeats=1, device="cpu")
    assert [row[1] for row in lines(capsys)[0][1:]] == ["chunked", "torchdistill"]


def test_json(capsys, quick_memory):
    assert bench.main([SIZE], repeats=1, as_json=True, device="cpu") == 0
    written = json.loads(capsys.readouterr().out)
    assert [row["loss"] for row in written["results"]] == ["chunked", "reference", "torchdistill"]
    assert set(written["results"][0]) == set(bench.Row._fields)
    assert {"commit", "device", "threads", "torch"} <= set(written["environment"])


@pytest.mark.parametrize("what", ["value", "gradient"])
@pytest.mark.parametrize("broken", [torch.float64, torch.float32])
def test_wrong_kernel_gets_no_speed(monkeypatch, capsys, what, broken):
    """Off by a thousandth, in one dtype, in the value or in the gradient only."""
    right = chunked.angle

    def wrong(student, teacher, huber_delta, triplets=None):
        losses = right(student, teacher, huber_delta, triplets)
        if student.dtype != broken:
            return losses
        return losses * 1.001 if what == "value" else losses.detach() + 1.001 * (losses - losses.detach())

    monkeypatch.setattr(chunked, "angle", wrong)
    with pytest.raises(
        RuntimeError, match=rf"bench: impl 'chunked' must agree .* got a {what} .* in {broken} at N = 64"
    ):
        bench.main([SIZE], repeats=1, device="cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("rows", "repeats"), [(1, 1), (2, 0)])
def test_nothing_to_measure(rows, repeats):
    with pytest.raises(ValueError, match=f"at least 2 rows and 1 repetition are needed, got {rows} and {repeats}"):
        bench.measure(rows, repeats, 1.0, "cpu")


def test_peak_growth_sees_what_is_allocated():
    """In a fresh process: the peer's cubes, within what the estimate leaves out at so few rows."""
    assert 0.7 < bench.peak_growth("torchdistill", 128, "cpu") / bench.peer_bytes(128) < 1.3


def test_a_recipes_step_is_timed_beside_torchdistills(capsys):
    small = ["recipe.samples_per_epoch=512", "recipe.batch_size=64"]
    assert main(["bench", "quickstart/student", *small, "--steps", "2"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    times = {name.strip("| "): float(ms) for name, ms, *_ in lines[1:]}
    assert list(times) == [
        "torchdistill's loop", "rkd run", "rkd run, channels_last", "rkd run, bf16", "rkd run, bf16, channels_last",
        "data alone",
    ]  # fmt: skip
    assert all(ms > 0 for ms in times.values())
    assert main(["bench", "quickstart/student", *small, "--steps", "20"]) == 1
    assert "expected at least 22 steps an epoch, got 8; ask for fewer" in capsys.readouterr().err
