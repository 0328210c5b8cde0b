"""Names and shapes of the tensors in the published files, read from the tables in `assets/published/tensors.yaml`."""

from collections.abc import Iterable

from braceexpand import braceexpand
from omegaconf import OmegaConf

from minigpt4 import PACKAGE_ROOT

VICUNA_VERSIONS = ("v0", "v1.1", "v1.5")

Sizes = dict[str, int]
Table = dict[str, tuple[int, ...]]

PUBLISHED = OmegaConf.to_container(OmegaConf.load(PACKAGE_ROOT / "assets/published/tensors.yaml"))
KEYS: dict[str, str] = PUBLISHED["keys"]
PARTS = tuple(KEYS)
SIZES: dict[str, Sizes] = {name: PUBLISHED["sizes"]["7b"] | sizes for name, sizes in PUBLISHED["sizes"].items()}


def eva_vit(sizes: Sizes) -> Table:
    """eva_vit_g.pth: {name: shape}, all float16.

    The model does not use the last block, and CLIP's final `norm` and `head`.
    """
    return _rows("eva", sizes, range(sizes["vit_blocks"]))


def blip2(sizes: Sizes, text_branch: bool = False) -> Table:
    """blip2_pretrained_flant5xxl.pth, under "model": {name: shape}, float32; `position_ids` is int64.

    The model does not use `t5_proj`, BLIP-2's projection into the T5 of its second stage.
    text_branch: include the text branch, as files of BLIP-2's first stage do. It is not used either.
    """
    layers = range(sizes["qformer_layers"])
    rows = _rows("qformer", sizes, layers)
    rows |= _rows("qformer_crossattention", sizes, layers[:: sizes["cross_attention_freq"]])
    return rows | _rows("qformer_text", sizes, layers) if text_branch else rows


def llama(sizes: Sizes) -> Table:
    """A Vicuna in Hugging Face format: {name: shape}, float16."""
    return _rows("llama", sizes, range(sizes["llm_layers"]))


def projection(sizes: Sizes) -> Table:
    """prerained_minigpt4_7b.pth and pretrained_minigpt4_13b.pth, under "model": {name: shape}, float32."""
    return _rows("projection", sizes, range(1))


def llama_config(sizes: Sizes, vicuna: str) -> dict:
    """The config.json of a Vicuna of a version."""
    config = PUBLISHED["llama_config"] | PUBLISHED["llama_config_of"].get(vicuna, {})
    return {key: sizes.get(value, value) if isinstance(value, str) else value for key, value in config.items()}


def small_options() -> list[str]:
    """The settings, as for `--options`, with which the small files load."""
    return [f"{key}={_size(str(value), SIZES['small'])}" for key, value in PUBLISHED["small_options"].items()]


def _rows(table: str, sizes: Sizes, layers: Iterable[int]) -> Table:
    """The tensors of a table, for each of the layers."""
    rows = {}
    for layer in layers:
        for line in PUBLISHED["tables"][table].strip().split("\n"):
            pattern, *dimensions = line.split()
            shape = tuple(_size(dimension, sizes) for dimension in dimensions)
            pattern = pattern.replace("#", str(layer)).replace(".*", ".{weight,bias}")
            for name in braceexpand(pattern):
                rows[name] = shape[:1] if name.endswith(".bias") else shape
    return rows


def _size(dimension: str, sizes: Sizes) -> int:
    """A number, one of `sizes`, or a multiple of one."""
    if dimension.isdigit():
        return int(dimension)
    factor, _, name = dimension.rpartition("*")
    return int(factor or 1) * sizes[name]
