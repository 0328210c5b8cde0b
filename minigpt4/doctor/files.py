"""Checks of files: are they there, of the right kind, whole, and is there room for what will be written?"""

import json
import os
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

from minigpt4.common import facts
from minigpt4.common.errors import ConfigError
from minigpt4.common.text import pluralize
from minigpt4.datasets.datasets.shards import expand_shards, is_local
from minigpt4.doctor.annotations import read_records
from minigpt4.doctor.case import RunContext
from minigpt4.doctor.estimate import trainable_parameters
from minigpt4.doctor.findings import Diagnostic, error, ok, warning
from minigpt4.doctor.headers import HeaderError, numel, read_header, tensors_of
from minigpt4.doctor.machine import free_disk, is_writable, readable
from minigpt4.weights import locate

# Shards that are opened; all are looked for.
SAMPLED_SHARDS = 8


def check_paths(case: RunContext) -> Iterator[Diagnostic]:
    """Every path of the config exists."""
    try:
        case.cfg.check_paths()
    except ConfigError as mistake:
        for line in str(mistake).splitlines()[1:]:
            what, _, fix = line.strip().partition(". ")
            key, _, what = what.partition(" = ")
            yield error(key, what, fix)
    else:
        yield ok("paths", "all that the config names are there")


def check_weights_files(case: RunContext) -> Iterator[Diagnostic]:
    """The encoder's, the Q-Former's and the trained weights are files that can be read to their ends."""
    for key, value in case.sources.items():
        local = not facts.is_url(value)
        path = case.file(key)
        if path is None:
            if local and Path(value).expanduser().is_dir():
                if key == "model.ckpt" or key == "run.resume_ckpt_path":
                    what = f"{value} is a folder without a checkpoint_N.pth"
                    yield error(key, what, "Name a file, or a run's own folder.")
                elif not locate.shards(Path(value).expanduser()):
                    what = f"{value} is a folder without weights"
                    yield error(key, what, "Name a .pth or .safetensors file.")
            continue
        yield _look_into(key, path)


def _look_into(key: str, path: Path) -> Diagnostic:
    try:
        tensors = tensors_of(read_header(path))
    except HeaderError as problem:
        if problem.needs_torch:
            return ok(key, f"{path}: not looked into; {problem}")
        return error(key, f"{path}: {locate.why_unreadable(path) or problem}", "Fetch or write it again.")
    return ok(key, f"{path}: {pluralize(len(tensors), 'tensor')}, {pluralize(numel(tensors), 'parameter')}")


def check_language_model(case: RunContext) -> Iterator[Diagnostic]:
    """The language model is a whole folder in Hugging Face format, a .gguf file or a hub id."""
    key, value = "model.llama_model", case.model.llama_model
    path = Path(value).expanduser()
    if path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            yield ok(key, f"{path}: a .gguf file; not looked into")
        else:
            reason = locate.why_unreadable(path) or "it is a file"
            yield error(key, f"{path}: {reason}", "A language model is a folder with a config.json, or a .gguf file.")
    elif path.is_dir():
        yield from _check_folder(key, path)
    elif case.llm_folder is not None:
        yield ok(key, f"{value}: in the hub's cache")
    elif facts.is_hub_id(value) and facts.offline():
        what = f"{value} is not in the hub's cache, and nothing may be fetched (HF_HUB_OFFLINE)"
        yield error(key, what, f"Fetch it where there is a network, or --options {key}=/folder/of/it")
    elif facts.is_hub_id(value):
        yield warning(key, f"{value} will be fetched from the hub", f"A local copy: --options {key}=/folder/of/it")


def _check_folder(key: str, folder: Path) -> Iterator[Diagnostic]:
    if not (folder / "config.json").is_file():
        fix = f"Give the folder that holds config.json and the weights: --options {key}=/where/it/is"
        yield error(key, f"{folder} has no config.json, so it is no language model in Hugging Face format", fix)
        return
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = locate.shards(folder)
    except ConfigError as mistake:
        yield error(key, str(mistake))
        return
    except ValueError as problem:
        reason = locate.why_unreadable(folder / "config.json") or f"it is not JSON ({problem})"
        yield error(key, f"{folder / 'config.json'}: {reason}", "Fetch it again.")
        return
    if not names:
        yield error(key, f"{folder} has no weights (.safetensors or .bin)", "Fetch them into it.")
        return
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        listed = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        yield error(key, f"{folder} lacks {len(missing)} of {len(names)} shards: {listed}", "Fetch them into it.")
    broken = [
        f for f in (_look_into(key, folder / name) for name in names if name not in missing) if f.status == "error"
    ]
    yield from broken
    tokenizers = ("tokenizer.model", "tokenizer.json", "vocab.json")
    if not any((folder / name).is_file() for name in tokenizers):
        yield error(key, f"{folder} has no tokenizer ({', '.join(tokenizers)})", "Fetch it into the folder.")
    if not missing and not broken:
        size = sum((folder / name).stat().st_size for name in names)
        yield ok(key, f"{folder}: {pluralize(len(names), 'file')} of weights, {readable(size)}")


