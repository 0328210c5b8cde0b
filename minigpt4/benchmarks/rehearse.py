"""python -m minigpt4 rehearse: run the real commands on random weights of full size, and measure them.

    python -m minigpt4 rehearse --out rehearsal --size 7b --jobs 2     # stage 1, stage 2, chat; 16, 8, 4 bit
    python -m minigpt4 rehearse --out rehearsal --size small           # the same with a small model, also on a CPU

Run this in the repository's folder. It writes weights (`make-random-weights`) and a few synthetic pictures to --out,
unless they exist. --out is a new folder, or one of an earlier rehearsal. Then it runs train.py and `python -m minigpt4
chat` with the shipped YAML files, and sets the paths with --options. It prints a line for each run, and appends it to
rehearsal.jsonl:

ready_s      seconds from the start of the process to the end of its first step, or to the chat's first prompt
gpu_GB       peak of the GPU memory that the process's tensors took, in 10^9 bytes
reserved_GB  peak of the GPU memory that its allocator reserved
host_GB      peak of the process's own memory on the host
rss_GB       the same with the pages of the files that it mapped

With --jobs above 1 the runs share the machine. This does not change their memory, but ready_s is longer.
"""

import argparse
import contextlib
import json
import logging
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TextIO

import psutil

from minigpt4.benchmarks.harness import report
from minigpt4.benchmarks.published import SIZES
from minigpt4.benchmarks.synthetic import ROOT, STAGE_CONFIGS, WORKLOADS, caption, photograph
from minigpt4.common.commands import check_positive, command_parser, path_argument
from minigpt4.common.output import is_taken, only_run, own_folder, whole_folder

