"""python -m minigpt4 make-random-weights: files in the published formats, filled with random numbers.

    python -m minigpt4 make-random-weights --out weights                  # with a Vicuna-7B: 16 GB
    python -m minigpt4 make-random-weights --out weights --size small     # the same formats, 20 MB

For rehearsals and benchmarks where the real weights are not at hand: they load like the real ones, with the same memory
and speed, and what the model says is noise. The last line printed is what to give to train.py, demo.py and chat.
"""

import argparse
import logging
import shlex
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="minigpt4 make-random-weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the files")
    parser.add_argument("--size", default="7b", choices=("7b", "13b", "small"), help="Vicuna's size (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (%(default)s)")
    parts = ("vision", "qformer", "llm", "ckpt")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts, help="what to write (all)")
    versions = ("v0", "v1.1", "v1.5")
    parser.add_argument("--vicuna", default="v1.1", choices=versions, help="version of its folder (%(default)s)")
    parser.add_argument("--bin", action="store_true", help="Vicuna's shards as .bin instead of .safetensors")
    parser.add_argument("--text-branch", action="store_true", help="a Q-Former file that holds a text branch too")
    parser.add_argument("--shard-gb", type=float, default=2, metavar="N", help="largest shard (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the files and print the options that use them."""
    args = parse_args(argv)
    from minigpt4.benchmarks import random_weights
    from minigpt4.common.logger import setup_logger

    setup_logger()
    logging.info("These weights are random: for rehearsals and benchmarks only.")
    paths = random_weights.write(
        args.out,
        args.size,
        args.seed,
        tuple(args.parts),
        args.vicuna,
        args.bin,
        args.text_branch,
        int(args.shard_gb * 1e9),
    )
    print("--options", shlex.join(random_weights.yaml_options(args.size, paths)))
    return 0
