"""Runs that start in the same second."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from minigpt4.common import dist_utils
from minigpt4.doctor.machine import is_writable
from minigpt4.runners import folder


@pytest.fixture
def same_second(monkeypatch):
    class Clock:
        @staticmethod
        def now():
            return Clock

        @staticmethod
        def strftime(form):
            return "20261130091500"

    monkeypatch.setattr(folder, "datetime", Clock)


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, same_second):
    started = Barrier(8)

    def run(number):
        started.wait()
        with folder.reserved_folder(str(tmp_path / "output")) as name:
            (tmp_path / "output" / name / "log.txt").write_text(str(number))
            return name

    with ThreadPoolExecutor(8) as pool:
        names = sorted(pool.map(run, range(8)))
    assert names == ["20261130091500", *(f"20261130091500-{n}" for n in range(2, 9))]
    assert sorted(p.name for p in (tmp_path / "output").iterdir()) == names
    assert {(tmp_path / "output" / name / "log.txt").read_text() for name in names} == set("01234567")


def test_a_folder_without_files_goes_with_its_run(tmp_path, same_second):
    (tmp_path / "20261130091500").mkdir()  # another run's, still empty
    with pytest.raises(ValueError, match="wrong weights"), folder.reserved_folder(str(tmp_path)) as name:
        assert (tmp_path / name).is_dir()
        raise ValueError("wrong weights")
    assert [p.name for p in tmp_path.iterdir()] == ["20261130091500"]
    with folder.reserved_folder(str(tmp_path / "made" / "for it")) as name:
        assert (tmp_path / "made" / "for it" / name).is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["20261130091500"]


def test_other_ranks_take_the_name_of_the_first(tmp_path, monkeypatch):
    """They make no folder, on whose disk it may not be."""
    monkeypatch.setattr(dist_utils, "is_main_process", lambda: False)
    monkeypatch.setattr(dist_utils, "broadcast_object", lambda value: ([tmp_path / "20261130091500-3"], None))
    with folder.reserved_folder(str(tmp_path)) as name:
        assert name == "20261130091500-3"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with folder.reserved_folder("~/runs") as name:
        assert (tmp_path / "runs" / name).is_dir() and folder.folder_of("~/runs", name).is_dir()


def test_a_folder_that_cannot_be_made(tmp_path):
    """A link to a disk that is not mounted, and a file in the place of a folder."""
    (tmp_path / "gone").symlink_to(tmp_path / "not mounted")
    (tmp_path / "file").touch()
    for place in ("gone", "file", "gone/below"):
        with pytest.raises(OSError), folder.reserved_folder(str(tmp_path / place)):
            pass
        assert not is_writable(tmp_path / place)
