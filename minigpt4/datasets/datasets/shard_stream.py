"""Endless streams of samples from webdataset shards: what all of them have in common."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import IterableDataset, get_worker_info

from minigpt4.common.errors import UnusableDataError
from minigpt4.common.text import pluralize
from minigpt4.datasets.captions import Unusable
from minigpt4.datasets.datasets.shard_reader import Position, ShardReader
from minigpt4.datasets.datasets.shards import is_local
from minigpt4.datasets.datasets.tar_reader import Group, ShardError, read_members, read_samples
from minigpt4.datasets.left_out import Gate
from minigpt4.datasets.patience import OutOfReach, Patience, PatientFile, open_shard
from minigpt4.datasets.samples import Sample
from minigpt4.datasets.seeding import derive_seed
from minigpt4.datasets.splits import Share
from minigpt4.weights import locate

log = logging.getLogger(__name__)


class Raw(Protocol):
    """A sample in the shuffle buffer, its pictures not decoded yet."""

    shard: str
    key: str
    size: int
    """Bytes in the tar."""


class ShardStream(IterableDataset):
    """An endless stream of samples. Subclasses define `raw_sample`, `identity` and `decode`.

    Shards are drawn with replacement, and their samples pass a shuffle buffer undecoded. The stream is a function of
    (seed, epoch, rank, worker): the same four give the same samples, any other four give others. It starts at a random
    place in its first shard, so that short epochs do not only see the beginnings of large shards (URLs and `pipe:` are
    read from their start). Samples that cannot be used, and shards that cannot be read, are left out, counted and
    reported by warnings. When nearly all are left out, iteration raises UnusableDataError, which names the causes and a
    shard. Shards that are out of reach are waited for (`datasets.patience`).

    Evaluation reads the shards once (`one_pass`), and so does `cache-features` (`common.contracts.CacheableDataset`).

    Args:
        shards: as from `expand_shards`.
        name: the dataset's name in the YAML, for messages.
        share: the samples that belong to the stream; None: all.
        shuffle_buffer: samples in it.
    """

    MEMBERS: tuple[str, ...] = ()
    """Suffixes of pictures."""
    SEVERAL_PICTURES = False
    """Whether a sample may have several."""

    def __init__(self, shards: list[str], name: str, share: Share | None = None, shuffle_buffer: int = 1000) -> None:
        self.shards, self.name, self.share, self.shuffle_buffer = shards, name, share, shuffle_buffer
        self.read, self.decoded = (Gate(name, len(shards)) for _ in range(2))
        self.patience = Patience(self.read, self._others_in_reach)
        self._last_read = ""  # shard
        self.epoch = 0
        self.set_seed(0)
        what = f"streaming {pluralize(len(shards), 'shard')}"
        if share and share.is_val:
            what = f"split val: {share.val:.1%} of the samples; each evaluation reads {pluralize(len(shards), 'shard')}"
        log.info("%s: %s.", name, what)

    def raw_sample(self, shard: str, group: Group) -> Raw:
        """The sample of the members of a tar. Raises Unusable, or Incomplete while members may follow that it lacks."""
        raise NotImplementedError

    def identity(self, sample: Any) -> str:
        """A text by which `share` draws samples."""
        raise NotImplementedError

    def decode(self, sample: Any) -> dict[str, Any]:
        """The training sample. Raises Unusable for one that cannot be used."""
        raise NotImplementedError

    def item(self, sample: Any) -> dict[str, Any] | None:
        """The training sample; None, counted as left out, for one that cannot be used."""
        return self.if_usable(self.decode, sample)

    def if_usable(self, decode: Callable[[Any], Any], sample: Any) -> Any | None:
        """`decode(sample)`; None, counted in `decoded` as left out, if that raises Unusable."""
        try:
            result = decode(sample)
        except Unusable as cause:
            self.decoded.drop(str(cause), sample.shard, f"{sample.key}: {cause.__cause__ or ''}")
            return None
        self.decoded.keep()
        return result

    def set_seed(self, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Set the seed and the rank. Each rank draws its own shards, so their number does not matter here."""
        self.seed, self.rank = seed, rank

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next `iter`."""
        self.epoch = epoch

    def take_left_out(self) -> Counter[tuple[str, ...]]:
        """Counts by (cause, shard) of the samples that this process has left out since the last call."""
        return self.read.take() + self.decoded.take()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        return self.reader(worker.id if worker else 0)

    def reader(self, number: int, position: Position | None = None) -> ShardReader:
        """The samples of worker `number` in this epoch after a position, which the reader's `position()` gave."""
        self._open_windows()
        return ShardReader(self, derive_seed(self.seed, self.epoch, self.rank, number), position)

    def one_pass(self, reader: int, num_readers: int) -> Iterator[dict[str, Any]]:
        """Each sample once, in order. Of `num_readers` readers each gets other samples: whole shards if there are as
        many.
        """
        shards, samples_of_each = list(dict.fromkeys(self.shards)), num_readers
        if len(shards) >= num_readers:
            shards, reader, samples_of_each = shards[reader::num_readers], 0, 1
        self._open_windows()
        samples = islice(self.raw_samples(shards), reader, None, samples_of_each)
        return (Sample(item, raw.shard) for raw in samples if (item := self.item(raw)) is not None)

    def digest(self) -> str:
        """Identifies the shards by their names and, of local ones, their sizes; a resumed run knows its data by it."""
        sizes = (os.path.getsize(shard) if is_local(shard) and os.path.exists(shard) else 0 for shard in self.shards)
        named = [f"{os.path.basename(shard)} {size}" for shard, size in zip(self.shards, sizes, strict=True)]
        return hashlib.sha256("\n".join(named).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @property
    def num_parts(self) -> int:
        return len(self.shards)

    def part(self, number: int) -> Iterator[Any]:
        """The samples of a shard, in order."""
        return self.raw_samples([self.shards[number]])

    def _open_windows(self) -> None:
        self.read.open_window()
        self.decoded.open_window()

    def raw_samples(self, shards: Iterable[str]) -> Iterator[Any]:
        """The samples of shards, in order. Raises UnusableDataError if none of very many belongs to the stream."""
        without = 0
        for shard in shards:
            self.read.check()
            self.decoded.check()
            without += 1
            for sample in self.samples_of(shard):
                without = 0
                yield sample
            if self.share and without > 10 * len(self.shards):
                raise UnusableDataError(
                    f"datasets.{self.name}: no sample is left to train on: build_info.val={self.share.val} takes all."
                )

    def samples_of(self, shard: str) -> Iterator[Any]:
        """The samples of a shard, in order, undecoded."""

        def drop(cause: str, detail: str) -> None:
            self.read.drop(cause, shard, detail)

        with closing(PatientFile(shard, self.patience)) as file:
            members = read_members(file, self.MEMBERS)
            try:
                for sample in read_samples(members, partial(self.raw_sample, shard), drop, self.SEVERAL_PICTURES):
                    self._last_read = shard
                    self.read.keep()
                    if self.share is None or self.share.has(self.identity(sample)):
                        yield sample
            except ShardError as problem:
                reason = None
                with suppress(OSError):
                    reason = is_local(shard) and locate.why_unreadable(Path(shard))
                self.read.drop(problem.cause, shard, reason or problem.detail)

    def size_of(self, shard: str) -> int:
        """Bytes of a shard; 0 for one that is no local file, or is out of reach."""
        with suppress(OutOfReach):
            return self.patience.retry(lambda: os.path.getsize(shard), shard) if is_local(shard) else 0
        return 0

    def _others_in_reach(self, shard: str) -> bool:
        """Whether another shard than this one can be read."""
        other = next((each for each in (self._last_read, *self.shards[:2]) if each not in ("", shard)), None)
        if other is None:
            return False
        with suppress(OSError), closing(open_shard(other)) as stream:
            return bool(stream.read(1))
        return False
