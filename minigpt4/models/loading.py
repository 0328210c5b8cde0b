"""From the paths of a config to loaded weights. They are found and checked, then read once, directly to the device."""

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt4.common import facts
from minigpt4.common.errors import ConfigError, check_names
from minigpt4.common.eval_mode import evaluating
from minigpt4.common.model_schema import BLIP2_URL, MiniGPT4Config
from minigpt4.common.registry import registry
from minigpt4.common.text import pluralize
from minigpt4.models import eva_vit, llm, qformer
from minigpt4.weights import checkpoint, fingerprint, hf_names, locate
from minigpt4.weights.checkpoint import CheckpointError

# Width of the T5 in the BLIP-2 whose Q-Former the published projections were trained with.
FLAN_T5_XXL_WIDTH = 4096
PUBLISHED_QFORMER_WIDTH = 768
PUBLISHED_QFORMER = "the Q-Former of blip2-flan-t5-xxl"
# The parts of MiniGPT4. The vision side alone has only the first four, a model for cached features only the last two.
PARTS = ("visual_encoder", "ln_vision", "query_tokens", "Qformer", "llama_proj", "llama_model")
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sources:
    """The weights that a config names, mapped from disk, so that they take no memory yet. None: random weights."""

    vision: State | None
    qformer: State | None
    trained: State | None
    recorded: dict | None
    """The fingerprint of the language model that `trained` was trained with."""


def open_sources(cfg: MiniGPT4Config) -> Sources:
    """Find the weights of the vision side, download missing files, and make the checks that need no model.

    Raises:
        CheckpointError: a file contains no weights, or the checkpoint was trained with another Q-Former.
        DownloadError: see `weights.locate.fetch`.
    """
    trained, recorded, settings = _open_checkpoint(cfg.ckpt) if cfg.ckpt else (None, None, {})
    if not cfg.load_vision:
        return Sources(None, None, trained, recorded)
    vit_source = facts.vit_weights(cfg.vit_model, cfg.vit_weights)
    vision = checkpoint.read_weights(locate.fetch(vit_source), (hf_names.VISION,)) if vit_source else None
    read = None
    if cfg.q_former_model:
        path = locate.fetch(cfg.q_former_model)
        read = checkpoint.read_weights(path, (hf_names.QFORMER, hf_names.LN_VISION, "query_tokens"))
        if trained:
            _check_qformer(path, read, trained, settings, cfg)
    if not (vision and read):
        logging.warning("Parts of the vision side have random weights, as the config asks.")
    return Sources(vision, read, trained, recorded)


def _open_checkpoint(ckpt: str) -> tuple[State, dict | None, dict]:
    """Weights, fingerprint of the language model, and `model:` settings of a checkpoint."""
    path = checkpoint.resolve(ckpt)
    if str(path) != ckpt:  # the folder of a run, or a URL
        logging.info("model.ckpt=%s: reading %s", ckpt, path)
    content = checkpoint.read_file(path)
    config = content.get("config")  # in a file of another origin it may be anything
    settings = config.get("model") if isinstance(config, dict) else None
    settings = settings if isinstance(settings, dict) else {}
    return checkpoint.weights_of(content, str(path)), content.get(fingerprint.KEY), settings


def vision_parts(cfg: MiniGPT4Config, sources: Sources, device: torch.device, dtype: torch.dtype) -> dict:
    """The arguments of `Vision`: encoder, with its weights, and Q-Former. They compute in `dtype`.

    Frozen parts have their matrices in that type.
    Parts that `load_rest` fills are on the meta device. With `load_vision: False`, all parts are.
    """
    device = device if cfg.load_vision else torch.device("meta")
    dtype = dtype if cfg.vit_precision == "fp16" else torch.float32
    vit = load_encoder(cfg, sources.vision, device, dtype)
    with llm.announced("Q-Former"), torch.device("meta" if sources.qformer else device):
        q_former = qformer.QFormer(vit.embed_dim, **cfg.qformer)
    if "qformer" not in trained_parts(cfg).names:
        cast_matrices(q_former, dtype)
    return {"visual_encoder": vit, "Qformer": q_former, "num_query_token": cfg.num_query_token, "dtype": dtype}


@llm.announced("VIT")
def load_encoder(
    cfg: MiniGPT4Config, weights: State | None, device: torch.device, dtype: torch.dtype
) -> eva_vit.EvaViT:
    """The vision encoder on `device`, with the given weights. If frozen, its matrices are in `dtype`."""
    with torch.device("meta" if weights else device):
        vit = eva_vit.create_vit(cfg.vit_model, cfg.image_size, cfg.drop_path_rate, cfg.use_grad_checkpoint)
    if "vit" not in trained_parts(cfg).names:
        cast_matrices(vit, dtype)
    if weights:
        used = eva_vit.checkpoint_filter_fn(weights, vit)
        source = facts.vit_weights(cfg.vit_model, cfg.vit_weights)
        logging.info("cache_file_path: %s", locate.local_path(source))
        _say_unused(weights, used, source)
        checkpoint.load_weights(vit, used, source, set(vit.state_dict()), device)
        vit.give_buffers_memory(device)
    return vit


