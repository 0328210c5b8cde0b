"""Which errors a command reports in one line."""

import errno
import os

import pytest

from minigpt4.__main__ import main
from minigpt4.common.errors import ConfigError, format_error, is_mistake
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
