"""How training steps are computed: packed, compiled, recorded. The numbers stay the same to rounding, but for fp8."""

import functools
import logging

import torch
from torch.utils.checkpoint import checkpoint

from minigpt4.models.cuda_graphs import GraphedFunction
from minigpt4.models.fp8 import convert_to_fp8
from minigpt4.models.fused import fuse_projections
from minigpt4.models.packing import PackedBatch, allow_packing
from minigpt4.models.vision import PREFIXES


def accelerate(model, packed: bool, compiled: bool, fp8: bool = False) -> None:
    """Set up a MiniGPT4 on its device for training; it may be set up anew.

    packed: batches without padding. compiled: joint projections in the language model, torch.compile for each layer of
    the three networks, and the vision side and the language model replayed from CUDA graphs, as far as they are frozen.
    fp8: products with the frozen weights of language model and encoder in 8 bit, from then on; raises ConfigError where
    there are none to be had.
    """
    for name in ("sum_of_losses", "query_outputs", "language_loss"):  # of an earlier set-up
        vars(model).pop(name, None)
    llm = model.llama_model
    has_vision = model.visual_encoder is not None  # training from cached features does without
    model.packed = packed and allow_packing(llm)
    if packed and not model.packed:
        logging.info("Batches are padded: the language model, or this GPU, cannot take packed ones.")
    if compiled:
        fuse_projections(llm)
    if fp8:
        convert_to_fp8(llm, model.visual_encoder)
    if not compiled:
        return
    llm_layers = [] if _is_quantized(llm) else llm.get_decoder().layers  # bitsandbytes' layers run as they are
    # One code object, Module._call_impl, is compiled for every kind of layer, with and without gradient.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Joint projections hand each other their products, in recomputed layers too. Older torch leaves those uncompiled.
    if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    layers = [*llm_layers]
    if has_vision:
        layers += [*model.visual_encoder.blocks, *model.Qformer.bert.encoder.layer]
    for layer in layers:
        layer.compile()
    logging.info("%d layers will be compiled at the first steps, which takes a minute or two.", len(layers))
    plain = type(model)
    model.sum_of_losses = torch.compile(plain.sum_of_losses, dynamic=True)  # in one pass over the logits
    # A graph gives gradients to its arguments alone: what it computes with must not train.
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("llama_proj.")]
    if has_vision and not trained:
        model.query_outputs = GraphedFunction(lambda image: plain.query_outputs(model, image), "vision side")
    if llm_layers and all(name.startswith(PREFIXES) for name in trained):
        model.language_loss = _graphed_loss(lambda embeds, tokens: plain.language_loss(model, embeds, tokens))


def recompute_layers(llm, count: int) -> None:
    """Let the first `count` layers recompute their activations in the backward pass instead of keeping them."""
    for layer in llm.get_decoder().layers[:count]:
        layer.forward = _recomputing(layer.forward)


def _recomputing(forward):
    """`forward` under checkpoint: a function, which torch.compile reads through; it passes functools.partial over."""

    @functools.wraps(forward)
    def recomputing(*args, **kwargs):
        return checkpoint(forward, *args, **kwargs, use_reentrant=False, preserve_rng_state=False)

    return recomputing


def _is_quantized(llm) -> bool:
    return any(type(module).__module__.startswith("bitsandbytes") for module in llm.modules())


def _graphed_loss(language_loss):
    """`language_loss` replayed from CUDA graphs where its batch is packed and it trains."""
    graphed = GraphedFunction(
        lambda embeds, numbers, sizes: language_loss(embeds, PackedBatch(numbers, sizes)), "language model"
    )

    def loss(image_embeds: torch.Tensor, tokens) -> torch.Tensor:
        if isinstance(tokens, PackedBatch) and image_embeds.requires_grad and torch.is_grad_enabled():
            return graphed(image_embeds, tokens.numbers, static=(tokens.sizes,))
        return language_loss(image_embeds, tokens)

    return loss
