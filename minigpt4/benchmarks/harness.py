"""Shared by all benchmarks: arguments, clocks, the GPU's memory, and rows of results.

torch is imported when it is needed, so that `--help` stays quick.
"""

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator

from minigpt4.common.commands import command_parser


def bench_parser(kind: str, usage: str) -> argparse.ArgumentParser:
    """The parser of `bench <kind>`, with `--json`."""
    parser = command_parser(f"bench {kind}", usage)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    return parser


def report(row: dict, as_json: bool) -> None:
    """Print a row of results, as a JSON object or as `key: value` for people."""
    text = json.dumps(row) if as_json else "  ".join(f"{key}: {value}" for key, value in row.items())
    print(text, flush=True)


def clock(device) -> float:
    """The time in seconds, read when the device has finished its work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def timed(owner, method: str, device) -> Iterator[list[float]]:
    """While entered, each call of a method of the object `owner` adds its seconds to the list."""
    original, seconds = getattr(owner, method), []

    def call(*args, **kwargs):
        start = clock(device)
        result = original(*args, **kwargs)
        seconds.append(clock(device) - start)
        return result

    setattr(owner, method, call)
    try:
        yield seconds
    finally:
        delattr(owner, method)


def time_in_turn(
    calls: dict[str, Callable], rounds: int, warmup: int = 1, read: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """{name: seconds of each of its calls}. The calls take turns; the first `warmup` rounds do not count.

    read: the clock, by default the CPU time of this process.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + rounds):
        for name, call in calls.items():
            start = read()
            call()
            seconds[name].append(read() - start)
    return {name: values[warmup:] for name, values in seconds.items()}


def reset_peak_memory(device) -> None:
    """Let `peak_memory` count from now on."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def peak_memory(device) -> dict[str, int]:
    """The most GPU memory, in MiB, that tensors took and that the allocator reserved; empty without a GPU."""
    if device.type != "cuda":
        return {}
    import torch

    return {
        "max_mem_MB": torch.cuda.max_memory_allocated() // 2**20,
        "reserved_MB": torch.cuda.max_memory_reserved() // 2**20,
    }


def free_memory() -> None:
    """Free the memory of earlier models, and their compiled code."""
    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
