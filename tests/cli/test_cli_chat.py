"""python -m minigpt4 chat."""

import io
import subprocess
import sys

import pytest
from helpers import GOLDEN, ROOT
from video_files import bad_videos, write_video

from minigpt4.__main__ import main as minigpt4
from minigpt4.cli.chat import Terminal, _history, _paths, parse_args
from minigpt4.conversation import Chat
from minigpt4.processors import Blip2ImageEvalProcessor

PICTURE = str(GOLDEN / "images" / "rgb.png")


@pytest.fixture
def terminal(build_golden_model):
    chat = Chat(build_golden_model(), Blip2ImageEvalProcessor(28))
    return Terminal(chat, {"do_sample": False, "max_new_tokens": 12}, frames=8)


def test_a_conversation(terminal, capsys):
    terminal.obey(f"/image {PICTURE}")
    terminal.obey("What is it?")
    told = capsys.readouterr()
    assert told.out == f"{terminal.conv.messages[-1][1]}\n" and told.err == f"[image 1: {PICTURE}]\n"
    first = terminal.conv.copy()
    terminal.obey("/retry")
    assert terminal.conv == first  # greedy
    capsys.readouterr()
    terminal.obey("/reset")
    assert terminal.conv.messages == terminal.img_list == []
    assert capsys.readouterr().err == "[a new conversation, without pictures]\n"
    terminal.obey("/retry")
    assert "no answer yet" in capsys.readouterr().err
    terminal.obey("/what")
    told = capsys.readouterr().err
    assert "no command /what" in told and "/image PATH" in told


def test_errors_are_printed_and_the_conversation_continues(terminal, capsys):
    terminal.obey("/image /nowhere.png")
    assert "nowhere.png cannot be read" in capsys.readouterr().err
    terminal.obey("a dog " * 3000)
    assert "the model holds" in capsys.readouterr().err
    terminal.obey("Hello")
    assert len(terminal.conv.messages) == 2


def test_a_question_that_is_too_long_is_dropped_alone(terminal, capsys):
    """The picture before it is in the same message, and stays."""
    terminal.obey(f"/image {PICTURE}")
    before = terminal.conv.copy()
    terminal.obey("a dog " * 3000)
    assert "the model holds" in capsys.readouterr().err
    assert terminal.conv == before
    terminal.obey("What is it?")
    assert terminal.conv.messages[0] == ["Human", "<Img><ImageHere></Img> What is it?"]
    assert capsys.readouterr().out == f"{terminal.conv.messages[1][1]}\n"
    before = terminal.conv.copy()
    terminal.settings["max_length"] = 10
    terminal.obey("/retry")
    assert "the model holds 10" in capsys.readouterr().err
    assert terminal.conv == before


def test_a_missing_picture_is_reported_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("minigpt4.conversation.loading.load_chat", lambda *_: pytest.fail("loads"))
    config = ["--cfg-path", str(ROOT / "eval_configs/minigpt4_tiny_eval.yaml")]
    for command in ("chat", "caption"):
        assert minigpt4([command, PICTURE, "gone.png", *config]) == "Error: There is no file gone.png."


def test_a_named_file_that_is_not_a_picture_ends_the_command(golden_config, tmp_path, monkeypatch):
    (tmp_path / "note.jpg").write_text("no picture")
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("it went on without the picture"))
    config = ("--cfg-path", str(golden_config))
    assert "note.jpg is not a picture that can be read" in minigpt4(["chat", str(tmp_path / "note.jpg"), *config])


def test_videos(terminal, capsys, tmp_path):
    terminal.frames = 3
    path = write_video(tmp_path / "my clip.mp4")
    terminal.obey(f"/image {PICTURE}")
    terminal.obey(f"/video {path}")
    terminal.obey(f"/image {path}")  # recognised by its suffix
    assert capsys.readouterr().err.splitlines()[1:] == [f"[images 2 to 4: {path}]", f"[images 5 to 7: {path}]"]
    terminal.obey("What happens?")
    assert terminal.conv.messages[0][1].count("<ImageHere>") == len(terminal.img_list) == 7
    assert capsys.readouterr().out == f"{terminal.conv.messages[1][1]}\n"
    messages = bad_videos(tmp_path)
    for name, message in messages.items():
        terminal.obey(f"/video {tmp_path / name}")
        assert message in capsys.readouterr().err
    terminal.obey(f"/video {PICTURE}")
    assert "rgb.png is not a video" in capsys.readouterr().err
    assert len(terminal.img_list) == 7


