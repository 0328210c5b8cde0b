"""Names and shapes of the tensors in the published files, written out by hand.

`random_weights.py` writes files by these tables, and tests read them back with the loading code: a table that came from
our own modules would share their mistakes. `tests/common/test_published.py` holds them against the golden list.

A row is a name and its dimensions. `{}` in a name counts the layers; a dimension is a number, or a letter of `Sizes`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a set of files; the defaults are the published ones, with Vicuna-7B."""

    vit_width: int = 1408
    vit_ffn: int = 6144
    vit_blocks: int = 40
    """The file holds one block more than is used."""
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
        """What the letters of the tables stand for."""
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
patch_embed.proj.weight D 3 P P
patch_embed.proj.bias D
"""
EVA_BLOCK = """
blocks.{}.norm1.weight D
blocks.{}.norm1.bias D
blocks.{}.attn.q_bias D
blocks.{}.attn.v_bias D
blocks.{}.attn.qkv.weight 3D D
blocks.{}.attn.proj.weight D D
blocks.{}.attn.proj.bias D
blocks.{}.norm2.weight D
blocks.{}.norm2.bias D
blocks.{}.mlp.fc1.weight F D
blocks.{}.mlp.fc1.bias F
blocks.{}.mlp.fc2.weight D F
blocks.{}.mlp.fc2.bias D
"""
# Surplus, with the last block: CLIP's final norm and head.
EVA_END = """
norm.weight D
norm.bias D
head.weight E D
head.bias E
"""

QFORMER_STEM = """
query_tokens 1 Q B
ln_vision.weight D
ln_vision.bias D
Qformer.bert.embeddings.position_ids 1 512
Qformer.bert.embeddings.LayerNorm.weight B
Qformer.bert.embeddings.LayerNorm.bias B
"""
QFORMER_ATTENTION = """
Qformer.bert.encoder.layer.{}.attention.self.query.weight B B
Qformer.bert.encoder.layer.{}.attention.self.query.bias B
Qformer.bert.encoder.layer.{}.attention.self.key.weight B B
Qformer.bert.encoder.layer.{}.attention.self.key.bias B
Qformer.bert.encoder.layer.{}.attention.self.value.weight B B
Qformer.bert.encoder.layer.{}.attention.self.value.bias B
Qformer.bert.encoder.layer.{}.attention.output.dense.weight B B
Qformer.bert.encoder.layer.{}.attention.output.dense.bias B
Qformer.bert.encoder.layer.{}.attention.output.LayerNorm.weight B
Qformer.bert.encoder.layer.{}.attention.output.LayerNorm.bias B
"""
QFORMER_CROSSATTENTION = """
Qformer.bert.encoder.layer.{}.crossattention.self.query.weight B B
Qformer.bert.encoder.layer.{}.crossattention.self.query.bias B
Qformer.bert.encoder.layer.{}.crossattention.self.key.weight B D
Qformer.bert.encoder.layer.{}.crossattention.self.key.bias B
Qformer.bert.encoder.layer.{}.crossattention.self.value.weight B D
Qformer.bert.encoder.layer.{}.crossattention.self.value.bias B
Qformer.bert.encoder.layer.{}.crossattention.output.dense.weight B B
Qformer.bert.encoder.layer.{}.crossattention.output.dense.bias B
Qformer.bert.encoder.layer.{}.crossattention.output.LayerNorm.weight B
Qformer.bert.encoder.layer.{}.crossattention.output.LayerNorm.bias B
"""
QFORMER_FFN = """
Qformer.bert.encoder.layer.{}.intermediate_query.dense.weight G B
Qformer.bert.encoder.layer.{}.intermediate_query.dense.bias G
Qformer.bert.encoder.layer.{}.output_query.dense.weight B G
Qformer.bert.encoder.layer.{}.output_query.dense.bias B
Qformer.bert.encoder.layer.{}.output_query.LayerNorm.weight B
Qformer.bert.encoder.layer.{}.output_query.LayerNorm.bias B
"""
# Surplus: what else BLIP-2's second stage trained.
QFORMER_END = """
t5_proj.weight T B
t5_proj.bias T
"""
# Surplus of BLIP-2's first-stage files: BERT's words, feed-forward layers and language head.
QFORMER_TEXT = """
Qformer.bert.embeddings.word_embeddings.weight W B
Qformer.bert.embeddings.position_embeddings.weight 512 B
Qformer.cls.predictions.bias W
Qformer.cls.predictions.transform.dense.weight B B
Qformer.cls.predictions.transform.dense.bias B
Qformer.cls.predictions.transform.LayerNorm.weight B
Qformer.cls.predictions.transform.LayerNorm.bias B
Qformer.cls.predictions.decoder.weight W B
Qformer.cls.predictions.decoder.bias W
"""
QFORMER_TEXT_FFN = """
Qformer.bert.encoder.layer.{}.intermediate.dense.weight G B
Qformer.bert.encoder.layer.{}.intermediate.dense.bias G
Qformer.bert.encoder.layer.{}.output.dense.weight B G
Qformer.bert.encoder.layer.{}.output.dense.bias B
Qformer.bert.encoder.layer.{}.output.LayerNorm.weight B
Qformer.bert.encoder.layer.{}.output.LayerNorm.bias B
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
llama_proj.weight H B
llama_proj.bias H
"""

Table = dict[str, tuple[int, ...]]


def _rows(table: str, sizes: Sizes, layer: int | None = None) -> Table:
    dims, rows = sizes.dims(), {}
    for line in table.split("\n"):
        if line:
            name, *shape = line.split()
            rows[name.format(layer)] = tuple(dims[d] if d in dims else int(d) for d in shape)
    return rows


def eva_vit(sizes: Sizes) -> Table:
    """eva_vit_g.pth: {name: shape}, all float16. The last block, `norm` and `head` are not used."""
    rows = _rows(EVA_STEM, sizes)
    for i in range(sizes.vit_blocks):
        rows |= _rows(EVA_BLOCK, sizes, i)
    return rows | _rows(EVA_END, sizes)


def blip2(sizes: Sizes, text_branch: bool = False) -> Table:
    """blip2_pretrained_flant5xxl.pth, under "model": {name: shape}, float32; `position_ids` is int64.

    text_branch: with the text branch, which files of BLIP-2's first stage hold.
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
