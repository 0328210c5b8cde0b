"""What metrics.jsonl and trackers cost a run: CPU time of its process, in per cent of a step.

    WANDB_MODE=offline python tests/tracker_cost.py
    WANDB_MODE=offline python tests/tracker_cost.py --trackers wandb --step 0.01

A step is a fixed amount of work on one CPU core, about --step seconds of it; every --log-freq steps, twelve numbers are
recorded, as a run does. The cost is all CPU time of the process that the steps do not take. The processes of the
trackers have their own time, which is printed too.
"""

import argparse
import hashlib
import tempfile
import time

import psutil

from minigpt4.tracking.record import RunRecord
from minigpt4.tracking.trackers import RunInfo

NAMES = ("epoch", "lr", "loss", "grad_norm", "step_seconds", "data_seconds", "images_per_second", "tokens_per_second")
NAMES += ("gpu_memory_mib", "host_memory_mib", "share/laion", "share/cc_sbu")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trackers = ["tensorboard", "wandb", "trackio"]
    parser.add_argument("--trackers", nargs="*", default=trackers, metavar="NAME", help="(%(default)s)")
    parser.add_argument("--step", type=float, default=0.02, help="seconds of a step (%(default)s)")
    parser.add_argument("--log-freq", type=int, default=20, help="steps between two lines (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of --log-freq steps (%(default)s)")
    return parser.parse_args()


def work(count: int) -> None:
    """Keep the core busy outside of Python, as a step of training does."""
    hashlib.sha256(bytes(count))


def main() -> None:
    args = parse_args()
    before = time.process_time()
    work(10**8)
    count = int(10**8 * args.step / (time.process_time() - before))
    working = 0.0
    with tempfile.TemporaryDirectory() as folder:
        record = RunRecord(RunInfo("cost", "cost", folder, {"run": {}}), args.trackers)
        record.log(0, {"loss": 1.0})  # which starts the trackers
        time.sleep(10)  # until they are there
        start = time.process_time()
        for number in range(1, args.rounds + 1):
            before = time.thread_time()
            for _ in range(args.log_freq):
                work(count)
            working += time.thread_time() - before
            record.log(number, {name: number / 7 for name in NAMES})
        total = time.process_time() - start
        children = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))
        record.close()
    each, share = (total - working) / args.rounds, total / working - 1
    print(f"{each * 1e6:.0f} µs of CPU time a line, threads included: {share:.3%} of the steps")
    print(f"(a line every {args.log_freq} steps of {working / args.rounds / args.log_freq:.4f} s)")
    print(f"processes of the trackers: {children:.1f} s of CPU time, start included")


if __name__ == "__main__":
    main()
