"""python -m minigpt4 plot: draw the curves of runs into one picture, to compare them.

    python -m minigpt4 plot output/minigpt4_tiny_stage1_pretrain/20261130143043
    python -m minigpt4 plot output/minigpt4_tiny_stage1_pretrain         # all runs in this folder
    python -m minigpt4 plot RUN OTHER_RUN --metrics loss val_loss --out comparison.png

The numbers are those of metrics.jsonl in the run's folder; a run that is still going can be drawn too.
"""

import argparse
from pathlib import Path

from minigpt4.common.commands import command_parser, path_argument


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("plot", __doc__)
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="metrics to draw (loss, results, lr, speed …)")
    parser.add_argument("--out", type=path_argument, default=Path("plot.png"), metavar="FILE", help="PNG (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Draw. Raises ConfigError for folders without a run, unknown metrics, and a file that is not ours to replace."""
    args = parse_args(argv)
    from minigpt4.tracking import plot

    runs = plot.find_runs(args.runs)
    shown = plot.save_png(args.out, runs, args.metrics or plot.metrics_to_draw(runs))
    print(f"{args.out} shows {shown}.")
    return 0
