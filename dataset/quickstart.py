"""Run all of MiniGPT-4 once, in miniature: pictures, stage 1, stage 2, evaluation. `make quickstart` runs this.

    python dataset/quickstart.py            # about five minutes on two CPU cores

Each step is a command that you can run by itself; it is printed before it runs.
"""

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "output" / "quickstart"


def run(command: list[str], log: Path | None = None, plugins: str = "") -> str:
    """Print and run a command in the repository. Shows and returns its output, and writes it to `log`.

    plugins: a folder with modules that the command imports. Exits if the command fails.
    """
    print(f"\n$ {f'PYTHONPATH={plugins} ' if plugins else ''}python {' '.join(command)}", flush=True)
    lines = []
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [plugins, os.getenv("PYTHONPATH")]))},
    )
    # Lines as they are: a progress bar returns to their start.
    for line in io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline=""):
        lines.append(line)
        print(line, end="", flush=True)
    if process.wait():
        options = [option for option in sys.argv[2:] if not option.startswith("run.resume_ckpt_path=")]
        again = shlex.join(["python", "dataset/quickstart.py", "--options", *options, "run.resume_ckpt_path=auto"])
        failed = f"The command failed with status {process.returncode}."
        sys.exit(f"{failed} To go on from the newest checkpoint:\n  {again}")
    if log:
        log.write_text("".join(lines), encoding="utf-8")
    return "".join(lines)


def train(stage: str, options: list[str]) -> Path:
    """Run a tiny training config. Returns the run's folder."""
    options = ["--options", *options] if options else []
    config = f"train_configs/minigpt4_tiny_{stage}.yaml"
    said = run(["train.py", "--cfg-path", config, *options], OUTPUT / f"{stage}.log")
    saved = re.findall(r"Saving checkpoint at epoch \d+ to (.*)\.$", said, flags=re.MULTILINE)
    return Path(saved[-1]).parent


def evaluate(stage: str, options: list[str], out: Path, longest: int) -> Path:
    """Let a model answer about the held-out pictures. Returns the folder of the results."""
    data = ["--data", "data/tiny/heldout/filter_cap.json", "--import", "tiny_names", "--task", "tiny_names"]
    how = ["--max-new-tokens", str(longest), "--batch-size", "64", "--out", str(out)]
    config = f"train_configs/minigpt4_tiny_{stage}.yaml"
    run(["-m", "minigpt4", "evaluate", "--cfg-path", config, "--options", *options, *data, *how], plugins="dataset")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings of both stages")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # the screen may not know every character
    OUTPUT.mkdir(parents=True, exist_ok=True)

    run(["dataset/prepare_tiny.py"])
    start = time.monotonic()
    stage1 = train("stage1_pretrain", args.options)
    stage2 = train("stage2_finetune", [*args.options, f"model.ckpt={stage1}"])
    trained = time.monotonic() - start
    folders = {
        "untrained": evaluate(
            "stage1_pretrain", [*args.options, "run.seed=3", "model.ckpt=null"], stage1 / "heldout_untrained", 30
        ),
        "stage1": evaluate("stage1_pretrain", [*args.options, f"model.ckpt={stage1}"], stage1 / "heldout", 30),
        "stage2": evaluate("stage2_finetune", [*args.options, f"model.ckpt={stage2}"], stage2 / "heldout", 100),
    }
    run(["dataset/tiny_report.py", *(str(part) for name, path in folders.items() for part in (f"--{name}", path))])

    curves = OUTPUT / "curves.png"
    run(["-m", "minigpt4", "plot", str(stage1), str(stage2), "--out", str(curves)])
    run(["-m", "minigpt4", "report", str(stage1), str(stage2)])  # again, with the evaluations
    print(
        f"""
Both stages took {trained:.0f} s together. What to look at:
  {OUTPUT.relative_to(ROOT)}/contact_sheet.png   twelve pictures, their names, and what the model said before and after
  {curves.relative_to(ROOT)}          loss, learning rate and speed of both stages
  {OUTPUT.relative_to(ROOT)}/figures.json        the figures above
  {folders["stage2"]}/answers.html   all answers after stage 2, the wrong ones first
  {stage2}   the trained projection, the run's log and its numbers

What to type next:
  . .venv/bin/activate
  python demo.py --cfg-path eval_configs/minigpt4_tiny_eval.yaml --options model.ckpt={stage2}
  python train.py --cfg-path train_configs/minigpt4_tiny_stage1_pretrain.yaml --options run.seed=1 run.init_lr=1e-3
  and with a Vicuna: README.md, "With the real weights"

The report page of each run, for a browser:
  {stage1}/report.html
  {stage2}/report.html"""
    )


if __name__ == "__main__":
    main()
