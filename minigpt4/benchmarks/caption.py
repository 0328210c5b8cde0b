"""python -m minigpt4 bench caption: pictures a second that `caption` describes.

    python -m minigpt4 bench caption                                       # Llama-7B, random weights, 16 bit
    python -m minigpt4 bench caption --size small --count 12 --batch 4     # to try it on a CPU

Each picture is a JPEG file of 400 to 1,000 pixels a side, decoded by threads. Its caption is chosen greedily and ends
after a number of tokens that is drawn between the two of --tokens. The captions are written together token by token, as
`caption` does. A first run of `batch` pictures warms up.
"""

import argparse
import io
import random

from minigpt4.benchmarks.harness import bench_parser, clock, free_memory, peak_memory, report, reset_peak_memory
from minigpt4.benchmarks.synthetic import PROMPT, photographs, random_chat, weights_name
from minigpt4.common.commands import check_positive
from minigpt4.common.parallel import THREADS

FILES = 32  # of pictures, which take turns


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = bench_parser("caption", __doc__)
    parser.add_argument("--size", choices=("7b", "small"), default="7b", help="size of the model (default: 7b)")
    parser.add_argument("--weights", choices=("16bit", "8bit_weights", "4bit"), default="16bit", help="(16bit)")
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 64], help="pictures at a time (default: 8 64)")
    parser.add_argument("--count", type=int, default=512, help="pictures that are timed (default: 512)")
    about = "least and most tokens of a caption (default: 20 160)"
    parser.add_argument("--tokens", nargs=2, type=int, default=[20, 160], metavar="N", help=about)
    parser.add_argument("--workers", type=int, default=THREADS, metavar="N", help="threads that decode (%(default)s)")
    args = parser.parse_args(argv)
    check_positive(parser, args, ("count", "workers"))
    if min(args.batch) < 1 or not 0 < args.tokens[0] <= args.tokens[1]:
        parser.error("--batch must be at least 1, and --tokens two numbers from 1 up, the smaller one first")
    return args


def main(argv: list[str]) -> int:
    """Time the captions for each batch size, and print a line for it."""
    args = parse_args(argv)
    chat = random_chat(args.size == "small", args.weights)
    files = photographs(min(FILES, args.count), 400, 1000)
    for batch in args.batch:
        row = {"weights": weights_name(chat, args.weights), "batch": batch}
        report(row | time_captions(chat, batch, files, args), args.json)
    return 0


def time_captions(chat, batch: int, files: list[bytes], args: argparse.Namespace) -> dict:
    """Pictures and tokens a second, seconds to warm up, and the peak of the GPU's memory."""
    free_memory()
    reset_peak_memory(chat.device)
    passed = []
    for count in (batch, args.count):
        rng = random.Random(count)
        lengths = [rng.randint(*args.tokens) for _ in range(count)]
        start = clock(chat.device)
        describe(chat, batch, args.workers, files, lengths)
        passed.append(clock(chat.device) - start)
    return {
        "pictures_per_s": round(args.count / passed[1], 2),
        "tokens_per_s": round(sum(lengths) / passed[1], 1),
        "warm_up_s": round(passed[0], 1),
        **peak_memory(chat.device),
    }


def describe(chat, batch: int, threads: int, files: list[bytes], lengths: list[int]) -> None:
    """Write captions of these lengths in tokens, as `caption` does."""
    from minigpt4.conversation import Decoding, open_picture
    from minigpt4.serving.offline import OfflineAnswers

    def load(number: int) -> tuple[int, list]:
        picture = open_picture(io.BytesIO(files[number % len(files)]), str(number))
        return number, [chat.vis_processor(picture)]

    class OfDrawnLengths(OfflineAnswers):
        def _answer(self, images):
            answer = super()._answer(images)
            answer.max_tokens = next(waiting)
            return answer

    waiting, decoding = iter(lengths), Decoding(do_sample=False, max_new_tokens=max(lengths))
    answers = OfDrawnLengths(chat, lambda pictures: PROMPT, decoding, batch, threads)
    batches = answers.batches(range(len(lengths)), load, lambda *line: {"line": line})
    assert sum(len(batch.lines) for batch in batches) == len(lengths)
