"""python -m minigpt4 bench train | chat | data: measure training steps, answers, or the reading of pictures."""

import importlib

KINDS = {
    "train": "training steps, at full size with random weights or of a config",
    "chat": "tokens per second of an answer, and milliseconds to the first one",
    "data": "pictures per second and core",
}


def main(argv: list[str] | None = None) -> int | str | None:
    """Run a kind of benchmark. Returns the process's exit status, or a message for stderr."""
    kind, *arguments = argv or ["--help"]
    if kind in ("-h", "--help"):
        from minigpt4.cli import print_help

        return print_help(__doc__, KINDS)
    if kind not in KINDS:
        return f"Unknown benchmark {kind!r}. Known: {', '.join(KINDS)}."
    return importlib.import_module(f"minigpt4.benchmarks.{kind}").main(arguments)
