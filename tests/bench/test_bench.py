"""The benchmark runs, prints all its results, and raises for a wrong kernel. No test depends on a duration."""

from __future__ import annotations

import itertools
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from rkd_plugin import bench
from rkd_plugin.bench import measuring, showing
from rkd_plugin.cli import main
from rkd_plugin.kernels import chunked, native

SIZE = 6
RESULTS = sorted(Path(__file__).parent.glob("*.json"))
PAGE = Path(__file__).parents[2] / "docs/pages/speed.md"


@pytest.fixture
def quick_memory(monkeypatch):
    """No process per contender, and no more repetitions of a small batch."""
    monkeypatch.setattr(measuring, "STEADY_ROWS", 1)
    monkeypatch.setattr(measuring, "peak_growth", lambda name, *_: {"chunked": 2_000_000}.get(name, 8_000_000))


def cells(text):
    head, rule, *rest = text.strip().splitlines()
    rows = [line for line in rest if line.startswith("|")]
    assert set(rule) == set("| -")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)], rest[-1]


def column(rows, name):
    return [row[rows[0].index(name)] for row in rows[1:]]


def test_table(capsys, quick_memory):
    assert main(["bench", "--n", str(SIZE), "7", "--repeats", "2", "--device", "cpu"]) == 0
    rows, environment = cells(capsys.readouterr().out)
    assert rows[0] == list(showing.HEADS.values())
    contenders = ("chunked", "reference", "torchdistill")
    assert [row[:2] for row in rows[1:]] == [[n, c] for n in ("6", "7") for c in contenders]
    for row in rows[1:]:
        assert len(row) == len(rows[0])
        assert all(float(cell.rstrip("x").replace(",", "")) >= 0 for cell in row[2:])
    assert column(rows, "peak growth MB") == ["2", "8", "8"] * 2
    assert column(rows, "times less memory") == ["4x", "1x", "1x"] * 2
    for word in ("commit", "device", "cores", "threads", "torch", "torchdistill"):
        assert f"{word} " in environment
    assert torch.__version__ in environment


def test_the_case_is_the_requested_one(quick_memory):
    measured = bench.main([SIZE], ["reference"], 3, 5, "bfloat16", "cpu", repeats=1)
    first, peer = measured["results"]
    assert [first[key] for key in ("rows", "student_dim", "teacher_dim", "dtype", "loss")] == [
        SIZE, 3, 5, "bfloat16", "reference",
    ]  # fmt: skip
    student, teacher = bench.batch(bench.Case(SIZE, 3, 5, torch.bfloat16))
    assert (student.shape, teacher.shape, student.dtype) == ((SIZE, 3), (SIZE, 5), torch.bfloat16)
    assert bench.peer_bytes(bench.Case(SIZE, 3, 5, torch.bfloat16)) == 2 * (3 * SIZE**3 + 2 * SIZE**2 * 8)
    # The computation in float32 is exact for bfloat16 inputs; the gradient is rounded to eight bits.
    assert first["value_error"] < 1e-6
    assert 1e-5 < first["gradient_error"] < 2**-8
    assert peer["loss"] == "torchdistill"


def test_peer_that_needs_too_much_memory_is_estimated(quick_memory):
    estimate = bench.peer_bytes(bench.Case(SIZE)) / 1e9
    options = {"repeats": 1, "device": "cpu"}
    table, _ = cells(bench.show(bench.main([SIZE], peer_limit_gb=estimate * 0.99, **options)))
    assert column(table, "both ms")[-1] == "-"
    assert column(table, "peak growth MB")[-1] == f"~{estimate * 1e3:.3g}"
    assert column(table, "times less memory")[-1] == "1x"
    assert column(table, "times faster than torchdistill") == ["-"] * 3
    table, _ = cells(bench.show(bench.main([SIZE], peer_limit_gb=estimate, **options)))
    assert column(table, "both ms")[-1] != "-"


def test_reference_has_a_row_for_large_batches_only_if_requested(quick_memory, monkeypatch):
    monkeypatch.setattr(measuring, "REFERENCE_ROWS", SIZE - 1)
    losses = [row["loss"] for row in bench.main([SIZE], repeats=1, device="cpu")["results"]]
    assert losses == ["chunked", "torchdistill"]
    losses = [row["loss"] for row in bench.main([SIZE], ["reference"], repeats=1, device="cpu")["results"]]
    assert losses == ["reference", "torchdistill"]


