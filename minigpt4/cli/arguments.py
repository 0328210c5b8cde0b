"""Command-line arguments that several commands share."""

import argparse
import errno
import os
import socket
from collections.abc import Iterable
from glob import glob
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.decoding import Decoding
from minigpt4.conversation.videos import FRAMES, MAX_FRAMES

DECODING_HELP = {
    "max_new_tokens": "most tokens of an answer",
    "num_beams": "answers pursued side by side",
    "min_length": "fewest tokens of an answer",
    "top_p": "sample from the likeliest tokens that together have this probability",
    "top_k": "sample from at most so many tokens; 0: from all",
    "temperature": "below 1: likelier tokens are favoured",
    "repetition_penalty": "above 1: fewer repetitions",
    "length_penalty": "with beams: above 0 favours long answers",
    "seed": "makes sampling repeatable",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--cfg-path`, `--options`, `--import`, `--offline` and `--gpu-id`."""
    parser.add_argument("--cfg-path", required=True, metavar="FILE", help="YAML file of the model")
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument("--options", **several, metavar="KEY=VALUE", help="settings that override the file's")
    parser.add_argument("--import", **several, dest="imports", metavar="MODULE", help="plug-ins to import first")
    parser.add_argument("--offline", action="store_true", help="fetch nothing: what is not cached is an error")
    parser.add_argument("--gpu-id", type=int, metavar="N", help="GPU to use (0); without one, the CPU is")


def add_frames_argument(parser: argparse.ArgumentParser) -> None:
    """`--frames`."""
    help_text = "pictures taken from a video, evenly (%(default)s)"
    parser.add_argument("--frames", type=int, default=FRAMES, metavar="N", help=help_text)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse; decoding settings and a number of frames that are out of bounds end the program with a message."""
    args = parser.parse_args(argv)
    if not 1 <= args.frames <= MAX_FRAMES:
        parser.error(f"--frames {args.frames} must be from 1 to {MAX_FRAMES}")
    try:
        Decoding(**decoding_settings(args))
    except ValueError as error:
        parser.error(str(error))
    return args


def add_decoding_arguments(parser: argparse.ArgumentParser, **defaults) -> None:
    """A flag for each setting of `Decoding`, with its default or the one given here, and `--sample`."""
    group = parser.add_argument_group("decoding")
    for name, text in DECODING_HELP.items():
        default = defaults.get(name, getattr(Decoding, name))
        kind = int if name == "seed" else type(default)
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, default=default, metavar="N", help=_help(text, default))
    sample = defaults.get("do_sample", Decoding.do_sample)
    group.add_argument(
        "--sample", action=argparse.BooleanOptionalAction, default=sample, help="sample, or take the likeliest answer"
    )


def _help(text: str, default) -> str:
    return text if default is None else f"{text} (%(default)s)"


def decoding_settings(args: argparse.Namespace) -> dict:
    """The settings of `Decoding` that the arguments give."""
    return {name: getattr(args, name) for name in DECODING_HELP} | {"do_sample": args.sample}


def check_files(paths: Iterable[Path]) -> None:
    """Raise a ConfigError that names those of the pictures and videos that are not there, or are folders."""
    wrong = [str(path) for path in paths if os.path.isdir(path) or not os.path.exists(path)]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        folders = " A folder is no file." if any(map(os.path.isdir, wrong)) else ""
        raise ConfigError(f"There is no file {', '.join(wrong[:3])}{more}.{folders}")


def port(text: str) -> int:
    """Type of `--port`."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 65535")
    return int(text)


def check_address(host: str, port: int) -> None:
    """Raise ConfigError where no server can listen, before anything slow begins."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            # As servers do: connections of an earlier one that are still closing do not count.
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


def expand_shards(patterns: list[str]) -> list[str]:
    """The tars that patterns with {00..09} or * name. Raises ConfigError for one that names none."""
    from braceexpand import braceexpand

    shards = []
    for pattern in patterns:
        found = sorted(file for name in braceexpand(pattern) for file in glob(name) or [name])
        missing = [file for file in found if not Path(file).is_file()]
        if missing or not found:
            raise ConfigError(f"--shards {pattern}: there is no file {missing[0] if missing else pattern}.")
        shards += found
    return shards