def trained_parts(cfg: MiniGPT4Config) -> Any:
    """The `TrainedParts` of a config. Raises ConfigError for settings that contradict each other."""
    return registry.get("trained_parts", "mini_gpt4")(cfg)


def cast_matrices(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights and biases of linear and convolution layers. Norms, positions, q and v biases keep their dtype."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.to(dtype)


def attach_llm_fingerprint(model: nn.Module, cfg: MiniGPT4Config, sources: Sources) -> None:
    """Give the model the fingerprint of its language model, which its checkpoints record.

    Raises MismatchError if `model.ckpt` records another one.
    """
    recorded = fingerprint.take(model.llama_model, cfg.llama_model, **model.template.record(cfg.template))
    model.fingerprint = recorded | trained_parts(cfg).record
    if cfg.ckpt:
        fingerprint.check(sources.recorded, model.fingerprint, cfg.ckpt, cfg.allow_llm_mismatch)


def add_adapters(model: nn.Module, cfg: MiniGPT4Config) -> None:
    """Put LoRA adapters into the language model, if the config asks for them."""
    parts = trained_parts(cfg)
    if parts.lora:
        adapters = registry.get("adapters", "lora")(model.llama_model, parts.lora, train="lora" in parts.names)
        model.trained_inside = adapters.modules


def load_rest(model: nn.Module, cfg: MiniGPT4Config, sources: Sources, device: torch.device) -> None:
    """Load the Q-Former, ln_vision and the queries of a model, then the trained tensors of its checkpoint.

    The model remembers the names of the latter: its own checkpoints hold them, even if they do not train.
    """
    if cfg.projector != "linear":
        _check_projector(model, cfg)
    if sources.qformer:
        used = qformer.checkpoint_filter_fn(sources.qformer)
        _say_unused(sources.qformer, used, cfg.q_former_model)
        own = {name for name in model.state_dict() if name.split(".")[0] in PARTS[1:4]}
        checkpoint.load_weights(model, used, cfg.q_former_model, own, device)
    if sources.trained is not None:
        logging.info("Load BLIP2-LLM Checkpoint: %s", cfg.ckpt)
        absent = set(PARTS) - {name.split(".")[0] for name in model.state_dict()}
        trained = {name: value for name, value in sources.trained.items() if name.split(".")[0] not in absent}
        own, adapters = _projection(model.state_dict()), set(filter(facts.is_adapter, model.state_dict()))
        if (given := _projection(trained)) and own and given != own:
            raise CheckpointError(
                f"{cfg.ckpt} holds another projector, with {', '.join(sorted(given))}, than model.projector="
                f"{cfg.projector}. Set it to the one that was trained: {', '.join(registry.names('projector'))}."
            )
        if adapters & trained.keys():
            registry.get("adapters", "lora").check_not_merged(model.llama_model, trained, cfg.ckpt)
        elif adapters:
            logging.warning(
                "%s has no LoRA adapters. Those of the model change nothing until they are trained.", cfg.ckpt
            )
            adapters = set()
        checkpoint.load_weights(model, trained, cfg.ckpt, required=own | adapters)
        model.from_checkpoint = set(trained)


def _projection(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith("llama_proj.")}


def report(model: nn.Module) -> None:
    """Log for each part of the model: tensors, parameters, dtypes, devices, and whether it trains."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault("LoRA adapters" if facts.is_adapter(name) else name.split(".")[0], []).append(parameter)
    rows = [
        f"  {name:<15}{pluralize(len(tensors), 'tensor'):>13}{sum(map(parameter_count, tensors)):>16,} parameters  "
        f"{_joined(str(t.dtype).removeprefix('torch.') for t in tensors):<18} on {_joined(t.device for t in tensors)}, "
        f"{_joined('trainable' if t.requires_grad else 'frozen' for t in tensors)}"
        for name, tensors in parts.items()
    ]
    logging.info("\n".join(["The parts of the model:", *rows]))


def parameter_count(parameter: nn.Parameter) -> int:
    """How many numbers a parameter has. 4-bit parameters have two in a byte."""
    state = getattr(parameter, "quant_state", None)  # bitsandbytes' own layers have it
    if state is not None:
        return state.shape.numel()
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _joined(values: Iterable) -> str:
    return "+".join(str(value) for value, _ in Counter(values).most_common())


def _say_unused(state: State, used: State, source: str) -> None:
    """Log the tensors of a file that are left out, grouped by the beginnings of their names."""
    if len(used) < len(state) and not any(name.startswith((hf_names.VISION, hf_names.QFORMER)) for name in state):
        names = Counter(".".join(name.split(".")[:2][: name.count(".")]) for name in state.keys() - used.keys())
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(names.items()))
        logging.info("Not used of %s: %s", source, listed)


def check_projector_name(cfg: MiniGPT4Config) -> None:
    """Raise ConfigError for a projector that is not registered."""
    check_names([cfg.projector], registry.names("projector"), lambda name: f"model.projector={name} is not registered")


def _check_projector(model: nn.Module, cfg: MiniGPT4Config) -> None:
    """Raise ConfigError for a projector that does not map [1,Q,W] to [1,Q,D], Q queries."""
    queries, width = model.query_tokens.detach(), model.llama_model.get_input_embeddings().embedding_dim
    expected = torch.Size([*queries.shape[:2], width])
    with torch.no_grad(), evaluating(model.llama_proj):
        found = model.llama_proj(queries.float())
    if getattr(found, "shape", None) != expected:
        shown = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ConfigError(
            f"model.projector={cfg.projector} maps {tuple(queries.shape)} to {shown}; the language model needs "
            f"{tuple(expected)}. Correct the class, or name another: {', '.join(registry.names('projector'))}."
        )


def check_trained(trained: State | None, recorded: dict | None, cfg: MiniGPT4Config) -> None:
    """Compare the trained parts of a checkpoint with the config, before other weights are read.

    recorded: the fingerprint in the checkpoint. Raises ConfigError if they differ, and for a projector that would
    neither be trained nor loaded.
    """
    parts = trained_parts(cfg)
    check_projector_name(cfg)
    if trained is None:
        if "projector" not in parts.names:
            raise ConfigError(
                f"model.train={list(cfg.train)} leaves the projector out, and there is no model.ckpt to take it from: "
                "it would stay random. Set model.ckpt, or add projector."
            )
        return
    parts.check(trained, recorded, cfg.ckpt)
    projection = trained.get("llama_proj.weight")
    if projection is None:
        return
    theirs, width = len(projection), llm.embedding_dim(cfg.llama_model, cfg.trust_remote_code)
    if theirs != width:
        known = {4096: " (as in Vicuna-7B)", 5120: " (as in Vicuna-13B)"}
        raise CheckpointError(
            f"{cfg.ckpt} was trained with a language model {theirs}{known.get(theirs, '')} wide; {cfg.llama_model} is "
            f"{width}{known.get(width, '')} wide. Change model.ckpt or model.llama_model so that they match."
        )


def _check_qformer(path: Path, state: State, trained: State, settings: dict, cfg: MiniGPT4Config) -> None:
    """Raise CheckpointError if the checkpoint was trained with the published Q-Former, and `path` is another one.

    It was trained with the published one if its config names no other file and its projection has the published width.
    trained, settings: weights of the checkpoint, and the `model:` section of its config.
    """
    trained_on = str(settings.get("q_former_model", BLIP2_URL))
    projection = trained.get("llama_proj.weight")
    has_width = projection is not None and projection.shape[1] == PUBLISHED_QFORMER_WIDTH
    if not has_width or Path(trained_on).name != locate.cached_file(BLIP2_URL).name:
        return
    origin = qformer_origin(path, state)
    if origin is None:
        logging.warning(
            "model.q_former_model=%s does not say which BLIP-2 it is of; %s needs %s.",
            *(path, cfg.ckpt, PUBLISHED_QFORMER),
        )
    elif origin != PUBLISHED_QFORMER:
        raise CheckpointError(
            f"model.ckpt={cfg.ckpt} was trained on {PUBLISHED_QFORMER}; model.q_former_model={path} is {origin}. Leave "
            "model.q_former_model out to fetch the published one, or train a projection of your own."
        )


def qformer_origin(path: Path, state: State) -> str | None:
    """The BLIP-2 that a Q-Former belongs to, as a text for messages. None: unknown.

    The config.json of a Hugging Face folder names the language model of the BLIP-2. A LAVIS file has a projection into
    that model.
    """
    config = path / "config.json"
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        text = settings.get("text_config") or {}
        kind, width = text.get("model_type", "an unnamed model"), text.get("d_model", text.get("hidden_size"))
        if settings.get("model_type") == "instructblip":
            return f"the Q-Former of an InstructBLIP with {kind}"
    else:
        name = next((name for name in ("t5_proj.weight", "opt_proj.weight") if name in state), None)
        if name is None:
            return None
        kind, width = name.split("_")[0], len(state[name])
    is_published = (kind, width) == ("t5", FLAN_T5_XXL_WIDTH)
    return PUBLISHED_QFORMER if is_published else f"the Q-Former of a BLIP-2 with {kind}, {width} wide"
