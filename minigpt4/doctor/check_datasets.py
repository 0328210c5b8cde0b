"""Checks of the datasets: shards and the folder of stage 2."""

import os
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.common.text import pluralize
from minigpt4.datasets.datasets.shards import expand_shards, is_local
from minigpt4.doctor.diagnostic import Diagnostic, error, ok, warning
from minigpt4.doctor.run_context import RunContext
from minigpt4.weights import locate

# How many shards are opened. All of them must exist.
SAMPLED_SHARDS = 8


def check_shards(context: RunContext) -> Iterator[Diagnostic]:
    """The shards of laion and cc_sbu exist, and the sampled ones can be read."""
    for name, storage in _storages(context, "laion", "cc_sbu"):
        key = f"datasets.{name}.build_info.storage"
        try:
            shards = [shard for shard in expand_shards(storage, name) if is_local(shard)]
        except (ConfigError, OSError) as mistake:
            yield error(key, str(mistake).removeprefix(f"{key}="))
            continue
        sample = random.Random(0).sample(shards, min(SAMPLED_SHARDS, len(shards)))
        problems = {shard: reason for shard in sample if (reason := why_no_shard(Path(shard)))}
        for shard, reason in problems.items():
            share = f"{len(problems)} of {pluralize(len(sample), 'opened shard')} cannot be used whole"
            yield warning(key, f"{shard}: {reason}. {share}", "Such shards are left out; fetch them again.")
        if sample and len(problems) == len(sample):
            yield error(key, f"none of {pluralize(len(sample), 'shard')} can be used", "Is this the right folder?")
        elif not problems:
            opened = f"; opened {len(sample)}" if sample else ""
            yield ok(key, f"{pluralize(len(shards), 'local shard')}{opened}")


def why_no_shard(path: Path) -> str | None:
    """The reason why a tar of samples cannot be used whole. None: its first sample and its end are there."""
    reason = locate.why_unreadable(path)
    if reason:
        return reason
    try:
        with tarfile.open(path) as tar:
            first = tar.next()
        with open(path, "rb") as file:
            file.seek(-min(1024, path.stat().st_size), os.SEEK_END)
            end = file.read()
    except (tarfile.TarError, OSError, EOFError) as problem:
        return f"it is no tar ({problem})"
    if first is None:
        return "it has no samples"
    return "it is cut off" if path.suffix == ".tar" and end.strip(b"\0") else None


def check_records(context: RunContext) -> Iterator[Diagnostic]:
    """cc_sbu_align has its list, its pictures, and enough records for a batch."""
    from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset

    for name, storage in _storages(context, "cc_sbu_align"):
        key = f"datasets.{name}.build_info.storage"
        try:
            records = len(CCSBUAlignDataset(storage, vis_processor=None, name=name))
        except (ConfigError, FileNotFoundError) as mistake:
            is_file = os.path.isfile(os.path.expanduser(str(storage)))
            what = f"{storage} is a file" if is_file else str(mistake).removeprefix(f"{key}=")
            yield error(key, what, "The folder holds filter_cap.json and image/: dataset/README_2_STAGE.md")
            continue
        per_rank = records // context.world_size
        if per_rank < context.run.batch_size_train:
            what = f"{pluralize(records, 'record')}, {per_rank} for each process; "
            what += f"run.batch_size_train={context.run.batch_size_train}"
            yield error(key, what, f"--options run.batch_size_train={max(per_rank, 1)}, or add data.")
        else:
            yield ok(key, pluralize(records, "record"))


def _storages(context: RunContext, *names: str) -> Iterator[tuple[str, str | list[str]]]:
    """(name, storage) of those datasets with these names that are trained on from pictures."""
    if not context.training:
        return
    for name in names:
        if name in context.cfg.datasets_cfg:
            storage = context.cfg.datasets_cfg[name].build_info.get("storage")
            if storage and not context.features(name):
                yield name, storage if isinstance(storage, str) else list(storage)
