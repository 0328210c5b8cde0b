"""Chat with MiniGPT-4 about pictures, in the terminal.

    python -m minigpt4 chat cat.jpg --cfg-path eval_configs/minigpt4_tiny_eval.yaml

Type a question, or a command: /image PATH, /video PATH, /reset, /retry, /help, /quit. Ctrl-C stops an answer or
the reading of a file; Ctrl-D quits. The arrow keys bring back earlier questions. Answers go to the standard output,
everything else to the standard error: `… chat cat.jpg < questions.txt > answers.txt` writes answers alone.
"""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from minigpt4.cli import arguments
from minigpt4.common.commands import command_parser
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.conversation import Decoding, PictureError
from minigpt4.conversation.videos import is_video

COMMANDS = """\
  /image PATH …   show pictures; they belong to the next question
  /video PATH …   show videos: --frames pictures of each, at even distances
  /reset          start a new conversation, without pictures
  /retry          answer the last question again
  /help           show this list
  /quit           quit, like quit or exit"""
QUIT = ("quit", "exit", "/quit", "/exit", "quit()", "exit()")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("chat", __doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures or videos to begin with")
    arguments.add_model_arguments(parser)
    arguments.add_answer_arguments(parser)
    return arguments.parse(parser, argv, arguments.AnswerSettings)


def main(argv: list[str]) -> None:
    """Load the model and chat until the end of the input."""
    args = parse_args(argv)
    arguments.check_files(Path(path).expanduser() for path in args.images)
    cfg = Config(args)
    cfg.check_paths()
    from minigpt4.conversation.loading import load_chat, select_gpu

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    note("Loading the model …")
    chat = load_chat(cfg, select_gpu(cfg, args.gpu_id or 0), warm_up=True)
    terminal = Terminal(chat, arguments.given(args, Decoding), args.frames)
    try:
        for path in args.images:
            terminal.add(path)
    except PictureError as error:
        raise ConfigError(str(error)) from error
    note("Ask something, or /help.")
    with _history():
        terminal.run()


def note(text: str) -> None:
    """Print what is no answer."""
    print(text, file=sys.stderr, flush=True)


def read_line(prompt: str) -> str:
    """A line of the input. Raises EOFError at its end.

    `input` writes the prompt to the standard output. There it belongs only if that is the screen: then the arrow keys
    leave the prompt alone.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt).strip()
    print(prompt, end="", file=sys.stderr, flush=True)
    return input().strip()


class Terminal:
    """A conversation in the terminal.

    Args:
        chat: a `Chat`, which holds the model.
        settings: of `Decoding`.
        frames: how many pictures to take from a video.
    """

    def __init__(self, chat, settings: dict, frames: int):
        self.chat, self.settings, self.frames = chat, settings, frames
        self.reset()

    def reset(self) -> None:
        self.conv, self.img_list = self.chat.new_conversation(), []

    def run(self) -> None:
        """Carry out the lines of the input, until /quit or its end."""
        while True:
            try:
                line = read_line("> ")
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                note("\nUse Ctrl-D or /quit to quit.")
                continue
            if line.lower() in QUIT:
                return
            if line:
                try:
                    self.obey(line)
                except KeyboardInterrupt:  # while a file was read; `answer` catches one of its own
                    note("\n[stopped]")

    def obey(self, line: str) -> None:
        """Carry out a command, or answer a question."""
        command, _, argument = line.partition(" ")
        if command in ("/image", "/video"):
            self.show(argument.strip() or _ask_for_path(command), video=command == "/video")
        elif command == "/reset":
            self.reset()
            note("[a new conversation, without pictures]")
        elif command == "/retry":
            self.retry()
        elif command.startswith("/") and Path(line).is_file():
            note(f"To show this file: /image {line}")
        elif command.startswith("/"):
            note(COMMANDS if command == "/help" else f"There is no command {line}.\n{COMMANDS}")
        else:
            if not (self.img_list or self.conv.messages):
                note("[no picture is shown, so the answer comes from the text alone; /image PATH shows one]")
            conv = self.conv.copy()
            self.chat.ask(line, conv)
            self.answer(conv)

    def show(self, paths: str, video: bool) -> None:
        """Show pictures or videos. One that cannot be read is reported, and the others are shown."""
        for path in _paths(paths):
            try:
                self.add(path, video)
            except PictureError as error:
                note(str(error))

    def add(self, path: str, video: bool = False) -> None:
        """Show one picture or video. Raises PictureError if the file cannot be read as one.

        video: it is a video, whatever its suffix.
        """
        file, first = Path(path).expanduser(), len(self.img_list) + 1
        if video or is_video(file):
            self.chat.upload_video(file, self.conv, self.img_list, self.frames)
            note(f"[images {first} to {len(self.img_list)}: {path}]")
        else:
            self.chat.upload_img(file, self.conv, self.img_list)
            note(f"[image {first}: {path}]")

    def retry(self) -> None:
        questioner, answerer = self.conv.roles
        conv = self.conv.copy()
        if not any(role == answerer for role, _ in conv.messages):
            note("There is no answer yet.")
        elif conv.messages[-1][0] == questioner:  # pictures that wait for their question
            note(
                "A picture was shown after the last answer, and waits for a question. /retry answers again only while "
                "nothing came after the answer: type the question once more."
            )
        else:
            conv.messages.pop()
            self.answer(conv)

    def answer(self, conv) -> None:
        """Print the answer to the last message of `conv` as it is written. Ctrl-C ends it.

        A question that is too long is dropped from the conversation.
        """
        before, self.conv = self.conv, conv
        printed = ""
        answering = self.chat.stream_answer(
            conv, self.img_list, notify=lambda text: note(f"\n[{text}]"), **self.settings
        )
        try:
            with closing(answering):
                for text in answering:
                    print(text[len(printed) :] if text.startswith(printed) else f"\n{text}", end="", flush=True)
                    printed = text
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            note("[stopped]")
        except ValueError as error:
            self.conv = before
            note(str(error))


def _ask_for_path(command: str) -> str:
    """The path of /image or /video; nothing, if none is given."""
    try:
        return read_line(f"{command} PATH: ")
    except EOFError:
        return ""


def _paths(argument: str) -> list[str]:
    """The paths after /image. If no file has the whole text as its name, it is split as a shell would split it."""
    if Path(argument).expanduser().is_file():
        return [argument]
    try:
        return shlex.split(argument)
    except ValueError:
        return [argument]


@contextmanager
def _history() -> Iterator[None]:
    """Let the arrow keys bring back questions, those of earlier chats too. At the end the questions are saved."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    file = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "minigpt4" / "chat_history"
    with suppress(OSError):  # there is no such file yet, or it cannot be read
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
        except OSError as error:
            logging.warning("The history was not saved: %s", error)