def check_downloads(case: RunContext) -> Iterator[Diagnostic]:
    """Weights given as URLs are in the cache, or may and can be fetched."""
    for key, url in case.sources.items():
        if not facts.is_url(url) or case.file(key):
            continue
        target = locate.cached_file(url)
        size = facts.PUBLISHED_KIB.get(url, 0) * 1024
        by_hand = f"Put the file of {url} at {target}, or --options {key}=/where/it/is"
        if facts.offline():
            yield error(key, f"{target.name} is not in the cache, and nothing may be fetched (HF_HUB_OFFLINE)", by_hand)
        elif free_disk(target) < size:
            what = f"{target.name} will be fetched: {readable(size)}, and {readable(free_disk(target))} are free"
            yield error(key, what, "Make room, or set TORCH_HOME to another disk.")
        else:
            yield warning(key, f"{target.name} is not in the cache and will be fetched, {readable(size)}", by_hand)


def check_shards(case: RunContext) -> Iterator[Diagnostic]:
    """The shards of laion and cc_sbu are there; a few of them are opened."""
    for name, storage in _storages(case, "laion", "cc_sbu"):
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
            opened = f"; looked into {len(sample)}" if sample else ""
            yield ok(key, f"{pluralize(len(shards), 'local shard')}{opened}")


def why_no_shard(path: Path) -> str | None:
    """What is wrong with a tar of samples; None: its first sample is whole and so is its end."""
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


def check_folder_dataset(case: RunContext) -> Iterator[Diagnostic]:
    """cc_sbu_align has its list, its pictures, and enough records for a batch."""
    for name, storage in _storages(case, "cc_sbu_align"):
        key = f"datasets.{name}.build_info.storage"
        folder = Path(str(storage)).expanduser()
        if not folder.is_dir():
            what = f"{storage} {'is a file' if folder.exists() else 'does not exist'}"
            yield error(key, what, f"Name the folder of filter_cap.json and image/: --options {key}=/where/it/is")
            continue
        records, problem = read_records(folder)
        if problem:
            yield error(key, problem, "The folder holds filter_cap.json and image/: dataset/README_2_STAGE.md")
            continue
        per_rank = records // case.world_size
        if per_rank < case.run.batch_size_train:
            what = f"{pluralize(records, 'record')}, {per_rank} for each process; "
            what += f"run.batch_size_train={case.run.batch_size_train}"
            yield error(key, what, f"--options run.batch_size_train={max(per_rank, 1)}, or add data.")
        else:
            yield ok(key, pluralize(records, "record"))


def check_features(case: RunContext) -> Iterator[Diagnostic]:
    """Caches of image features are there."""
    if not case.training:
        return
    for name in case.cfg.datasets_cfg:
        key, value = f"datasets.{name}.build_info.features", case.features(name)
        if value is None:
            continue
        if Path(str(value)).expanduser().exists():
            yield ok(key, f"{value} is there")
        else:
            what = f"{value} does not exist"
            yield error(key, what, f"Make it: python -m minigpt4 cache-features, or --options {key}=/where/it/is")


def _storages(case: RunContext, *names: str):
    """(name, storage) of the datasets with these names, in training."""
    if not case.training:
        return
    for name in names:
        if name in case.cfg.datasets_cfg:
            storage = case.cfg.datasets_cfg[name].build_info.get("storage")
            if storage and not case.features(name):
                yield name, storage if isinstance(storage, str) else list(storage)


def check_output(case: RunContext) -> Iterator[Diagnostic]:
    """The output folder can be written to and has room for the checkpoints."""
    if not case.training:
        return
    folder, key = Path(case.run.output_dir).expanduser(), "run.output_dir"
    if not is_writable(folder):
        fix = f"--options {key}=/where/there/is/room"
        yield error(key, f"{folder.absolute()} cannot be written to", fix)
        return
    # weights and AdamW's two averages, float32
    each = 12 * trainable_parameters(case)
    needed, free = each * case.run.max_epoch, free_disk(folder)
    what = f"{readable(free)} are free"
    if each:
        what = f"{pluralize(case.run.max_epoch, 'checkpoint')} of {readable(each)}, and {what}"
    if free < needed:
        yield error(key, what, f"Make room, or --options {key}=/where/there/is/room")
    else:
        yield ok(key, what)
