"""Folders and files of a command's own, and one run at a time."""

import subprocess
import sys

import pytest
from helpers import ROOT

from minigpt4.common.errors import ConfigError
from minigpt4.common.output import is_taken, make_folder, only_run, own_folder, whole_folder


def test_a_folder_is_ones_own_if_it_is_new_empty_or_marked(tmp_path):
    own_folder(tmp_path / "a" / "b", "mark.json")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "a" / "b" / ".mark.json.123").touch()  # another rank writes the mark
    own_folder(tmp_path / "a" / "b", "mark.json")
    (tmp_path / "a" / "b" / "x.tar").touch()
    with pytest.raises(ConfigError, match=r"a/b has files that this command did not write, e\.g\. x\.tar"):
        own_folder(tmp_path / "a" / "b", "mark.json")
    (tmp_path / "a" / "b" / "mark.json").touch()
    own_folder(tmp_path / "a" / "b", "mark.json")


@pytest.mark.parametrize("left", [".mark.json.part", ".answers.jsonl.lock", ".answers.jsonl.settings.part", ".lock"])
def test_a_run_that_ended_before_its_mark_is_started_again(tmp_path, left):
    (tmp_path / left).touch()
    own_folder(tmp_path, "mark.json")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_where_there_can_be_no_folder(tmp_path, name):
    (tmp_path / "file").write_text("of the user")
    for function in (make_folder, lambda path: own_folder(path, "mark")):
        with pytest.raises(ConfigError, match=f"--out {tmp_path / name} cannot be a folder"):
            function(tmp_path / name)
    with pytest.raises(ConfigError, match="--out .* cannot be written: "), only_run(tmp_path / "file" / "out.jsonl"):
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / ".new.part").mkdir()
    (tmp_path / ".new.part" / "left").touch()  # by a run that was killed
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with whole_folder(tmp_path / name) as part:
            (part / "file").write_text(name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["file"]
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "other") as part:
        (part / "file").write_text(str(1 / 0))
    with (
        pytest.raises(ConfigError, match="--out .*/other cannot be written: .*No space"),
        whole_folder(tmp_path / "other"),
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "new"):
        pass
    assert (tmp_path / "new" / "file").read_text() == "new"
    (tmp_path / "empty" / "file").unlink()
    with whole_folder(tmp_path / "empty") as part:
        (part / "file").write_text("of the first")
        with pytest.raises(ConfigError, match="another run is writing there"), whole_folder(tmp_path / "empty"):
            pass
    assert (tmp_path / "empty" / "file").read_text() == "of the first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_a_folder_that_cannot_be_replaced_is_filled_whole_or_not_at_all(tmp_path, monkeypatch):
    """Such as the place of a mounted disk."""
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path) as part:
        (part / "file").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "left").touch()  # by a run that was killed
    assert not is_taken(tmp_path)
    with whole_folder(tmp_path) as part:
        (part / "sub").mkdir()
        (part / "sub" / "file").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["sub", "sub/file"]
    assert is_taken(tmp_path)


def test_one_process_at_a_time(tmp_path):
    """The lock ends with its process, however that ends."""
    path = tmp_path / "new" / "out.jsonl"
    code = (
        "import pathlib, sys\nfrom minigpt4.common.output import only_run\n"
        "with only_run(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match="another run is writing there"), only_run(path):
        pass
    other.kill()
    other.wait()
    for _ in range(2):
        with only_run(path):
            pass
