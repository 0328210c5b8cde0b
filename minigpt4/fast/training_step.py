"""A training step that is packed, fused, compiled and captured. Its numbers are the plain step's, up to rounding.

fp8 is the exception: its rounding is larger.

`MiniGPT4.accelerate` installs a `FastStep` in the place of the `PlainStep`.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch.autograd.function import once_differentiable

from minigpt4.common import compat
from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import is_adapter, tokens_per_micro_batch
from minigpt4.common.registry import registry
from minigpt4.fast.attention import allow_packing, disallow_packing
from minigpt4.fast.compilation import compile_for_any_length, same_kernels
from minigpt4.fast.cuda_graphs import GraphedFunction
from minigpt4.fast.fused_linear import fuse_projections, fused_layers
from minigpt4.fast.llama import FusedLlama, supports_fused_llama
from minigpt4.fast.packing.batch import MicroBatch, PackedBatch, Sizes, pack
from minigpt4.fast.self_check import TrainingCheck, sees_like_the_library
from minigpt4.fast.vit import FusedViT, supports_fused_vit
from minigpt4.models.mini_gpt4 import MiniGPT4, PlainStep, cross_entropies
from minigpt4.models.vision import is_vision
from minigpt4.quantization.bitsandbytes import has_bitsandbytes_layers
from minigpt4.quantization.fp8 import MULTIPLE, Fp8Linear, convert_linear_layers, supports_fp8

# Limit of compilations: torch counts those of all kinds of layers, with and without gradients, as one function's.
MAX_COMPILATIONS = 64


@registry.register("step", "fast")
class FastStep(PlainStep):
    """Collates packed batches, and computes vision and loss by compiled layers and CUDA graphs.

    Args:
        model: a `MiniGPT4` on its device. Layers of its language model and encoder are exchanged.
        packed: batches without padding. Where the language model is frozen, the gradient of each micro-batch is
            computed with its loss, so that one micro-batch at a time needs memory.
        compiled: joint projections in the language model, torch.compile for the layers of the three networks, and CUDA
            graphs for the vision side and the micro-batches, as far as they are frozen.
        fp8: products with the frozen weights of language model and encoder in fp8, from now on.

    Raises ConfigError for fp8 where the language model has no layer for it.
    """

    def __init__(self, model, packed: bool, compiled: bool, fp8: bool = False):
        llm = model.llama_model
        check = TrainingCheck(llm)
        self.packed = packed and allow_packing(llm) and check.passes_packed("The packed attention", _library_predict)
        if packed and not self.packed:
            disallow_packing(llm)
            logging.info("Batches are padded: the language model, or this GPU, cannot take packed ones.")
        self.max_tokens = tokens_per_micro_batch(fp8, _gpu_bytes(llm))
        if compiled and check.passes("The joint computation of projections", fuse_projections):
            fuse_projections(llm)
        if fp8:
            convert_to_fp8(llm, model.visual_encoder)
        self.adapters = tuple(p for name, p in llm.named_parameters() if is_adapter(name) and p.requires_grad)
        self.quantized = has_bitsandbytes_layers(llm)  # bitsandbytes' own, which were not exchanged for ours
        self.fused_llama, self.fused_vit = None, None
        self.cross_entropies = cross_entropies
        if compiled:
            self._compile(model, check, fp8)
        self._capture(model, compiled)

    def collate(self, model, sequences: list[list[int]], labels: list[list[int]]):
        """Token ids and labels to a packed batch, or to a padded one where packing is off."""
        return pack(sequences, labels, self.max_tokens) if self.packed else super().collate(model, sequences, labels)

    def vision(self, model, image: torch.Tensor) -> torch.Tensor:
        """Images [B,3,H,W] to the Q-Former's output [B,Q,W]."""
        if self.graphed_vision:
            return self.graphed_vision(image)[0]
        return self._query_outputs(model, image)

    def _query_outputs(self, model, image: torch.Tensor) -> torch.Tensor:
        return model.query_outputs(image, self.fused_vit) if self.fused_vit else model.query_outputs(image)

    def loss(self, model, image_embeds: torch.Tensor, batch) -> torch.Tensor:
        """Mean cross-entropy over the labels of a batch, given its images [B,Q,D]."""
        # A batch may be of the other kind: a plug-in's own, or one that was made before this step was installed.
        parts = batch.micro_batches if isinstance(batch, PackedBatch) else [batch]
        with_gradient = self.loss_and_gradient and torch.is_grad_enabled()
        with_gradient = with_gradient and bool(image_embeds.requires_grad or self.adapters)
        losses = []
        for part in parts:
            if with_gradient and isinstance(part, MicroBatch):
                trained = image_embeds, *self.adapters
                losses.append(_LossWithGradient.apply(self.loss_and_gradient, part, *trained))
            else:
                losses.append(self._summed_loss(model, image_embeds, part))
        return sum(losses) / max(batch.num_labels, 1)

    def _summed_loss(self, model, image_embeds: torch.Tensor, part, leaves: Mapping | None = None) -> torch.Tensor:
        """Cross-entropy summed over the labels of a micro-batch, or of a padded batch, given all images [B,Q,D].

        leaves: tensors that stand for the parameters of adapters in a `FusedLlama`.
        """
        embeds = model.embed(part, image_embeds)
        is_micro_batch = isinstance(part, MicroBatch)
        logits = (
            self.fused_llama(embeds, part, leaves)
            if self.fused_llama and is_micro_batch
            else model.predict(embeds, part)
        )
        return self.cross_entropies(logits, part.targets).sum()

    def _loss_and_gradient(self, model, image_embeds: torch.Tensor, numbers: torch.Tensor, sizes: Sizes) -> tuple:
        """The summed loss of a micro-batch and its gradients: of the image vectors, and of `adapters`."""
        image_embeds = image_embeds.detach().requires_grad_()
        # A parameter's gradient belongs to the stream on which its graph began, which a captured stream cannot wait
        # for. These tensors have the same memory, and no earlier graph.
        leaves = {p: p.detach().requires_grad_() for p in self.adapters} if self.fused_llama else {}
        with torch.enable_grad():
            loss = self._summed_loss(model, image_embeds, MicroBatch(numbers, sizes), leaves)
        trained = [image_embeds, *(leaves.get(p, p) for p in self.adapters)]
        with torch.autocast(image_embeds.device.type, enabled=False):
            return loss.detach(), *torch.autograd.grad(loss, trained)

    def _compile(self, model, check: TrainingCheck, in_fp8: bool) -> None:
        """Set up torch.compile for the layers; each is compiled when the first step calls it."""
        compat.raise_recompile_limit(MAX_COMPILATIONS)
        layers, llm, vit = [], model.llama_model, model.visual_encoder
        fused = functools.partial(FusedLlama, compiled=False)
        # A plug-in may compute logits or image features in its own way: its methods are called then.
        fusible = self.packed and not _overrides(model, "predict") and supports_fused_llama(llm)
        if fusible and check.passes_packed("The fused Llama", fused, in_fp8):
            self.fused_llama = FusedLlama(llm, compiled=True)
        elif not self.quantized:  # bitsandbytes' own layers cannot be compiled
            layers += map(compat.without_recomputation, llm.get_decoder().layers)
            if self.adapters:
                logging.info("Adapters train in the language model: its layers are compiled one by one.")
        if vit is not None:
            layers += model.Qformer.bert.encoder.layer
            own_features = _overrides(model, "query_outputs", "encode_img")
            eager, autocast = FusedViT(vit, compiled=False), model.autocast(model.device)
            if not own_features and supports_fused_vit(vit) and sees_like_the_library(vit, eager, autocast):
                self.fused_vit = FusedViT(vit, compiled=True)
            else:
                layers += vit.blocks
        for layer in layers:
            layer.compile(options=same_kernels())
        # In one pass over the logits.
        self.cross_entropies = compile_for_any_length(cross_entropies, same_kernels(split_sums=False))
        logging.info("Layers will be compiled at the first step, which takes half a minute the first time.")

    def _capture(self, model, compiled: bool) -> None:
        """Set up CUDA graphs. No gradient passes through one.

        So nothing of the vision side may train. The graph of the language model returns the gradient of the image
        vectors among its results, and those of adapters in a `FusedLlama`. Around other layers, adapters are not
        captured (`_loss_and_gradient` says why).
        """
        self.graphed_vision, self.loss_and_gradient = None, None
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        trained = [name for name in trained if not name.startswith("llama_proj.") and not is_adapter(name)]
        if compiled and model.visual_encoder is not None and not trained:
            self.graphed_vision = GraphedFunction(lambda image: (self._query_outputs(model, image),), "vision side")
        # In float16 the loss has to be scaled before its gradient is computed. A plug-in's own methods may use weights
        # that train, under any name.
        in_float16 = model.llama_model.get_input_embeddings().weight.dtype == torch.float16
        at_once = self.packed and not in_float16 and not _overrides(model, "predict", "embed")
        if at_once and all(map(is_vision, trained)):
            self.loss_and_gradient = functools.partial(self._loss_and_gradient, model)
            if compiled and self.adapters and not self.fused_llama:
                logging.info("Micro-batches with adapters are compiled, and not captured in CUDA graphs.")
            elif compiled and not self.quantized:
                self.loss_and_gradient = GraphedFunction(self.loss_and_gradient, "language model")


