"""The parts of MiniGPT4 that train: those that a config asks for, and those in a checkpoint.

torch is not imported here. The loaders find this in the registry, so that a reader of the model need not.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any

from minigpt4.common.errors import ConfigError, check_names
from minigpt4.common.facts import is_adapter
from minigpt4.common.model_schema import LoraSettings, MiniGPT4Config
from minigpt4.common.registry import registry
from minigpt4.common.schema import LrGroup, RunConfig

LORA = "lora"
# The parts by the names of `model.train`, and the beginnings of their parameters' names; beside them, adapters.
PARTS = {
    "projector": "llama_proj",
    "query_tokens": "query_tokens",
    "qformer": "Qformer",
    "vit": "visual_encoder",
    "ln_vision": "ln_vision",
}
FROZEN_BY = {"freeze_vit": ("vit", "ln_vision"), "freeze_qformer": ("qformer", "query_tokens")}


def part_of(parameter: str) -> str:
    """The part that a parameter belongs to; for a plug-in's own, the first component of its name."""
    if is_adapter(parameter):
        return LORA
    first = parameter.partition(".")[0]
    return next((part for part, beginning in PARTS.items() if beginning == first), first)


def rates_of_parts(run_cfg: RunConfig) -> dict[str, LrGroup]:
    """The rates of each part that `run.lr_groups` names, completed from `run:`.

    Raises ConfigError for a lowest rate above the highest.
    """
    found = {}
    for part, given in (run_cfg.lr_groups or {}).items():
        rates = found[part] = LrGroup(**{key.name: given.get(key.name, run_cfg[key.name]) for key in fields(LrGroup)})
        if rates.min_lr > rates.init_lr:
            raise ConfigError(
                f"run.lr_groups.{part}: min_lr={rates.min_lr} must be at most init_lr={rates.init_lr}. A rate that is "
                "not given is that of run:; set both."
            )
    return found


@registry.register("trained_parts", "mini_gpt4")
class TrainedParts:
    """The trained parts that a `model:` section asks for.

    `names` are the parts that train, `lora` the settings of the adapters or None, and `record` names the parts that
    differ from the paper's one linear layer, as a checkpoint does under "projector" and "lora".

    Raises ConfigError for settings that contradict each other.
    """

    def __init__(self, model_cfg: MiniGPT4Config):
        self.lora = _lora_settings(model_cfg)
        self.names = _names(model_cfg, with_adapters=self.lora is not None)
        self.record: dict[str, Any] = {}
        if model_cfg.projector != "linear":
            self.record["projector"] = model_cfg.projector
        if self.lora:
            settings = asdict(self.lora) | {"target_modules": sorted(self.lora.target_modules)}
            self.record["lora"] = {key: value for key, value in settings.items() if key != "dropout"}

    def check(self, trained: Mapping[str, Any], recorded: Any, source: str) -> None:
        """`check_parts` with the parts of this config."""
        check_parts(trained, recorded, self.record, source)


def _names(model_cfg: MiniGPT4Config, with_adapters: bool) -> Collection[str]:
    """The parts that train, from `train`, `freeze_vit` and `freeze_qformer`."""
    train, frozen = model_cfg.train, {key: parts for key, parts in FROZEN_BY.items() if getattr(model_cfg, key)}
    if train is None:
        return {*PARTS, *([LORA] if with_adapters else [])}.difference(*frozen.values())
    check_names(train, (*PARTS, LORA), lambda name: f"model.train lists {name!r}")
    if LORA in train and not with_adapters:
        raise ConfigError("model.train lists lora, and model.lora is not set. Set it, for example to {r: 64}.")
    for key, parts in FROZEN_BY.items():
        listed = [part for part in parts if part in train]
        if key in frozen and listed:
            raise ConfigError(
                f"model.train lists {' and '.join(listed)}, which model.{key}=True freezes. Set model.{key}=False, or "
                f"leave out {' and '.join(listed)}."
            )
        if key not in frozen and not listed:
            raise ConfigError(
                f"model.{key}=False trains what model.train={list(train)} leaves out. Set model.{key}=True, or add "
                f"{' or '.join(parts)}."
            )
    return set(train)


def _lora_settings(model_cfg: MiniGPT4Config) -> LoraSettings | None:
    """The settings of the adapters, in either spelling."""
    given = model_cfg.lora
    if given is not None and model_cfg.lora_r is not None:
        raise ConfigError(f"model.lora={given} and model.lora_r={model_cfg.lora_r} mean the same. Keep one of them.")
    if given is None and (model_cfg.lora_r or 0) > 0:
        given = {name: getattr(model_cfg, f"lora_{name}") for name in ("r", "alpha", "dropout", "target_modules")}
    if given is None:
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules") if model_cfg.lora_r is None else ():
            if getattr(model_cfg, name) is not None:
                raise ConfigError(f"model.{name} is set, and model.lora_r is not: there are no adapters. Set both.")
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f"model.lora={given!r} must be a mapping, such as {{r: 64, alpha: 16}}.")
    settings = LoraSettings(**{name: value for name, value in given.items() if value is not None})
    settings.target_modules = list(settings.target_modules)
    settings.layers = None if settings.layers is None else list(settings.layers)
    return settings


def check_parts(trained: Mapping[str, Any], recorded: Any, own: Mapping[str, Any], source: str) -> None:
    """Compare the projector and the adapters of a checkpoint with those of the model that it is to be loaded into.

    Args:
        trained: the tensors of the checkpoint by name.
        recorded: its fingerprint, in which they are named, or None.
        own: the `record` of the model. A model with adapters may start from a checkpoint without any.
        source: path of the checkpoint, for messages.

    Raises ConfigError if they differ, and for adapters that were never trained: all their matrices B are zero.
    """
    recorded, fix = recorded if isinstance(recorded, dict) else {}, "or take another checkpoint"
    theirs = recorded.get("projector") or ("linear" if "llama_proj.weight" in trained else None)
    mine = own.get("projector", "linear")
    if theirs not in (None, mine):
        raise ConfigError(
            f"{source} was trained with model.projector={theirs}; it is {mine} here. Set model.projector={theirs}, "
            f"{fix}."
        )
    b_matrices = [value for name, value in trained.items() if ".lora_B." in name]
    theirs, mine = recorded.get("lora"), own.get("lora")
    if b_matrices and not mine:
        settings = json.dumps(theirs or {"r": b_matrices[0].shape[1]})  # as YAML reads it, null included
        raise ConfigError(
            f"{source} has LoRA adapters, and model.lora is not set. Set it to what they were trained with, "
            f"--options 'model.lora={settings}', {fix}."
        )
    if theirs and mine and theirs != mine:
        differing = [
            f"{key}={json.dumps(theirs.get(key))}, not {json.dumps(value)}"
            for key, value in mine.items()
            if value != theirs.get(key)
        ]
        raise ConfigError(
            f"{source} was trained with other LoRA adapters: {'; '.join(differing)}. Change model.lora, {fix}."
        )
    if b_matrices and not any(value.any() for value in b_matrices):
        raise ConfigError(
            f"{source}: the matrices B of its LoRA adapters are all zero, so that they change nothing. They were never "
            "trained, or what wrote the file lost them. Take another checkpoint."
        )
