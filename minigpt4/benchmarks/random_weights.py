"""Files in exactly the published formats, with the published names, shapes and types, filled with random numbers.

They load like the real files and take the same memory and time, for rehearsals and benchmarks; the model writes noise.
Files are written one at a time, and a language model shard by shard, so that twice a shard's memory is enough.
"""

import functools
import io
import json
import logging
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from minigpt4 import PACKAGE_ROOT
from minigpt4.benchmarks import published
from minigpt4.benchmarks.published import PARTS, Sizes, Table
from minigpt4.common.errors import ConfigError
from minigpt4.common.output import whole_folder
from minigpt4.weights import checkpoint
from minigpt4.weights.sentencepiece import UNUSED, piece

PAD_TOKEN = "[PAD]"


class RandomValues:
    """Tensors of normal numbers, std 0.02, copied from random places of one pool.

    Drawing 6.7 billion numbers takes a CPU minutes; copying them takes seconds. Because the pool's length is prime, the
    rows of a matrix do not repeat each other.
    """

    POOL = 2**24 + 43

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._pool = torch.empty(self.POOL).normal_(0, 0.02, generator=self._generator)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor for a parameter of this name. Weights of norms are around 1, all others around 0."""
        if name.endswith("position_ids"):
            return torch.arange(shape[-1]).expand(shape).clone()
        flat = torch.empty(prod(shape), dtype=dtype)
        start = int(torch.randint(self.POOL, (1,), generator=self._generator))
        filled = 0
        while filled < len(flat):
            part = self._pool[start : start + len(flat) - filled]
            flat[filled : filled + len(part)] = part
            filled, start = filled + len(part), 0
        is_norm = name.endswith("weight") and len(shape) == 1
        return (flat + 1 if is_norm else flat).view(shape)


def write(
    folder: Path,
    size: str = "7b",
    seed: int = 0,
    parts: Sequence[str] = PARTS,
    vicuna: str = "v1.1",
    as_bin: bool = False,
    text_branch: bool = False,
    shard_gb: float = 2,
) -> dict[str, Path]:
    """Write the files of `size` to `folder`. Files that exist are left as they are.

    Args:
        size: "7b", "13b", or "small", which has the same formats with small dimensions.
        parts: the files to write, of `PARTS`.
        vicuna: version of the language model's folder, one of `VICUNA_VERSIONS`.
        as_bin: write its shards as torch pickles (.bin) instead of safetensors.
        text_branch: write the Q-Former's file with a text branch, as files of BLIP-2's first stage have.
        shard_gb: most gigabytes of tensors in a shard. Writing takes twice this memory, or 2 GB for the encoder.

    Returns:
        {part: path}, with the files that existed.

    Raises:
        ConfigError: the disk has too little free space, or something else is at the path of a file.
    """
    sizes = published.SIZES[size]
    if vicuna == "v0":  # its tokenizer has a pad token more
        sizes = sizes | {"vocabulary": sizes["vocabulary"] + 1}
    names = published.PUBLISHED["files"][size]
    files = {
        "vision": (folder / names["vision"], published.eva_vit(sizes), torch.float16),
        "qformer": (folder / names["qformer"], published.blip2(sizes, text_branch), torch.float32),
        "llm": (folder / f"vicuna-{size}-{vicuna}", published.llama(sizes), torch.float16),
        "ckpt": (folder / names["ckpt"], published.projection(sizes), torch.float32),
    }
    files = {part: file for part, file in files.items() if part in parts}
    written = {part for part, (path, *_) in files.items() if path.is_file() or (path / "config.json").is_file()}
    missing = {part: file for part, file in files.items() if part not in written}
    folder.mkdir(parents=True, exist_ok=True)
    for path, *_ in missing.values():
        if path.exists():
            raise ConfigError(
                f"{path} is in the way: it is not what this command writes. Move it, or name another --out."
            )
    needed, free = sum(_nbytes(table, dtype) for _, table, dtype in missing.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{folder} has {free / 1e9:.1f} GB free; the files need {needed / 1e9:.1f} GB. Choose another --out, or "
            "fewer --parts."
        )
    for part, (path, table, dtype) in missing.items():
        values = RandomValues(seed + PARTS.index(part))
        if part == "llm":
            with whole_folder(path) as part_folder:
                _write_llm(part_folder, table, values, sizes, vicuna, as_bin, shard_gb)
        else:
            tensors = {name: values.tensor(name, shape, dtype) for name, shape in table.items()}
            checkpoint.save(tensors if part == "vision" else {"model": tensors}, path)
        logging.info("Wrote %s (%s bytes of tensors)", path, f"{_nbytes(table, dtype):,}")
    for part in written:
        logging.info("%s exists and is left as it is.", files[part][0])
    return {part: path for part, (path, _, _) in files.items()}


def yaml_options(size: str, paths: dict[str, Path]) -> list[str]:
    """Values for `--options`: the paths of the files, and the dimensions of small ones."""
    options = [f"{published.KEYS[part]}={path}" for part, path in paths.items()]
    return options + (published.small_options() if size == "small" else [])


def _write_llm(folder, table, values, sizes, vicuna, as_bin, shard_gb) -> None:
    """Write a language model's folder."""
    empty = {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in table.items()}
    shards = split_torch_state_dict_into_shards(empty, max_shard_size=int(shard_gb * 1e9)).filename_to_tensors.values()
    stem, suffix = ("pytorch_model", "bin") if as_bin else ("model", "safetensors")
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = folder / f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        tensors = {name: values.tensor(name, table[name], torch.float16) for name in names}
        if as_bin:
            tensors |= _rotary_buffers(names, sizes)
            checkpoint.save(tensors, file)
        else:
            save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    index = {"metadata": {"total_size": _nbytes(table, torch.float16)}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.{suffix}.index.json", index)
    _write_tokenizer(folder, vicuna)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    _write_json(folder / "config.json", published.llama_config(sizes, vicuna))


def _rotary_buffers(names: list[str], sizes: Sizes) -> dict[str, torch.Tensor]:
    """The buffers that transformers 4.28 saved with the weights of each layer."""
    half = sizes["llm_width"] // sizes["llm_heads"] // 2
    inv_freq = 1.0 / 10000 ** (torch.arange(half).float() / half)
    layers = [name.removesuffix("q_proj.weight") for name in names if name.endswith("q_proj.weight")]
    return {f"{layer}rotary_emb.inv_freq": inv_freq.clone() for layer in layers}


def _write_tokenizer(folder: Path, vicuna: str) -> None:
    """Write a SentencePiece model, trained like LLaMA's but on this package's source, and the files beside it."""
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if vicuna == "v0":  # as its conversion left it
        _write_json(folder / "added_tokens.json", {PAD_TOKEN: 32000})
        special = dict.fromkeys(special, "") | {"pad_token": PAD_TOKEN}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", special | {"tokenizer_class": "LlamaTokenizer"})


@functools.cache
def _sentencepiece_model() -> bytes:
    """A model with LLaMA's settings and 2,000 learnt pieces, padded to 32,000 with pieces that occur in no text."""
    from sentencepiece import SentencePieceTrainer

    texts = sorted([*PACKAGE_ROOT.glob("**/*.py"), *PACKAGE_ROOT.glob("**/*.md"), *PACKAGE_ROOT.glob("**/*.yaml")])
    lines = (line for path in texts for line in path.read_text(encoding="utf-8").splitlines() if line)
    written = io.BytesIO()
    settings = published.PUBLISHED["sentencepiece"]
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=written, **settings)
    unused = (f"\u27e8unused {i}\u27e9" for i in range(settings["vocab_size"], 32000))
    return written.getvalue() + b"".join(piece(text, kind=UNUSED) for text in unused)


def _nbytes(table: Table, dtype: torch.dtype) -> int:
    return sum(map(prod, table.values())) * dtype.itemsize


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
