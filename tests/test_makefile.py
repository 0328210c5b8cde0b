"""The Makefile: `make clean` removes what make made, and nothing else."""

import shutil
import subprocess

import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def make(*arguments, folder):
    command = ["make", "--no-print-directory", "-f", str(ROOT / "Makefile"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_clean_removes_only_environments_that_make_created(tmp_path):
    kept = ["data/mine.tar", "output/run/checkpoint_3.pth", ".venv/bin/python", "my envs/pyvenv.cfg"]
    removed = [".venv-img2dataset/.made-by-make", ".venv-img2dataset/bin/img2dataset"]
    for name in kept + removed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    said = make("clean", folder=tmp_path)
    for name in (".venv", "data/", "output/"):
        assert f"Kept {name}" in said
    assert "Removed .venv-img2dataset." in said
    make("clean", "VENV=my envs", folder=tmp_path)
    make("clean", "VENV=", folder=tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert make("clean", folder=tmp_path / "my envs") == ""


def test_the_mark_is_set_only_where_there_was_nothing(tmp_path):
    """Python is a stand-in, which stops after the step that would create the environment."""
    (tmp_path / "old").mkdir()
    for name in ("requirements.txt", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).touch()
    for name in ("old", "new"):
        command = [
            "make",
            "--no-print-directory",
            "-f",
            str(ROOT / "Makefile"),
            f"{name}/.installed",
            f"VENV={name}",
            "PYTHON=true",
            "PIP=false",
        ]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode
    assert not (tmp_path / "old" / ".made-by-make").exists() and (tmp_path / "new" / ".made-by-make").exists()
