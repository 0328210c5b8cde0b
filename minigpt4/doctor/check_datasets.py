"""Checks of the datasets: shards and the folder of stage 2. One usable sample of each source is shown."""

import os
import random
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from minigpt4.common.config_files import shipped_datasets
from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import offline
from minigpt4.common.text import pluralize
from minigpt4.datasets.datasets.shards import expand_shards, is_local
from minigpt4.doctor.diagnostic import Diagnostic, error, ok, warning
from minigpt4.doctor.run_context import RunContext
from minigpt4.weights import locate

# How many shards are opened, and how many samples of each are looked at. All local shards must exist.
SAMPLED_SHARDS, SAMPLES = 8, 50
# Seconds for the first sample of a URL or a command.
REMOTE_TIMEOUT = 30


def check_shards(context: RunContext) -> Iterator[Diagnostic]:
    """The shards of laion and cc_sbu exist, and the sampled ones have usable samples."""
    for name, key, storage in _storages(context, "laion", "cc_sbu"):
        sources = [storage] if isinstance(storage, str) else storage
        try:
            shards_of_sources = [expand_shards(source, name) for source in sources]
        except (ConfigError, OSError) as mistake:
            what = str(mistake).replace("build_info.storage", key.removeprefix(f"datasets.{name}."))
            yield error(key, what.removeprefix(f"{key}="))
            continue
        looks: list[Look] = []
        for shards in shards_of_sources:
            sample = random.Random(0).sample(shards, min(SAMPLED_SHARDS, len(shards)) if is_local(shards[0]) else 1)
            of_source = [look_into(context, name, shard) for shard in sample]
            problems = {shard: look.problem for shard, look in zip(sample, of_source, strict=True) if look.problem}
            for shard, reason in problems.items():
                share = f"{len(problems)} of {pluralize(len(sample), 'opened shard')} cannot be used whole"
                yield warning(key, f"{shard}: {reason}. {share}", "Such shards are left out; fetch them again.")
            if example := next((look.example for look in of_source if look.example), None):
                yield ok(key, f"{pluralize(len(shards), 'shard')}; opened {len(sample)}; a sample: {example}")
            else:
                what = f"none of {pluralize(len(sample), 'shard')} can be used, e.g. {sample[0]}"
                yield error(key, what, "Is this the right folder?")
            looks += of_source
        causes = sum((look.causes for look in looks), Counter())
        yield from cause_warnings(key, causes, sum(len(look.captions) for look in looks))


@dataclass
class Look:
    """What was seen in a shard."""

    problem: str | None = None
    """Why it cannot be used whole."""
    example: str = ""
    """A usable sample."""
    captions: list[str] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)
    """Of the samples left out."""

    def read(self, stream, samples: int) -> None:
        """Look at the first samples of a stream's first shard."""
        try:
            for sample in islice(stream.part(0), samples):
                text, fields = stream.text_of(sample), stream.load(sample)
                self.captions += [text] if text else []
                if text and fields:
                    self.example = self.example or _shown(sample.image_id, text)
        except Exception as error:  # of a plug-in's processor, in a thread
            self.problem = f"{type(error).__name__}: {error}"
            return
        self.causes = stream.read.left_out + stream.decoded.left_out
        counts = ", ".join(f"{count} × {cause}" for cause, count in self.causes.most_common())
        self.problem = None if self.example else f"no usable sample: {counts}"


def look_into(context: RunContext, name: str, shard: str) -> Look:
    """A look into a shard of laion or cc_sbu. Of a URL or a command only the first sample is read, within 30 s."""
    from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
    from minigpt4.processors import BaseProcessor

    problem = why_no_shard(Path(shard)) if is_local(shard) else "it is not looked into: --offline" if offline() else ""
    look = Look(problem or f"no sample within {REMOTE_TIMEOUT} s")
    if not problem:
        stream = ImageTextStream([shard], BaseProcessor(), _text_processor(context, name), name)
        if is_local(shard):
            look.read(stream, SAMPLES)
        else:
            reading = threading.Thread(target=look.read, args=(stream, 1), daemon=True)
            reading.start()
            reading.join(REMOTE_TIMEOUT)
    return look


def _text_processor(context: RunContext, name: str):
    from minigpt4.processors import BaseProcessor

    builder = context.cfg.builder_class(name)(context.cfg.datasets_cfg[name])
    with suppress(Exception):  # another check reports it
        builder.build_processors()
    return builder.text_processors.get("train", BaseProcessor())


def _shown(image_id: str, caption: str) -> str:
    # A tar's names may be in any encoding.
    return f"{image_id}: {caption[:100]!r}".encode("utf-8", errors="backslashreplace").decode()


def cause_warnings(key: str, causes: Counter[str], usable: int) -> Iterator[Diagnostic]:
    """The causes for which samples are left out."""
    total = pluralize(usable + causes.total(), "sample")
    for cause, count in causes.most_common():
        yield warning(key, f"{count} of {total} looked at: {cause}", "They are left out and counted: docs/data.md")


