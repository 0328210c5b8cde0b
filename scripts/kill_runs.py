"""Kill training runs at random moments, let them go on, and compare their last weights with an uninterrupted run's.

    python scripts/kill_runs.py --out /tmp/kills --kills 100                                # a small model, any machine
    python scripts/kill_runs.py --out /data/kills --size 7b --kills 5 --cases shards-1-4-1  # full size, on a GPU

A case is DATA-RANKS-WORKERS-ACCUM: `shards` (stage 1) or `files` (stage 2), processes, data workers of each, and
micro-batches of a step. Each case first trains without interruption. Then the same run is started with
run.resume_ckpt_path=auto, killed by SIGKILL with all its processes at a random moment of a random phase, and started
again, until it is done; all cases in turn, until --kills runs were killed. --out is a new folder, or one of this
script. The status is 1 if a weight differs, or if more steps were lost than those since the last save.
"""

import argparse
import contextlib
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from minigpt4.benchmarks import random_weights
from minigpt4.benchmarks.published import SIZES
from minigpt4.benchmarks.rehearse import make_data
from minigpt4.benchmarks.synthetic import ROOT, STAGE_CONFIGS
from minigpt4.cli.compare import weights_digest
from minigpt4.common.facts import checkpoints_in
from minigpt4.common.output import own_folder

CASES = [
    f"{data}-{ranks}-{workers}-{accum}"
    for data in ("shards", "files")
    for ranks in (1, 2)
    for workers, accum in ((0, 2), (1, 1), (4, 3))
]
EPOCHS, SAVE_EVERY = 2, 3
MOST_KILLS_OF_A_RUN = 5
LOADING, STEPS, SAVING, EVALUATION = "loading", "steps", "saving", "evaluation"
# Phases, and the lines of the log that they begin with.
BEGINNINGS = {STEPS: "Start training epoch", SAVING: "Saving checkpoint", EVALUATION: "Averaged stats"}
# Other lines of a phase.
LINES = {"Train: data epoch": STEPS, "is validated first": EVALUATION} | {
    line: name for name, line in BEGINNINGS.items()
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for weights, data and runs")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="(%(default)s)")
    parser.add_argument("--size", default="small", choices=list(SIZES), help="of the model (%(default)s)")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="CASE", help="(all)")
    parser.add_argument("--batches", type=int, default=24, metavar="N", help="micro-batches of an epoch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (%(default)s)")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="more settings for all runs")
    return parser.parse_args(argv)


def command(args: argparse.Namespace, weights: list[str], case: str, output: Path, *more: str) -> list[str]:
    """The command that trains a case."""
    data, ranks, workers, accum = case.split("-")
    if data == "shards":
        storage = dict.fromkeys(("laion", "cc_sbu"), args.out / "data/shards/{00000..00001}.tar")
    else:
        storage = {"cc_sbu_align": args.out / "data/cc_sbu_align"}
    run = {"output_dir": output, "max_epoch": EPOCHS, "iters_per_epoch": args.batches, "num_workers": workers}
    run |= {"batch_size_train": 2, "accum_grad_iters": accum, "save_every_steps": SAVE_EVERY}
    run |= {"log_freq": 1, "report": False}
    run |= {"valid_splits": "[val]", "init_lr": 1e-3, "warmup_steps": 5, "warmup_lr": 1e-5}
    options = [f"run.{key}={value}" for key, value in run.items()]
    for name, path in storage.items():
        options += [f"datasets.{name}.build_info.storage={path}", f"datasets.{name}.build_info.val=0.1"]
    python = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, "--rdzv-backend", "c10d"]
    python += ["--rdzv-endpoint", "localhost:0"]
    start = python if int(ranks) > 1 else [sys.executable]
    stage = STAGE_CONFIGS[1 if data == "shards" else 2]
    return [*start, "train.py", "--cfg-path", stage, "--options", *weights, *options, *args.options, *more]


def start(words: list[str], log: Path) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    with open(log, "w") as file:
        return subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)


def wait_for(process: subprocess.Popen, log: Path, phase: str, count: int = 1) -> float:
    """Wait until a phase has begun `count` times, or the run ends. Returns the time."""
    while process.poll() is None and log.read_text(errors="replace").count(BEGINNINGS[phase]) < count:
        time.sleep(0.01)
    return time.monotonic()


def phase_of(log: Path) -> str:
    """The phase that a run was in when it was killed."""
    text = log.read_text(errors="replace")
    found = {text.rfind(line): phase for line, phase in LINES.items()}
    return found[max(found)] if max(found) >= 0 else LOADING


def kill(process: subprocess.Popen) -> None:
    """Kill torchrun, its ranks, which are sessions of their own, and their workers; wait until none is left."""
    own = psutil.Process(process.pid)
    processes = [own, *own.children(recursive=True)]
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(processes)


def weights_of(output: Path) -> str:
    """The SHA-256 of the trained weights of a finished run, in the newest folder of `output`."""
    # A run that was killed after its last save leaves nothing to train: the next one writes no checkpoint of its own.
    last = checkpoints_in(max(path.parent for path in output.glob("*/checkpoint_[0-9]*.pth")))[0]
    return f"{last.name} {weights_digest(last)}"


