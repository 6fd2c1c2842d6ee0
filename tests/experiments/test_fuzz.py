"""Whatever a recipe, a command line or a bank contains: it is checked in seconds, and nothing in it is executed.

The default checks 200 recipes and command lines and 50 banks, `.ci/slow` ten times as many, the same ones every time;
``RKD_FUZZ=50000`` checks as many new recipes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rkd_plugin import cli
from rkd_plugin.experiments.recipe import RecipeError, check, examine, find, read, read_suite, suites
from rkd_plugin.experiments.recipe.reading import parse
from rkd_plugin.experiments.running.embed import verify
from rkd_plugin.teacher_bank import Bank, files
from rkd_plugin.teacher_bank.fingerprint import digest
from rkd_plugin.teacher_bank.header import FORMAT, HEADER, VERSION

SECONDS = 10.0  # of CPU, for one example; the slowest takes two
EXAMPLES = int(os.environ.get("RKD_FUZZ", "200"))
SEEDS = ["quickstart/rkd_da", "quickstart/student", "classification/small_cifar100/fitnet", "few_shot/omniglot/rkd"]
LINES = {
    name: [line for line in find(name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    for name in [*SEEDS, "quickstart"]
}
PARTS = re.compile(r"( *(?:- )?)([^:\[{]*)(: ?|)(.*)")
WORDS = sorted({part for lines in LINES.values() for line in lines for part in PARTS.fullmatch(line).groups()[1::2]})
PATHS = ["recipe.seed", "train", "train.num_epochs", "datasets.digits/train", "models.student_model", "dependencies"]
PATHS += ["models.student_model.key", "models.student_model.kwargs", "train.optimizer.kwargs.lr", "recipe.l2_normalize"]
PATHS += ["train.criterion.kwargs.sub_terms.rkd.criterion.kwargs", "train.student.forward_proc", "test", "nowhere", ""]

CANARY = """
import rkd_canary_calls
def spring(size=1, **kwargs): rkd_canary_calls.made.append("spring")
class Springer:
    def __new__(cls, *args, **kwargs): rkd_canary_calls.made.append("Springer")
    def leap(self=None, **kwargs): rkd_canary_calls.made.append("leap")
    @property
    def lurk(self): rkd_canary_calls.made.append("lurk")
