"""Work for benchmarks: models of full size with random weights, and batches of random pictures and texts."""

import itertools
import random
import zlib
from collections.abc import Iterator

from minigpt4.common.errors import ConfigError

VOCABULARY = 32000


def random_model(device, dtype, small: bool, load_in: str = "16bit", llm_grad_checkpoint: int = 0):
    """MiniGPT-4 with a Llama-7B (or small parts), random weights, straight on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from minigpt4.models import MiniGPT4
    from minigpt4.models.eva_vit import create_vit
    from minigpt4.models.loading import cast_matrices
    from minigpt4.models.qformer import QFormer
    from minigpt4.quantization.bitsandbytes import replace_bitsandbytes_layers

    vit_model, qformer, llama = "eva_clip_g", {}, {}
    if small:
        vit_model = {"patch_size": 56, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 4}
        qformer = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        llama = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **llama)).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        vit = create_vit(vit_model, 224)
        if load_in != "16bit":
            quantize(llm.model, load_in, dtype)
            replace_bitsandbytes_layers(llm)
        q_former = QFormer(vit.embed_dim, **qformer)
        cast_matrices(vit, dtype)
        cast_matrices(q_former, dtype)
        model = MiniGPT4(vit, q_former, llm, WordTokenizer(), dtype=dtype, llm_grad_checkpoint=llm_grad_checkpoint)
    return model


def quantize(module, load_in: str, dtype) -> None:
    """Quantise the linear layers in place, as bitsandbytes does on loading. Raises ConfigError for other ways."""
    import bitsandbytes as bnb
    from torch import nn

    if load_in not in ("8bit", "4bit"):
        raise ConfigError(f"Random weights can be in 16bit, 8bit or 4bit, not model.load_in={load_in}.")
    for name, layer in module.named_children():
        if not isinstance(layer, nn.Linear):
            quantize(layer, load_in, dtype)
            continue
        shape, weight = (layer.in_features, layer.out_features), layer.weight.data
        if load_in == "8bit":
            quantized = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, device="meta")
            quantized.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            quantized = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            how = {"quant_type": "nf4", "compress_statistics": False}
            quantized.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, **how)
        setattr(module, name, quantized.to(weight.device))


class WordTokenizer:
    """One token a word, so that lengths are as wanted."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [3 + zlib.crc32(word.encode()) % (VOCABULARY - 3) for word in text.split()]


class RandomPairs:
    """A length is all that the runner's set-up asks of it: the batches are made beforehand."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length


def random_batches(
    stage: int, batch_size: int, count: int, rank: int = 0, ranks: int = 1, repeat: int = 1
) -> Iterator[dict]:
    """`count` batches on the host: random images (three sets in turn) and captions of the workload's lengths.

    Each rank has its own; among several, they are dealt out as a run's loader does it. `repeat`: how often each comes
    in a row.
    """
    import torch

    generator = torch.Generator().manual_seed(1 + rank)
    images = [torch.randn(batch_size, 3, 224, 224, generator=generator) for _ in range(3)]
    texts = _texts(stage, batch_size, rank, ranks)
    for i in range(count):
        if i % repeat == 0:
            batch = next(texts)
        yield {"image": images[i % 3], "text_input": batch}


def _texts(stage: int, batch_size: int, rank: int, ranks: int) -> Iterator[list[str]]:
    """The texts of a rank's batches without end: of a stream in stage 1, its part of those of all ranks in stage 2."""
    from minigpt4.datasets.length_balancing import POOL, balanced_batches, rank_share, text_length

    low, high = (80, 160) if stage == 2 else (8, 24)
    rng = random.Random(1 + (rank if stage == 1 else 0))
    samples = ({"text_input": " ".join(["w"] * (rng.randint(low, high) - 1))} for _ in itertools.count())
    if stage == 1:
        batches = balanced_batches(samples, batch_size, POOL if ranks > 1 else 0)
    else:
        joint = balanced_batches(samples, batch_size * ranks, pool=0)
        batches = (rank_share(batch, text_length, rank, ranks) for batch in joint)
    return ([sample["text_input"] for sample in batch] for batch in batches)
