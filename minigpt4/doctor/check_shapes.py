"""Checks of shapes: the weights fit the config and each other, and checkpoints their language model.

The loaders' own checks are used. The vision side is built on the meta device, where "loading" compares names and
shapes and reads no weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from minigpt4.common.errors import ConfigError
from minigpt4.doctor.diagnostic import Diagnostic, error, ok, warning
from minigpt4.doctor.run_context import CHECKPOINT_KEYS, RunContext
from minigpt4.weights import fingerprint

# The package's processors make images of this size by default.
PROCESSOR_IMAGE_SIZE = 224


def check_image_settings(context: RunContext) -> Iterator[Diagnostic]:
    """The encoder's patches tile the image, and the processors make images of that size."""
    size, patch_size = context.model.image_size, context.vit["patch_size"]
    if size % patch_size:
        lower = size - size % patch_size
        what = f"{size} is not a multiple of the encoder's patch size {patch_size}"
        yield error("model.image_size", what, f"--options model.image_size={lower}")
        return
    for name, dataset in context.cfg.datasets_cfg.items():
        processor = (dataset.get("vis_processor") or {}).get("train")
        if not isinstance(processor, Mapping):
            continue
        own = processor.get("image_size", PROCESSOR_IMAGE_SIZE)
        ours = str(processor.get("name")).startswith("blip2_image_")
        if ours and isinstance(own, int) and own != size:  # another type is no size: `check_registry`
            key = f"datasets.{name}.vis_processor.train.image_size"
            fix = f"--options {key}={size}, or model.image_size={own}"
            yield error(key, f"{own}, but model.image_size={size}", fix)
    yield ok("model.image_size", f"{size} px")


def check_vision(context: RunContext) -> Iterator[Diagnostic]:
    """The weights of encoder and Q-Former fit the config."""
    import torch

    from minigpt4.models import loading

    cfg, model, meta = context.local_model_cfg, context.meta_model, torch.device("meta")
    sources = loading.open_sources(cfg)
    if sources.vision:
        try:
            loading.load_encoder(cfg, sources.vision, meta, torch.float32)
        except ConfigError as mistake:
            fix = "Change model.vit_model, or model.vit_weights to the file of that encoder."
            yield error("model.vit_model", str(mistake), fix)
        else:
            yield ok("model.vit_model", f"{cfg.vit_weights} fits{_interpolated(context, sources.vision)}")
    if sources.qformer:
        try:
            loading.load_rest(model, cfg, replace(sources, trained=None), meta)
        except ConfigError as mistake:
            key, fix = _qformer_fix(context, sources.qformer)
            yield error(key, str(mistake), fix)
        else:
            yield ok("model.q_former_model", f"{cfg.q_former_model} fits")


def _interpolated(context: RunContext, weights: dict) -> str:
    positions = weights.get("pos_embed")
    if positions is None or positions.shape == context.meta_model.visual_encoder.pos_embed.shape:
        return ""
    return f"; its positions will be interpolated for {context.model.image_size} px"


def _qformer_fix(context: RunContext, weights: dict) -> tuple[str, str]:
    """The key to change, and how, where a Q-Former's weights do not fit."""
    if "query_tokens" in weights:
        _, count, width = weights["query_tokens"].shape
        if count != context.model.num_query_token:
            return "model.num_query_token", f"--options model.num_query_token={count}"
        if width != context.meta_model.Qformer.hidden_size:
            return "model.qformer", "Set model.qformer to the sizes of the file."
    return "model.q_former_model", "Encoder and Q-Former must come from one BLIP-2."


def check_checkpoints(context: RunContext) -> Iterator[Diagnostic]:
    """Checkpoints fit the model: their projection goes from the Q-Former's width to the language model's."""
    import torch

    from minigpt4.models import loading
    from minigpt4.weights import checkpoint

    loading.check_projector_name(context.model)
    for key in CHECKPOINT_KEYS:
        content = context.content(key)
        if content is None:
            continue
        trained = checkpoint.weights_of(content, context.sources[key])
        cfg = replace(context.local_model_cfg, ckpt=context.sources[key])
        try:
            if context.llm:
                own = replace(cfg, llama_model=context.llm_source)
                loading.check_trained(trained, content.get(fingerprint.KEY), own)
            sources = loading.Sources(vision=None, qformer=None, trained=trained, recorded=None)
            loading.load_rest(context.meta_model, cfg, sources, torch.device("meta"))
        except ConfigError as mistake:
            fix = f"Change {key}, or model.llama_model and model.qformer to those that it was trained with."
            yield error(key, str(mistake), fix if isinstance(mistake, checkpoint.CheckpointError) else "")
        else:
            yield ok(key, f"{cfg.ckpt} fits")
        yield from _check_fingerprint(context, key, content.get(fingerprint.KEY))


def _check_fingerprint(context: RunContext, key: str, recorded: dict | None) -> Iterator[Diagnostic]:
    """A checkpoint was trained with this language model, and with this template (MismatchError)."""
    if recorded is None:
        yield ok(key, "records no language model, as published checkpoints do: only the shape could be checked")
    elif context.llm and context.llm.embedding is not None:
        own = fingerprint.of_weights(context.llm.embedding, context.llm.layers, context.model.llama_model)
        difference = fingerprint.difference_of(recorded, own)
        if difference is None:
            yield ok(key, "was trained with this language model")
            if template := context.template:
                own |= template.record(context.model.template)
                fingerprint.check(recorded, own, context.sources[key], context.model.allow_llm_mismatch)
            return
        what = f"trained with {fingerprint.describe(recorded)}; yours is {fingerprint.describe(own)}: {difference}"
        fix = "Change model.llama_model or the checkpoint; to try it all the same: model.allow_llm_mismatch=true"
        yield (warning if context.model.allow_llm_mismatch else error)(key, what, fix)
