"""python -m minigpt4 <command> …

python -m minigpt4 chat cat.jpg --cfg-path eval_configs/minigpt4_tiny_eval.yaml
python -m minigpt4 caption --dir photos --out captions.jsonl --cfg-path eval_configs/minigpt4_eval.yaml
python -m minigpt4 serve --cfg-path eval_configs/minigpt4_eval.yaml
"""

import importlib
import sys

# command -> what it does
COMMANDS = {
    "chat": "talk about pictures in the terminal",
    "caption": "describe pictures, a folder or shards, into a JSONL file",
    "serve": "answer programs that speak OpenAI's chat completions",
    "bench": "measure training steps, answers, or the reading of pictures",
    "cache-features": "compute image features once, to train from them",
    "doctor": "find what is wrong with a run before it starts",
    "make-random-weights": "write files in the published formats, for rehearsals and benchmarks",
    "rehearse": "run train.py and chat on such files, and measure",
}
# Those that measure; the others are modules of `minigpt4.cli`. Each has a `main(argv)` and is imported when called.
BENCHMARKS = ("bench", "make-random-weights", "rehearse")


def main(argv: list[str] | None = None) -> int | str | None:
    """Run a command. Returns the process's exit status, or a message for stderr."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        return _help()
    if command not in COMMANDS:
        return f"Unknown command {command!r}. Known: {', '.join(COMMANDS)}."
    from minigpt4.common.errors import ConfigError, format_error
    from minigpt4.common.registry import UnknownNameError

    try:
        package = "benchmarks" if command in BENCHMARKS else "cli"
        return importlib.import_module(f"minigpt4.{package}.{command.replace('-', '_')}").main(arguments)
    except (ConfigError, UnknownNameError) as error:
        return format_error(error)


def _help() -> None:
    from minigpt4.cli import print_help

    print_help(__doc__, COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
