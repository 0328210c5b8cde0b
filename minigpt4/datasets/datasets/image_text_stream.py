"""Endless streams of pictures with captions from webdataset shards: laion and cc_sbu."""

import hashlib
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from minigpt4.common.text import pluralize
from minigpt4.datasets.captions import Incomplete, Unusable, read_caption, usable
from minigpt4.datasets.datasets.shards import expand_shards, is_local
from minigpt4.datasets.datasets.tar_reader import Group, ShardError, read_members, read_samples
from minigpt4.datasets.left_out import Gate
from minigpt4.datasets.patience import OutOfReach, Patience, PatientFile, open_shard
from minigpt4.datasets.seeding import derive_seed
from minigpt4.processors import read_picture, to_sample
from minigpt4.weights import locate

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
    beginnings of large shards (URLs and `pipe:` are read from their start). Samples without picture or usable caption
    (`datasets.captions`), pictures that cannot be decoded, and shards that cannot be read are left out, counted and
    reported by warnings. When nearly all samples are left out, iteration raises RuntimeError that names the causes and
    a shard. Shards that are out of reach are waited for (`datasets.patience`).

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
        self.patience = Patience(self.read, self._others_in_reach)
        self._last_read = ""  # shard
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
        return self._decode(shuffle(self._start_anywhere(self._raw_samples(drawn), rng)))

    def digest(self) -> str:
        """Identifies the shards by their names and, of local ones, their sizes; a resumed run knows its data by it."""
        sizes = (os.path.getsize(shard) if is_local(shard) and os.path.exists(shard) else 0 for shard in self.shards)
        named = [f"{os.path.basename(shard)} {size}" for shard, size in zip(self.shards, sizes, strict=True)]
        return hashlib.sha256("\n".join(named).encode("utf-8", "surrogateescape")).hexdigest()[:16]

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

    def text_of(self, sample: RawSample) -> str | None:
        """The caption after `text_processor`; None, counted as left out, if that leaves nothing that can be used."""
        try:
            return usable(self.text_processor(sample.caption))
        except Unusable as cause:
            self.decoded.drop(f"{cause}, after text_processor", sample.shard, f"{sample.key}: {sample.caption}")
            return None

    def texts(self) -> Iterator[tuple[str, str]]:
        """(image id, caption after `text_processor`) of the usable captions, in the order of the shards."""
        for sample in self._raw_samples(self.shards):
            text = self.text_of(sample)
            if text is not None:
                yield sample.image_id, text

    def _raw_samples(self, shards: Iterable[str]) -> Iterator[RawSample]:
        """The usable samples of shards, in order."""
        for shard in shards:
            self.read.check()
            self.decoded.check()
            yield from self._raw_samples_of(shard)

    def _raw_samples_of(self, shard: str) -> Iterator[RawSample]:
        def drop(cause: str, group: Group) -> None:
            self.read.drop(cause, shard, str(group))

        with closing(PatientFile(shard, self.patience)) as file:
            members = read_members(file, self.MEMBERS)
            try:
                for sample in read_samples(members, partial(self._raw_sample, shard), drop):
                    self._last_read = shard
                    self.read.keep()
                    yield sample
            except ShardError as problem:
                reason = None
                with suppress(OSError):
                    reason = is_local(shard) and locate.why_unreadable(Path(shard))
                self.read.drop(problem.cause, shard, reason or problem.detail)

    def _raw_sample(self, shard: str, group: Group) -> RawSample:
        """Raises Unusable for a sample without picture or usable caption."""
        image = next((group.files[suffix] for suffix in self.MEMBERS if suffix in group.files), None)
        if image is None:
            raise Incomplete(f"a sample without {self.WHAT} (.{', .'.join(self.MEMBERS)})")
        caption = read_caption(group.files)
        return RawSample(shard, group.key, self._image_id(shard, group), image, caption, group.size)

    def _image_id(self, shard: str, group: Group) -> str:
        return f"{os.path.basename(shard)}/{group.key}"

    def _others_in_reach(self, shard: str) -> bool:
        """Whether another shard than this one can be read."""
        other = next((each for each in (self._last_read, *self.shards[:2]) if each not in ("", shard)), None)
        if other is None:
            return False
        with suppress(OSError), closing(open_shard(other)) as stream:
            return bool(stream.read(1))
        return False

    def _start_anywhere(self, samples: Iterator[RawSample], rng: random.Random) -> Iterator[RawSample]:
        """Skip a random part of the first shard, so that each place in it is equally likely to be the start."""
        first = next(samples)
        size = 0
        if is_local(first.shard):
            with suppress(OutOfReach):
                size = self.patience.retry(lambda: os.path.getsize(first.shard), first.shard)
        bytes_to_skip = rng.random() * size
        for sample in chain([first], samples):
            if bytes_to_skip > 0 and sample.shard == first.shard:
                bytes_to_skip -= sample.size
            else:
                bytes_to_skip = 0
                yield sample

    def _decode(self, samples: Iterator[RawSample]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            text = self.text_of(sample)
            fields = None if text is None else self.load(sample)
            if fields is not None:
                yield {**fields, "text_input": text, "image_id": sample.image_id}
