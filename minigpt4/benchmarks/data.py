"""python -m minigpt4 bench data: how many pictures a CPU core makes ready for training in a second.

    python -m minigpt4 bench data                                          # made-up photographs, two sizes
    python -m minigpt4 bench data --shards "laion/{00000..00009}.tar"      # pictures of yours, and the whole stream
    python -m minigpt4 bench data --shards … --workers 4                   # and through the training loader

Each way decodes the same pictures and takes the crops of blip2_image_train. Rates are per second of CPU time, so that
other work on the machine matters little; the ways take turns, and the median of the rounds counts. `levels` is how far
the pixels are from Pillow's own, in 255ths: the largest difference, and the mean.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from itertools import chain, islice

from minigpt4.cli.arguments import expand_shards

SIZES = {"256 px": (256, 256), "400-1000 px": (400, 1000)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="minigpt4 bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", nargs="+", metavar="TAR", help="webdataset tars; globs and {00..09} are expanded")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="pictures a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds after one of warm-up (%(default)s)")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="side of the crops (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="time the loader with so many processes too"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="of the loader (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    for name in ("count", "rounds", "image_size", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.workers and not args.shards:
        parser.error("--workers needs --shards: the loader reads a stream")
    return args


def main(argv: list[str] | None = None) -> int:
    """Time what the arguments name, and print a line for each way."""
    args = parse_args(argv)
    import torch

    torch.set_num_threads(1)
    if args.shards:
        stream = _stream(expand_shards(args.shards), args.image_size)
        samples = chain.from_iterable(map(stream.part, range(stream.num_parts)))
        works = {"pictures of the shards": [sample.image for sample in islice(samples, args.count)]}
    else:
        works = {work: _photographs(args.count, *sides) for work, sides in SIZES.items()}
    for work, pictures in works.items():
        for row in time_ways(pictures, args.image_size, args.rounds):
            report({"work": work, "mean_kB": round(sum(map(len, pictures)) / len(pictures) / 1e3, 1), **row}, args.json)
    if args.shards:
        for row in time_stream(stream, args):
            report(row, args.json)
    return 0


def report(row: dict, as_json: bool) -> None:
    print(json.dumps(row) if as_json else "  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


def time_ways(pictures: list[bytes], image_size: int, rounds: int) -> list[dict]:
    """Pictures a second of CPU time of each way, and the distance of its pixels from Pillow's."""
    from minigpt4.processors import Blip2ImageTrainProcessor

    processor = Blip2ImageTrainProcessor(image_size)
    by_way = ways(processor)
    times: dict[str, list[float]] = {name: [] for name in by_way}
    for _ in range(rounds + 1):
        for name, way in by_way.items():
            start = time.process_time()
            for picture in pictures:
                way(picture)
            times[name].append(time.process_time() - start)
    rows = []
    for name, way in by_way.items():
        row = {"way": name, **rates([len(pictures) / seconds for seconds in times[name][1:]])}
        rows.append(row if name in (FIRST_RELEASE, DECODE_ONLY) else row | levels(way, pictures[:20], processor))
    return rows


def rates(per_second: list[float]) -> dict:
    median = statistics.median(per_second)
    return {"images_per_core_s": round(median), "min": round(min(per_second)), "max": round(max(per_second))}


FIRST_RELEASE = "Pillow, normalised float32 (first release)"
OURS = "libjpeg-turbo, torch's resize, uint8 (train.py)"
DECODE_ONLY = "the same, decoding alone"


def ways(processor) -> dict[str, Callable]:
    """{name: a file's content → pixels of a random crop}; OpenCV's only where it is installed."""
    import torch
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    from minigpt4.processors import read_picture, to_rgb, to_sample

    crop = processor.transform.transforms[0]
    found = {
        FIRST_RELEASE: lambda content: processor(Image.open(io.BytesIO(content))),
        "Pillow, torch's resize, uint8": lambda content: processor.pixels(
            pil_to_tensor(to_rgb(Image.open(io.BytesIO(content))))
        ),
        OURS: lambda content: to_sample(processor, read_picture(content, processor))["image"],
        DECODE_ONLY: lambda content: read_picture(content, processor),
    }
    try:
        import cv2
        import numpy as np
    except ImportError:
        return found
    cv2.setNumThreads(0)

    def opencv(content: bytes) -> torch.Tensor:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
        top, left, height, width = crop.get_params(torch.from_numpy(image).permute(2, 0, 1), crop.scale, crop.ratio)
        image = cv2.resize(image[top : top + height, left : left + width], crop.size, interpolation=cv2.INTER_CUBIC)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous()

    return found | {"OpenCV, cubic without antialiasing, uint8": opencv}


def levels(way: Callable, pictures: list[bytes], processor) -> dict:
    """How far a way's pixels are from those that the processor makes when it is called, crop by crop."""
    import torch
    from PIL import Image

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


def time_stream(stream, args: argparse.Namespace) -> list[dict]:
    """Samples a second of CPU time from reading a shard to the processed sample; and through the loader's workers."""
    samples = iter(stream)
    next(samples)  # fills the shuffle buffer
    seconds = []
    for _ in range(args.rounds + 1):
        start = time.process_time()
        for _ in islice(samples, args.count):
            pass
        seconds.append(time.process_time() - start)
    rows = [{"work": "stream of the shards", **rates([args.count / s for s in seconds[1:]])}]
    if args.workers:
        rows.append(time_loader(stream, args))
    return rows


def time_loader(stream, args: argparse.Namespace) -> dict:
    """Images a second, by the clock, that the training loader delivers; the start of its workers left out."""
    from minigpt4.datasets.loaders import TrainLoader

    loader = TrainLoader({"bench": stream}, None, args.batch_size, args.workers, seed=0)
    ahead = 4 * args.workers  # batches that may wait already when the clock starts
    timed = max(4 * ahead, args.rounds * args.count // args.batch_size)
    batches = loader.epoch(0, ahead + timed)
    for _ in islice(batches, ahead):
        pass
    start = time.perf_counter()
    count = sum(len(batch["image"]) for batch in batches)
    rate = count / (time.perf_counter() - start)
    return {"work": "loader", "workers": args.workers, "images_per_s": round(rate)}


def _stream(shards: list[str], image_size: int):
    from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
    from minigpt4.processors import Blip2ImageTrainProcessor, BlipCaptionProcessor

    return ImageTextStream(shards, Blip2ImageTrainProcessor(image_size), BlipCaptionProcessor(), name="bench")


def _photographs(count: int, least: int, most: int) -> list[bytes]:
    """JPEGs whose sides are drawn between `least` and `most` pixels."""
    import random

    rng = random.Random(0)
    sides = [(rng.randint(least, most), rng.randint(least, most)) for _ in range(count)]
    return [photograph(seed, *size) for seed, size in enumerate(sides)]


def photograph(seed: int, width: int, height: int) -> bytes:
    """A made-up picture as a JPEG: structure at all scales, as in nature, hard edges, a little noise."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), dtype=np.float32)
    for side in (4, 8, 16, 32, 64, 128, 256):
        noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        resized = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image += np.asarray(resized, dtype=np.float32) / side**0.8
    image += rng.normal(0, 0.01 * image.max(), image.shape)
    image = 255 * (image - image.min()) / (image.max() - image.min())
    picture = Image.fromarray(image.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(8):
        x, y, w, h = rng.random(4) * (width, height, width / 3, height / 3)
        draw.rectangle((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=95)
    return content.getvalue()