def test_other_relations_have_rows_without_a_comparison(quick_memory, monkeypatch):
    names = [*measuring.RELATIONS]
    measured = bench.main([SIZE], ["chunked", *names], repeats=1, device="cpu")
    rows, _ = cells(bench.show(measured))
    assert f"RKD-DA beside {', '.join(names)}, student" in bench.show(measured)
    assert column(rows, "loss") == ["chunked", *names, "torchdistill"]
    for head in ("times faster than torchdistill", "times less memory"):
        assert [cell == "-" for cell in column(rows, head)] == [False, *(True for _ in names), False]
    assert all(float(error) < 1e-5 for error in column(rows, "gradient's error")[1:-1])
    right = measuring.relational_loss
    monkeypatch.setattr(measuring, "relational_loss", lambda *x, impl, **o: right(*x, **o) * (1.001 + (impl == "auto")))
    for name in names:
        with pytest.raises(RuntimeError, match=f"expected impl '{name}' to agree with 'reference'"):
            measuring.check(name, "cpu")


def test_json_can_be_shown_later(capsys, quick_memory, tmp_path):
    assert main(["bench", "--n", str(SIZE), "--repeats", "1", "--device", "cpu", "--json"]) == 0
    text = capsys.readouterr().out
    written = json.loads(text)
    assert [row["loss"] for row in written["results"]] == ["chunked", "reference", "torchdistill"]
    assert set(written["results"][0]) == set(measuring.Row._fields)
    (tmp_path / "kept.json").write_text(text)
    assert main(["bench", "--show", str(tmp_path / "kept.json")]) == 0
    assert capsys.readouterr().out.strip() == showing.table(written)


@pytest.mark.parametrize("what", ["value", "gradient"])
@pytest.mark.parametrize("broken", [torch.float64, torch.float32])
def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys, what, broken):
    """With an error of a thousandth in one dtype, in the value or in the gradient only."""
    right = chunked.sums

    def wrong(student, *arguments):
        terms = right(student, *arguments)
        if student.dtype != broken:
            return terms
        return [1.001 * x if what == "value" else x.detach() + 1.001 * (x - x.detach()) for x in terms]

    monkeypatch.setattr(chunked, "sums", wrong)
    with pytest.raises(RuntimeError, match=rf"expected impl 'chunked' to agree .* {what} .* {broken} at N = 64"):
        bench.main([SIZE], repeats=1, device="cpu")
    assert capsys.readouterr().out == ""


def test_large_batches_are_checked_too(monkeypatch):
    """The library works in tiles; a check of a small batch does not reach the second one."""
    right = native.relations

    def wrong(squares, *arguments):
        found = right(squares, *arguments)
        return [1.001 * x for x in found] if len(squares[0]) > 512 else found

    monkeypatch.setattr(native, "relations", wrong)
    with pytest.raises(RuntimeError, match=r"expected impl 'chunked' to agree .* at N = 700"):
        measuring.check("chunked", "cpu")


def test_every_call_gets_a_new_teacher(quick_memory, monkeypatch):
    """As in training; the timed calls of one loss have different values."""
    seen, original = {}, measuring._contender

    def contender(name, *arguments):
        loss = original(name, *arguments)

        def call(student, teacher):
            seen.setdefault(name, []).append(teacher)  # a reference, so that no other tensor gets its memory
            return loss(student, teacher)

        return call

    monkeypatch.setattr(measuring, "_contender", contender)
    measuring._times({name: contender(name) for name in ("chunked", bench.PEER)}, *bench.batch(bench.Case(SIZE)), 1)
    calls = 2 * (measuring.WARM_UPS + 1)  # one that is timed and one before it
    assert {name: len(teachers) for name, teachers in seen.items()} == {"chunked": calls, bench.PEER: calls}
    for ours, theirs in itertools.combinations(seen["chunked"], 2):
        assert not torch.equal(ours, theirs)
    assert all(torch.equal(*pair) for pair in zip(*seen.values(), strict=True))
    bench.main([SIZE], ["chunked", "reference"], repeats=1, device="cpu")
    addresses = [teacher.data_ptr() for teachers in seen.values() for teacher in teachers]
    assert len(addresses) > 4 * calls
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize(("rows", "repeats"), [(1, 1), (2, 0)])
def test_nothing_to_measure(rows, repeats):
    with pytest.raises(ValueError, match=f"expected at least 2 rows and 1 repetition, got {rows} and {repeats}"):
        bench.measure(bench.Case(rows), ["chunked"], False, repeats, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "a floating-point dtype of torch, got 'int8'"),
        (["--impl", "quick"], "expected impl to be .*'quick'"),
        (["--impl", "fused", "--device", "cpu"], "for impl 'fused', .*; use impl='chunked'"),
    ],
)
def test_options_that_cannot_be_measured(options, message, capsys, monkeypatch):
    if find_spec("triton") is not None:  # without the interpreter, which the tests of that kernel use
        monkeypatch.setattr("rkd_plugin.kernels.fused.INTERPRETED", False)
    assert main(["bench", "--n", "4", *options]) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error)


