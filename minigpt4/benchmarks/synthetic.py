"""Synthetic work for benchmarks: models of full size with random weights, batches, captions and photographs."""

import io
import itertools
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
STAGE_CONFIGS = {
    1: "train_configs/minigpt4_stage1_pretrain.yaml",
    2: "train_configs/minigpt4_stage2_finetune.yaml",
}
# {name: (stage, batch size)}
WORKLOADS = {"S1/16": (1, 16), "S1/64": (1, 64), "S2/12": (2, 12)}
# {stage: least and most tokens of a caption, with the one that ends it}
CAPTION_TOKENS = {1: (8, 24), 2: (80, 160)}
VOCABULARY = 32000
PROMPT = " w" * 24 + "<ImageHere>" + " w" * 23  # of an answer; with <s> and 32 vectors: 80 tokens


def load_config(path: Path | str, options: list[str] | None):
    """The `Config` of a YAML file and of options as on the command line."""
    from minigpt4.common.config import Config

    return Config(SimpleNamespace(cfg_path=path, options=options))


def random_model(device, dtype, small: bool, load_in: str = "16bit", llm_grad_checkpoint: int = 0):
    """MiniGPT-4 with a Llama-7B (or with small parts) and random weights, built on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from minigpt4.benchmarks import published
    from minigpt4.models import MiniGPT4, loading
    from minigpt4.quantization.int8 import quantize_model

    options = [*published.small_options(), "model.vit_model.patch_size=56"] if small else []  # 56: few image tokens
    cfg = load_config(ROOT / STAGE_CONFIGS[1], options).model_cfg
    llama = published.llama_config(published.SIZES["small" if small else "7b"], "v1.1")
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        llm = LlamaForCausalLM(LlamaConfig(**llama)).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        if load_in == "8bit_weights":
            quantize_model(llm, device)
        elif load_in != "16bit":
            round_layers(llm, load_in)
        parts = loading.vision_parts(cfg, loading.Sources(None, None, None, None), device, dtype)
        return MiniGPT4(**parts, llama_model=llm, tokenizer=WordTokenizer(), llm_grad_checkpoint=llm_grad_checkpoint)


def random_chat(small: bool, load_in: str = "16bit"):
    """A `Chat` with such a model, on a GPU in bfloat16 if there is one. Its answers never end early."""
    from minigpt4.common import dist_utils
    from minigpt4.conversation import Chat
    from minigpt4.processors import Blip2ImageEvalProcessor

    device = dist_utils.select_device("cuda")
    model = random_model(device, dist_utils.select_dtype(device, True, "bf16"), small, load_in).eval()
    model.llama_model.generation_config.eos_token_id = None
    return Chat(model, Blip2ImageEvalProcessor(), device)


def weights_name(chat, load_in: str) -> str:
    """How a row of results calls the weights: "32bit" for those of a CPU that are not quantized."""
    return "32bit" if load_in == "16bit" and chat.device.type == "cpu" else load_in


def round_layers(llm, load_in: str) -> None:
    """Round the linear layers in place to those of a run with this `load_in`. The output layer stays as it is."""
    from torch import nn

    from minigpt4.quantization.bitsandbytes import BLOCK, QUANT_TYPE, LowBitLinear
    from minigpt4.quantization.int8 import quantize_linear

    for parent in list(llm.get_decoder().modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and load_in == "8bit":
                setattr(parent, name, quantize_linear(layer, layer.weight.device))
            elif isinstance(layer, nn.Linear):
                from bitsandbytes.functional import quantize_4bit

                weight, state = quantize_4bit(layer.weight.data, blocksize=BLOCK, quant_type=QUANT_TYPE)
                setattr(parent, name, LowBitLinear.replacing(layer, weight, state.absmax, state.code))


class WordTokenizer:
    """Makes one token of each word, so that texts have exactly the lengths that are wanted."""

    unk_token_id, bos_token_id, eos_token_id = 0, 1, 2
    special_tokens: dict[str, int] = {}  # so that no answer ends by itself

    def __len__(self) -> int:
        return VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [3 + zlib.crc32(word.encode()) % (VOCABULARY - 3) for word in text.split()]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " w" * len(ids)


def random_batches(
    stage: int, batch_size: int, count: int, rank: int = 0, ranks: int = 1, repeat: int = 1
) -> Iterator[dict]:
    """`count` batches on the host: random images (three sets in turn), and captions of the stage's lengths.

    Each rank has its own. Several ranks balance the lengths of their batches as a run's loader does.
    repeat: how often in a row the captions of a batch come.
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
    """The captions of a rank's batches, without end.

    In stage 1 each rank has a stream of its own; in stage 2 all ranks share one, and each takes its part of it.
    """
    from minigpt4.datasets.length_balancing import POOL, balanced_batches, rank_share, text_length

    rng = random.Random(1 + (rank if stage == 1 else 0))
    samples = ({"text_input": caption(rng, stage)} for _ in itertools.count())
    if stage == 1:
        batches = balanced_batches(samples, batch_size, POOL if ranks > 1 else 0)
    else:
        joint = balanced_batches(samples, batch_size * ranks, pool=0)
        batches = (rank_share(batch, text_length, rank, ranks) for batch in joint)
    return ([sample["text_input"] for sample in batch] for batch in batches)


def caption(rng: random.Random, stage: int) -> str:
    """A caption of a length that the stage's captions have, without the token that ends it."""
    return " ".join(["w"] * (rng.randint(*CAPTION_TOKENS[stage]) - 1))


def photographs(count: int, least: int, most: int) -> list[bytes]:
    """JPEGs with sides of `least` to `most` pixels."""
    rng = random.Random(0)
    sides = [(rng.randint(least, most), rng.randint(least, most)) for _ in range(count)]
    return [photograph(seed, *size) for seed, size in enumerate(sides)]


def photograph(seed: int, width: int, height: int) -> bytes:
    """A JPEG that is as hard to decode as a photograph: structure at all scales, hard edges and a little noise."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), dtype=np.float32)
    for side in (4, 8, 16, 32, 64, 128, 256):
        noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        resized = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image += np.asarray(resized, dtype=np.float32) / side**0.8
    image += rng.normal(0, 0.01 * image.max(), image.shape)
    image = 255 * (image - image.min()) / (image.max() - image.min())
    picture = Image.fromarray(image.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(8):
        x, y, w, h = rng.random(4) * (width, height, width / 3, height / 3)
        draw.rectangle((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=95)
    return content.getvalue()
