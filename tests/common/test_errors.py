"""Which errors a command reports in one line."""

import errno
import os
import re
import signal

import pytest

from minigpt4.__main__ import main
from minigpt4.common.errors import ConfigError, UnusableDataError
from minigpt4.common.failing import failure_text, format_error, is_mistake
from minigpt4.common.registry import UnknownNameError


def raised(action) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (raised(lambda: open("/dev/null/x")), "Error: /dev/null/x: Not a directory."),
        (raised(lambda: open("/")), "Error: /: Is a directory."),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x"), "Error: /x: Permission denied."),
        (FileNotFoundError("/x holds no weights."), "Error: /x holds no weights."),
        (ConfigError("run.seed"), "Error: run.seed"),
        (UnknownNameError("run.task"), "Error: run.task"),
        (UnusableDataError("datasets.x: nothing"), "Error: datasets.x: nothing"),
        (UnusableDataError("Caught …\nTraceback …\nx.UnusableDataError: of a worker\n"), "Error: of a worker"),
    ],
)
def test_mistakes(error, text, monkeypatch):
    assert is_mistake(error)
    monkeypatch.setattr("minigpt4.__main__.dispatch", lambda *_: (_ for _ in ()).throw(error))
    assert main(["chat"]) == format_error(error) == text


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), ValueError("x"), RuntimeError("x")])
def test_faults_of_ours_keep_their_traceback(error, monkeypatch):
    monkeypatch.setattr("minigpt4.__main__.dispatch", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        main(["chat"])


@pytest.fixture
def several(monkeypatch, tmp_path):
    """Function that lets this process be a rank of torchrun's, and returns what it says at its end, and its waits."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def end(rank, error):
        file = tmp_path / f"attempt_0/{rank}/error.json"
        file.parent.mkdir(parents=True)
        for name, value in {"WORLD_SIZE": 4, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_ERROR_FILE": file}.items():
            monkeypatch.setenv(name, str(value))
        waits = []
        monkeypatch.setattr("time.sleep", waits.append)
        return failure_text(raised(lambda: (_ for _ in ()).throw(error))), waits

    return end


def test_the_first_rank_that_fails_says_why_and_no_other(several):
    first, waited = several(2, ValueError("a fault"))
    assert "Rank 2" in first and "Traceback" in first and first.endswith("ValueError: a fault") and not waited
    for rank, error in ((0, RuntimeError("[gloo/pair.cc:1] Connection closed by peer")), (3, ValueError("a fault"))):
        said, waited = several(rank, error)
        assert said.count("\n") == 0 and f"Rank {rank}" in said and "has lost another rank" in said and waited
    said, waited = several(1, ConfigError("run.seed"))
    assert said == "Error: run.seed" and waited


def test_a_rank_that_lost_another_does_not_claim_to_be_the_first(several):
    said, waited = several(0, RuntimeError("NCCL error"))
    assert "has lost another rank" in said and waited
    said, waited = several(1, ConfigError("run.seed"))
    assert said == "Error: run.seed" and not waited


def test_without_torchrun_each_rank_says_what_it_knows_at_once(several, monkeypatch):
    monkeypatch.setattr("minigpt4.common.failing.ERROR_FILE", "A_VARIABLE_THAT_IS_NOT_SET")
    for rank, error, text in (
        (1, ValueError("a fault"), "ValueError: a fault"),
        (2, ConfigError("run.seed"), "Error: run.seed"),
        (
            3,
            RuntimeError("[gloo/pair.cc:1] Connection closed by peer"),
            "Rank 3 on .* has lost another rank.*closed by",
        ),
        (0, RuntimeError("[gloo/x.cc:1] Timed out waiting 30000ms"), "Rank 0 on .*30000ms.*run.timeout_minutes"),
    ):
        said, waited = several(rank, error)
        assert re.search(text, said) and not waited


def test_the_only_process_shows_its_traceback():
    with pytest.raises(ValueError, match="a fault"):
        failure_text(ValueError("a fault"))
