"""The command line: what it prints, what raises, and that it works from an installed wheel."""

import itertools
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from rkd_plugin.cli import VERBS, main
from rkd_plugin.cli.arguments import unrecognized
from rkd_plugin.cli.streams import lasting_streams
from rkd_plugin.experiments.running import runner
from rkd_plugin.experiments.tables import suite
from rkd_plugin.printing import report, show

ROOT = Path(__file__).parents[2]
METRICS = {"final": {"recall_at_1": 1.0}, "best": {"epoch": 1, "recall_at_1": 1.0}}
RESULT = {**METRICS, "measured_on": "9 images of 2 of 4 classes"}
SMALL = ["recipe.num_epochs=1", "recipe.samples_per_epoch=128", "recipe.batch_size=64"]


def test_ls_lists_every_packaged_file(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert {line.split()[0] for line in lines} == names
    assert all(len(line.split()) > 5 for line in lines)


HELP = [["--help"], ["--version"], ["ls"], *([verb, "--help"] for verb in VERBS)]


def test_help_and_lists_load_no_torch():
    """Loading torch takes seconds."""
    code = f"""
import json, sys
from rkd_plugin.cli import main
for words in {HELP}:
    try:
        main(words)
    except SystemExit:
        pass
    found = [name for name in ("torch", "numpy", "torchdistill") if name in sys.modules]
    assert not found, (words, found)
    assert words == ["ls"] or "yaml" not in sys.modules or ["ls"] in {HELP}[: {HELP}.index(words)], words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


READY = "quickstart/rkd_da: no problems in the recipe, no notes"


def test_check_of_a_good_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "quickstart/rkd_da"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "missing files and folders:"
    assert said[-1] == f"{READY}; not ready to run: 1 file is missing"
    (tmp_path / "teacher.pt").touch()
    assert main(["check", "quickstart/rkd_da", "recipe.teacher_checkpoint=teacher.pt"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == READY


def test_check_of_a_bad_recipe(capsys):
    assert main(["check", "quickstart/rkd_da", "train.optimizer.key=Adm", "train.num_epochs=ten"]) == 1
    error = capsys.readouterr().err
    assert "train.optimizer.key" in error
    assert "train.num_epochs" in error


def test_run_and_eval_print_the_same(tmp_path, capsys):
    assert main(["run", "quickstart/student", *SMALL, "--out", str(tmp_path / "run")]) == 0
    ours, final, *_ = capsys.readouterr().out.splitlines()
    final = final.split()
    checkpoint = str(tmp_path / "run" / "last.pt")
    for options in (
        [str(tmp_path / "run")],
        ["quickstart/student", "--checkpoint", checkpoint, "--data", "quickstart/teacher"],
    ):
        assert main(["eval", *options]) == 0
        measured, *metrics = capsys.readouterr().out.splitlines()
        assert measured == ours == "measured on 896 images of 5 of 10 classes"
        assert " ".join(metrics).split() == final[1:]
    assert main(["eval", str(tmp_path / "run"), "--classes", "all"]) == 0
    measured, *metrics = capsys.readouterr().out.splitlines()
    assert measured == "measured on 1797 images of 10 of 10 classes"
    assert " ".join(metrics).split() != final[1:]


def test_eval_draws_pictures(tmp_path, capsys, monkeypatch):
    few = [*SMALL, "datasets.digits/test.init.kwargs.classes=[8, 9]"]
    assert main(["run", "quickstart/teacher", *few, "--out", str(tmp_path / "teacher")]) == 0
    overrides = [*few, f"recipe.teacher_checkpoint={tmp_path / 'teacher' / 'last.pt'}"]
    assert main(["run", "quickstart/rkd_da", *overrides, "--out", str(tmp_path / "student")]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "student"), "--checkpoint", "best", "--pictures"]) == 0
    names = {"retrieval.png", "embedding_map.png", "distances.png", "relations.png"}
    printed = [Path(line) for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert {path.name for path in printed} == names
    assert all(path.stat().st_size > 10_000 for path in printed)
    assert len(list((tmp_path / "student" / "pictures").glob("events.out.tfevents.*"))) == 1
    monkeypatch.setattr("rkd_plugin.experiments.tables.report.find_spec", lambda _: None)
    assert main(["eval", str(tmp_path / "student"), "--pictures"]) == 1
    assert capsys.readouterr().err.endswith(
        "expected matplotlib for pictures, found none; install rkd-plugin[report]\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quickstart/rkd_dd"], "did you mean quickstart/rkd_d"),
        (["run", "quickstart/student", "train.num_epoch=2"], "num_epochs"),
        (["eval", "."], "expected a folder of `rkd run`"),
        (["eval", "nowhere"], "neither a file nor a packaged recipe"),
        (["eval", "quickstart/student", "--checkpoint", "none.pt"], "expected a checkpoint at none.pt, found none"),
        (["reproduce", "quickstar"], "did you mean quickstart"),
        (["reproduce", "quickstart/student"], "suite"),
        (["bench", "--n", "1"], "at least 2 rows"),
    ],
)
def test_wrong_input_is_one_message_and_no_traceback(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"rkd {arguments[0]}: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err


def test_overrides_can_follow_an_option(tmp_path, capsys):
    """As in the commands in the headers of the recipes."""
    assert main(["run", "quickstart/teacher", "--out", str(tmp_path), "recipe.sed=1"]) == 1
    assert "recipe.sed: recipe has no key 'sed'; did you mean seed?" in capsys.readouterr().err
    for words in (["run", "quickstart/teacher", "--out", "x", "--sed=1"], ["ls", "recipe.seed=1"]):
        with pytest.raises(SystemExit):
            main(words)
        assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_an_option_instead_of_an_override_prints_usage_and_the_override(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "quickstart/student", "--num_epochs", "2"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: rkd run ")
    assert "unrecognized arguments: --num_epochs" in error
    assert error.endswith("write an override without dashes: recipe.num_epochs=2\n")
    assert unrecognized(["--lr", "", "--x"], True).endswith(" recipe.lr=")  # an empty word


@pytest.mark.parametrize("verb", ["run", "reproduce"])
def test_a_recipe_above_the_current_folder_is_run_inside_of_it(tmp_path, monkeypatch, capsys, verb):
    (tmp_path / "here").mkdir()
    recipe = (ROOT / "configs" / ("quickstart/student.yaml" if verb == "run" else "quickstart.yaml")).read_text()
    (tmp_path / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path / "here")
    folders = []
    ran = {**RESULT, "seconds": 1.0, "parameters": 1}
    monkeypatch.setattr(runner, "run", lambda _, folder, *__: folders.append(folder) or {**ran, "seed": 0})
    monkeypatch.setattr(suite.report, "suite_pictures", lambda *_: [])
    assert main([verb, "../mine.yaml"]) == 0, capsys.readouterr().err
    assert folders
    assert {Path(os.path.relpath(folder)).parts[:2] for folder in folders} == {("runs", "mine")}
    assert {path.name for path in tmp_path.iterdir()} == {"here", "mine.yaml"}


def test_a_finished_run_is_reported_as_such(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *_: RESULT)
    assert main(["run", "quickstart/student", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("measured on 9 images of 2 of 4 classes", f"in {tmp_path}")
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert main(["run", "quickstart/student", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"already finished, in {tmp_path}"


# Output on a terminal


def test_external_text_moves_no_cursor(tmp_path, monkeypatch, capsys):
    show("a\x1b[2J\nb\x07")
    report("c\x1b]0;title\x07")
    assert capsys.readouterr() == ("a\\x1b[2J\nb\\x07\n", "c\\x1b]0;title\\x07\n")
    monkeypatch.setattr(runner, "run", lambda *_: {**RESULT, "final": {"x\x1b[31m": 1.0}})
    assert main(["run", "quickstart/student", "--out", str(tmp_path / "e\x1b[31m")]) == 0
    assert main(["eval", "quickstart/student", "--checkpoint", "f\x1b[31m\n.pt"]) == 1
    for text in capsys.readouterr():
        assert "\\x1b[31m" in text
        assert "\x1b" not in text


def python(code, shell="", **environment):
    """The result of a line of Python in a fresh interpreter, with redirections of a shell."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_closed_streams_are_not_those_of_files(tmp_path):
    code = f"""
import os, sys
from rkd_plugin.cli.streams import lasting_streams
with lasting_streams(), open({str(tmp_path / "checkpoint")!r}, "w") as file:
    print("result")
    print("warning", file=sys.stderr, flush=True)
    os.write(2, b"of a library")
"""
    for shell in ("2>&-", ">&-", "<&- >&- 2>&-"):
        assert python(code, shell).returncode == 0
        assert (tmp_path / "checkpoint").read_text() == ""


def test_a_reader_that_has_ended_stops_nothing():
    read, write = os.pipe()
    os.close(read)
    before = sys.stdout, sys.stderr
    with os.fdopen(write, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with lasting_streams():
            for _ in range(3):
                print("a result", flush=True)
        assert sys.stdout is stream
    assert before == (sys.stdout, sys.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="none")
def test_a_full_disk_behind_stdout_is_one_sentence():
    done = python("import sys; from rkd_plugin.cli import main; sys.exit(main(['ls']))", ">/dev/full")
    assert done.returncode == 1
    assert done.stderr == "rkd ls: expected to print to <stdout>, got: No space left on device\n"


def test_ascii_terminals_get_what_they_can_show():
    code = "from rkd_plugin.cli.streams import lasting_streams as l\n"
    code += "from rkd_plugin.printing import show\n"
    done = python(code + "with l(): show('50 ± 2')", PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stdout) == (0, "50 \\xb1 2\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "expected enough memory, got too little; use a smaller batch"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "expected enough memory, got too little",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "expected the workers that load data"),
    ],
)
def test_too_little_memory_is_one_sentence_and_keeps_the_epochs(tmp_path, monkeypatch, capsys, error, message):
    steps_of, epochs = runner.steps_of, itertools.count(1)

    def failing(experiment, box, part):
        yield from steps_of(experiment, box, part)
        if next(epochs) == 2:
            raise error

    monkeypatch.setattr(runner, "steps_of", failing)
    command = ["run", "quickstart/student", *SMALL, "recipe.num_epochs=2", "--out", str(tmp_path)]
    assert main(command) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"rkd run: {message}")
    monkeypatch.undo()
    assert main(command) == 0
    assert f"{tmp_path}: continuing with epoch 2 of 2" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(VERBS["ls"], "execute", lambda _: {}["a"])
    with pytest.raises(KeyError):
        main(["ls"])


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(tmp_path):
    """A fresh environment with the wheel; a path file adds the packages of this environment."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    hosts = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site.stdout.strip()) / "hosts.pth").write_text("\n".join(hosts))

    def rkd(*arguments):
        command = [tmp_path / "venv" / "bin" / "rkd", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert "quickstart/rkd_da" in rkd("ls")
    assert rkd("check", "quickstart/rkd_da").splitlines()[-1].startswith(READY)
    where = [
        python,
        "-c",
        "import pathlib, rkd_plugin as r; p = pathlib.Path(r.__file__); print(p, p.with_name('py.typed').is_file())",
    ]
    location = subprocess.run(where, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()
    assert location[0].startswith(str(tmp_path))
    assert location[1] == "True"
