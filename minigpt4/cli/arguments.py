"""Command-line arguments that several commands share."""

import argparse
import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.common.settings import setting
from minigpt4.conversation.decoding import Decoding
from minigpt4.conversation.videos import FRAMES, MAX_FRAMES


def add_config_arguments(parser: argparse.ArgumentParser, file: str, required: bool = True) -> None:
    """`--cfg-path`, `--options` and `--import`. file: describes the YAML file in the help."""
    parser.add_argument("--cfg-path", required=required, metavar="FILE", help=file)
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument("--options", **several, metavar="KEY=VALUE", help="settings that override the file's")
    parser.add_argument("--import", **several, dest="imports", metavar="MODULE", help="plug-ins to import first")


def add_files_arguments(parser: argparse.ArgumentParser) -> None:
    """`--images`, `--format` and `--columns`: how the files that a command names are read."""
    parser.add_argument("--images", metavar="FOLDER", help="where the paths of pictures start; by default, at the file")
    parser.add_argument("--format", metavar="NAME", help="format of the files (docs/own_data.md); by default, any")
    several = {"nargs": "+", "action": "extend", "metavar": "KEY=COLUMN"}
    parser.add_argument("--columns", **several, help="columns of tables: image=picture caption=words")


def columns_of(args: argparse.Namespace) -> dict[str, str]:
    """{our key: column} of `--columns`."""
    pairs = [item.partition("=") for item in args.columns or []]
    if wrong := next((item for item, sign, _ in pairs if not sign), None):
        raise ConfigError(f"--columns {wrong}: write KEY=COLUMN, as in image=picture caption=words.")
    return {key: column for key, _, column in pairs}


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """While entered, errors about files that a command names mention its flags, not the keys of a YAML file."""
    try:
        yield
    except (ConfigError, FileNotFoundError) as mistake:
        text = str(mistake).replace("datasets.data.", "").partition(" Set it in the YAML")[0]
        text = text.replace("build_info.storage=", "").replace("build_info.columns.", "--columns ")
        raise ConfigError(text.replace("build_info.", "--")) from None


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """`--cfg-path`, `--options`, `--import`, `--offline` and `--gpu-id`."""
    add_config_arguments(parser, "YAML file of the model", required)
    parser.add_argument("--offline", action="store_true", help="download nothing: an uncached file is an error")
    parser.add_argument("--gpu-id", type=int, metavar="N", help="GPU to use (0); the CPU is used if there is none")


@dataclass(frozen=True)
class AnswerSettings(Decoding):
    """The settings of an answer, and of the videos that it is about."""

    frames: int = setting(FRAMES, "pictures to take from a video, at even distances", at_least=1, at_most=MAX_FRAMES)


def add_settings(parser, settings: type) -> None:
    """A flag for each field of a dataclass that has a help text."""
    for each in fields(settings):
        flag, text = f"--{each.name.replace('_', '-')}", each.metadata["help"]
        if text and isinstance(each.default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        elif text:
            text += "" if each.default is None else " (%(default)s)"
            kind = int if each.default is None else type(each.default)
            metavar = "NAME" if kind is str else "N"
            parser.add_argument(flag, type=kind, default=each.default, metavar=metavar, help=text)


def given(args: argparse.Namespace, settings: type) -> dict:
    """The arguments that are fields of a dataclass."""
    return {each.name: getattr(args, each.name) for each in fields(settings) if hasattr(args, each.name)}


def add_answer_arguments(
    parser: argparse.ArgumentParser, sample: bool = Decoding.do_sample, settings: type = AnswerSettings
) -> None:
    """`--sample`, and a flag for each other field of `settings`. sample: the default of `--sample`."""
    group = parser.add_argument_group("answers")
    add_settings(group, settings)
    text = "sample the tokens, or take the likeliest ones"
    group.add_argument("--sample", dest="do_sample", action=argparse.BooleanOptionalAction, default=sample, help=text)


def parse(parser: argparse.ArgumentParser, argv: list[str], settings: type) -> argparse.Namespace:
    """Parse the arguments. Values that a dataclass of settings refuses end the program with a message."""
    args = parser.parse_args(argv)
    try:
        settings(**given(args, settings))
    except ValueError as error:
        parser.error(str(error))
    return args


def check_files(paths: Iterable[Path]) -> None:
    """Raise a ConfigError that names the pictures and videos that do not exist or are folders."""
    wrong = [str(path) for path in paths if os.path.isdir(path) or not os.path.exists(path)]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        folders = " A folder is no file." if any(map(os.path.isdir, wrong)) else ""
        raise ConfigError(f"There is no file {', '.join(wrong[:3])}{more}.{folders}")


def check_address(host: str, port: int) -> None:
    """Raise ConfigError if no server can listen there. Called before anything slow begins."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port} must be from 0 to 65535.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Like servers, this does not count connections of an earlier server that are still closing (SO_REUSEADDR).
        socket.create_server(address, family=family).close()
    except OSError as error:
        raise ConfigError(
            f"--host {host} and --port {port}: {error.strerror}. Use another port, or another host: 127.0.0.1 is this "
            "machine, 0.0.0.0 the network."
        ) from None
