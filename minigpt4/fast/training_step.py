"""How training steps are computed: packed, compiled, recorded. The numbers stay the same to rounding, but for fp8."""

import functools
import logging

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minigpt4.common.facts import tokens_per_micro_batch
from minigpt4.fast import llama as fast_llama
from minigpt4.fast import vit as fast_vit
from minigpt4.fast.attention import allow_packing
from minigpt4.fast.cuda_graphs import GraphedFunction
from minigpt4.fast.fused_linear import fuse_projections
from minigpt4.fast.packing.batch import MicroBatch
from minigpt4.models.vision import PREFIXES
from minigpt4.quantization import bitsandbytes as low_bit
from minigpt4.quantization.fp8 import convert_to_fp8


def accelerate(model, packed: bool, compiled: bool, fp8: bool = False) -> None:
    """Set up a MiniGPT4 on its device for training; it may be set up anew.

    packed: batches without padding, whose pieces have their gradients taken one by one where the language model is
    frozen. compiled: joint projections in the language model, torch.compile for each layer of the three networks, and
    the vision side and the pieces replayed from CUDA graphs, as far as they are frozen. fp8: products with the frozen
    weights of language model and encoder in 8 bit, from then on; raises ConfigError where there are none to be had.
    """
    for name in ("sum_of_losses", "query_outputs", "micro_batch_loss", "predict"):  # of an earlier set-up
        vars(model).pop(name, None)
    if model.visual_encoder is not None:
        vars(model.visual_encoder).pop("forward_features", None)
    llm, plain = model.llama_model, type(model)
    model.packed = packed and allow_packing(llm)
    device = llm.get_input_embeddings().weight.device
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    model.tokens_per_micro_batch = tokens_per_micro_batch(fp8, memory)
    if packed and not model.packed:
        logging.info("Batches are padded: the language model, or this GPU, cannot take packed ones.")
    if compiled:
        fuse_projections(llm)
        low_bit.fuse(llm)
    if fp8:
        convert_to_fp8(llm, model.visual_encoder)
    quantized = low_bit.of_bitsandbytes(llm)
    if compiled:
        _compile(model, quantized)
    # What follows gives gradients to its arguments alone: what it computes with must not train.
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("llama_proj.")]
    if compiled and model.visual_encoder is not None and not trained:  # from cached features it does without
        vision = GraphedFunction(lambda image: (plain.query_outputs(model, image),), "vision side")
        model.query_outputs = lambda image: vision(image)[0]
    # In float16 the loss has to be scaled before its gradient is taken.
    in_float16 = llm.get_input_embeddings().weight.dtype == torch.float16
    if model.packed and not in_float16 and all(name.startswith(PREFIXES) for name in trained):
        micro_batch_loss = functools.partial(plain.micro_batch_loss, model)
        compute = _loss_and_gradient(micro_batch_loss)
        if compiled and not quantized:
            compute = GraphedFunction(compute, "language model")
        model.micro_batch_loss = _with_gradient(micro_batch_loss, compute)


def _compile(model, quantized: bool) -> None:
    # One code object, Module._call_impl, is compiled for every kind of layer, with and without gradient.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Joint projections hand each other their products, in recomputed layers too. Older torch leaves those uncompiled.
    if hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    layers, llm, vit = [], model.llama_model, model.visual_encoder
    if model.packed and fast_llama.fits(llm):
        model.predict = fast_llama.FusedLlama(llm, compiled=True)
    elif not quantized:  # what is left of bitsandbytes' layers runs as it is
        layers += llm.get_decoder().layers
    if vit is not None:
        layers += model.Qformer.bert.encoder.layer
        if fast_vit.fits(vit):
            unit = torch.compile(fast_vit.run_block)
            vit.forward_features = functools.partial(fast_vit.forward_features, vit, unit=unit)
        else:
            layers += vit.blocks
    for layer in layers:
        layer.compile()
    logging.info("Layers will be compiled at the first step, which takes half a minute the first time.")
    model.sum_of_losses = torch.compile(type(model).sum_of_losses, dynamic=True)  # in one pass over the logits


def _loss_and_gradient(micro_batch_loss):
    """A function that computes the loss of a piece, and its gradient by the image vectors, at once."""

    def compute(image_embeds: torch.Tensor, numbers: torch.Tensor, sizes) -> tuple[torch.Tensor, torch.Tensor]:
        image_embeds = image_embeds.detach().requires_grad_()
        with torch.enable_grad():
            loss = micro_batch_loss(image_embeds, MicroBatch(numbers, sizes))
        with torch.autocast(image_embeds.device.type, enabled=False):
            return loss.detach(), *torch.autograd.grad(loss, image_embeds)

    return compute


def _with_gradient(micro_batch_loss, loss_and_gradient):
    """`micro_batch_loss`, whose gradient, where it is wanted, is taken before the next piece's turn comes."""

    def loss(image_embeds: torch.Tensor, piece) -> torch.Tensor:
        if isinstance(piece, MicroBatch) and image_embeds.requires_grad and torch.is_grad_enabled():
            return _TakenAtOnce.apply(loss_and_gradient, image_embeds, piece)
        return micro_batch_loss(image_embeds, piece)

    return loss


class _TakenAtOnce(torch.autograd.Function):
    """The loss of a piece, of which nothing is kept for the backward pass but its gradient."""

    @staticmethod
    def forward(ctx, loss_and_gradient, image_embeds: torch.Tensor, piece: MicroBatch) -> torch.Tensor:
        loss, gradient = loss_and_gradient(image_embeds, piece.numbers, piece.sizes)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grad, None


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
