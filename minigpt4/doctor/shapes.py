"""Checks of shapes: do the weights fit the sizes of the config, and the projection its language model?"""

from collections.abc import Iterator
from math import isqrt

import numpy as np

from minigpt4.common import facts
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import VIT_KEYS
from minigpt4.common.text import pluralize
from minigpt4.doctor.case import RunContext
from minigpt4.doctor.findings import Diagnostic, error, ok, warning
from minigpt4.weights import fingerprint

KNOWN = {4096: " (as in Vicuna-7B)", 5120: " (as in Vicuna-13B)"}
# Key of a trained checkpoint -> the key whose other value would help.
CHECKPOINTS = ("model.ckpt", "run.resume_ckpt_path")


def check_projection(case: RunContext) -> Iterator[Diagnostic]:
    """The trained projection goes from the Q-Former's width to the language model's."""
    for key in CHECKPOINTS:
        tensors = case.tensors(key)
        projection = tensors.get("llama_proj.weight")
        if not tensors:
            continue
        if projection is None:
            what = f"{case.file(key)} has no llama_proj.weight: it is no checkpoint of MiniGPT-4"
            yield error(key, what, f"--options {key}=/where/the/checkpoint/is")
            continue
        theirs, queries = projection.shape
        if case.llm and case.llm.width and theirs != case.llm.width:
            yours = case.llm.width
            what = (
                f"{case.file(key)} was trained with a language model {theirs}{KNOWN.get(theirs, '')} wide; "
                f"{case.model.llama_model} is {yours}{KNOWN.get(yours, '')} wide"
            )
            yield error(key, what, "Change model.ckpt or model.llama_model so that they match.")
        elif queries != case.qformer["hidden_size"]:
            what = f"the projection takes {queries} numbers, the Q-Former gives {case.qformer['hidden_size']}"
            yield error(key, what, "Set model.qformer to the sizes it was trained with.")
        else:
            yield ok(key, f"the projection fits: {queries} -> {theirs}")


def check_fingerprint(case: RunContext) -> Iterator[Diagnostic]:
    """The checkpoint was trained with this language model."""
    own = _own_fingerprint(case)
    for key in CHECKPOINTS:
        content = case.content(key)
        recorded = content.get(fingerprint.KEY) if content else None
        if not isinstance(recorded, dict):
            if content and "llama_proj.weight" in case.tensors(key):
                yield ok(key, "records no language model, as published checkpoints do: only the shape could be checked")
            continue
        if own is None:
            continue
        recorded = recorded | {"embedding_rows": recorded["embedding_rows"].rows(list(range(8)))}
        difference = fingerprint.difference_of(recorded, own)
        if difference:
            what = f"trained with {fingerprint.describe(recorded)}; yours is {fingerprint.describe(own)}: {difference}"
            fix = "Change model.llama_model or the checkpoint; to try it all the same: model.allow_llm_mismatch=true"
            yield (warning if case.model.allow_llm_mismatch else error)(key, what, fix)
        else:
            yield ok(key, "was trained with this language model")


def _own_fingerprint(case: RunContext) -> dict | None:
    llm = case.llm
    if llm is None or None in (llm.width, llm.layers, llm.vocabulary):
        return None
    rows: np.ndarray | None = None
    if llm.embedding:
        rows = llm.embedding.rows(fingerprint.row_ids(llm.vocabulary)).astype(np.float16)
    sizes = {"width": llm.width, "layers": llm.layers, "vocabulary": llm.vocabulary}
    return {"name": case.model.llama_model, "embedding_rows": rows, **sizes}


def check_encoder(case: RunContext) -> Iterator[Diagnostic]:
    """The encoder's weights have the sizes that the config asks for."""
    key, vit = "model.vit_model", case.vit
    if vit is None:
        return
    try:
        facts.vit_weights(case.model.vit_model, case.model.vit_weights)
    except ConfigError as mistake:
        yield error("model.vit_weights", str(mistake))
    tensors = case.tensors("model.vit_weights")
    if "pos_embed" not in tensors:
        return
    tokens, width = tensors["pos_embed"].shape[1:]
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1)
    patch = tensors["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in tensors else vit["patch_size"]
    found = {"embed_dim": width, "patch_size": patch}
    wrong = [f"{name} {found[name]} instead of {vit[name]}" for name in found if found[name] != vit[name]]
    if depth < vit["depth"]:
        wrong.append(f"{pluralize(depth, 'block')} instead of {vit['depth']}")
    if wrong:
        what = f"{case.file('model.vit_weights')} has {', '.join(wrong)}"
        yield error(key, what, "Change model.vit_model, or model.vit_weights to the file of that encoder.")
        return
    size = isqrt(tokens - 1) * patch
    resized = f"; positions for {size} px will be interpolated" if size != case.model.image_size else ""
    yield ok(key, f"{pluralize(depth, 'block')}, {width} wide{resized}")


def check_qformer(case: RunContext) -> Iterator[Diagnostic]:
    """The Q-Former's weights have the queries and widths that the config asks for."""
    tensors = case.tensors("model.q_former_model")
    queries = tensors.get("query_tokens")
    if queries is None:
        return
    _, count, width = queries.shape
    file = case.file("model.q_former_model")
    if count != case.model.num_query_token:
        what = f"{file} has {pluralize(count, 'query', 'queries')}, model.num_query_token={case.model.num_query_token}"
        yield error("model.num_query_token", what, f"--options model.num_query_token={count}")
        return
    if width != case.qformer["hidden_size"]:
        what = f"{file} is {width} wide, model.qformer.hidden_size={case.qformer['hidden_size']}"
        yield error("model.qformer", what, "Set model.qformer to the sizes of the file.")
        return
    norm = tensors.get("ln_vision.weight")
    if norm is not None and case.vit and norm.shape[0] != case.vit["embed_dim"]:
        what = f"{file} reads an encoder {norm.shape[0]} wide; model.vit_model is {case.vit['embed_dim']} wide"
        yield error("model.q_former_model", what, "The two must come from one BLIP-2.")
        return
    yield ok("model.q_former_model", f"{pluralize(count, 'query', 'queries')}, {width} wide")


def check_image_size(case: RunContext) -> Iterator[Diagnostic]:
    """Image sizes agree, and the encoder's patches tile them."""
    size, vit = case.model.image_size, case.vit
    if vit is None:
        fix = f"Use {', '.join(facts.VIT_WEIGHTS)}, or a mapping of exactly {', '.join(VIT_KEYS)}."
        yield error("model.vit_model", f"{case.model.vit_model!r} is not known", fix)
        return
    if size % vit["patch_size"]:
        lower = size - size % vit["patch_size"]
        what = f"{size} is not a multiple of the encoder's patch size {vit['patch_size']}"
        yield error("model.image_size", what, f"--options model.image_size={lower}")
        return
    others = {}
    for name, dataset in case.cfg.datasets_cfg.items():
        processor = (dataset.get("vis_processor") or {}).get("train") or {}
        if str(processor.get("name")).startswith("blip2_image_"):  # ours, which make 224 px unless told otherwise
            others[f"datasets.{name}.vis_processor.train.image_size"] = processor.get("image_size", 224)
    wrong = {key: value for key, value in others.items() if value != size}
    for key, value in wrong.items():
        what = f"{value}, but model.image_size={size}"
        yield error(key, what, f"--options {key}={size}, or model.image_size={value}")
    if not wrong:
        yield ok("model.image_size", f"{size} px")
