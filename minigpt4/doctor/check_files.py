"""Checks of the model's files: they exist, are of the right kind, and are whole."""

from collections.abc import Iterator
from pathlib import Path

from minigpt4.common import facts
from minigpt4.common.errors import ConfigError
from minigpt4.common.text import pluralize
from minigpt4.doctor.diagnostic import Diagnostic, error, ok, warning
from minigpt4.doctor.machine import free_disk, readable
from minigpt4.doctor.run_context import TOKENIZER_FILES, RunContext
from minigpt4.weights import fingerprint, gguf, locate

LLM = "model.llama_model"
REFETCH = "Fetch or write it again, or name another file or folder."


def check_paths(context: RunContext) -> Iterator[Diagnostic]:
    """Every path of the config exists."""
    missing = list(context.cfg.missing_paths(datasets=context.training))
    for key, what, fix in missing:
        if key.endswith(".features"):
            fix = f"Make it: python -m minigpt4 cache-features. {fix}"
        yield error(key, what, fix)
    if not missing:
        yield ok("paths", "all that the config names are there")


def check_headers(context: RunContext) -> Iterator[Diagnostic]:
    """The files of weights are whole, as far as their headers tell."""
    for key, path in context.weights_paths.items():
        try:
            files = [path / name for name in locate.shards(path)] if path.is_dir() else [path]
        except ConfigError as mistake:
            yield error(key, str(mistake))
            continue
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            yield error(key, f"{path} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}", REFETCH)
        for file in files:
            if file.is_file() and (reason := locate.broken_header(file)):
                yield error(key, f"{file}: {reason}", REFETCH)


def check_weights_files(context: RunContext) -> Iterator[Diagnostic]:
    """The loaders can read the files of vision side and checkpoints."""
    from minigpt4.runners import entries
    from minigpt4.weights import checkpoint

    for key, source in context.sources.items():
        try:
            content = context.content(key)
            if content is None:
                continue
            tensors = checkpoint.weights_of(content, source).values()
            names = entries.ENTRIES if key == "run.resume_ckpt_path" else ("config", fingerprint.KEY)
            entries.check_entries(content, source, names)
        except (ConfigError, OSError) as mistake:
            yield error(key, str(mistake), REFETCH)
        else:
            counts = f"{pluralize(len(tensors), 'tensor')}, {pluralize(sum(t.numel() for t in tensors), 'parameter')}"
            yield ok(key, f"{source}: {counts}")


def check_numbers(context: RunContext) -> Iterator[Diagnostic]:
    """All numbers in the files of vision side and checkpoints are finite. The run looks at them as it loads them."""
    from minigpt4.runners import entries
    from minigpt4.weights import checkpoint

    for key, source in context.sources.items():
        content = context.content(key) or {}
        used = {name: value for name, value in content.items() if name not in ("config", "best_metric")}
        numbers = ((name.removeprefix("."), value) for name, value in entries.numbers_in(used, ""))
        try:
            checkpoint.check_finite(numbers, source)
        except ConfigError as mistake:
            yield error(key, str(mistake), REFETCH)


def check_language_model(context: RunContext) -> Iterator[Diagnostic]:
    """The language model is a folder, a .gguf file, or a hub id that can be fetched."""
    value = context.model.llama_model
    path, copy = Path(value).expanduser(), f"--options {LLM}=/folder/of/it"
    if path.is_file() and facts.is_gguf(value):
        yield from _check_gguf(path)
    elif path.is_file():
        reason = locate.why_unreadable(path) or "it is a file"
        yield error(LLM, f"{path}: {reason}", "A language model is a folder with a config.json, or a .gguf file.")
    elif context.llm_folder is None and facts.is_hub_id(value):
        if facts.offline():
            what = f"{value} is not in the hub's cache, and nothing may be fetched (HF_HUB_OFFLINE)"
            yield error(LLM, what, f"Fetch it where there is a network, or {copy}")
        else:
            yield warning(LLM, f"{value} will be fetched from the hub", f"A local copy: {copy}")


def _check_gguf(path: Path) -> Iterator[Diagnostic]:
    """The header of a .gguf file: it is whole, and has the sizes of a language model and a tokenizer."""
    try:
        header = gguf.read_header(path)
    except ConfigError as mistake:
        yield error(LLM, f"{locate.why_unreadable(path) or mistake}", REFETCH)
        return
    tokens, kind = header.fields.get("tokenizer.ggml.tokens"), header.fields.get("tokenizer.ggml.model")
    sizes = {"layers": header.size("block_count"), "wide": header.size("embedding_length")}
    if not tokens or None in sizes.values() or gguf.EMBEDDING not in header.tensors:
        what = f"{path}: a .gguf file of the kind {header.architecture!r}, without the tokenizer or sizes of a decoder"
        yield error(LLM, what, "Name the file of the language model itself.")
        return
    described = ", ".join(f"{size} {unit}" for unit, size in sizes.items())
    template = "a" if "tokenizer.chat_template" in header.fields else "no"
    yield ok(
        LLM,
        f"{path}: {header.architecture}, {described}, {gguf.parameter_count(header) / 1e6:,.0f} M parameters in "
        f"{readable(path.stat().st_size)}; tokenizer {kind} with {len(tokens)} tokens; {template} chat template for "
        "model.template=auto",
    )


def check_remote_code(context: RunContext) -> Iterator[Diagnostic]:
    """The language model's own Python files are run only where the config says so."""
    if context.llm_folder is None or not context.model.trust_remote_code:
        return
    files = sorted(file.name for file in context.llm_folder.glob("*.py"))
    if files:
        what = f"{', '.join(files)} of {context.llm_folder} may be run, and can do whatever you can"
        yield warning("model.trust_remote_code", what, "Read them, or --options model.trust_remote_code=False")


def check_language_model_contents(context: RunContext) -> Iterator[Diagnostic]:
    """transformers knows the language model's config, and the loaders can read its weights and its tokenizer."""
    if context.llm_source is None:
        return
    folder = Path(context.llm_source)
    try:
        tensors = context.llm.tensors
        context.tokenizer  # noqa: B018
    except Exception as problem:  # the libraries share no base class
        config = folder / "config.json"
        pointer = locate.why_unreadable(config) if config.is_file() else None
        reason = f"{config}: {pointer}" if pointer else problem
        yield error(LLM, f"{folder} cannot be read: {reason}", "" if "trust_remote_code" in str(reason) else REFETCH)
        return
    if context.llm_folder and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield error(LLM, f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)})", "Fetch it into the folder.")
    size = sum(tensor.nbytes for tensor in tensors.values()) if context.llm_folder else folder.stat().st_size
    yield ok(LLM, f"{folder}: {pluralize(len(tensors), 'tensor')}, {readable(size)}")


def check_downloads(context: RunContext) -> Iterator[Diagnostic]:
    """Weights given as URLs are in the cache, or may and can be fetched."""
    for key, url in context.sources.items():
        if context.is_here(key):
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