WORK = ("S1/16", "S2/12", "chat")
RESULTS = "rehearsal.jsonl"  # also marks a folder as one of this command's
LOAD_IN = ("16bit", "8bit", "4bit", "8bit_weights")
# Runs a script as `python script …` would, and writes the memory that it took to a file when it ends.
WATCHED = """
import atexit, json, resource, runpy, sys

def leave(file=sys.argv[1]):
    torch = sys.modules.get("torch")
    measured = {"rss_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if torch and torch.cuda.is_available():
        measured["gpu_GB"] = torch.cuda.max_memory_allocated() / 1e9
        measured["reserved_GB"] = torch.cuda.max_memory_reserved() / 1e9
    json.dump(measured, open(file, "w"))

atexit.register(leave)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("rehearse", __doc__)
    parser.add_argument(
        "--out", required=True, type=path_argument, metavar="DIR", help="folder for weights, data and results"
    )
    parser.add_argument("--size", nargs="+", default=["7b"], choices=list(SIZES), help="Vicuna's sizes (7b)")
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=WORK, help="what to run (all)")
    parser.add_argument(
        "--load-in", nargs="+", default=list(LOAD_IN[:3]), choices=LOAD_IN, help="precisions (16, 8, 4 bit)"
    )
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="training steps of a run (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (%(default)s)")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="more settings for all runs")
    args = parser.parse_args(argv)
    check_positive(parser, args, ("steps", "jobs"))
    return args


def main(argv: list[str]) -> int:
    """Write the files, run the commands, and print the results. Returns the number of runs that failed."""
    args = parse_args(argv)
    args.out = args.out.resolve()
    from minigpt4.common.logger import setup_logger

    setup_logger()
    own_folder(args.out, RESULTS)
    with only_run(args.out), open(args.out / RESULTS, "a", encoding="utf-8") as kept:
        return rehearse_all(args, kept)


def rehearse_all(args: argparse.Namespace, kept: TextIO) -> int:
    """Write the files, run the commands, and append the results to `kept`. Returns the number of runs that failed."""
    from minigpt4.benchmarks import random_weights

    make_data(args.out / "data")
    options = {}
    for size in args.size:
        # The encoder and the Q-Former are the same for 7b and 13b, and are written once.
        folder = args.out / ("weights-small" if size == "small" else "weights")
        paths = random_weights.write(folder, size)
        options[size] = random_weights.yaml_options(size, paths)
    # Neighbours differ in precision, so that the large ones seldom run side by side.
    runs = [(size, load_in, work) for size, work, load_in in product(args.size, args.work, args.load_in)]
    logging.info("%d runs", len(runs))
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda run: rehearse(args, *run, options[run[0]]), runs):
            failed += "failed" in row
            report(row, as_json=True)
            kept.write(json.dumps(row) + "\n")
    return failed


def rehearse(args: argparse.Namespace, size: str, load_in: str, work: str, paths: list[str]) -> dict:
    """Run one command in a process of its own. Returns what it took."""
    name = f"{size}-{load_in}-{work.replace('/', '_')}"
    log, result = args.out / f"{name}.log", args.out / f"{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-u", "-c", WATCHED, str(result), *_command(args, work, load_in, paths, name)]
    row = {"size": size, "load_in": load_in, "work": work}
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        peak = threading.Thread(target=_watch_host, args=(psutil.Process(process.pid), row))
        peak.start()
        with contextlib.suppress(BrokenPipeError):  # it has failed already
            process.stdin.write("What is in this picture?\n")
            process.stdin.close()
        for line in process.stdout:
            file.write(line)
            if "ready_s" not in row and ("Train: data epoch: [0]" in line or line.startswith("[image 1")):
                row["ready_s"] = time.monotonic() - start
        status = process.wait()
        peak.join()
    row["total_s"] = time.monotonic() - start
    if status or not result.exists():
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        row["failed"] = f"exit status {status}, see {log}: {''.join(last)}"
    else:
        row |= json.loads(result.read_text())
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}


def _command(args: argparse.Namespace, work: str, load_in: str, paths: list[str], name: str) -> list[str]:
    """The script and its arguments."""
    options = [*paths, f"model.load_in={load_in}", *args.options]
    data = args.out / "data"
    if work == "chat":
        cfg = ["chat", str(data / "cc_sbu_align/image/0.jpg"), "--cfg-path", "eval_configs/minigpt4_eval.yaml"]
        return [str(ROOT / "minigpt4/__main__.py"), *cfg, "--max-new-tokens", "200", "--options", *options]
    stage, _ = WORKLOADS[work]
    run = {"max_epoch": 1, "iters_per_epoch": args.steps, "log_freq": 1, "output_dir": args.out / "output" / name}
    options += [f"run.{key}={value}" for key, value in run.items()]
    if stage == 1:
        storage = dict.fromkeys(("laion", "cc_sbu"), data / "shards/{00000..00001}.tar")
    else:
        storage = {"cc_sbu_align": data / "cc_sbu_align"}
    options += [f"datasets.{name}.build_info.storage={path}" for name, path in storage.items()]
    return ["train.py", "--cfg-path", STAGE_CONFIGS[stage], "--options", *options]


def _watch_host(process: psutil.Process, row: dict) -> None:
    """Keep the peak of the process's own memory in `row`, where the system tells it from shared memory."""
    with contextlib.suppress(psutil.Error, AttributeError):
        while process.is_running():  # not `poll`, which would take the exit status from `rehearse`
            memory = process.memory_info()
            row["host_GB"] = max(row.get("host_GB", 0.0), (memory.rss - memory.shared) / 1e9)
            time.sleep(0.02)


def make_data(folder: Path, count: int = 64) -> None:
    """Write synthetic pictures: two shards with captions of stage 1, and a cc_sbu_align folder with those of stage 2.

    count: pictures in each of the three. Raises ConfigError for a folder that has other files.
    """
    from webdataset import TarWriter

    own_folder(folder, "cc_sbu_align/filter_cap.json")
    if is_taken(folder):
        return
    rng = random.Random(1)
    pictures = [photograph(seed, 256, 256) for seed in range(count)]
    with whole_folder(folder) as part:
        (part / "shards").mkdir()
        (part / "cc_sbu_align/image").mkdir(parents=True)
        for shard in range(2):
            with TarWriter(str(part / f"shards/{shard:05}.tar")) as tar:
                for i, picture in enumerate(pictures):
                    tar.write({"__key__": f"{shard:05}{i:04}", "jpg": picture, "json": {"caption": caption(rng, 1)}})
        records = [{"image_id": str(i), "caption": caption(rng, stage=2)} for i in range(count)]
        for i, picture in enumerate(pictures):
            (part / f"cc_sbu_align/image/{i}.jpg").write_bytes(picture)
        (part / "cc_sbu_align/filter_cap.json").write_text(json.dumps({"annotations": records}))