def steps_done(log: Path, batches: int) -> int:
    """Micro-batches that a run has reported. batches: of an epoch."""
    found = re.findall(r"data epoch: \[(\d+)\]  \[ *(\d+)/", log.read_text(errors="replace"))
    return max((int(epoch) * batches + int(batch) + 1 for epoch, batch in found), default=0)


def step_resumed(log: Path, batches: int) -> int:
    """The micro-batches behind the checkpoint that a run goes on from; 0: it starts anew, -1: it is not known yet."""
    text = log.read_text(errors="replace")
    if found := re.search(r"Resuming after (?:batch (\d+) of )?epoch (\d+)", text):
        epoch = int(found[2])
        return epoch * batches + int(found[1]) if found[1] else (epoch + 1) * batches
    return 0 if "a new run starts" in text else -1


class Case:
    """A case, with the weights and the seconds of its uninterrupted run."""

    def __init__(self, args: argparse.Namespace, weights: list[str], name: str) -> None:
        self.args, self.weights, self.name = args, weights, name
        self.accum = int(name.split("-")[3])
        output, log = args.out / name / "whole", args.out / name / "whole.log"
        log.parent.mkdir(parents=True)
        began, process = time.monotonic(), start(command(args, weights, name, output), log)
        self.until_steps = wait_for(process, log, STEPS) - began
        if process.wait():
            sys.exit(f"{name}: the run failed: {log}")
        self.seconds, self.expected = time.monotonic() - began - self.until_steps, weights_of(output)
        shown = f"{self.until_steps:.0f} s until it trains and {self.seconds:.0f} s more"
        print(f"{name}: {shown} without interruption, {self.expected}", flush=True)

    def wait_for_moment(self, process: subprocess.Popen, log: Path, draw: random.Random) -> int:
        """Wait until a run is to be killed. Returns its status; raises TimeoutExpired if it has not ended by then."""
        phase, part = draw.choice([LOADING, STEPS, SAVING, EVALUATION]), draw.random()
        if phase == LOADING:
            return process.wait(part * self.until_steps)
        wait_for(process, log, phase, 1 if phase == STEPS else draw.randint(1, EPOCHS))
        # Saving takes some 10 ms, and a validation a tenth of the time.
        return process.wait(part * {STEPS: self.seconds, SAVING: 0.03, EVALUATION: self.seconds / 10}[phase])

    def run_killed(self, number: int, most_kills: int, draw: random.Random) -> tuple[list[str], list[str]]:
        """Run once with kills. Returns the phases in which it was killed, and what is wrong."""
        output, kills, done, wrong = self.args.out / self.name / f"run{number}", [], 0, []
        words = command(self.args, self.weights, self.name, output, "run.resume_ckpt_path=auto")
        while True:
            log = output.with_name(f"{output.name}.{len(kills)}.log")
            process = start(words, log)
            try:
                status = process.wait() if len(kills) == most_kills else self.wait_for_moment(process, log, draw)
            except subprocess.TimeoutExpired:
                kill(process)
                kills.append(phase_of(log))
                status = None
            resumed = step_resumed(log, self.args.batches)
            if resumed >= 0:
                if done - resumed > SAVE_EVERY * self.accum:
                    wrong.append(f"{log}: {done} micro-batches were done, and it goes on after {resumed}")
                print(f"{self.name}: {done} micro-batches done, goes on after {resumed}", flush=True)
                done = steps_done(log, self.args.batches) or resumed
            if status is not None:
                break
        if status:
            wrong.append(f"{log}: status {status}")
        elif (found := weights_of(output)) != self.expected:
            wrong.append(f"{output}: {found}, not {self.expected}")
        return kills, wrong


def main(argv: list[str] | None = None) -> int:
    """Kill as many runs as asked for. Returns the number of those that went wrong."""
    args = parse_args(argv)
    args.out = args.out.resolve()
    own_folder(args.out, "kills.txt")
    (args.out / "kills.txt").touch()
    make_data(args.out / "data")
    paths = random_weights.write(args.out / "weights", args.size)
    weights = random_weights.yaml_options(args.size, paths)
    draw, phases, wrong = random.Random(args.seed), Counter(), []
    args.out = args.out / time.strftime("%Y%m%d-%H%M%S")
    (args.out).mkdir()
    (args.out / "data").symlink_to(args.out.parent / "data")
    cases = [Case(args, weights, name) for name in args.cases]
    number = 0
    while (kills := phases.total()) < args.kills:
        case = cases[number % len(cases)]
        killed, problems = case.run_killed(number, min(args.kills - kills, MOST_KILLS_OF_A_RUN), draw)
        phases.update(killed)
        number, wrong = number + 1, wrong + problems
        where = ", ".join(killed) or "never"
        print(f"{case.name}: killed in: {where}; {phases.total()} in all; {problems or 'the same weights'}", flush=True)
    print(f"Kills by phase: {dict(phases)}.")
    print("\n".join(wrong) or f"{kills} kills in {number} runs: all weights are those of uninterrupted runs.")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
