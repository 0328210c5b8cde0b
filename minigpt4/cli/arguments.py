"""Command-line arguments that several commands share."""

import argparse
import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.decoding import Decoding
from minigpt4.conversation.videos import FRAMES, MAX_FRAMES

DECODING_HELP = {
    "max_new_tokens": "most tokens of an answer",
    "num_beams": "beams of the beam search; 1: no beam search",
    "min_length": "fewest tokens of an answer",
    "top_p": "sample from the likeliest tokens that together have this probability",
    "top_k": "sample from this many of the likeliest tokens; 0: from all",
    "temperature": "below 1: likelier tokens are favoured",
    "repetition_penalty": "above 1: fewer repetitions",
    "length_penalty": "with beams: above 0 favours long answers",
    "seed": "makes sampling repeatable",
}


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


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the arguments. Frames or decoding settings that are out of bounds end the program with a message."""
    args = parser.parse_args(argv)
    if not 1 <= args.frames <= MAX_FRAMES:
        parser.error(f"--frames {args.frames} must be from 1 to {MAX_FRAMES}")
    try:
        Decoding(**decoding_settings(args))
    except ValueError as error:
        parser.error(str(error))
    return args


def add_answer_arguments(parser: argparse.ArgumentParser, sample: bool = Decoding.do_sample) -> None:
    """`--frames`, `--sample`, and a flag for each other setting of `Decoding`. sample: the default of `--sample`."""
    frames = "pictures to take from a video, at even distances (%(default)s)"
    parser.add_argument("--frames", type=int, default=FRAMES, metavar="N", help=frames)
    group = parser.add_argument_group("decoding")
    for name, text in DECODING_HELP.items():
        default = getattr(Decoding, name)
        if default is not None:
            text = f"{text} (%(default)s)"
        kind = int if name == "seed" else type(default)
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=text)
    group.add_argument(
        "--sample",
        action=argparse.BooleanOptionalAction,
        default=sample,
        help="sample the tokens, or take the likeliest ones",
    )


def decoding_settings(args: argparse.Namespace) -> dict:
    """The settings of `Decoding` that the arguments give."""
    return {name: getattr(args, name) for name in DECODING_HELP} | {"do_sample": args.sample}


def check_files(paths: Iterable[Path]) -> None:
    """Raise a ConfigError that names the pictures and videos that do not exist or are folders."""
    wrong = [str(path) for path in paths if os.path.isdir(path) or not os.path.exists(path)]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        folders = " A folder is no file." if any(map(os.path.isdir, wrong)) else ""
        raise ConfigError(f"There is no file {', '.join(wrong[:3])}{more}.{folders}")


def port(text: str) -> int:
    """The type of `--port`."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 65535")
    return int(text)


def check_address(host: str, port: int) -> None:
    """Raise ConfigError if no server can listen there. Called before anything slow begins."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            # Servers set this too, so that connections of an earlier server that are still closing do not count.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}. 127.0.0.1 is this machine, 0.0.0.0 the network.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} of {host} is taken by another program"
        else:
            reason = f"cannot listen on port {port} of {host}: {error.strerror}"
        raise ConfigError(f"{reason}; use --port (or --host) for another.") from None