@pytest.mark.parametrize("text", ["# Notes", "{}", "[1, 2]", '{"environment": {}, "results": [{"rows": 4}]}', "3"])
def test_files_that_cannot_be_shown(text, capsys, tmp_path):
    (tmp_path / "kept.json").write_text(text)
    assert main(["bench", "--show", str(tmp_path / "kept.json")]) == 1
    expected = "expected what `rkd bench --json` printed, got something else; measure it again"
    assert capsys.readouterr().err == f"rkd bench: {tmp_path / 'kept.json'}: {expected}\n"


@pytest.mark.slow
def test_peak_growth_sees_what_is_allocated():
    """In a new process: torchdistill's N^3 tensors; the estimate is less exact for so few rows."""
    case = bench.Case(128)
    assert 0.7 < bench.peak_growth("torchdistill", case) / bench.peer_bytes(case) < 1.3


def test_saved_bytes():
    def loss(student, teacher):
        return (student.exp() * teacher).sum()  # saves exp(student); inputs are not counted

    assert measuring._saved_bytes(loss, torch.randn(10, 7), torch.randn(10, 7)) == 10 * 7 * 4


def test_exponents_are_fitted_through_large_batches():
    rows = [{"rows": n, "loss": "l", "both_ms": 3 * n**2.5, "estimated": False} for n in (8, 256, 512, 2048)]
    rows[0]["both_ms"] = 1e9  # too small a batch to count
    assert showing.exponent(rows, "l", "both_ms") == pytest.approx(2.5)
    assert showing.exponent(rows[:3], "l", "both_ms") is None
    assert showing.exponent([*rows[:3], {**rows[3], "estimated": True}], "l", "both_ms") is None


def test_picture(tmp_path):
    row = dict.fromkeys(measuring.Row._fields, 1.0)
    results = [
        {**row, "rows": n, "loss": loss, "both_ms": n**3 / 1e3, "memory_mb": n**2 / 1e3, "estimated": False}
        for n in (64, 256, 512, 1024)
        for loss in ("chunked", "torchdistill")
    ]
    results[-1] |= {"estimated": True, "both_ms": None}
    measured = {"environment": {"device": "a processor"}, "results": results}
    showing.picture(measured, tmp_path / "new" / "bench.png")
    with Image.open(tmp_path / "new" / "bench.png") as image:
        assert image.size == (1200, 540)
        assert len(image.convert("L").getcolors()) > 20


# Committed results


def test_there_are_results():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_have_the_schema(path):
    measured = json.loads(path.read_text())
    assert set(measured) == {"environment", "results"}
    assert {"commit", "device", "cores", "threads", "python", "torch", "torchdistill"} == set(measured["environment"])
    assert "dirty" not in measured["environment"]["commit"]
    optional = {"forward_ms", "backward_ms", "both_ms", "spread_ms", "saved_mb", "value_error", "gradient_error"}
    optional |= {"speed_up", "memory_ratio"}
    for row in measured["results"]:
        assert tuple(row) == measuring.Row._fields
        for name, value in row.items():
            if name in ("loss", "dtype"):
                assert isinstance(value, str)
            elif name == "estimated":
                assert isinstance(value, bool)
            elif value is None:
                assert name in optional
            else:
                assert math.isfinite(value) or name in ("value_error", "gradient_error")
                assert value >= 0
        assert row["estimated"] == (row["both_ms"] is None)


def test_the_documentation_has_their_tables(capsys):
    text = PAGE.read_text()
    shown = [path for path in RESULTS if f"rkd bench --show tests/bench/{path.name}" in text]
    assert shown
    for path in shown:
        assert main(["bench", "--show", str(path)]) == 0
        assert capsys.readouterr().out.strip() in text


def test_a_step_of_a_recipe_is_compared_with_torchdistills(capsys):
    small = ["recipe.samples_per_epoch=512", "recipe.batch_size=64"]
    assert main(["bench", "quickstart/student", *small, "--steps", "2"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    times = {name.strip("| "): float(ms) for name, ms, *_ in lines[2:]}
    assert list(times)[:7] == [
        "torchdistill's loop", "rkd run", "rkd run, channels_last", "rkd run, bf16", "rkd run, bf16, channels_last",
        "data alone", "rkd run, 1 thread",
    ]  # fmt: skip
    assert all(ms > 0 for ms in times.values())
    assert main(["bench", "quickstart/student", *small, "--steps", "20"]) == 1
    assert "expected at least 22 steps an epoch, got 8; request fewer with --steps" in capsys.readouterr().err
