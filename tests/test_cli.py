"""The command line: what it prints, what it refuses, and that it works from an installed wheel."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from rkd_plugin.cli import main

ROOT = Path(__file__).parent.parent
SMALL = ["recipe.num_epochs=1", "recipe.samples_per_epoch=128", "recipe.batch_size=64"]


def test_ls_lists_every_packaged_file(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert {line.split()[0] for line in lines} == names
    assert all(len(line.split()) > 5 for line in lines)


def test_check_of_a_good_recipe(capsys):
    assert main(["check", "quickstart/rkd_da"]) == 0
    assert capsys.readouterr().out.startswith("quickstart/rkd_da: no problems, 1 note\n")


def test_check_of_a_bad_recipe(capsys):
    assert main(["check", "quickstart/rkd_da", "train.optimizer.key=Adm", "train.num_epochs=ten"]) == 1
    error = capsys.readouterr().err
    assert "train.optimizer.key" in error
    assert "train.num_epochs" in error


def test_run_and_eval_say_the_same(tmp_path, capsys):
    assert main(["run", "quickstart/student", *SMALL, "--out", str(tmp_path / "run")]) == 0
    final = capsys.readouterr().out.splitlines()[0].split()
    checkpoint = str(tmp_path / "run" / "last.pt")
    for options in (
        [str(tmp_path / "run")],
        ["quickstart/student", "--checkpoint", checkpoint, "--data", "quickstart/teacher"],
    ):
        assert main(["eval", *options]) == 0
        measured, *metrics = capsys.readouterr().out.splitlines()
        assert measured == "measured on 896 images of 5 of 10 classes"
        assert " ".join(metrics).split() == final[1:]
    assert main(["eval", str(tmp_path / "run"), "--classes", "all"]) == 0
    measured, *metrics = capsys.readouterr().out.splitlines()
    assert measured == "measured on 1797 images of 10 of 10 classes"
    assert " ".join(metrics).split() != final[1:]


def test_eval_draws_pictures(tmp_path, capsys, monkeypatch):
    assert main(["run", "quickstart/teacher", *SMALL, "--out", str(tmp_path / "teacher")]) == 0
    overrides = [*SMALL, f"recipe.teacher_checkpoint={tmp_path / 'teacher' / 'last.pt'}"]
    assert main(["run", "quickstart/rkd_da", *overrides, "--out", str(tmp_path / "student")]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "student"), "--checkpoint", "best", "--pictures"]) == 0
    names = {"retrieval.png", "embedding_map.png", "distances.png", "relations.png"}
    printed = [Path(line) for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert {path.name for path in printed} == names
    assert all(path.stat().st_size > 10_000 for path in printed)
    assert len(list((tmp_path / "student" / "pictures").glob("events.out.tfevents.*"))) == 1
    monkeypatch.setattr("rkd_plugin.experiments.report.find_spec", lambda _: None)
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


def test_overrides_may_stand_behind_an_option(tmp_path, capsys):
    """As in the commands at the head of the recipes."""
    assert main(["run", "quickstart/teacher", "--out", str(tmp_path), "recipe.sed=1"]) == 1
    assert "recipe.sed: recipe has no key 'sed'; did you mean seed?" in capsys.readouterr().err
    for words in (["run", "quickstart/teacher", "--out", "x", "--sed=1"], ["ls", "recipe.seed=1"]):
        with pytest.raises(SystemExit):
            main(words)
        assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_the_wheel_works_away_from_the_checkout(tmp_path):
    """A fresh environment whose only package of its own is the wheel; the hosts are lent to it by a path file."""
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
    (Path(site.stdout.strip()) / "hosts.pth").write_text(sysconfig.get_path("purelib"))

    def rkd(*arguments):
        command = [tmp_path / "venv" / "bin" / "rkd", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert "quickstart/rkd_da" in rkd("ls")
    assert rkd("check", "quickstart/rkd_da").startswith("quickstart/rkd_da: no problems, 1 note\n")
    where = [
        python,
        "-c",
        "import pathlib, rkd_plugin as r; p = pathlib.Path(r.__file__); print(p, p.with_name('py.typed').is_file())",
    ]
    location = subprocess.run(where, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()
    assert location[0].startswith(str(tmp_path))
    assert location[1] == "True"