"""
LAUGHS = ", ".join(f"&{b} [*{a}, *{a}, *{a}]" for a, b in itertools.pairwise("abcdefghijklmnopqrst"))
HOSTILE = [
    *("~", "0", "-1", "1.5", "True", "''", "a", ".nan", ".inf", "1.0e+400", "1e-3", "1:30", "=", "?", "-", ":",
      "%", "|"),
    *("0x" + "f" * 5000, "9" * 5000, "'" + "9" * 5000 + "'", "x" * 5000, "2001-12-14", "2001-13-13", "\t", "\x00"),
    *("\ufeff", '"\\ud800"', '"\\e[2J\\n"', "\udcff", "'.'", "'..'", "'a.b.'", "[]", "{}", "[[]]",
      "[a, 1, {b: [c]}]"),
    *("{1: a, b: c}", "{~: 1}", "{[a]: 1}", "{a: 1, a: 2}", "{<<: 1}", "{<<: {a: 1}}", "[" * 120 + "]" * 120,
      "[" * 999),
    *("!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "!!null x", "!!set {a}", "!!omap [a: 1]",
      "!!pairs [a: 1]"),
    *("!!binary YQ==", "!!binary é", "!!str [a]", "!!map a", "!!seq {}", "!!python/object/apply:os.abort []", "!",
      "!a x"),
    *("!<x> 1", "&seed 1", "*seed", "*nowhere", "&a [*a]", "!import_call", "!import_get []", "!join x", "!getattr [a]"),
    *("rkd_canary", "rkd_canary.spring", "rkd_canary.Springer.lurk", "os.abort", ".os", "..", "rkd_canary."),
    "!import_get {key: rkd_canary.spring}",
    "!import_call {key: rkd_canary.spring, init: {kwargs: {size: x}}}",
    "!import_call {key: Springer, package: rkd_canary, init: {args: [1, 2]}}",
    "!import_call_method {package: rkd_canary.Springer.leap, init: {kwargs: {a: 1}}}",
    "!import_call_method {package: rkd_canary, class_name: Springer, method_name: leap}",
    "!call_method {obj: !import_call {key: rkd_canary.Springer}, method_name: leap}",
    "!getattr [!import_call {key: rkd_canary.Springer}, lurk]",
    "{key: get_model, kwargs: {name: fcn_resnet50}}",
    "{key: BackboneEmbedding, kwargs: {backbone: fcn_resnet50, embedding_dim: 2, l2_normalize: False}}",
    "{key: resnet18, kwargs: {weights: IMAGENET1K_V1, num_classes: -1}}",
    "{key: vgg11, kwargs: {progress: [], num_classes: a}}",
    "{key: resnet20, repo_or_dir: 'nobody/nothing', kwargs: {}}",
    f"[&a [x, x], {LAUGHS}]",
    *("rkd_canary_program.__main__", "rkd_canary_program.__main__.x", "{name: .__main__, package: rkd_canary_program}"),
    *("antigravity", "antigravity.fly", "[[antigravity]]", "-m rkd_canary_program"),
]  # fmt: skip
# Values for which an algorithm of quadratic time is slow.
LARGE = [
    *("[" + ", ".join(map(str, range(4_000))) + "]", "9" * 40_000, "x" * 100_000),
    *("0x" + "f" * 40_000, "1" + ":30" * 20_000, "a" + ".a" * 50_000, "'" + "''" * 50_000, "[" * 50_000),
    *("{" + ", ".join(f"{prefix}{index}: {value}" for index in range(count)) + "}" for prefix, count, value in [
        ("k", 2_000, 1), ("x" * 100, 2_000, "[]"), ("num_epoch", 2_000, 1),
        ("k", 400, "!import_call {key: nowhere.x}"), ("k", 400, "{key: Adam, kwargs: {}}"),
        ("k", 400, "!import_call {key: torchvision.transforms.Resize, init: {kwargs: {size: 1}}}"),
        ("k", 400, "{criterion: {key: MSELoss, kwargs: {}}, weight: 1.0}"),
    ]),
    "[" + "torch, " * 4_000 + "]",
    "{key: ResNet12Embedding, kwargs: {widths: [" + "1, " * 3_000 + "1]}}",
    "{key: resnet, kwargs: {depth: 999998, num_classes: 10}}",
    "{key: ConvEmbedding, kwargs: {width: 99999999999, embedding_dim: 9, l2_normalize: True}}",
    *(f"[&j0 !join [{'x' * 9}], " + ", ".join(f"&j{i} !join [*j{i - 1}, *j{i - 1}]" for i in range(1, n)) + "]"
      for n in (11, 40)),
]  # fmt: skip

# Everything with an effect: processes, the network, files.
ACTS = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|fork|forkpty|kill|remove|rename|mkdir|rmdir|chmod|chown|link|symlink|truncate)"
    r"|subprocess\..*|pty\..*|socket\.(connect|bind|sendto|sendmsg|getaddrinfo|gethostby.*)|urllib\..*|http\..*|ftplib\..*"
    r"|smtplib\..*|webbrowser\..*|shutil\..*|tempfile\..*|sqlite3\..*"
)
acts: list[tuple[object, ...]] | None = None


def _record(event: str, args: tuple[object, ...]) -> None:
    if acts is not None and (ACTS.fullmatch(event) or (event == "open" and _writes(*args[1:3]))):
        acts.append((event, *args))


def _writes(mode: object, flags: object) -> bool:
    return (isinstance(mode, str) and any(kind in mode for kind in "wax+")) or (
        isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )


sys.addaudithook(_record)  # cannot be removed; it records only while `acts` is a list


@contextlib.contextmanager
def watched():
    global acts
    acts = []
    try:
        yield acts
    finally:
        acts = None


@pytest.fixture(scope="module", autouse=True)
def calls(tmp_path_factory):
    """The calls into a module that recipes name; the hosts are loaded before."""
    folder = tmp_path_factory.mktemp("canary")
    (folder / "rkd_canary.py").write_text(CANARY)
    (folder / "rkd_canary_calls.py").write_text("made = []")
    (folder / "rkd_canary_idle.py").write_text("")
    (folder / "rkd_canary_program").mkdir()
    (folder / "rkd_canary_program" / "__init__.py").write_text("")
    (folder / "rkd_canary_program" / "__main__.py").write_text(CANARY + "spring()")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(sys, "dont_write_bytecode", True)
        import rkd_canary_calls

        for name in SEEDS:
            check(parse("\n".join(LINES[name]), Path("seed.yaml")))
        yield rkd_canary_calls.made
        for name in [name for name in sys.modules if name.startswith("rkd_canary")]:
            del sys.modules[name]


def looked_at(count: int):
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=EXAMPLES <= 2000,
        suppress_health_check=list(HealthCheck),
    )


def answer(text: str, is_suite: bool = False) -> None:
    """Check a recipe: it has no problem, or a `RecipeError` whose lines are printable."""
    raised = None
    started = time.process_time()
    with watched() as seen:
        try:
            recipe = parse(text, Path("mutated.yaml"))
            if is_suite:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(suites, "read", lambda _: recipe)
                    read_suite("mutated")
            else:
                recipe.validate()
                recipe.resolved()
        except RecipeError as error:
            raised = error
    assert seen == []
    assert time.process_time() - started < SECONDS
    if raised:
        lines = str(raised).split("\n")
        assert len(lines) == len(raised.problems) + 1 > 1
        assert all(line.isprintable() for line in lines)


HOSTILE_OR_KNOWN = st.one_of(st.sampled_from(HOSTILE), st.sampled_from(WORDS), st.text(max_size=8))
MUTATION = st.tuples(
    st.sampled_from(
        ["value", "value", "value", "value", "key", "drop", "twice", "move", "indent", "tag", "splice", "root"]
    ),
    st.integers(0, 200),
    st.integers(0, 200),
    HOSTILE_OR_KNOWN,
)


def mutated(lines: list[str], mutations: list[tuple[str, int, int, str]]) -> str:
    lines = list(lines)
    for what, at, other, new in mutations:
        at, other = at % len(lines), other % len(lines)
        lead, key, colon, value = PARTS.fullmatch(lines[at].replace("\n", " ")).groups()
        match what:
            case "value":
                lines[at] = f"{lead}{key}{colon}{new}" if colon else f"{lead}{new}"
            case "key":
                lines[at] = f"{lead}{new}{colon}{value}"
            case "tag":
                lines[at] = f"{lead}{key}{colon}{new} {value}"
            case "drop" if len(lines) > 1:
                del lines[at]
            case "twice":
                lines.insert(other, lines[at])
            case "move":
                lines.insert(other, lines.pop(at))
            case "indent":
                lines[at] = "  " * (other % 4) + lines[at].lstrip()
            case "root":
                lines = [f"--- {new}", *lines] if other % 2 else ["root:", *(f"  {line}" for line in lines)]
            case "splice":
                cut = other % (len(lines[at]) + 1)
                lines[at] = lines[at][:cut] + new + lines[at][cut + other % 3 :]
    return "\n".join(lines)


@looked_at(EXAMPLES // 2)
@given(st.sampled_from(SEEDS), st.lists(MUTATION, min_size=1, max_size=4))
def test_any_recipe(calls, name, mutations):
    answer(mutated(LINES[name], mutations))
    assert calls == []


@looked_at(EXAMPLES // 100)
@given(st.sampled_from(SEEDS), st.integers(0, 200), st.sampled_from(LARGE), st.booleans())
def test_any_size(calls, name, line, large, is_key):
    answer(mutated(LINES[name], [("key" if is_key else "value", line, 0, large)]))
    assert calls == []


@looked_at(EXAMPLES // 10)
@given(st.lists(MUTATION, min_size=1, max_size=4))
def test_any_suite(calls, mutations):
    answer(mutated(LINES["quickstart"], mutations), is_suite=True)
    assert calls == []


KEY, EQUALS = st.one_of(st.sampled_from(PATHS), st.text(max_size=8)), st.sampled_from(["=", "=", "=", "", "=="])
OVERRIDE = st.builds("{}{}{}".format, KEY, EQUALS, HOSTILE_OR_KNOWN)
OTHERS = st.sampled_from(["quickstart/student", "--out", "--seeds", "--help", "--", "-x", "-", "@x", "%s", "1"])
WORD = st.one_of(OVERRIDE, OVERRIDE, OTHERS, st.text(max_size=6))
COMMAND = st.tuples(
    st.sampled_from(["check"] * 6 + ["run", "eval", "reproduce", "embed", "bench", "ls", "chex", ""]),
    st.sampled_from(
        ["quickstart/rkd_da"] * 6 + ["quickstart", ".", "/dev/null", "/", "a\0b", "x" * 5000, "\udcff", ""]
    ),
    st.lists(WORD, max_size=4),
)


@looked_at(EXAMPLES - EXAMPLES // 2 - EXAMPLES // 10 - EXAMPLES // 100)
@given(COMMAND)
def test_any_command_line(calls, command):
    verb, name, rest = command
    started = time.process_time()
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="")
    with pytest.MonkeyPatch.context() as patch, watched() as seen:
        for other in ("eval", "reproduce", "embed", "bench"):
            patch.setattr(cli.VERBS[other], "execute", lambda options: None)
        patch.setattr(cli.run, "execute", cli.check.execute)  # the first part of a run
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main([verb, name, *rest])
            except SystemExit as stopped:
                code = stopped.code
    assert time.process_time() - started < SECONDS
    out.flush(), err.flush()
    error = err.buffer.getvalue().decode()
    if code == 1:
        assert re.fullmatch(r"rkd (check|run): .*: \d+ problems?\n(  .+\n)+", error), error
    elif code == 2:
        assert re.match(r"usage: rkd[\S\s]+\nrkd.*: error: .+", error), error
    else:
        assert code == 0
        assert error == ""
    assert seen == []
    assert calls == []


@pytest.mark.parametrize("line", range(len(LINES["quickstart"])))
def test_a_tag_anywhere_in_a_suite(line):
    answer(mutated(LINES["quickstart"], [("value", line, 0, "!import_call")]), is_suite=True)


@pytest.mark.parametrize(
    "value", ["[" + "1, " * 60_000 + "]", "{" + ", ".join(f"k{i}: 1" for i in range(20_000)) + "}"]
)
def test_more_than_a_recipe_can_need_raises(value):
    started = time.process_time()
    with pytest.raises(RecipeError, match="expected at most "):
        parse("\n".join([*LINES[SEEDS[0]], f"more: {value}"]), Path("large.yaml"))
    assert time.process_time() - started < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("start", ["dependencies:", "datasets:", "  student_model:", "      lr:", "          weight:"])
def test_every_large_value(start):
    """Each of them as a value of a section, expected or not."""
    lines = LINES[SEEDS[0]]
    at = next(index for index, line in enumerate(lines) if line.startswith(start))
    indent = len(start) - len(start.lstrip())
    inside = itertools.takewhile(lambda line: not line or len(line) - len(line.lstrip()) > indent, lines[at + 1 :])
    rest = lines[at + 1 + len(list(inside)) :]
    for large in LARGE:
        answer("\n".join([*lines[:at], f"{start} {large}", *rest]))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_files_that_never_end_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.yaml", "x.pt", "root"):
        os.mkfifo(name)
    for name in ("x.yaml", "/dev/zero", "/dev/stdin"):
        with pytest.raises(RecipeError, match="neither a file nor a packaged recipe"):
            read(name)
    findings = examine(read("quickstart/rkd_da", ["models.teacher_model.src_ckpt=x.pt"]))
    assert any("there is no file 'x.pt'" in note for _, note in findings.missing)


def test_only_values_of_keys_are_imported():
    """Every scalar of a recipe but keys and dependencies names a module, and none of them is loaded."""
    named = re.compile(r"(.*\b(?:key|package|name|dependencies):.*|[^:]*:|[^:]*: [&*!].*)")
    lines = [
        line if named.fullmatch(line) else re.sub(r": .*", ": rkd_canary_idle.spring", line) for line in LINES[SEEDS[0]]
    ]
    assert sum("rkd_canary_idle" in line for line in lines) > 10
    assert check(parse("\n".join(lines), Path("idle.yaml")))
    assert "rkd_canary_idle" not in sys.modules
    answer("\n".join(LINES[SEEDS[0]]).replace("rkd_plugin.components.models", "rkd_canary_idle"))
    assert "rkd_canary_idle" in sys.modules  # the check can fail


@pytest.mark.parametrize(
    "act", ["open('{}', 'w').close()", "__import__('os').mkdir('{}')", "__import__('subprocess').run('true')"]
)
def test_acts_are_recorded(act, tmp_path):
    with watched() as seen:
        exec(act.format(tmp_path / "act"))
    assert seen


# Banks: reading any files ends in seconds, with rows or with one sentence.

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
BANK = {
    "format": FORMAT, "version": VERSION, "dtype": "float32", "views": 0, "seed": 0, "shard_rows": 2,
    "arrays": [{"path": ".", "io": "output", "pool": None, "width": 3}],
    "data": {
        "count": 4, "labels": None, "files": None, "transform": "",
        "images": [{"index": 0, "shape": [1], "mean": 0.0, "std": 0.0}],
    },
    "teacher": {"model": {}, "weights": "", "precision": "float32"},
}  # fmt: skip
KEYS = [(key,) for key in BANK] + [("data", key) for key in BANK["data"]] + [("arrays", 0), ("checksums",), ("more",)]
KEYS += [("arrays", 0, key) for key in BANK["arrays"][0]] + [("data", "images", 0, "shape", 0), ("teacher", "weights")]
VALUES = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x" * 10**6, "\x1b[2J"]
VALUES += ["float16", "../../x", "\0", [], {}, [[]] * 1000, {"x": {}}, [-1], [2**63]]
HEADERS = [
    *(f"{{'descr': {descr}, 'fortran_order': False, 'shape': (4, 3), }}" for descr in (
        "'<f8'", "'|O'", "'<U99999999'", "'x'", "[]", "[('a', '|O')]", "('<f4', (2,))", "'|V0'", "None", "'<M8[ns]'")),
    *(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}" for shape in (
        "(-4, 3)", "(4, 0)", "()", "(99999999999999, 3)", f"({10**400}, 3)", "(4.0, 3)", "'x'", "(4,) * 99999999",
        "(True, 3)", f"(2, {2**63})", "[4, 3]")),
    "{'descr': '<f4', 'fortran_order': True, 'shape': (4, 3), }", "{}", "", "(" * 9000, "-" * 9000,
    "x" * 70_000, "9" * 9999,
]  # fmt: skip
FILES = [HEADER, "0.npy", files.CHECKSUMS, "a.npy", "a.npz", "a.safetensors", "a.pt"]
CHANGE = st.one_of(
    st.tuples(st.just("value"), st.just(HEADER), st.sampled_from(KEYS), st.sampled_from(VALUES), st.booleans()),
    st.tuples(st.just("header"), st.sampled_from([name for name in FILES if ".npy" in name]), st.sampled_from(HEADERS)),
    st.tuples(st.just("bytes"), st.sampled_from(FILES), st.integers(0, 1500), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("cut"), st.sampled_from(FILES), st.integers(0, 1500)),
    st.tuples(st.just("without"), st.sampled_from(FILES)),
    st.tuples(st.just("fifo"), st.sampled_from(FILES)),
)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """A folder with a bank, and arrays of the other kinds; their bytes by name."""
    folder = tmp_path_factory.mktemp("bank")
    layout = files.Layout.of(BANK)
    writer = files.ShardWriter(folder, layout)
    writer.allocate()
    writer.write(0, [ROWS])
    write_header(folder, {**BANK, "checksums": digest(files.ShardReader(folder, layout).sums)})
    np.save(folder / "a.npy", ROWS)
    np.savez(folder / "a.npz", ROWS)
    save_file({"a": ROWS}, folder / "a.safetensors")
    torch.save(torch.from_numpy(ROWS), folder / "a.pt")
    return folder, {name: (folder / name).read_bytes() for name in FILES}


def write_header(folder, header):
    (folder / HEADER).write_text(json.dumps({**header, "checksum": digest(header)}))


def replaced(content, keys, value):
    """JSON with another value at a place, which can be new."""
    if not keys:
        return value
    new = dict(content) if isinstance(content, dict) else list(content)
    new[keys[0]] = replaced(new[keys[0]] if len(keys) > 1 else None, keys[1:], value)
    return new


def change(folder, what, name, *how):
    path = folder / name
    match what:
        case "value":
            keys, value, is_signed = how
            header = json.loads(path.read_text())
            header.pop("checksum")
            header = replaced(header, keys, value)
            write_header(folder, header) if is_signed else path.write_text(json.dumps({**header, "checksum": ""}))
        case "header":
            data = ROWS.tobytes() if name != files.CHECKSUMS else bytes(16)
            text = how[0].encode("latin1")
            path.write_bytes(b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + data)
        case "bytes":
            content = path.read_bytes()
            at = how[0] % len(content)
            path.write_bytes(content[:at] + how[1] + content[at + len(how[1]) :])
        case "cut":
            path.write_bytes(path.read_bytes()[: how[0] % path.stat().st_size])
        case "without" | "fifo":
            path.unlink()
            if what == "fifo":
                os.mkfifo(path)


@contextlib.contextmanager
def alarm(seconds):
    """Interrupt a call that waits, such as for the other end of a FIFO."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@looked_at(EXAMPLES // 4)
