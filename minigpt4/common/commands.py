"""Commands: `python -m minigpt4 <command>`, and `bench <kind>` within it. Importing this needs no torch."""

import argparse
import codecs
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.common.settings import broken_bound


def accept_any_text() -> None:
    """Let the screen show every text, and the keyboard send any bytes, whatever their encoding.

    A character that the encoding lacks is shown as an escape of JSON's, so that JSON stays valid: é as \\u00e9.
    """
    codecs.register_error("json_escape", lambda e: (json.dumps(e.object[e.start : e.end])[1:-1], e.end))
    for stream, errors in ((sys.stdout, "json_escape"), (sys.stderr, "json_escape"), (sys.stdin, "replace")):
        if hasattr(stream, "reconfigure"):  # not of a notebook
            stream.reconfigure(errors=errors)


def check_dashes(arguments: Iterable[str]) -> None:
    """Raise ConfigError for a flag such as `—options`, whose two hyphens a text editor made one dash."""
    for argument in arguments:
        if match := re.fullmatch("[–—−‐‑‒―－]-?([a-z][a-z-]+)", argument):
            raise ConfigError(f"{argument} does not begin with hyphens. Write --{match[1]}")


def dispatch(
    arguments: list[str], usage: str, commands: dict[str, str], module_of: Callable[[str], str], noun: str = "command"
) -> int | str | None:
    """Call `main` of the module that the first argument names, with the other arguments; or print the help.

    Args:
        commands: {name: one line about it}.
        module_of: maps a name to its module, which is imported only when it is called.
        noun: the word for a command in messages.

    Returns:
        The process's exit status, or a message for stderr.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        _help(usage, commands).print_help()
        return None
    if name not in commands:
        return f"Unknown {noun} {name!r}. Known: {', '.join(commands)}."
    return importlib.import_module(module_of(name)).main(rest)


def _help(usage: str, commands: dict[str, str]) -> argparse.ArgumentParser:
    """A parser whose help is `usage` and the list of commands."""
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {text}" for name, text in commands.items()]
    return argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description="\n".join([usage.strip(), "\ncommands (each has its own --help):", *lines]),
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def command_parser(command: str, usage: str) -> argparse.ArgumentParser:
    """A parser whose help shows `usage`, the docstring of the command's module, with its line breaks."""
    return argparse.ArgumentParser(
        prog=f"minigpt4 {command}", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def path_argument(text: str) -> Path:
    """The `type` of an argument that is a path. An empty one is an error, as of a variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text).expanduser()


def text_argument(text: str) -> str:
    """The `type` of an argument that is a text for the model: as UTF-8 where the locale's encoding cannot read it."""
    return os.fsencode(text).decode(errors="replace") if re.search("[\ud800-\udfff]", text) else text


def check_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str]) -> None:
    """End the program with a message unless each of these arguments is None, or finite and more than 0."""
    for name in names:
        value = getattr(args, name)
        if broken := broken_bound(value, {"more_than": 0}, args.__getattribute__):
            parser.error(f"--{name.replace('_', '-')} {value} {broken}")
