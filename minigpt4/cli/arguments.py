"""Command-line arguments that several commands share."""

import argparse
import os
import socket
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.decoding import Decoding
from minigpt4.conversation.videos import FRAMES, MAX_FRAMES


def add_config_arguments(parser: argparse.ArgumentParser, file: str) -> None:
    """`--cfg-path`, `--options` and `--import`. file: describes the YAML file in the help."""
    parser.add_argument("--cfg-path", required=True, metavar="FILE", help=file)
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument("--options", **several, metavar="KEY=VALUE", help="settings that override the file's")
    parser.add_argument("--import", **several, dest="imports", metavar="MODULE", help="plug-ins to import first")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--cfg-path`, `--options`, `--import`, `--offline` and `--gpu-id`."""
    add_config_arguments(parser, "YAML file of the model")
    parser.add_argument("--offline", action="store_true", help="download nothing: an uncached file is an error")
    parser.add_argument("--gpu-id", type=int, metavar="N", help="GPU to use (0); the CPU is used if there is none")


def add_settings(parser, settings: type) -> list[str]:
    """A flag for each field of a dataclass that has a help text. Returns the names of the fields."""
    names = []
    for each in fields(settings):
        if text := each.metadata.get("help"):
            names.append(each.name)
            text += "" if each.default is None else " (%(default)s)"
            kind = int if each.default is None else type(each.default)
            flag = f"--{each.name.replace('_', '-')}"
            parser.add_argument(flag, type=kind, default=each.default, metavar="N", help=text)
    return names


def given(args: argparse.Namespace, settings: type) -> dict:
    """The arguments that are fields of a dataclass."""
    return {each.name: getattr(args, each.name) for each in fields(settings) if hasattr(args, each.name)}


def add_answer_arguments(parser: argparse.ArgumentParser, sample: bool = Decoding.do_sample) -> None:
    """`--frames`, `--sample`, and a flag for each other setting of `Decoding`. sample: the default of `--sample`."""
    frames = "pictures to take from a video, at even distances (%(default)s)"
    parser.add_argument("--frames", type=int, default=FRAMES, metavar="N", help=frames)
    group = parser.add_argument_group("decoding")
    add_settings(group, Decoding)
    text = "sample the tokens, or take the likeliest ones"
    group.add_argument("--sample", dest="do_sample", action=argparse.BooleanOptionalAction, default=sample, help=text)


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the arguments. Frames or decoding settings that are out of bounds end the program with a message."""
    args = parser.parse_args(argv)
    if not 1 <= args.frames <= MAX_FRAMES:
        parser.error(f"--frames {args.frames} must be from 1 to {MAX_FRAMES}")
    try:
        Decoding(**given(args, Decoding))
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
