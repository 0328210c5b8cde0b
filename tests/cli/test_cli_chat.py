"""python -m minigpt4 chat."""

import subprocess
import sys

import pytest
from helpers import GOLDEN, ROOT

from minigpt4.cli.chat import Terminal, _paths, parse_args
from minigpt4.conversation import Chat
from minigpt4.processors import Blip2ImageEvalProcessor

PICTURE = str(GOLDEN / "images" / "rgb.png")


@pytest.fixture
def terminal(build_golden_model):
    chat = Chat(build_golden_model(), Blip2ImageEvalProcessor(28))
    return Terminal(chat, {"do_sample": False, "max_new_tokens": 12})


def test_a_talk(terminal, capsys):
    terminal.obey(f"/image {PICTURE}")
    terminal.obey("What is it?")
    out = capsys.readouterr().out
    assert out == f"[image 1: {PICTURE}]\n{terminal.conv.messages[-1][1]}\n"
    first = terminal.conv.copy()
    terminal.obey("/retry")
    assert terminal.conv == first  # greedy
    terminal.obey("/reset")
    assert terminal.conv.messages == terminal.img_list == []
    terminal.obey("/retry")
    assert "no answer yet" in capsys.readouterr().out
    terminal.obey("/what")
    assert "/image PATH" in capsys.readouterr().out


def test_problems_are_told_and_the_talk_goes_on(terminal, capsys):
    terminal.obey("/image /nowhere.png")
    assert "nowhere.png cannot be read" in capsys.readouterr().out
    terminal.obey("a dog " * 3000)
    assert "the model holds" in capsys.readouterr().out
    terminal.obey("Hello")
    assert len(terminal.conv.messages) == 2


def test_ctrl_c_stops_an_answer(terminal, capsys, monkeypatch):
    terminal.settings |= {"max_new_tokens": 300, "min_length": 300}

    def interrupted(*args, end="\n", **kwargs):
        if end == "":
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: interrupted(*args, **kwargs))
    with pytest.raises(KeyboardInterrupt):  # the "[stopped]" is printed with this print, too
        terminal.obey("Hello")
    monkeypatch.undo()
    assert terminal.conv.messages[-1][0] == "Assistant"
    terminal.settings |= {"max_new_tokens": 5, "min_length": 1}
    terminal.obey("And now?")


def test_paths_with_spaces(tmp_path, monkeypatch):
    (tmp_path / "my cat.png").touch()
    assert _paths(f"{tmp_path}/my cat.png") == [f"{tmp_path}/my cat.png"]
    assert _paths("a.png 'b c.png'") == ["a.png", "b c.png"]
    assert _paths("it's") == ["it's"]


def test_the_whole_command(golden_config, tmp_path):
    command = [sys.executable, "-m", "minigpt4", "chat", PICTURE, "--cfg-path", str(golden_config), "--seed", "1"]
    result = subprocess.run(
        command, cwd=ROOT, input="Hi\n/quit\n", capture_output=True, text=True, timeout=120,
        env={"PATH": "", "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"[image 1: {PICTURE}]" in result.stdout


def test_settings():
    args = parse_args(["--cfg-path", "x", "--num-beams", "3", "--temperature", "0.5", "--no-sample"])
    assert (args.num_beams, args.temperature, args.sample, args.max_new_tokens, args.seed) == (3, 0.5, False, 300, None)
