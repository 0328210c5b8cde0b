"""Names and shapes of the tensors in the published files, written out by hand.

`random_weights.py` writes files by these tables, and tests load them with the package's own code. Tables that were made
from the package's modules would share their mistakes. `tests/benchmarks/test_published.py` compares the tables with the
golden list.

A row is a name and its dimensions. `{}` in a name is the number of the layer. A name that ends with `.*` stands for a
weight of these dimensions and a bias of the first one. A dimension is a number, or a letter that `Sizes.dims` explains.
"""

from dataclasses import dataclass


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

    def dims(self) -> dict[str, int]:
        """The dimensions that the letters in the tables stand for."""
        return {
            "D": self.vit_width,
            "3D": 3 * self.vit_width,
            "F": self.vit_ffn,
            "N": self.vit_tokens,
            "P": self.patch,
            "E": self.vit_head,
            "Q": self.queries,
            "B": self.qformer_width,
            "G": self.qformer_ffn,
            "W": self.bert_vocabulary,
            "T": self.t5_width,
            "H": self.llm_width,
            "I": self.llm_ffn,
            "V": self.vocabulary,
        }


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

EVA_STEM = """
cls_token 1 1 D
pos_embed 1 N D
patch_embed.proj.* D 3 P P
"""
EVA_BLOCK = """
blocks.{}.norm1.* D
blocks.{}.attn.q_bias D
blocks.{}.attn.v_bias D
blocks.{}.attn.qkv.weight 3D D
blocks.{}.attn.proj.* D D
blocks.{}.norm2.* D
blocks.{}.mlp.fc1.* F D
blocks.{}.mlp.fc2.* D F
"""
# Not used, like the last block: CLIP's final norm and head.
EVA_END = """
norm.* D
head.* E D
"""

QFORMER_STEM = """
query_tokens 1 Q B
ln_vision.* D
Qformer.bert.embeddings.position_ids 1 512
Qformer.bert.embeddings.LayerNorm.* B
"""
QFORMER_ATTENTION = """
Qformer.bert.encoder.layer.{}.attention.self.query.* B B
Qformer.bert.encoder.layer.{}.attention.self.key.* B B
Qformer.bert.encoder.layer.{}.attention.self.value.* B B
Qformer.bert.encoder.layer.{}.attention.output.dense.* B B
Qformer.bert.encoder.layer.{}.attention.output.LayerNorm.* B
"""
QFORMER_CROSSATTENTION = """
Qformer.bert.encoder.layer.{}.crossattention.self.query.* B B
Qformer.bert.encoder.layer.{}.crossattention.self.key.* B D
Qformer.bert.encoder.layer.{}.crossattention.self.value.* B D
Qformer.bert.encoder.layer.{}.crossattention.output.dense.* B B
Qformer.bert.encoder.layer.{}.crossattention.output.LayerNorm.* B
"""
QFORMER_FFN = """
Qformer.bert.encoder.layer.{}.intermediate_query.dense.* G B
Qformer.bert.encoder.layer.{}.output_query.dense.* B G
Qformer.bert.encoder.layer.{}.output_query.LayerNorm.* B
"""
# Not used: BLIP-2's projection into the T5 of its second stage.
QFORMER_END = """
t5_proj.* T B
"""
# Not used: the text branch in BLIP-2's first-stage files, which is BERT's words, feed-forward layers and language head.
QFORMER_TEXT = """
Qformer.bert.embeddings.word_embeddings.weight W B
Qformer.bert.embeddings.position_embeddings.weight 512 B
Qformer.cls.predictions.bias W
Qformer.cls.predictions.transform.dense.* B B
Qformer.cls.predictions.transform.LayerNorm.* B
Qformer.cls.predictions.decoder.* W B
"""
QFORMER_TEXT_FFN = """
Qformer.bert.encoder.layer.{}.intermediate.dense.* G B
Qformer.bert.encoder.layer.{}.output.dense.* B G
Qformer.bert.encoder.layer.{}.output.LayerNorm.* B
"""

LLAMA_STEM = """
model.embed_tokens.weight V H
"""
LLAMA_LAYER = """
model.layers.{}.self_attn.q_proj.weight H H
model.layers.{}.self_attn.k_proj.weight H H
model.layers.{}.self_attn.v_proj.weight H H
model.layers.{}.self_attn.o_proj.weight H H
model.layers.{}.mlp.gate_proj.weight I H
model.layers.{}.mlp.up_proj.weight I H
model.layers.{}.mlp.down_proj.weight H I
model.layers.{}.input_layernorm.weight H
model.layers.{}.post_attention_layernorm.weight H
"""
LLAMA_END = """
model.norm.weight H
lm_head.weight V H
"""

PROJECTION = """
llama_proj.* H B
"""

Table = dict[str, tuple[int, ...]]


def _rows(table: str, sizes: Sizes, layer: int | None = None) -> Table:
    dims, rows = sizes.dims(), {}
    for line in filter(None, table.split("\n")):
        name, *shape = line.format(layer).split()
        shape = tuple(dims[d] if d in dims else int(d) for d in shape)
        if name.endswith(".*"):
            module = name.removesuffix("*")
            rows |= {f"{module}weight": shape, f"{module}bias": shape[:1]}
        else:
            rows[name] = shape
    return rows


def eva_vit(sizes: Sizes) -> Table:
    """eva_vit_g.pth: {name: shape}, all float16. The model uses neither the last block nor `norm` and `head`."""
    rows = _rows(EVA_STEM, sizes)
    for i in range(sizes.vit_blocks):
        rows |= _rows(EVA_BLOCK, sizes, i)
    return rows | _rows(EVA_END, sizes)


def blip2(sizes: Sizes, text_branch: bool = False) -> Table:
    """blip2_pretrained_flant5xxl.pth, under "model": {name: shape}, float32; `position_ids` is int64.

    text_branch: include the text branch, as files of BLIP-2's first stage do.
    """
    rows = _rows(QFORMER_STEM, sizes)
    for i in range(sizes.qformer_layers):
        rows |= _rows(QFORMER_ATTENTION, sizes, i)
        if i % sizes.cross_attention_freq == 0:
            rows |= _rows(QFORMER_CROSSATTENTION, sizes, i)
        rows |= _rows(QFORMER_FFN, sizes, i)
        if text_branch:
            rows |= _rows(QFORMER_TEXT_FFN, sizes, i)
    return rows | (_rows(QFORMER_TEXT, sizes) if text_branch else {}) | _rows(QFORMER_END, sizes)


def llama(sizes: Sizes) -> Table:
    """A Vicuna in Hugging Face format: {name: shape}, float16."""
    rows = _rows(LLAMA_STEM, sizes)
    for i in range(sizes.llm_layers):
        rows |= _rows(LLAMA_LAYER, sizes, i)
    return rows | _rows(LLAMA_END, sizes)


def projection(sizes: Sizes) -> Table:
    """prerained_minigpt4_7b.pth and pretrained_minigpt4_13b.pth, under "model": {name: shape}, float32."""
    return _rows(PROJECTION, sizes)
