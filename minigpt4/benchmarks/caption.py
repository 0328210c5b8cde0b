"""python -m minigpt4 bench caption: pictures a second that `caption` describes.

    python -m minigpt4 bench caption                                       # Llama-7B, random weights, 16 bit
    python -m minigpt4 bench caption --size small --count 12 --batch 4     # to try it on a CPU

Each picture is a JPEG file of 400 to 1,000 pixels a side, decoded by threads. Its caption is chosen greedily and ends
after a number of tokens that is drawn between the two of --tokens. The captions are written together token by token, as
`caption` does, and in batches, which end with their longest caption. A first run of `batch` pictures warms up.
"""

import argparse
import io
import random
from collections.abc import Iterator
from functools import partial

from minigpt4.benchmarks.harness import bench_parser, clock, free_memory, peak_memory, report, reset_peak_memory
from minigpt4.benchmarks.synthetic import photograph
from minigpt4.common.commands import check_positive
from minigpt4.common.parallel import THREADS, Batch, answer_in_batches

PROMPT = " w" * 24 + "<ImageHere>" + " w" * 23  # with <s> and 32 vectors: 80 tokens
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
    """Time both ways for each batch size, and print a line for each."""
    args = parse_args(argv)
    import torch

    from minigpt4.benchmarks.synthetic import random_model
    from minigpt4.common import dist_utils
    from minigpt4.conversation import Chat
    from minigpt4.processors import Blip2ImageEvalProcessor

    device = dist_utils.select_device("cuda")
    dtype = dist_utils.select_dtype(device, True, "bf16")
    model = random_model(device, dtype, args.size == "small", args.weights).eval()
    model.llama_model.generation_config.eos_token_id = None  # captions never end early
    chat = Chat(model, Blip2ImageEvalProcessor(224), device)
    rng = random.Random(0)
    sides = [(rng.randint(400, 1000), rng.randint(400, 1000)) for _ in range(min(FILES, args.count))]
    files = [photograph(seed, *size) for seed, size in enumerate(sides)]
    name = "32bit" if args.weights == "16bit" and dtype == torch.float32 else args.weights
    for batch in args.batch:
        for by, run in (("together", together), ("in batches", in_batches)):
            row = {"weights": name, "batch": batch, "by": by}
            report(row | time_captions(partial(run, chat, batch, args.workers), batch, files, args, device), args.json)
            free_memory()
    return 0


def time_captions(run, batch: int, files: list[bytes], args: argparse.Namespace, device) -> dict:
    """Pictures and tokens a second, seconds to warm up, and the peak of the GPU's memory."""
    free_memory()
    reset_peak_memory(device)
    passed = []
    for count in (batch, args.count):
        rng = random.Random(count)
        lengths = [rng.randint(*args.tokens) for _ in range(count)]
        start = clock(device)
        described = sum(len(each.lines) for each in run(lengths, files))
        passed.append(clock(device) - start)
        assert described == count
    return {
        "pictures_per_s": round(args.count / passed[1], 2),
        "tokens_per_s": round(sum(lengths) / passed[1], 1),
        "warm_up_s": round(passed[0], 1),
        **peak_memory(device),
    }


def together(chat, batch: int, threads: int, lengths: list[int], files: list[bytes]) -> Iterator[Batch]:
    """Captions of these lengths in tokens, as `caption` writes them."""
    from minigpt4.conversation import Decoding
    from minigpt4.serving.offline import OfflineAnswers

    class OfDrawnLengths(OfflineAnswers):
        def _answer(self, images):
            answer = super()._answer(images)
            answer.max_tokens = next(waiting)
            return answer

    waiting, decoding = iter(lengths), Decoding(do_sample=False, max_new_tokens=max(lengths))
    answers = OfDrawnLengths(chat, lambda pictures: PROMPT, decoding, batch, threads)
    return answers.batches(range(len(lengths)), partial(_load, chat, files), lambda *line: {"line": line})


def in_batches(chat, batch: int, threads: int, lengths: list[int], files: list[bytes]) -> Iterator[Batch]:
    """The same in batches, each as long as its longest caption."""
    import torch

    def describe(items: list) -> list[dict]:
        images = torch.stack([pictures[0] for _, pictures in items]).to(chat.device)
        longest = max(lengths[number] for number, _ in items)
        prompts, loop = [PROMPT] * len(items), chat.decoding_loop
        texts = chat.model.generate(images, prompts, decoding_loop=loop, max_new_tokens=longest)
        return [{"line": text} for text in texts]

    return answer_in_batches(range(len(lengths)), partial(_load, chat, files), describe, batch, threads)


def _load(chat, files: list[bytes], number: int) -> tuple[int, list]:
    from minigpt4.conversation import open_picture

    return number, [chat.vis_processor(open_picture(io.BytesIO(files[number % len(files)]), str(number)))]
