"""Checks of the model's files: they exist, are of the right kind, and are whole."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minigpt4.common import facts
from minigpt4.common.errors import ConfigError
from minigpt4.common.text import pluralize
from minigpt4.doctor.diagnostic import Diagnostic, error, ok, warning
from minigpt4.doctor.machine import free_disk, readable
from minigpt4.doctor.run_context import CHECKPOINT_KEYS, TOKENIZER_FILES, RunContext
from minigpt4.weights import locate

LLM = "model.llama_model"
# The first byte of a pickle, which torch.save wrote before 2020. Today it writes zip files.
PICKLE = b"\x80"


def check_paths(context: RunContext) -> Iterator[Diagnostic]:
    """Every path of the config exists."""
    try:
        context.cfg.check_paths(datasets=context.training)
    except ConfigError as mistake:
        for line in str(mistake).splitlines()[1:]:
            what, _, fix = line.strip().partition(". ")
            key, _, what = what.partition(" = ")
            if key.endswith(".features"):
                fix = f"Make it: python -m minigpt4 cache-features. {fix}"
            yield error(key, what, fix)
    else:
        yield ok("paths", "all that the config names are there")


def check_weights_files(context: RunContext) -> Iterator[Diagnostic]:
    """The files of vision side and checkpoints look like weights, as far as can be seen without torch."""
    for key, value in context.sources.items():
        path = context.local_path(key)
        if path is None:
            if key in CHECKPOINT_KEYS and Path(value).expanduser().is_dir():
                what = f"{value} is a folder without a checkpoint_N.pth"
                yield error(key, what, "Name a file, or a run's own folder.")
        elif path.is_dir():
            if not locate.shards(path):
                yield error(key, f"{value} is a folder without weights", "Name a .pth or .safetensors file.")
        elif reason := why_no_weights(path):
            yield error(key, f"{path}: {reason}", "Fetch or write it again.")


def why_no_weights(path: Path) -> str | None:
    """The reason why a weights file cannot be used, where that shows without torch."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "np"):
                return None
        except SafetensorError as problem:
            return locate.why_unreadable(path) or f"it is cut off, or no safetensors file ({problem})"
    with open(path, "rb") as file:
        is_pickle = file.read(1) == PICKLE
    return None if is_pickle or zipfile.is_zipfile(path) else locate.why_unreadable(path)


def check_contents(context: RunContext) -> Iterator[Diagnostic]:
    """The loaders can read the files of vision side and checkpoints."""
    from minigpt4.weights import checkpoint

    for key in context.sources:
        try:
            content = context.content(key)
        except checkpoint.CheckpointError as mistake:
            yield error(key, str(mistake), "Fetch or write it again.")
            continue
        if content is not None:
            tensors = checkpoint.weights_of(content).values()
            counts = f"{pluralize(len(tensors), 'tensor')}, {pluralize(sum(t.numel() for t in tensors), 'parameter')}"
            yield ok(key, f"{context.local_path(key)}: {counts}")


def check_language_model(context: RunContext) -> Iterator[Diagnostic]:
    """The language model is a whole folder in Hugging Face format, a .gguf file or a hub id."""
    value = context.model.llama_model
    path = Path(value).expanduser()
    if path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            yield ok(LLM, f"{path}: a .gguf file, not opened")
        else:
            reason = locate.why_unreadable(path) or "it is a file"
            yield error(LLM, f"{path}: {reason}", "A language model is a folder with a config.json, or a .gguf file.")
    elif path.is_dir():
        yield from _check_folder(path)
    elif context.llm_folder is not None:
        yield ok(LLM, f"{value}: in the hub's cache")
    elif facts.is_hub_id(value) and facts.offline():
        what = f"{value} is not in the hub's cache, and nothing may be fetched (HF_HUB_OFFLINE)"
        yield error(LLM, what, f"Fetch it where there is a network, or --options {LLM}=/folder/of/it")
    elif facts.is_hub_id(value):
        yield warning(LLM, f"{value} will be fetched from the hub", f"A local copy: --options {LLM}=/folder/of/it")


def _check_folder(folder: Path) -> Iterator[Diagnostic]:
    config = folder / "config.json"
    if not config.is_file():
        fix = f"Give the folder that holds config.json and the weights: --options {LLM}=/where/it/is"
        yield error(LLM, f"{folder} has no config.json, so it is no language model in Hugging Face format", fix)
        return
    try:
        names = locate.shards(folder)
    except ConfigError as mistake:
        yield error(LLM, str(mistake))
        return
    if not names:
        yield error(LLM, f"{folder} has no weights (.safetensors or .bin)", "Fetch them into it.")
        return
    missing = locate.missing_shards(folder)
    if missing:
        listed = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        yield error(LLM, f"{folder} lacks {len(missing)} of {len(names)} shards: {listed}", "Fetch them into it.")
    present = [config, *(folder / name for name in names if name not in missing)]
    broken = {path: reason for path in present if (reason := why_no_weights(path))}
    for path, reason in broken.items():
        yield error(LLM, f"{path}: {reason}", "Fetch it again.")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield error(LLM, f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)})", "Fetch it into the folder.")
    if not missing and not broken:
        size = sum(path.stat().st_size for path in present)
        yield ok(LLM, f"{folder}: {pluralize(len(names), 'file')} of weights, {readable(size)}")


def check_language_model_contents(context: RunContext) -> Iterator[Diagnostic]:
    """transformers knows the language model's config, and the loaders can read its weights."""
    try:
        context.llm  # noqa: B018
    except Exception as problem:  # whatever it is, it would end the run
        yield error(LLM, f"{context.llm_folder} cannot be read: {problem}", "Fetch its files again.")


def check_downloads(context: RunContext) -> Iterator[Diagnostic]:
    """Weights given as URLs are in the cache, or may and can be fetched."""
    for key, url in context.sources.items():
        if not facts.is_url(url) or context.local_path(key):
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