def why_no_shard(path: Path) -> str | None:
    """The reason why a tar of samples cannot be used whole. None: its first member and its end are there."""
    from minigpt4.datasets.datasets.tar_reader import unpacker

    reason = locate.why_unreadable(path)
    if reason:
        return reason
    try:
        with tarfile.open(path) as tar:
            first = tar.next()
        with open(path, "rb") as file:
            compressed = unpacker(file.read(8))
            file.seek(-min(1024, path.stat().st_size), os.SEEK_END)
            end = file.read()
    except (tarfile.TarError, OSError, EOFError) as problem:
        return "it is no tar" if isinstance(problem, tarfile.ReadError) else f"it is no tar ({problem})"
    if first is None:
        return "it has no samples"
    return "it is cut off" if not compressed and end.strip(b"\0") else None


def check_records(context: RunContext) -> Iterator[Diagnostic]:
    """cc_sbu_align has its list, its pictures, usable captions, and enough records for a batch."""
    from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset
    from minigpt4.datasets.splits import Share
    from minigpt4.processors import BaseProcessor

    for name, key, storage in _storages(context, "cc_sbu_align"):
        try:
            dataset = CCSBUAlignDataset(storage, BaseProcessor(), name=name)
            sample, val = dataset[0], context.cfg.datasets_cfg[name].build_info.get("val")
            share = Share(val, is_val=False) if isinstance(val, float) and key.endswith("storage") else None
            trained = len(dataset.select(share))
        except (ConfigError, FileNotFoundError, RuntimeError) as mistake:
            is_file = os.path.isfile(os.path.expanduser(str(storage)))
            what = f"{storage} is a file" if is_file else str(mistake).removeprefix(f"{key}=")
            yield error(key, what, "The folder holds filter_cap.json and image/: dataset/README_2_STAGE.md")
            continue
        yield from cause_warnings(key, dataset.unusable + dataset.tally.left_out, len(dataset.captions))
        records, per_rank = pluralize(len(dataset), "record"), trained // context.world_size
        records += f", {len(dataset) - trained} of them in val" if share else ""
        if per_rank < context.run.batch_size_train and key.endswith("storage"):
            what = f"{records}, {per_rank} for each process; "
            what += f"run.batch_size_train={context.run.batch_size_train}"
            yield error(key, what, f"--options run.batch_size_train={max(per_rank, 1)}, or add data.")
        else:
            example = _shown(sample["image_id"], sample["text_input"])
            yield ok(key, f"{records}; a sample: {example}")


def check_cached_features(context: RunContext) -> Iterator[Diagnostic]:
    """The first shard of each cache of a shipped dataset has a usable sample."""
    from minigpt4.datasets.datasets.feature_dataset import FeatureStream
    from minigpt4.datasets.feature_cache import MANIFEST

    cached = [name for name in context.cfg.datasets_cfg if context.cfg.builder(name) in shipped_datasets()]
    for name in sorted(cached) if context.training else ():
        folder = context.features(name)
        if not folder or not Path(folder, MANIFEST).is_file():  # the run says so
            continue
        key, stream, look = f"datasets.{name}.build_info.features", FeatureStream(folder, str, name), Look()
        look.read(stream, SAMPLES)
        if look.problem:
            yield error(key, f"{stream.shards[0]}: {look.problem}", "Make the cache again.")
        else:
            yield ok(key, f"{pluralize(stream.num_parts, 'shard')}; a sample: {look.example}")


def check_conversations(context: RunContext) -> Iterator[Diagnostic]:
    """The files of each dataset of the builder `conversation` have no mistake; a sample of each is shown."""
    from minigpt4.datasets.loaders import check_sizes
    from minigpt4.models.template import join_parts

    names = [name for name in context.cfg.datasets_cfg if context.cfg.builder(name) == "conversation"]
    for name in names if context.training else ():
        key = f"datasets.{name}.build_info"
        try:
            dataset = context.training_dataset(name)
            sample = next(iter(dataset))
        except (ConfigError, RuntimeError) as mistake:
            yield error(
                key, str(mistake), "python -m minigpt4 data check lists all. docs/own_data.md shows each format."
            )
            continue
        try:
            check_sizes({name: dataset}, [1.0], context.run.batch_size_train, context.world_size)
        except ConfigError as too_few:  # the message has the fix
            yield error(key, str(too_few))
            continue
        (_, asked), (_, answer) = sample["text_input"][-2:]
        size = pluralize(len(dataset), "record") if hasattr(dataset, "__len__") else "a stream"
        yield ok(key, f"{size}; a sample: {_shown(sample['image_id'], f'{join_parts(asked)} → {answer[0]}')}")


def _storages(context: RunContext, *names: str) -> Iterator[tuple[str, str, str | list[str]]]:
    """(name, key, files) of those datasets with these builders that are read from pictures: `storage`, and `val`."""
    if not context.training:
        return
    for name in context.cfg.datasets_cfg:
        if context.cfg.builder(name) in names:
            for key in ("storage", "val"):
                files = context.cfg.datasets_cfg[name].build_info.get(key)
                if files and not isinstance(files, float | int) and not context.features(name):
                    yield name, f"datasets.{name}.build_info.{key}", files if isinstance(files, str) else list(files)
