"""Names and shapes of the tensors in the published files, written out by hand.

`random_weights.py` writes files by these tables, and tests load them with the package's own code. Tables that were made
from the package's modules would share their mistakes. `tests/benchmarks/test_published.py` compares the tables with the
golden list.

A row is a name and its dimensions. In a name, `#` stands for the number of each layer, `{a,b}` for a and for b, and
`.*` for a weight of these dimensions and a bias of the first one. A dimension is a number, a field of `Sizes`, or a
multiple of one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from braceexpand import braceexpand


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a set of files; the defaults are the published ones, with Vicuna-7B."""

    vit_width: int = 1408
    vit_ffn: int = 6144
    vit_blocks: int = 40
    """One more than is used."""
    vit_tokens: int = 257
    patch: int = 14
    vit_head: int = 1024
    queries: int = 32
    qformer_width: int = 768
    qformer_ffn: int = 3072
    qformer_layers: int = 12
    cross_attention_freq: int = 2
    bert_vocabulary: int = 30523
    t5_width: int = 4096
    llm_width: int = 4096
    llm_ffn: int = 11008
    llm_layers: int = 32
    llm_heads: int = 32
    vocabulary: int = 32000


PARTS = ("vision", "qformer", "llm", "ckpt")
VICUNA_VERSIONS = ("v0", "v1.1", "v1.5")
SIZES = {
    "7b": Sizes(),
    "13b": Sizes(llm_width=5120, llm_ffn=13824, llm_layers=40, llm_heads=40),
    "small": Sizes(
        vit_width=64,
        vit_ffn=256,
        vit_blocks=3,
        vit_head=16,
        qformer_width=48,
        qformer_ffn=96,
        qformer_layers=2,
        bert_vocabulary=64,
        llm_width=128,
        llm_ffn=256,
        llm_layers=2,
        llm_heads=4,
    ),
}

EVA = """
cls_token 1 1 vit_width
pos_embed 1 vit_tokens vit_width
patch_embed.proj.* vit_width 3 patch patch
blocks.#.norm1.* vit_width
blocks.#.attn.q_bias vit_width
blocks.#.attn.v_bias vit_width
blocks.#.attn.qkv.weight 3*vit_width vit_width
blocks.#.attn.proj.* vit_width vit_width
blocks.#.norm2.* vit_width
blocks.#.mlp.fc1.* vit_ffn vit_width
blocks.#.mlp.fc2.* vit_width vit_ffn
norm.* vit_width
head.* vit_head vit_width
"""

QFORMER = """
query_tokens 1 queries qformer_width
ln_vision.* vit_width
Qformer.bert.embeddings.position_ids 1 512
Qformer.bert.embeddings.LayerNorm.* qformer_width
t5_proj.* t5_width qformer_width
Qformer.bert.encoder.layer.#.attention.self.{query,key,value}.* qformer_width qformer_width
Qformer.bert.encoder.layer.#.attention.output.dense.* qformer_width qformer_width
Qformer.bert.encoder.layer.#.attention.output.LayerNorm.* qformer_width
Qformer.bert.encoder.layer.#.intermediate_query.dense.* qformer_ffn qformer_width
Qformer.bert.encoder.layer.#.output_query.dense.* qformer_width qformer_ffn
Qformer.bert.encoder.layer.#.output_query.LayerNorm.* qformer_width
"""
QFORMER_CROSSATTENTION = """
Qformer.bert.encoder.layer.#.crossattention.self.query.* qformer_width qformer_width
Qformer.bert.encoder.layer.#.crossattention.self.{key,value}.* qformer_width vit_width
Qformer.bert.encoder.layer.#.crossattention.output.dense.* qformer_width qformer_width
Qformer.bert.encoder.layer.#.crossattention.output.LayerNorm.* qformer_width
"""
# BERT's words, feed-forward layers and language head.
QFORMER_TEXT = """
Qformer.bert.embeddings.word_embeddings.weight bert_vocabulary qformer_width
Qformer.bert.embeddings.position_embeddings.weight 512 qformer_width
Qformer.cls.predictions.bias bert_vocabulary
Qformer.cls.predictions.transform.dense.* qformer_width qformer_width
Qformer.cls.predictions.transform.LayerNorm.* qformer_width
Qformer.cls.predictions.decoder.* bert_vocabulary qformer_width
Qformer.bert.encoder.layer.#.intermediate.dense.* qformer_ffn qformer_width
Qformer.bert.encoder.layer.#.output.dense.* qformer_width qformer_ffn
Qformer.bert.encoder.layer.#.output.LayerNorm.* qformer_width
"""

LLAMA = """
model.embed_tokens.weight vocabulary llm_width
model.layers.#.self_attn.{q,k,v,o}_proj.weight llm_width llm_width
model.layers.#.mlp.{gate,up}_proj.weight llm_ffn llm_width
model.layers.#.mlp.down_proj.weight llm_width llm_ffn
model.layers.#.input_layernorm.weight llm_width
model.layers.#.post_attention_layernorm.weight llm_width
model.norm.weight llm_width
lm_head.weight vocabulary llm_width
"""

PROJECTION = """
llama_proj.* llm_width qformer_width
"""

Table = dict[str, tuple[int, ...]]


def eva_vit(sizes: Sizes) -> Table:
    """eva_vit_g.pth: {name: shape}, all float16.

    The model does not use the last block, and CLIP's final `norm` and `head`.
    """
    return _rows(EVA, sizes, range(sizes.vit_blocks))


def blip2(sizes: Sizes, text_branch: bool = False) -> Table:
    """blip2_pretrained_flant5xxl.pth, under "model": {name: shape}, float32; `position_ids` is int64.

    The model does not use `t5_proj`, BLIP-2's projection into the T5 of its second stage.
    text_branch: include the text branch, as files of BLIP-2's first stage do. It is not used either.
    """
    layers = range(sizes.qformer_layers)
    rows = _rows(QFORMER, sizes, layers)
    rows |= _rows(QFORMER_CROSSATTENTION, sizes, layers[:: sizes.cross_attention_freq])
    return rows | _rows(QFORMER_TEXT, sizes, layers) if text_branch else rows


def llama(sizes: Sizes) -> Table:
    """A Vicuna in Hugging Face format: {name: shape}, float16."""
    return _rows(LLAMA, sizes, range(sizes.llm_layers))


def projection(sizes: Sizes) -> Table:
    """prerained_minigpt4_7b.pth and pretrained_minigpt4_13b.pth, under "model": {name: shape}, float32."""
    return _rows(PROJECTION, sizes, range(1))


def _rows(table: str, sizes: Sizes, layers: Iterable[int]) -> Table:
    """The tensors of a table, for each of the layers."""
    rows = {}
    for layer in layers:
        for line in table.strip().split("\n"):
            pattern, *dimensions = line.split()
            shape = tuple(_size(dimension, sizes) for dimension in dimensions)
            pattern = pattern.replace("#", str(layer)).replace(".*", ".{weight,bias}")
            for name in braceexpand(pattern):
                rows[name] = shape[:1] if name.endswith(".bias") else shape
    return rows


def _size(dimension: str, sizes: Sizes) -> int:
    """A number, a field of `sizes`, or a multiple of one."""
    if dimension.isdigit():
        return int(dimension)
    factor, _, field = dimension.rpartition("*")
    return int(factor or 1) * getattr(sizes, field)
