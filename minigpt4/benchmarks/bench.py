"""python -m minigpt4 bench train | chat | caption | serve | data: measure steps, answers, servers, or reading."""

from minigpt4.common.commands import dispatch

KINDS = {
    "train": "training steps, at full size with random weights or of a config",
    "chat": "tokens per second of an answer, and milliseconds to the first one",
    "caption": "pictures per second that are described",
    "serve": "tokens per second of a server, and seconds to the first one, for several clients at a time",
    "data": "pictures per second and core",
}


def main(argv: list[str]) -> int | str | None:
    """Run a kind of benchmark. Returns the process's exit status, or a message for stderr."""
    return dispatch(argv, __doc__, KINDS, lambda kind: f"minigpt4.benchmarks.{kind}", "benchmark")