def convert_to_fp8(llm: torch.nn.Module, visual_encoder: torch.nn.Module | None = None) -> None:
    """Exchange frozen linear layers in bfloat16 for layers in fp8: the language model's, and a frozen encoder's.

    Only those inside its decoder layers and blocks are exchanged. The encoder passes no gradient on from then.

    Raises ConfigError for a language model that has no such layer, such as a quantised one.
    """
    layers = llm.get_decoder().layers
    for fused in fused_layers(layers):
        if supports_fp8(fused.joint):
            fused.replace_joint(Fp8Linear(fused.joint, with_gradient=True, from_norm=True))
    convert_linear_layers(layers, with_gradient=True)
    if not _log_fp8(layers):
        raise ConfigError(
            "run.fp8=True: the language model has no frozen linear layers in bfloat16 with sizes in multiples of "
            f"{MULTIPLE}. Set model.load_in=16bit, or run.fp8=False."
        )
    if visual_encoder is not None and not any(p.requires_grad for p in visual_encoder.parameters()):
        for block in visual_encoder.blocks:
            compat.call_qkv_layer(block.attn)
        convert_linear_layers(visual_encoder.blocks, with_gradient=False)
        _log_fp8(visual_encoder.blocks)


def _log_fp8(layers: torch.nn.ModuleList) -> int:
    """Log how many linear layers compute in fp8, and return this number."""
    kinds = Counter(type(part) for part in (*layers.modules(), *(fused.joint for fused in fused_layers(layers))))
    in_fp8, others = kinds[Fp8Linear], kinds[torch.nn.Linear]
    kind = type(compat.without_recomputation(layers[0])).__name__
    logging.info("%d linear layers compute in fp8, %d do not, of %s.", in_fp8, others, kind)
    return in_fp8


def _overrides(model, *methods: str) -> bool:
    """Whether a plug-in's class has its own version of one of the methods of `MiniGPT4`."""
    return any(getattr(type(model), name) is not getattr(MiniGPT4, name) for name in methods)


def _library_predict(llm) -> Callable[[torch.Tensor, MicroBatch], torch.Tensor]:
    """Logits of a micro-batch by the language model's own layers."""
    return lambda embeds, part: llm(inputs_embeds=embeds, use_cache=False, **part.llm_inputs()).logits


def _gpu_bytes(llm) -> int:
    device = llm.get_input_embeddings().weight.device
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


class _LossWithGradient(torch.autograd.Function):
    """The loss of a micro-batch. Only its gradients are kept for the backward pass.

    trained: adapters, of which `loss_and_gradient` gives the gradients after that of the image vectors.
    """

    @staticmethod
    def forward(
        ctx, loss_and_gradient, part: MicroBatch, image_embeds: torch.Tensor, *trained: torch.Tensor
    ) -> torch.Tensor:
        loss, *gradients = loss_and_gradient(image_embeds, part.numbers, part.sizes)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        return None, None, *(gradient * grad for gradient in ctx.saved_tensors)