@given(CHANGE)
def test_any_bank(bank, how):
    folder, contents = bank
    for name, content in contents.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    change(folder, *how)
    started, problem = time.process_time(), None
    with watched() as seen:
        try:
            with alarm(60):
                opened = Bank(folder / how[1] if how[1].startswith("a.") else folder)
                rows = opened.read([0, 3])
                assert sum(opened.verify()) == opened.count * max(opened.views, 1)
        except (ValueError, OSError, IndexError) as error:
            problem = str(error)
        else:
            assert [row.dtype for row in rows] == [torch.float32]
    assert seen == []
    assert time.process_time() - started < SECONDS
    assert problem is None or re.fullmatch(r".+", problem)  # one line; `TimeoutError` has none


def test_an_unchanged_bank_is_read(bank):
    folder, contents = bank
    for name, content in contents.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    for path in [folder, *(folder / name for name in FILES if name.startswith("a."))]:
        assert torch.equal(Bank(path).read([0, 3])[0], torch.from_numpy(ROWS[[0, 3]]))


def test_labels_of_progress_bars_are_escaped(bank, tmp_path, capsys):
    _, contents = bank
    copy = tmp_path / "a\x1b[31m"
    copy.mkdir()
    for name, content in contents.items():
        (copy / name).write_bytes(content)
    assert sum(verify(copy)) == 4
    found = capsys.readouterr().err
    assert "a\\x1b[31m" in found
    assert "\x1b[31m" not in found
