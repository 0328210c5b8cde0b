"""Endless streams of pictures with captions from webdataset shards: laion and cc_sbu."""

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, count
from typing import Any, NamedTuple

import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from minigpt4.common.text import pluralize
from minigpt4.datasets.datasets.shards import expand_shards, is_local
from minigpt4.datasets.seeding import derive_seed
from minigpt4.processors import read_picture, to_sample

log = logging.getLogger(__name__)

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


class RawSample(NamedTuple):
    """A sample in the shuffle buffer, its picture not decoded yet."""

    shard: str
    key: str
    image_id: str
    image: bytes
    caption: str
    size: int  # bytes in the tar


class ImageTextStream(IterableDataset):
    """An endless stream of `{"image": …, "text_input": text_processor(caption), "image_id": str}`.

    `to_sample` makes "image" and its companions. Shards are drawn with replacement, and their samples pass a shuffle
    buffer undecoded. The stream is a function of (seed, epoch, rank, worker): the same four give the same samples, any
    other four give others. It starts at a random place in its first shard, so that short epochs do not only see the
    beginnings of large shards (URLs and `pipe:` are read from their start). Samples without caption or picture,
    pictures that cannot be decoded, and shards that cannot be read are left out, counted and reported by warnings. When
    nearly all samples are left out, iteration raises RuntimeError that names the causes and a shard.

    `cache-features` reads the shards once, in order (`common.contracts.CacheableDataset`).
    """

    MEMBERS = IMAGE_KEYS  # the members of a sample that may hold the picture
    WHAT = "picture"

    def __init__(
        self,
        storage: str | Iterable[str],
        vis_processor: Callable[[Image.Image], Any],
        text_processor: Callable[[str], str],
        name: str = "image_text",
        shuffle_buffer: int = 1000,
    ) -> None:
        """storage: see `expand_shards`. name: the dataset's name in the YAML, for messages."""
        self.shards = expand_shards(storage, name)
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.name = name
        self.shuffle_buffer = shuffle_buffer
        self.read = Gate(name, len(self.shards))
        self.decoded = Gate(name, len(self.shards))
        self._current = ""  # the shard being read
        self.epoch = 0
        self.set_seed(0)
        log.info("%s: streaming %s.", name, pluralize(len(self.shards), "shard"))

    def set_seed(self, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Set the seed and the rank. Each rank draws its own shards, so their number does not matter here."""
        self.seed, self.rank = seed, rank

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next `iter`."""
        self.epoch = epoch

    def take_left_out(self) -> Counter[tuple[str, str]]:
        """Counts by (cause, shard) of the samples that this process has left out since the last call."""
        return self.read.take() + self.decoded.take()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        seed = derive_seed(self.seed, self.epoch, self.rank, worker.id if worker else 0)
        rng = random.Random(seed)
        self.read.open_window()
        self.decoded.open_window()
        # We draw shards and seeds ourselves: webdataset's depend on time and process id, or collide.
        drawn = (rng.choice(self.shards) for _ in count())
        shuffle = wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, seed=derive_seed(seed, "shuffle"))
        return self._decode(shuffle(_start_anywhere(self._raw_samples(drawn), rng)))

    @property
    def num_parts(self) -> int:
        return len(self.shards)

    def part(self, number: int) -> Iterator[RawSample]:
        """The samples of a shard, in order."""
        return self._raw_samples([self.shards[number]])

    def load(self, sample: RawSample) -> dict[str, Any] | None:
        """ "image" and its companions; None, counted as left out, for a picture that cannot be decoded."""
        try:
            picture = read_picture(sample.image, self.vis_processor)
        except Exception as error:  # Pillow's plug-ins raise nearly every kind of error on broken files
            self.decoded.drop("an image that is not one, or is broken", sample.shard, f"{sample.key}: {error}")
            return None
        self.decoded.keep()
        return to_sample(self.vis_processor, picture)

    def _raw_samples(self, shards: Iterable[str]) -> Iterator[RawSample]:
        """The usable samples of shards, in order."""
        read_tars = wds.tarfile_to_samples(handler=self._on_shard_error)
        for sample in read_tars(self._opened(shards)):
            shard, key = sample["__url__"], sample["__key__"]
            image = next((sample[k] for k in self.MEMBERS if k in sample), None)
            caption = read_caption(sample)
            if image is not None and caption is not None:
                self.read.keep()
                size = sum(512 + -len(v) % 512 + len(v) for v in sample.values() if isinstance(v, bytes))
                yield RawSample(shard, key, self._image_id(sample), image, caption, size)
                continue
            has = ", ".join("." + k for k in sample if not k.startswith("__"))
            if caption is None:
                self.read.drop('a sample without caption (.json with "caption", or .txt)', shard, f"{key} has {has}")
            else:
                self.read.drop(f"a sample without {self.WHAT} (.{', .'.join(self.MEMBERS)})", shard, f"{key} has {has}")

    def _opened(self, shards: Iterable[str]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            self.read.check()
            self.decoded.check()
            source = {"url": shard}
            self._current = shard
            seen = self.read.seen
            try:
                yield source
                self._check_end(source, any_sample=self.read.seen > seen)
            finally:  # webdataset opens the stream and never closes it
                with suppress(OSError):
                    if "stream" in source:
                        source["stream"].close()

    def _check_end(self, source: dict[str, Any], any_sample: bool) -> None:
        """Count a shard without samples, and one that is cut off: tarfile takes a broken header for the end."""
        shard, stream = source["url"], source.get("stream")
        if not any_sample:
            self.read.drop("a shard without samples", shard)
        elif stream is not None:
            with suppress(OSError):
                if any(block.strip(b"\0") for block in iter(lambda: stream.read(1 << 20), b"")):
                    self.read.drop("the rest of a corrupt tar", shard)
                elif is_local(shard) and shard.endswith(".tar"):
                    stream.seek(-1024, os.SEEK_END)  # a tar ends with two blocks of zeros
                    if stream.read().strip(b"\0"):
                        self.read.drop("the rest of a tar that was cut off", shard)

    def _on_shard_error(self, error: Exception) -> bool:
        detail = f"{type(error).__name__}: {error.args[0] if error.args else ''}"
        self.read.drop("a shard, or a part of it, that cannot be read", self._current, detail)
        return True

    def _image_id(self, sample: dict[str, Any]) -> str:
        return f"{os.path.basename(sample['__url__'])}/{sample['__key__']}"

    def _decode(self, samples: Iterator[RawSample]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            fields = self.load(sample)
            if fields is not None:
                yield {**fields, "text_input": self.text_processor(sample.caption), "image_id": sample.image_id}


def read_caption(sample: dict[str, Any]) -> str | None:
    """The key "caption" of the sample's .json, otherwise its .txt; None if both are absent or blank."""
    with suppress(ValueError, TypeError, KeyError):
        caption = json.loads(sample["json"])["caption"]
        if isinstance(caption, str) and caption.strip():
            return caption
    caption = sample.get("txt", b"").decode("utf-8", errors="replace")
    return caption if caption.strip() else None


def _start_anywhere(samples: Iterator[RawSample], rng: random.Random) -> Iterator[RawSample]:
    """Skip a random part of the first shard, so that each place in it is equally likely to be the start."""
    first = next(samples)
    bytes_to_skip = rng.random() * (os.path.getsize(first.shard) if is_local(first.shard) else 0)
    for sample in chain([first], samples):
        if bytes_to_skip > 0 and sample.shard == first.shard:
            bytes_to_skip -= sample.size
        else:
            bytes_to_skip = 0
            yield sample


class Gate:
    """Counts the samples that pass a stage of a stream, and those left out. Warns at the 1st, 10th, 100th … of a cause.

    A stream is given up if at most MIN_KEPT of the samples in a window pass.
    """

    WINDOW = 1000  # samples in a window
    MIN_SAMPLES = 100  # a shorter window is not judged
    MIN_SHARDS = 3  # nor one with fewer affected shards, unless these are all
    MIN_KEPT = 0.05

    def __init__(self, name: str, num_shards: int) -> None:
        self.name = name
        self.num_shards = num_shards
        self.left_out: Counter[str] = Counter()  # by cause, since the start of the process
        self._unreported: Counter[tuple[str, str]] = Counter()  # by cause and shard, since the last `take`
        self.open_window()

    def open_window(self) -> None:
        """Start a new window."""
        self.kept = 0
        self.causes: Counter[str] = Counter()
        self.bad_shards: Counter[str] = Counter()

    @property
    def seen(self) -> int:
        """Samples in the window, and shards left out."""
        return self.kept + self.causes.total()

    def keep(self) -> None:
        """Count a sample that passes."""
        self.kept += 1

    def drop(self, cause: str, shard: str, detail: str = "") -> None:
        """Count a sample, or a shard, that is left out. Never raises: webdataset calls it from its handlers."""
        self.causes[cause] += 1
        self.bad_shards[shard] += 1
        self.left_out[cause] += 1
        self._unreported[cause, shard] += 1
        count = self.left_out[cause]
        if count == 10 ** (len(str(count)) - 1):
            detail = f" ({detail})" if detail else ""
            log.warning("%s: left out %s: %s%s. So far in this process: %d.", self.name, cause, shard, detail, count)

    def take(self) -> Counter[tuple[str, str]]:
        """Counts of what was left out since the last call, by (cause, shard)."""
        taken, self._unreported = self._unreported, Counter()
        return taken

    def check(self) -> None:
        """Raise RuntimeError if nearly everything in the window was left out."""
        if self.seen < self.MIN_SAMPLES or len(self.bad_shards) < min(self.MIN_SHARDS, self.num_shards):
            return
        if self.kept <= self.MIN_KEPT * self.seen:
            causes = ", ".join(f"{count} × {cause}" for cause, count in self.causes.most_common())
            shard, count = self.bad_shards.most_common(1)[0]
            raise RuntimeError(
                f"datasets.{self.name}: of the last {self.seen} samples only {self.kept} could be used: {causes}; "
                f"in {len(self.bad_shards)} of {self.num_shards} shards, e.g. {shard} ({count} times). "
                f"Check the shards, or name others with --options datasets.{self.name}.build_info.storage=…"
            )
        if self.seen >= self.WINDOW:
            self.open_window()
