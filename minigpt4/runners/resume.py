"""Whether a run goes on from a checkpoint as if it had never stopped.

A checkpoint holds the settings of its run, and under FACTS facts beside them that determine how the run goes on. Each
difference is either harmless, and reported, or it breaks exactness, and the run is refused.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from minigpt4.common import compat, facts
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import DatasetConfig, MiniGPT4Config, RunConfig
from minigpt4.common.text import pluralize
from minigpt4.runners.data import batches_per_epoch

FACTS = "facts"
"""Their key in a checkpoint."""

# A difference in these does not change the weights that are trained, or only to rounding (packed, compile). Files of
# weights may have moved: FROZEN compares their values. `max_epoch` is raised to go on with a finished run.
HARMLESS_RUN = """imports name trackers report save_every_steps save_every_minutes keep_last max_epoch batch_size_eval
    log_freq valid_splits test_splits evaluate eval_task eval_every_epochs eval_every_steps eval_samples
    best_metric output_dir packed compile device distributed dist_backend dist_url world_size gpu rank
    use_dist_eval_sampler data_timeout_s video_backend max_bad_steps timeout_minutes"""
HARMLESS_MODEL = """model_type llama_model vit_weights q_former_model ckpt load_vision prompt use_grad_checkpoint
    llm_grad_checkpoint llm_device_map device_8bit allow_llm_mismatch trust_remote_code"""
HARMLESS = {f"run.{key}" for key in HARMLESS_RUN.split()} | {f"model.{key}" for key in HARMLESS_MODEL.split()}
# They say which checkpoint to resume, and how.
OWN = ("run.resume_ckpt_path", "run.resume_anyway")
# Facts, and the settings that act through them alone.
RANKS, BATCHES, DATA, READERS = "number of ranks", "micro-batches per epoch", "data", "num_workers of streams"
FIXED_READERS = "streams that each number of workers reads in another way"
DTYPE, PROMPTS, FROZEN = "computing type", "prompts", "frozen weights"
ACT_THROUGH = {
    "run.iters_per_epoch": BATCHES,
    "run.num_workers": READERS,
    "run.amp": DTYPE,
    "run.amp_dtype": DTYPE,
    "model.prompt_path": PROMPTS,
}
# Values of a frozen tensor that are compared.
VALUES = 16
UNKNOWN = object()


def facts_of_data(cfg: Config, training: Mapping, world_size: int) -> dict[str, Any]:
    """The facts that are known before the model is built. training: the datasets by name."""
    streams = [dataset for dataset in training.values() if isinstance(dataset, IterableDataset)]
    return {
        RANKS: world_size,
        BATCHES: batches_per_epoch(cfg, training, world_size),
        DATA: [f"{name}: {_extent(dataset)}" for name, dataset in training.items()],  # batches are drawn in this order
        READERS: max(cfg.run_cfg.num_workers, 1) if streams else None,  # 0 workers read like 1
        FIXED_READERS: not all(hasattr(stream, "reader") for stream in streams),
    }


def facts_of_model(module: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """The facts about a model that is not fused or converted yet."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and not parameter.is_meta:
            values = parameter.data.reshape(-1)[:: max(1, parameter.numel() // VALUES)]
            digest.update(compat.name_in_state_dict(name).encode() + values.float().cpu().numpy().tobytes())
    return {
        DTYPE: str(dtype).removeprefix("torch."),
        PROMPTS: list(getattr(module, "prompt_list", None) or []),
        FROZEN: digest.hexdigest()[:16],
    }


def check(content: Mapping, cfg: Config, own: Mapping[str, Any], source: str) -> tuple[list[str], list[str]]:
    """The `differences`. Raises ConfigError if some break exactness, unless `run.resume_anyway` is set.

    content: of the checkpoint `source`. own: facts of this run; those that are not given are not compared.
    """
    breaking, harmless = differences(content, cfg, own)
    if breaking and not cfg.run_cfg.resume_anyway:
        raise ConfigError(
            f"run.resume_ckpt_path={source}: the run would not go on as it began, because it differs in\n  "
            + "\n  ".join(breaking)
            + "\nTake the checkpoint's values, or go on all the same: --options run.resume_anyway=True. To start a new "
            f"run from its weights: --options run.resume_ckpt_path=null model.ckpt={source}"
        )
    return breaking, harmless


def report(content: Mapping, breaking: list[str], harmless: list[str]) -> None:
    """Log the differences between a checkpoint and a run that goes on from it."""
    if not isinstance(content.get("config"), Mapping):
        logging.warning("The checkpoint holds no settings: whether this run has the same is not known.")
    if breaking:
        logging.warning("run.resume_anyway: the run goes on, although it differs in\n  %s", "\n  ".join(breaking))
    if harmless:
        logging.info("Differences that do not matter to what was trained so far:\n  %s", "\n  ".join(harmless))


def differences(content: Mapping, cfg: Config, own: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The differences that break exactness, and the harmless ones, a line each: the key, both values."""
    recorded = dict(content.get(FACTS) or {})
    if content.get("rng") is not None:
        recorded.setdefault(RANKS, len(content["rng"]))
    breaking, harmless = [], []
    for name, value in own.items():
        old = recorded.get(name, value)
        if _agrees(old, value):
            continue
        line = f"{name}: {old!r} in the checkpoint, {value!r} here"
        if name == RANKS:
            inexact = "The samples of a step and the random numbers are not those of a run without interruption"
            harmless.append(f"{line}. {inexact}")
        elif name != READERS or own.get(FIXED_READERS):
            breaking.append(line)
    for key, old, new in _config_differences(content.get("config"), cfg.to_dict()):
        is_harmless = key in HARMLESS or ACT_THROUGH.get(key) in recorded
        if key == "run.max_epoch":  # the length of the schedule, unless the run was finished
            is_harmless = content.get("epoch", 0) + 1 >= old and not content.get("batches")
        (harmless if is_harmless else breaking).append(f"{key}: {old!r} in the checkpoint, {new!r} here")
    return breaking, harmless


def _agrees(recorded: Any, value: Any) -> bool:
    """Whether a fact is the same. Of data, checkpoints of earlier versions may lack the digest at the end."""
    if isinstance(recorded, list) and isinstance(value, list) and len(recorded) == len(value):
        return all(new == old or str(new).startswith(f"{old}, ") for old, new in zip(recorded, value, strict=True))
    return recorded == value


def _config_differences(old: Any, new: Mapping) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in the checkpoint, value here) of the settings that differ."""
    if not isinstance(old, Mapping):
        return
    for section, schema in (("run", RunConfig), ("model", MiniGPT4Config)):
        before, now = (_with_effective_load_in(config.get(section) or {}) for config in (old, new))
        for key in before | now:
            # Checkpoints of other releases lack some keys. If there is no default either, nothing can be compared.
            default = getattr(schema, key, UNKNOWN)
            was, value = before.get(key, default), now.get(key, default)
            comparable = was is not UNKNOWN and value is not UNKNOWN and f"{section}.{key}" not in OWN
            if comparable and was != value:
                yield f"{section}.{key}", was, value
    sections = [config.get("datasets") or {} for config in (old, new)]
    before, now = (_flat(section, "datasets") for section in sections)
    builders = {name: section.get("builder") or name for each in sections for name, section in each.items()}
    for key in before | now:
        values = before.get(key), now.get(key)
        other_files = key.endswith(".build_info.val") and not any(isinstance(value, float) for value in values)
        if _is_trained_on(key, builders.get(key.split(".")[1], "")) and values[0] != values[1] and not other_files:
            yield key, *values


def _with_effective_load_in(section: Mapping) -> dict[str, Any]:
    """A section in which `low_resource` is part of `load_in`."""
    section = dict(section)
    low_resource = section.pop("low_resource", False)
    return section | {"load_in": facts.load_in(section.get("load_in"), low_resource)}


def _flat(settings: Mapping, prefix: str) -> dict[str, Any]:
    """The innermost values by dotted key."""
    flat = {}
    for name, value in settings.items():
        key = f"{prefix}.{name}"
        if isinstance(value, str) and prefix.endswith(".build_info"):
            value = os.path.realpath(os.path.expanduser(value)) if os.path.exists(os.path.expanduser(value)) else value
        flat |= _flat(value, key) if isinstance(value, Mapping) else {key: value}
    return {key: value for key, value in flat.items() if value is not None and value != _default(key)}


def _default(key: str) -> Any:
    return getattr(DatasetConfig, key.rpartition(".")[2], None) if key.count(".") == 2 else None


def _is_trained_on(key: str, builder: str) -> bool:
    """Whether a key of a dataset's section has a say in training."""
    _, _, name, *rest = key.split(".")
    if name == "text_processor" and builder in ("cc_sbu_align", "conversation"):
        return False  # they take texts as they are
    return name not in ("data_type", "type") and not (name.endswith("_processor") and rest[:1] == ["eval"])


def _extent(dataset: Any) -> str:
    """The size of a dataset, and the digest of its content if it has one."""
    if isinstance(dataset, IterableDataset):
        parts = getattr(dataset, "num_parts", None)
        extent = "a stream" if parts is None else pluralize(parts, "shard")
    else:
        extent = pluralize(len(dataset), "sample")
    digest = getattr(dataset, "digest", None)
    return f"{extent}, {digest()}" if digest else extent