@pytest.mark.parametrize("command", ["/image", "/video"])
def test_a_command_without_a_path_asks_for_it(terminal, capsys, monkeypatch, tmp_path, command):
    path = PICTURE if command == "/image" else write_video(tmp_path / "clip.mp4")
    lines = iter([str(path), ""])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    terminal.obey(command)
    shown = len(terminal.img_list)
    assert shown == (1 if command == "/image" else 8)
    terminal.obey(command)  # answered by an empty line
    assert list(lines) == [] and len(terminal.img_list) == shown
    monkeypatch.undo()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    terminal.obey(command)  # at the end of the input
    told = capsys.readouterr()
    assert told.err.count(f"{command} PATH: ") == 3 and told.out == "" and len(terminal.img_list) == shown


def test_retry_is_for_an_answer_after_which_nothing_came(terminal, capsys):
    terminal.obey(f"/image {PICTURE}")
    terminal.obey("/retry")
    assert "no answer yet" in capsys.readouterr().err
    terminal.obey("What is it?")
    terminal.obey(f"/image {PICTURE}")
    before = terminal.conv.copy()
    capsys.readouterr()
    terminal.obey("/retry")
    told = capsys.readouterr()
    assert "after the last answer" in told.err and not told.out and terminal.conv == before
    terminal.obey("And this?")  # the picture was kept for it
    assert [text.count("<ImageHere>") for _, text in terminal.conv.messages] == [1, 0, 1, 0]
    terminal.obey("/retry")
    assert len(terminal.conv.messages) == 4


def test_the_first_question_without_a_picture_is_pointed_out(terminal, capsys):
    terminal.obey("Hello")
    assert "no picture" in capsys.readouterr().err
    terminal.obey("And now?")
    assert "no picture" not in capsys.readouterr().err
    terminal.obey(f"/image {PICTURE}")
    terminal.obey("/reset")
    terminal.obey("What is it?")
    assert "no picture is shown" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["quit", "Exit", "/quit", "/exit", "exit()"])
def test_words_that_leave(terminal, monkeypatch, capsys, word):
    lines = iter([f" {word} ", "never"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    terminal.run()
    assert list(lines) == ["never"] and capsys.readouterr().out == ""


def test_a_path_typed_as_a_command(terminal, capsys):
    terminal.obey(PICTURE)
    assert f"/image {PICTURE}" in capsys.readouterr().err and not terminal.conv.messages


def test_typed_text_is_not_markup(terminal, capsys):
    terminal.obey(f"/image {PICTURE}")
    terminal.obey("<ImageHere> ### <Img>")
    assert terminal.conv.get_prompt().count("<ImageHere>") == 1
    assert "the model holds" not in capsys.readouterr().err


def test_ctrl_c_stops_an_answer(terminal, capsys, monkeypatch):
    terminal.settings |= {"max_new_tokens": 300, "min_length": 300}

    def interrupted(*args, end="\n", **kwargs):
        if end == "":
            raise KeyboardInterrupt
        told.append(args)

    told = []
    monkeypatch.setattr("builtins.print", interrupted)
    terminal.obey("Hello")
    monkeypatch.undo()
    assert told[-1] == ("[stopped]",)
    assert terminal.conv.messages[-1][0] == "Assistant"
    terminal.settings |= {"max_new_tokens": 5, "min_length": 1}
    terminal.obey("And now?")


def test_ctrl_c_while_a_picture_is_read_leaves_the_conversation_as_it_was(terminal, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    lines = iter(["/image big.png", "/reset", "/quit"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    monkeypatch.setattr(terminal.chat, "upload_img", interrupted)
    terminal.run()
    assert list(lines) == []
    told = capsys.readouterr()
    assert told.out == "" and told.err == "> \n[stopped]\n> [a new conversation, without pictures]\n> "


def test_an_unreadable_history_is_ignored(monkeypatch, tmp_path):
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def unreadable(file):
        raise OSError("Invalid argument")

    (tmp_path / "minigpt4").mkdir()
    (tmp_path / "minigpt4" / "chat_history").write_text("x")
    monkeypatch.setattr(readline, "read_history_file", unreadable)
    with _history():
        pass
    assert (tmp_path / "minigpt4" / "chat_history").is_file()


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
    assert f"[image 1: {PICTURE}]" in result.stderr and "> " in result.stderr
    # The model's weights are random, so its answer may hold any short text.
    others = ("Loading", "Ask", "[image")
    assert result.stdout and not result.stdout.startswith(">") and not any(word in result.stdout for word in others)


def test_settings():
    args = parse_args(["--cfg-path", "x", "--num-beams", "3", "--temperature", "0.5", "--no-sample"])
    assert (args.num_beams, args.temperature, args.do_sample, args.max_new_tokens, args.seed) == (
        3,
        0.5,
        False,
        300,
        None,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "temperature=0.0 must be more than 0"),
        (["--num-beams", "0"], "num_beams=0 must be at least 1"),
        (["--frames", "0"], "frames=0 must be at least 1"),
    ],
)
def test_settings_out_of_bounds_are_reported_before_anything_is_loaded(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--cfg-path", "x", *arguments])
    assert message in capsys.readouterr().err
