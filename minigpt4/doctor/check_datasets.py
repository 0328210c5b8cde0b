"""Checks of the datasets: shards and the folder of stage 2. One usable sample of each source is shown."""

import os
import random
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import SEPARATOR, offline
from minigpt4.common.text import pluralize
from minigpt4.datasets.datasets.shards import expand_shards, is_local
from minigpt4.doctor.diagnostic import Diagnostic, error, ok, warning
from minigpt4.doctor.run_context import RunContext
from minigpt4.weights import locate

# How many local shards are opened, and how many samples of each are looked at. All local shards must exist.
SAMPLED_SHARDS, SAMPLES = 8, 50
# Seconds for the first sample of a URL or a command.
REMOTE_TIMEOUT = 30
LEFT_OUT = "They are left out and counted in training: docs/data.md"


def check_shards(context: RunContext) -> Iterator[Diagnostic]:
    """The shards of laion and cc_sbu exist, and the sampled ones have usable samples."""
    for name, storage in _storages(context, "laion", "cc_sbu"):
        key = f"datasets.{name}.build_info.storage"
        sources = [storage] if isinstance(storage, str) else storage
        try:
            shards = [expand_shards(source, name) for source in sources]
        except (ConfigError, OSError) as mistake:
            yield error(key, str(mistake).removeprefix(f"{key}="))
            continue
        looked_at = Looked(context)
        for of_source in shards:
            local = [shard for shard in of_source if is_local(shard)]
            count = min(max(SAMPLED_SHARDS // len(shards), 1), len(local))
            sample = random.Random(0).sample(local, count) or of_source[:1]
            looked_at.example = ""
            problems = {shard: reason for shard in sample if (reason := looked_at.why_unusable(name, shard))}
            for shard, reason in problems.items():
                share = f"{len(problems)} of {pluralize(len(sample), 'opened shard')} cannot be used whole"
                yield warning(key, f"{shard}: {reason}. {share}", "Such shards are left out; fetch them again.")
            if not looked_at.example:
                what = f"none of {pluralize(len(sample), 'shard')} can be used, e.g. {sample[0]}"
                yield error(key, what, "Is this the right folder?")
            else:
                opened = f"{pluralize(len(local), 'local shard')}; " if local else ""
                yield ok(key, f"{opened}opened {len(sample)}; {looked_at.example}")
        yield from looked_at.warnings(key)


class Looked:
    """What was seen of a dataset's samples: an example, the causes of those left out, captions with markers."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.example = ""
        self.causes: Counter[str] = Counter()
        self.captions: list[str] = []

    def why_unusable(self, name: str, shard: str) -> str | None:
        """The reason why a shard cannot be used whole. None: its samples and its end are there."""
        if is_local(shard):
            return why_no_shard(Path(shard)) or self._why_no_samples(name, shard)
        if offline() and not shard.startswith(("file:", "pipe:")):
            return "it is not looked into (HF_HUB_OFFLINE)"
        return _within(REMOTE_TIMEOUT, lambda: self._why_no_samples(name, shard))

    def _why_no_samples(self, name: str, shard: str) -> str | None:
        from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
        from minigpt4.processors import BaseProcessor

        stream = ImageTextStream([shard], BaseProcessor(), text_processor(self.context, name), name)
        example = ""
        for sample in islice(stream.part(0), SAMPLES if is_local(shard) else 1):
            text, fields = stream.text_of(sample), stream.load(sample)
            self.captions += [text] if text else []
            if text and fields and not example:
                example = shown(sample.image_id, text, fields["image"])
        self.example = example or self.example
        causes = stream.read.left_out + stream.decoded.left_out
        self.causes += causes
        if example:
            return None
        return "no usable sample: " + ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())

    def warnings(self, key: str) -> Iterator[Diagnostic]:
        """The causes for which samples are left out, and captions with markers of the prompt."""
        looked_at = len(self.captions) + self.causes.total()
        for cause, count in self.causes.most_common():
            yield warning(key, f"{count} of {pluralize(looked_at, 'sample')} looked at: {cause}", LEFT_OUT)
        marked = with_markers(self.context, self.captions)
        if marked:
            what = f"{pluralize(len(marked), 'caption')} of {len(self.captions)} with markers of the prompt, "
            what += f"such as {SEPARATOR}, e.g. {marked[0][:100]!r}"
            yield warning(key, what, "They are broken up by a space in training, as in chat.")


def text_processor(context: RunContext, name: str) -> Callable[[str], str]:
    """The text processor of a dataset in training; one that changes nothing, if another check reports a mistake."""
    from minigpt4.common.registry import registry
    from minigpt4.processors import BaseProcessor

    with suppress(Exception):
        settings = context.cfg.datasets_cfg[name].text_processor.train
        return registry.get_processor_class(settings.name).from_config(settings)
    return BaseProcessor()


def shown(image_id: str, caption: str, image: Any) -> str:
    """A sample for people."""
    caption = caption if len(caption) <= 100 else caption[:100] + "…"
    text = f"a sample: {image_id}, {image.width} x {image.height} pixels, {caption!r}"
    return text.encode("utf-8", errors="backslashreplace").decode()  # a tar's names may be in any encoding


def with_markers(context: RunContext, captions: Iterable[str]) -> list[str]:
    """The captions in which training breaks up markers of the prompt."""
    from minigpt4.models.prompt import sanitize

    tokenizer = SimpleNamespace(special_tokens={"<s>": 1, "</s>": 2})
    if context.is_ours:
        with suppress(Exception):  # another check reports it
            tokenizer = context.tokenizer or tokenizer
    captions = list(captions)
    sound = sanitize(captions, tokenizer, [context.model.get("end_sym") or "", SEPARATOR])
    return [caption for caption, other in zip(captions, sound, strict=True) if caption != other]


def _within(seconds: float, action: Callable[[], str | None]) -> str | None:
    """The result of an action that may hang."""
    results: list[str | None] = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else f"no sample within {seconds} s"


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
    from minigpt4.processors import BaseProcessor

    for name, storage in _storages(context, "cc_sbu_align"):
        key = f"datasets.{name}.build_info.storage"
        try:
            dataset = CCSBUAlignDataset(storage, BaseProcessor(), name=name)
            sample = dataset[0]
        except (ConfigError, FileNotFoundError, RuntimeError) as mistake:
            is_file = os.path.isfile(os.path.expanduser(str(storage)))
            what = f"{storage} is a file" if is_file else str(mistake).removeprefix(f"{key}=")
            yield error(key, what, "The folder holds filter_cap.json and image/: dataset/README_2_STAGE.md")
            continue
        looked_at = Looked(context)
        looked_at.causes = dataset.unusable + dataset.tally.left_out
        looked_at.captions = list(dataset.captions)
        yield from looked_at.warnings(key)
        records, per_rank = len(dataset), len(dataset) // context.world_size
        if per_rank < context.run.batch_size_train:
            what = f"{pluralize(records, 'record')}, {per_rank} for each process; "
            what += f"run.batch_size_train={context.run.batch_size_train}"
            yield error(key, what, f"--options run.batch_size_train={max(per_rank, 1)}, or add data.")
        else:
            example = shown(sample["image_id"], sample["text_input"], sample["image"])
            yield ok(key, f"{pluralize(records, 'record')}; {example}")


def check_cached_features(context: RunContext) -> Iterator[Diagnostic]:
    """The first shard of each cache of a shipped dataset has a usable sample."""
    from minigpt4.datasets.datasets.feature_dataset import FeatureStream
    from minigpt4.datasets.feature_cache import MANIFEST

    shipped = context.cfg.datasets_cfg.keys() & {"laion", "cc_sbu", "cc_sbu_align"}
    for name in sorted(shipped) if context.training else ():
        folder = context.features(name)
        if not folder or not Path(folder, MANIFEST).is_file():  # the run says so
            continue
        key = f"datasets.{name}.build_info.features"
        stream = FeatureStream(folder, str, name)
        sample = next((s for s in islice(stream.part(0), SAMPLES) if stream.load(s)), None)
        if sample is None:
            causes = stream.read.left_out + stream.decoded.left_out
            what = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
            yield error(key, f"{stream.shards[0]}: no usable sample: {what}", "Make the cache again.")
        else:
            what = f"{pluralize(stream.num_parts, 'shard')}; a sample: {sample.image_id}, {sample.caption[:100]!r}"
            yield ok(key, what)


def _storages(context: RunContext, *names: str) -> Iterator[tuple[str, str | list[str]]]:
    """(name, storage) of those datasets with these names that are trained on from pictures."""
    if not context.training:
        return
    for name in names:
        if name in context.cfg.datasets_cfg:
            storage = context.cfg.datasets_cfg[name].build_info.get("storage")
            if storage and not context.features(name):
                yield name, storage if isinstance(storage, str) else list(storage)
