"""python -m minigpt4 make-random-weights: files in the published formats, filled with random numbers.

    python -m minigpt4 make-random-weights --out weights                  # with a Vicuna-7B: 16 GB
    python -m minigpt4 make-random-weights --out weights --size small     # the same formats, 20 MB

For rehearsals and benchmarks without the real weights. The files load like the real ones and take the same memory and
time, but the model writes noise. The last line printed holds the options for train.py, demo.py and chat.
"""

import argparse
import logging
import shlex

from minigpt4.benchmarks.published import PARTS, SIZES, VICUNA_VERSIONS
from minigpt4.common.commands import check_positive, command_parser, path_argument
from minigpt4.common.output import make_folder


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("make-random-weights", __doc__)
    parser.add_argument(
        "--out", dest="folder", required=True, type=path_argument, metavar="DIR", help="folder for the files"
    )
    parser.add_argument("--size", default="7b", choices=list(SIZES), help="Vicuna's size (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (%(default)s)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="files to write (all)")
    parser.add_argument("--vicuna", default="v1.1", choices=VICUNA_VERSIONS, help="version of its folder (%(default)s)")
    parser.add_argument("--bin", dest="as_bin", action="store_true", help="write Vicuna as .bin, not .safetensors")
    parser.add_argument("--text-branch", action="store_true", help="write a Q-Former file that has a text branch too")
    parser.add_argument("--shard-gb", type=float, default=2, metavar="N", help="largest shard (%(default)s)")
    args = parser.parse_args(argv)
    check_positive(parser, args, ("shard_gb",))
    return args


def main(argv: list[str]) -> int:
    """Write the files and print the options that use them."""
    args = parse_args(argv)
    from minigpt4.benchmarks import random_weights
    from minigpt4.common.logger import setup_logger

    setup_logger()
    logging.info("These weights are random: for rehearsals and benchmarks only.")
    make_folder(args.folder)
    paths = random_weights.write(**vars(args))
    print("--options", shlex.join(random_weights.yaml_options(args.size, paths)))
    return 0
