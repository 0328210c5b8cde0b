"""Self-checks: each fast path against the library's own computation, on the model at hand.

A fast path relies on how the layers of a library (transformers, timm) compute. A new release may compute in another way
without any error. So when a fast path is switched on, a few tokens pass through two layers both ways, and one image
through the whole vision encoder. Where the results differ, or either way fails, one line says so, and the library's own
way is taken. Modules are compared in eval mode: dropout would make any two results differ.

T tokens, K labels, D width, V vocabulary.
"""

import copy
import functools
import itertools
import logging
from collections.abc import Callable

import torch
from torch import nn

from minigpt4.common import compat
from minigpt4.common.eval_mode import evaluating
from minigpt4.fast.fused_linear import fused_layers
from minigpt4.fast.packing.batch import MicroBatch, pack
from minigpt4.models.prompt import IGNORE_INDEX
from minigpt4.quantization.fp8 import Fp8Linear

# Largest norm of a difference, as a share of the norm of the library's result. Rounding gives about 1e-6 in float32,
# 0.01 in 16 bit and 0.1 in fp8.
EXACT_TOLERANCE, TOLERANCE, FP8_TOLERANCE = 1e-3, 0.05, 0.3
# The same for a decoding step through all layers in 16 bit: rounding gives 0.03 in the 32 of Vicuna-7B.
STEP_TOLERANCE = 0.2
LAYERS = 2
# Token ids that all sequences share, and the others of each.
PREFIX = [1, 2]
SEQUENCES = [[*range(3, 12)], [*range(12, 16)], [*range(16, 30)]]

Results = tuple[torch.Tensor, ...]


def shared_copy(llm: nn.Module, keep: tuple[nn.Module, ...] = ()) -> nn.Module:
    """A copy of a model's modules and settings whose parameters and buffers are the model's own tensors.

    keep: modules that are not copied either.
    """
    joints = [fused.joint for fused in fused_layers(llm)]  # not among the model's modules
    parts = [llm, *joints]
    tensors = itertools.chain(*((*part.parameters(), *part.buffers()) for part in parts))
    return copy.deepcopy(llm, {id(kept): kept for kept in (*tensors, *keep)})


def first_layers(llm: nn.Module) -> nn.Module:
    """A language model of the first two layers of another; all weights are shared."""
    copied = shared_copy(llm, keep=tuple(compat.decoder_layers(llm)))
    layers = compat.decoder_layers(copied)
    copied.config.get_text_config().num_hidden_layers = min(LAYERS, len(layers))
    del layers[LAYERS:]
    return copied


class TrainingCheck:
    """Compares ways to compute a training step with the language model's own results, sequence by sequence.

    Compared are the logits at positions whose next token has a label, and the gradients of the embeddings after the
    shared prefix.

    Args:
        llm: the model. Its own results are computed at the first comparison, before a layer is exchanged.
    """

    def __init__(self, llm: nn.Module):
        embedding = llm.get_input_embeddings()
        self.sequences = [[token % embedding.num_embeddings for token in PREFIX + own] for own in SEQUENCES]
        self.not_learnt = len(PREFIX) + 1
        labels = [[IGNORE_INDEX] * self.not_learnt + ids[self.not_learnt :] for ids in self.sequences]
        packed = pack(self.sequences, labels, max_tokens=1024).to(embedding.weight.device)
        self.micro_batch = packed.micro_batches[0]
        self.llm = llm

    @functools.cached_property
    def expected(self) -> Results:
        """The library's results."""
        return self._library_results(first_layers(self.llm))

    def passes(self, name: str, change: Callable[[nn.Module], object]) -> bool:
        """Whether a change of the model leaves its results on unpacked sequences the same to rounding.

        change: is applied to a copy. The model itself stays as it is.
        """

        def changed() -> Results:
            copied = shared_copy(first_layers(self.llm))
            change(copied)
            return self._library_results(copied)

        return _agree(name, changed, lambda: self.expected)

    def passes_packed(
        self,
        name: str,
        predict_by: Callable[[nn.Module], Callable[[torch.Tensor, MicroBatch], torch.Tensor]],
        in_fp8: bool = False,
    ) -> bool:
        """Whether a fast path gives the library's results to rounding; logs a warning where it does not.

        predict_by: from a model to a function from embeddings [1,T,D] and a micro-batch to logits [1,K,V].
        """

        def packed() -> Results:
            return self._packed_results(first_layers(self.llm), predict_by)

        return _agree(name, packed, lambda: self.expected, in_fp8)

    def _packed_results(self, llm: nn.Module, predict_by: Callable) -> Results:
        learnt, predict = self.micro_batch.targets[0] != IGNORE_INDEX, predict_by(llm)
        logits, gradient = _logits_and_gradient(
            llm, self.micro_batch.input_ids, lambda embeds: predict(embeds, self.micro_batch)[0, learnt]
        )
        used = len(PREFIX) + sum(len(own) - 1 for own in SEQUENCES)  # a sequence's last token is left out
        return logits, gradient[len(PREFIX) : used]

    def _library_results(self, llm: nn.Module) -> Results:
        def predict(embeds: torch.Tensor) -> torch.Tensor:
            return llm(inputs_embeds=embeds, use_cache=False).logits[0, self.not_learnt - 1 :]

        device = self.micro_batch.numbers.device
        inputs = [torch.tensor([ids[:-1]], device=device) for ids in self.sequences]
        logits, gradients = zip(*(_logits_and_gradient(llm, ids, predict) for ids in inputs), strict=True)
        return torch.cat(logits), torch.cat([gradient[len(PREFIX) :] for gradient in gradients])


