"""python -m minigpt4 bench data: how many pictures a CPU core makes ready for training in a second.

    python -m minigpt4 bench data                                          # synthetic photographs of two sizes
    python -m minigpt4 bench data --shards "laion/{00000..00009}.tar"      # your own pictures, and the whole stream
    python -m minigpt4 bench data --shards … --workers 4                   # and through the training loader

Each way decodes the same pictures and takes the crops of blip2_image_train. Rates are per second of CPU time, so that
other work on the machine matters little. The ways take turns, and the median of the rounds counts. `max_levels` and
`mean_levels` are the largest and the mean difference of the pixels from Pillow's, in 255ths.
"""

import argparse
import io
import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import chain, islice

from PIL import Image

from minigpt4.benchmarks.harness import bench_parser, report, time_in_turn
from minigpt4.benchmarks.synthetic import photographs
from minigpt4.common.commands import check_positive

consume = partial(deque, maxlen=0)  # iterates over what it is given, and keeps nothing
# {name: least and most pixels of a side}
SIZES = {"256 px": (256, 256), "400-1000 px": (400, 1000)}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = bench_parser("data", __doc__)
    parser.add_argument("--shards", nargs="+", metavar="TAR", help="webdataset tars; globs and {00..09} are expanded")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="pictures a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, after one to warm up (%(default)s)")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="side of the crops (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="also time the loader, with N processes")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="of the loader (%(default)s)")
    args = parser.parse_args(argv)
    check_positive(parser, args, ("count", "rounds", "image_size", "batch_size"))
    if args.workers and not args.shards:
        parser.error("--workers needs --shards: the loader reads a stream")
    return args


def main(argv: list[str]) -> int:
    """Time each way of reading the pictures that the arguments name, and print a line for it."""
    args = parse_args(argv)
    import torch

    from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
    from minigpt4.datasets.datasets.shards import shards_of_argument
    from minigpt4.processors import Blip2ImageTrainProcessor, BlipCaptionProcessor

    torch.set_num_threads(1)
    processor = Blip2ImageTrainProcessor(args.image_size)
    if args.shards:
        stream = ImageTextStream(shards_of_argument(args.shards), processor, BlipCaptionProcessor(), name="bench")
        samples = chain.from_iterable(map(stream.part, range(stream.num_parts)))
        works = {"pictures of the shards": [sample.image for sample in islice(samples, args.count)]}
    else:
        works = {work: photographs(args.count, *sides) for work, sides in SIZES.items()}
    for work, pictures in works.items():
        mean_kb = round(sum(map(len, pictures)) / len(pictures) / 1e3, 1)
        for row in time_ways(pictures, processor, args.rounds):
            report({"work": work, "mean_kB": mean_kb, **row}, args.json)
    if args.shards:
        samples = iter(stream)  # from reading a shard to the processed sample
        next(samples)  # fills the shuffle buffer
        seconds = time_in_turn({"stream": lambda: consume(islice(samples, args.count))}, args.rounds)["stream"]
        report({"work": "stream of the shards", **rates(args.count, seconds)}, args.json)
        if args.workers:
            report({"work": "loader", "workers": args.workers, **time_loader(stream, args)}, args.json)
    return 0


def time_ways(pictures: list[bytes], processor, rounds: int) -> list[dict]:
    """For each way, pictures a second of CPU time, and the distance of its pixels from Pillow's."""
    by_name = ways(processor)
    calls = {name: lambda way=way: consume(map(way, pictures)) for name, way in by_name.items()}
    rows = []
    for name, seconds in time_in_turn(calls, rounds).items():
        row = {"way": name, **rates(len(pictures), seconds)}
        if name not in (FIRST_RELEASE, DECODE_ONLY):
            row |= levels(by_name[name], pictures[:20], processor)
        rows.append(row)
    return rows


def rates(count: int, seconds: list[float]) -> dict:
    """Median, least and most pictures a second of rounds of `count` pictures."""
    per_second = [count / s for s in seconds]
    return {
        "images_per_core_s": round(statistics.median(per_second)),
        "min": round(min(per_second)),
        "max": round(max(per_second)),
    }


FIRST_RELEASE = "Pillow, normalised float32 (first release)"
OURS = "libjpeg-turbo, torch's resize, uint8 (train.py)"
DECODE_ONLY = "the same, decoding alone"


def ways(processor) -> dict[str, Callable]:
    """{name: function from a file's content to the pixels of a random crop}."""
    from torchvision.transforms.functional import pil_to_tensor

    from minigpt4.processors import read_picture, to_rgb, to_sample

    return {
        FIRST_RELEASE: lambda content: processor(Image.open(io.BytesIO(content))),
        "Pillow, torch's resize, uint8": lambda content: processor.pixels(
            pil_to_tensor(to_rgb(Image.open(io.BytesIO(content))))
        ),
        OURS: lambda content: to_sample(processor, read_picture(content, processor))["image"],
        DECODE_ONLY: lambda content: read_picture(content, processor),
    }


def levels(way: Callable, pictures: list[bytes], processor) -> dict:
    """The largest and the mean difference of a way's pixels from the processor's own, of the same crops."""
    import torch

    differences = []
    for seed, picture in enumerate(pictures):
        torch.manual_seed(seed)
        image = way(picture).float()
        torch.manual_seed(seed)
        expected = processor(Image.open(io.BytesIO(picture)))
        expected = (expected * processor.std[:, None, None] + processor.mean[:, None, None]) * 255
        differences.append((image - expected).abs())
    return {
        "max_levels": round(max(float(d.max()) for d in differences)),
        "mean_levels": round(statistics.mean(float(d.mean()) for d in differences), 3),
    }


def time_loader(stream, args: argparse.Namespace) -> dict:
    """Images a second, by the clock, that the training loader delivers once its workers have started."""
    from minigpt4.datasets.loaders import TrainLoader

    loader = TrainLoader({"bench": stream}, None, args.batch_size, args.workers, seed=0)
    ahead = 4 * args.workers  # batches that may be waiting when the clock starts
    timed = max(4 * ahead, args.rounds * args.count // args.batch_size)
    batches = loader.epoch(0, ahead + timed)
    consume(islice(batches, ahead))
    start = time.perf_counter()
    count = sum(len(batch["image"]) for batch in batches)
    return {"images_per_s": round(count / (time.perf_counter() - start))}
