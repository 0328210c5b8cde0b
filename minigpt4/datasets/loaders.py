"""Batches: endless and mixed for training, every sample once for evaluation.

`TrainLoader` plans an epoch in the main process: which dataset each batch comes from and, if the dataset has a length,
which samples. The workers make whole batches as planned. The plan and all randomness depend only on
(seed, epoch, rank), so an epoch is the same whether or not the process has run the ones before it.
`common.contracts` lists the optional methods of a dataset.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from minigpt4.common.errors import ConfigError
from minigpt4.common.text import listed
from minigpt4.datasets.left_out import Tally
from minigpt4.datasets.length_balancing import POOL, rank_share
from minigpt4.datasets.patience import at_batch, read_now
from minigpt4.datasets.samples import SampleId, identify, usable_samples
from minigpt4.datasets.seeding import derive_seed, seeded
from minigpt4.datasets.splits import spread
from minigpt4.datasets.stream_batches import Restart, StreamBatches
from minigpt4.datasets.workers import WatchedLoader


class BatchRequest(NamedTuple):
    """Describes one batch to the worker that makes it."""

    dataset: str
    epoch: int
    number: int  # of the batch in the epoch
    indices: list[int] | None  # None: the next samples of the stream
    reader: int = 0  # of the stream
    restart: Restart | None = None  # from where the stream goes on


class LeftOut(NamedTuple):
    """The key of a count: of samples that were left out, or of files that were waited for."""

    dataset: str
    cause: str
    shard: str
    verb: str = "left out"


class Made(NamedTuple):
    """The batch that a worker made for a request."""

    batch: Any  # None if no sample is left
    left_out: dict[LeftOut, int]
    ids: list[SampleId]
    restart: Restart | None = None  # of the stream, after this batch


class TrainLoader:
    """Endless training batches of one rank from one or more datasets.

    Datasets with a length are walked pass after pass, each pass in another order; the walk continues from epoch to
    epoch, and ranks share each pass. Streams (IterableDataset) start again in each epoch and worker. Each rank draws
    the dataset of each batch by itself. With several ranks, batches of a dataset are balanced by length
    (`length_balancing.py`): between the ranks of a step if the dataset has `text_length(index)`, between the batches
    of a rank if it is a stream.

    Batch N of a stream is made by reader N modulo `num_readers`: the number of workers, or in a resumed run that of the
    run's start, so that another number of workers makes the same batches (of streams with the method `reader`).

    Batches are fetched before they are used. `use_next` says that one is used; `state` is that of the batches used.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        sample_ratios: Mapping[str, float] | None,
        batch_size: int,
        num_workers: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        timeout_s: float = 300.0,
    ) -> None:
        """sample_ratios: relative frequency of each dataset (default 1). batch_size: samples per rank.

        timeout_s: of files out of reach, after which a worker that reads the same file still is taken to hang.

        Raises ConfigError for no datasets, ratios that are no frequencies, or a dataset smaller than a batch.
        """
        self.names = list(datasets)
        self.ratios = [float((sample_ratios or {}).get(name, 1.0)) for name in self.names]
        check_sizes(datasets, self.ratios, batch_size, world_size)
        self.batch_size = batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._text_lengths = {name: getattr(dataset, "text_length", None) for name, dataset in datasets.items()}
        self._walks = {
            name: EndlessWalk(len(dataset), derive_seed(seed, name))
            for name, dataset in datasets.items()
            if not isinstance(dataset, IterableDataset)
        }
        for name, dataset in datasets.items():
            if hasattr(dataset, "set_seed"):
                dataset.set_seed(derive_seed(seed, name), rank, world_size)
        self.num_readers = max(num_workers, 1)
        self._num_workers = max(num_workers, 1)
        self._left_out: Counter[LeftOut] = Counter()
        self._restarts: dict[tuple[str, int], Restart] = {}  # by dataset and reader
        self._fetched: deque[tuple[BatchRequest, Made]] = deque()  # that are not used yet
        self._ids: deque[list[SampleId]] = deque()  # of the batches that `take_ids` was not called for yet
        self._drawn: list[str] = []  # the dataset of each batch of the epoch
        self._plan: list[BatchRequest | None] = []  # the sampler; replaced in each epoch
        maker = BatchMaker(dict(datasets), batch_size, derive_seed(seed, "batch", rank), balanced=world_size > 1)
        self._loader = WatchedLoader(maker, self._plan, num_workers, timeout_s)

    def epoch(self, epoch: int, num_batches: int, first: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of this epoch from number `first` on: `{"image": [B, 3, S, S], "text_input": [str] * B, …}`.

        A walk continues where it ended if all earlier epochs had `num_batches` batches too. An iterator that was not
        exhausted is void as soon as the next epoch begins. If `first` is not 0, `load_state` must have been called.
        """
        if not first:
            self._restarts.clear()
        self._fetched.clear()
        self._ids.clear()
        self._drawn = self._draw(epoch, num_batches)
        requests = self._requests(epoch, num_batches)[first:]
        self._plan[:] = self._routed(requests)
        for request, made in zip(requests, filter(None, self._loader), strict=True):
            self._fetched.append((request, made))
            self._ids.append(made.ids)
            yield made.batch

    def use_next(self) -> None:
        """Count the oldest batch that was yielded and not used yet as used."""
        request, made = self._fetched.popleft()
        self._left_out.update(made.left_out)
        if made.restart:
            self._restarts[request.dataset, request.reader] = made.restart

    def state(self) -> dict[str, Any]:
        """The position of this rank after the batches used, in types that torch reads with `weights_only=True`."""
        restarts = [(*key, restart) for key, restart in self._restarts.items()]
        return {"left_out": [(tuple(key), count) for key, count in self._left_out.items()], "restarts": restarts}

    def load_state(self, left_out: list[tuple[tuple[str, ...], int]], restarts: list[tuple[str, int, Restart]]) -> None:
        """Go on from the entries of a state in the next epoch that is begun."""
        self._left_out = Counter()
        for key, count in left_out:
            self._left_out[LeftOut(*key)] += count
        self._restarts = {(name, reader): restart for name, reader, restart in restarts}

    def take_ids(self) -> list[SampleId]:
        """The names of the samples of the next batch; the first call is for the first. Batches may be prefetched."""
        return self._ids.popleft() if self._ids else []

    def shares(self) -> dict[str, float]:
        """The share of each dataset among this rank's batches of the epoch."""
        counts = Counter(self._drawn)
        return {name: counts[name] / max(counts.total(), 1) for name in self.names}

    def take_left_out(self) -> Counter[LeftOut]:
        """Counts of the samples that this rank has left out since the last call, in all batches that were yielded."""
        while self._fetched:
            self.use_next()
        taken, self._left_out = self._left_out, Counter()
        return taken

    def _requests(self, epoch: int, num_batches: int) -> list[BatchRequest]:
        done = sum((Counter(self._draw(earlier, num_batches)) for earlier in range(epoch)), Counter())
        requests = []
        for number, name in enumerate(self._draw(epoch, num_batches)):
            indices = self._next_indices(name, done[name]) if name in self._walks else None
            requests.append(BatchRequest(name, epoch, number, indices, number % self.num_readers))
            done[name] += 1
        return requests

    def _routed(self, requests: list[BatchRequest]) -> Iterator[BatchRequest | None]:
        """The requests, the first one of each stream and reader with its restart, so that one worker makes its batches.

        Workers take turns. None lets a worker pass.
        """
        turn, restarts = 0, dict(self._restarts)
        for request in requests:
            while turn % self._num_workers != request.reader % self._num_workers:
                turn += 1
                yield None
            turn += 1
            yield BatchRequest(*request[:-1], restarts.pop((request.dataset, request.reader), None))

    def _draw(self, epoch: int, num_batches: int) -> list[str]:
        """The dataset of each batch of an epoch."""
        rng = random.Random(derive_seed(self.seed, epoch, self.rank))
        return rng.choices(self.names, self.ratios, k=num_batches)

    def _next_indices(self, name: str, batches_done: int) -> list[int]:
        """This rank's part of the next batches of all ranks."""
        walk, text_length = self._walks[name], self._text_lengths[name]
        count = self.batch_size * self.world_size
        indices = [walk[p] for p in range(batches_done * count, (batches_done + 1) * count)]
        return rank_share(indices, text_length, self.rank, self.world_size)


def check_sizes(datasets: Mapping[str, Dataset], ratios: list[float], batch_size: int, world_size: int) -> None:
    """Raise ConfigError unless a batch for each rank can be drawn from each dataset."""
    if batch_size < 1:
        raise ConfigError(f"batch_size_train={batch_size} must be at least 1.")
    if not datasets or min(ratios) < 0 or not 0 < sum(ratios) < float("inf"):
        ratios = dict(zip(datasets, ratios, strict=True))
        raise ConfigError(f"Nothing to draw batches from: the datasets and their sample_ratio are {ratios}.")
    for name, dataset in datasets.items():
        if isinstance(dataset, IterableDataset):
            continue
        per_rank = len(dataset) // world_size
        if per_rank < batch_size:
            share = f" ({per_rank} for each of {world_size} ranks)" if world_size > 1 else ""
            raise ConfigError(
                f"batch_size_train={batch_size} needs at least {batch_size} samples per rank; "
                f"{name} has {len(dataset)}{share} to train on. Lower run.batch_size_train (--options "
                f"run.batch_size_train={max(per_rank, 1)}) or add data to datasets.{name}.build_info.storage."
            )


class EndlessWalk:
    """Walks a dataset pass after pass: `walk[position]` is an index; each pass has another order."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self._pass, self._order = -1, np.empty(0)

    def __getitem__(self, position: int) -> int:
        number, offset = divmod(position, self.length)
        if number != self._pass:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, number))
            self._pass, self._order = number, torch.randperm(self.length, generator=generator).numpy()
        return int(self._order[offset])


def report_left_out(left_out: Counter[LeftOut]) -> list[str]:
    """A line for each dataset and cause: how many samples were left out, and the shards where most were."""
    by_cause: dict[tuple[str, str, str], Counter[str]] = {}
    for (dataset, cause, shard, verb), count in left_out.items():
        by_cause.setdefault((dataset, verb, cause), Counter())[shard] += count
    lines = []
    for (dataset, verb, cause), shards in sorted(by_cause.items()):
        worst = listed([f"{shard} ({count})" for shard, count in shards.most_common()], 3)
        lines.append(f"{dataset}: {verb} {shards.total()} × {cause}: {worst}.")
    return lines


def left_out_counts(left_out: Counter[LeftOut]) -> dict[str, int]:
    """The counts of all shards together by `verb/dataset/cause`, such as "left_out/laion/an empty caption"."""
    counts: Counter[str] = Counter()
    for (dataset, cause, _, verb), count in left_out.items():
        counts[f"{verb.replace(' ', '_')}/{dataset}/{cause}"] += count
    return dict(counts)


class BatchMaker(Dataset):
    """Makes whole batches on request, in the workers. Each batch has its own seed.

    Samples of any dataset that cannot be trained on (`usable_samples`) are left out; the next one takes their place.

    balanced: batches of a stream are balanced by length. replace: False leaves a batch without them smaller.
    """

    def __init__(
        self, datasets: dict[str, Dataset], batch_size: int, seed: int, balanced: bool = False, replace: bool = True
    ) -> None:
        self.datasets, self.batch_size, self.seed = datasets, batch_size, seed
        self.balanced, self.replace = balanced, replace
        self._tallies = {name: Tally(name) for name in datasets}
        self._streams: dict[tuple[str, int], StreamBatches] = {}  # by dataset and reader
        self._last: dict[tuple[str, int], BatchRequest] = {}

    def __getitem__(self, request: BatchRequest | None) -> Made | None:
        if request is None:
            return None
        source = f"datasets.{request.dataset}" if request.dataset else "an evaluation"
        with at_batch(f"batch {request.number} of {source}"):
            return self._make(request)

    def _make(self, request: BatchRequest) -> Made:
        name, dataset = request.dataset, self.datasets[request.dataset]
        stream = self._stream(request) if request.indices is None else None
        with self._seeded(request.epoch, request.number):
            if stream:
                found = [(sample, None) for sample in stream.make(request.number)]
            else:
                found = [(sample, index) for index in request.indices for sample in self._at(name, index)]
            batch = collate_fn_of(dataset)([sample for sample, _ in found]) if found else None
        ids = [identify(sample, name, index) for sample, index in found]
        left_out = {LeftOut(name, *key): n for key, n in self._take(name).items()}
        return Made(batch, left_out, ids, stream and stream.restart())

    def _seeded(self, epoch: int, number: int) -> AbstractContextManager[None]:
        return seeded(derive_seed(self.seed, epoch, number))

    def _take(self, name: str) -> Counter[tuple[str, ...]]:
        """Counts of the samples left out since the last call."""
        left_out, dataset = self._tallies[name].take(), self.datasets[name]
        left_out.update(dataset.take_left_out() if hasattr(dataset, "take_left_out") else {})
        return left_out

    def _at(self, name: str, index: int) -> Iterator[Any]:
        """The sample at an index, or the next one that is usable; without `replace`, perhaps none."""
        dataset = self.datasets[name]
        read_now(f"sample {index}")
        if self.replace:
            following = (dataset[(index + i) % len(dataset)] for i in range(len(dataset)))
        else:  # ours put the next record in the place of a bad one themselves
            item = getattr(dataset, "item_or_none", dataset.__getitem__)(index)
            following = [] if item is None else [item]
        return islice(usable_samples(following, self._tallies[name]), 1)

    def _stream(self, request: BatchRequest) -> StreamBatches:
        """The batches of a stream. They start again in a new epoch, and in one that is begun once more."""
        name, key = request.dataset, (request.dataset, request.reader)
        last = self._last.get(key)
        if last is None or last.epoch != request.epoch or last.number >= request.number or request.restart:
            dataset, pool = self.datasets[name], POOL if self.balanced else 0
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(request.epoch)
            tally, seeded_for = self._tallies[name], partial(self._seeded, request.epoch)
            made_from = dataset, tally, self.batch_size, pool, request.reader, seeded_for
            self._streams[key] = StreamBatches(*made_from, request.restart)
            if request.restart:
                self._take(name)  # they were counted when their batches were made for the first time
        self._last[key] = request
        return self._streams[key]


def eval_loader(
    dataset: Dataset,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    most: int | None = None,
    timeout_s: float = 300.0,
) -> Iterator[dict[str, Any]]:
    """Batches of a dataset in order, every sample once; over several ranks each takes a part of the samples.

    Batches may be smaller, and a rank may have none. Random draws are the same each time.
    The dataset has a length, or is a stream with the method `one_pass`.

    most: number of samples, of a stream the first ones, otherwise spread over the dataset; None: all. timeout_s: as for
    `TrainLoader`.
    """
    if isinstance(dataset, IterableDataset):
        yield from WatchedLoader(OnePass(dataset, batch_size, rank, world_size, most), None, num_workers, timeout_s)
        return
    part = spread(len(dataset), most)[rank::world_size]
    starts = range(0, len(part), batch_size)
    plan = [BatchRequest("", 0, number, list(part[i : i + batch_size])) for number, i in enumerate(starts)]
    maker = BatchMaker({"": dataset}, batch_size, derive_seed("eval", rank), replace=False)
    loader = WatchedLoader(maker, plan, num_workers, timeout_s)
    yield from (made.batch for made in loader if made.batch is not None)


class OnePass(IterableDataset):
    """The batches of one pass over a stream, or of its first `most` samples. Ranks and workers share them."""

    def __init__(
        self, stream: IterableDataset, batch_size: int, rank: int, world_size: int, most: int | None = None
    ) -> None:
        self.stream, self.batch_size, self.rank, self.world_size = stream, batch_size, rank, world_size
        self.most = most

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.rank * workers + number, self.world_size * workers
        with at_batch("the start of an evaluation"):
            if self.most is None:
                found = self.stream.one_pass(reader, readers)
            else:  # which ones are the first must not depend on the number of readers
                found = islice(self.stream.one_pass(0, 1), reader, self.most, readers)
        samples = usable_samples(found, Tally("evaluation"))
        batch, number = [None], 0
        while batch:
            with seeded(derive_seed("eval", reader, number)), at_batch(f"batch {number} of an evaluation"):
                batch = list(islice(samples, self.batch_size))
            number += 1
            if batch:
                yield collate_fn_of(self.stream)(batch)


def collate_fn_of(dataset: Dataset) -> Callable[[list[Any]], Any]:
    """The dataset's own `collater` (LAVIS) or `collate_fn`, otherwise torch's: tensors stacked, strings in a list."""
    return getattr(dataset, "collater", None) or getattr(dataset, "collate_fn", None) or default_collate