def sees_like_the_library(vit: nn.Module, fused_vit: Callable, autocast: torch.autocast) -> bool:
    """Whether a `FusedViT` gives timm's image tokens, for one random image and all blocks."""
    image = torch.randn(1, 3, vit.image_size, vit.image_size, generator=torch.Generator().manual_seed(0))
    image = image.to(vit.pos_embed.device)
    in_fp8 = any(isinstance(part, Fp8Linear) for part in vit.modules())
    with torch.no_grad(), autocast, evaluating(vit):
        return _agree("The fused vision encoder", lambda: (fused_vit(image),), lambda: (vit(image),), in_fp8)


def decodes_like_the_library(llm: nn.Module, make_cache: Callable) -> bool:
    """Whether prefill and steps on a KV cache give the logits that the model gives when it reads all tokens at once.

    make_cache: from batch, length and device to a cache.
    """
    lengths, prompt_len = (12, 9), 8
    device = llm.get_input_embeddings().weight.device
    vocabulary = llm.get_input_embeddings().num_embeddings
    ids = [torch.arange(1, length + 1, device=device) * 7 % vocabulary for length in lengths]
    steps = max(lengths) - prompt_len

    def by_cache() -> Results:
        two_layers = first_layers(llm)
        padded = torch.stack([nn.functional.pad(row, (max(lengths) - len(row), 0)) for row in ids])
        mask = torch.stack([torch.arange(max(lengths), device=device) >= max(lengths) - n for n in lengths]).long()
        cache = make_cache(len(ids), 2 * max(lengths), device)
        embeds = two_layers.get_input_embeddings()(padded[:, :prompt_len])
        logits = [cache.prefill(two_layers, embeds, mask[:, :prompt_len], 0)]
        for n in range(prompt_len, max(lengths)):
            cache.advance(padded[:, n])
            logits.append(cache.step(two_layers, n + 1))
        return (torch.stack(logits, dim=1).flatten(0, 1),)

    def by_library() -> Results:
        two_layers = first_layers(llm)
        logits = [two_layers(input_ids=row.unsqueeze(0), use_cache=False).logits[0, -steps - 1 :] for row in ids]
        return (torch.cat(logits),)

    with torch.no_grad(), evaluating(llm):
        return _agree("The decoding loop", by_cache, by_library)


def _logits_and_gradient(llm: nn.Module, ids: torch.Tensor, predict: Callable[[torch.Tensor], torch.Tensor]) -> Results:
    """The logits [K,V] that `predict` gives for the embeddings of ids [1,T], and a gradient of the embeddings [T,D].

    It is the gradient of a sum with fixed weights, which neither depends on the logits nor overflows in 16 bit.
    """
    with torch.no_grad():
        embeds = llm.get_input_embeddings()(ids)
    embeds = embeds.detach().requires_grad_()
    with torch.enable_grad(), evaluating(llm):
        logits = predict(embeds)
        count = logits.shape[-1]
        weights = torch.arange(count, device=logits.device).cos() / count**0.5
        (gradient,) = torch.autograd.grad((logits.float() @ weights).sum(), embeds)
    return logits, gradient[0]


def largest_difference(results: Results, expected: Results) -> float:
    """The largest norm of a difference as a share of the norm of what was expected; NaN if any is NaN.

    Where only zeros were expected, such as after a token whose embedding is zero, zeros differ by 0.
    """
    tiny = torch.finfo(torch.float32).tiny
    pairs = [(a.float(), b.float()) for a, b in zip(results, expected, strict=True)]
    return torch.stack([(a - b).norm() / b.norm().clamp(min=tiny) for a, b in pairs]).max().item()


def _tolerance_of(result: torch.Tensor) -> float:
    """The largest difference from a result that rounding explains."""
    exact = result.dtype == torch.float32 and not torch.is_autocast_enabled(result.device.type)
    return EXACT_TOLERANCE if exact else TOLERANCE


def _agree(name: str, compute: Callable[[], Results], by_library: Callable[[], Results], in_fp8: bool = False) -> bool:
    """Whether a fast path gives the library's results to rounding; one line says so where it does not."""
    try:
        expected = by_library()
        difference = largest_difference(compute(), expected)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a changed library raises
        logging.warning("%s does not run with this library (%s: %s). It is off.", name, type(error).__name__, error)
        return False
    if difference <= (FP8_TOLERANCE if in_fp8 else _tolerance_of(expected[0])):  # NaN is not
        return True
    logging.warning("%s differs from the library's own result by %.2g. It is off.", name, difference)
    return False
