"""The Q-Former: learned queries that read an image through cross-attention (BLIP-2, Li et al. 2023, section 3.1).

Only the path of the queries is built. The published file also has a text branch (word embeddings, text feed-forward,
language head), which is used in BLIP-2's first stage only. Modules have the names of the published checkpoint, such as
``Qformer.bert.encoder.layer.N.attention.self.query``.

B batch, Q queries, N image tokens, D width, H heads.
"""

import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import QFormerSizes
from minigpt4.weights import hf_names

# Tensors of BLIP-2's files that are not used: the text branch, the language head, the projection for T5 or OPT.
SURPLUS = re.compile(
    r"Qformer\.cls\.|Qformer\.bert\.embeddings\.(word|position)_embeddings\.|"
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.|(t5|opt)_proj\."
)


class SelfOutput(nn.Module):
    """The end of every sub-layer of BERT: projection, dropout, sum with the residual, norm."""

    def __init__(self, in_dim: int, sizes: QFormerSizes):
        super().__init__()
        self.dense = nn.Linear(in_dim, sizes.hidden_size)
        self.LayerNorm = nn.LayerNorm(sizes.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(sizes.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class MultiHeadAttention(nn.Module):
    """Attention of queries [B,Q,D] over `context` [B,N,context_dim]."""

    def __init__(self, context_dim: int, sizes: QFormerSizes):
        super().__init__()
        dim = sizes.hidden_size
        self.num_heads, self.dropout = sizes.num_attention_heads, sizes.attention_probs_dropout_prob
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(context_dim, dim)
        self.value = nn.Linear(context_dim, dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        def heads(t: torch.Tensor) -> torch.Tensor:  # [B,L,D] -> [B,H,L,D/H]
            return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        x = F.scaled_dot_product_attention(
            heads(self.query(x)),
            heads(self.key(context)),
            heads(self.value(context)),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention, then its output projection."""

    def __init__(self, context_dim: int, sizes: QFormerSizes):
        super().__init__()
        self.self = MultiHeadAttention(context_dim, sizes)
        self.output = SelfOutput(sizes.hidden_size, sizes)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.output(self.self(x, context), x)


class Layer(nn.Module):
    """Self-attention among the queries, cross-attention to the image (in some of the layers), feed-forward."""

    def __init__(self, image_dim: int | None, sizes: QFormerSizes):
        """image_dim: width of the image tokens; None: the layer has no cross-attention."""
        super().__init__()
        dim, inner = sizes.hidden_size, sizes.intermediate_size
        self.attention = Attention(dim, sizes)
        self.crossattention = Attention(image_dim, sizes) if image_dim else None
        self.intermediate_query = nn.Sequential(OrderedDict(dense=nn.Linear(dim, inner), gelu=nn.GELU()))
        self.output_query = SelfOutput(inner, sizes)

    def forward(self, x: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, image_embeds)
        return self.output_query(self.intermediate_query(x), x)


class QFormer(nn.Module):
    """Queries [B,Q,D] and image tokens [B,N,vision_width] to query outputs [B,Q,D].

    Dropout acts in train mode only.

    sizes: the fields of `QFormerSizes`. The defaults are those of bert-base and of the published weights.
    """

    def __init__(self, vision_width: int, **sizes: float):
        super().__init__()
        given = QFormerSizes(**sizes)
        self.hidden_size = given.hidden_size
        if given.hidden_size % given.num_attention_heads:
            raise ConfigError(
                f"model.qformer.hidden_size={given.hidden_size} is not a multiple of "
                f"model.qformer.num_attention_heads={given.num_attention_heads}."
            )
        widths = (vision_width if i % given.cross_attention_freq == 0 else None for i in range(given.num_hidden_layers))
        layers = nn.ModuleList(Layer(width, given) for width in widths)
        # BERT's embeddings without the embedding: the queries are given.
        norm, dropout = nn.LayerNorm(given.hidden_size, eps=1e-12), nn.Dropout(given.hidden_dropout_prob)
        embeddings = nn.Sequential(OrderedDict(LayerNorm=norm, dropout=dropout))
        self.bert = nn.ModuleDict({"embeddings": embeddings, "encoder": nn.ModuleDict({"layer": layers})})

    def forward(self, query_tokens: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        x = self.bert.embeddings(query_tokens)
        for layer in self.bert.encoder.layer:
            x = layer(x, image_embeds)
        return x


def checkpoint_filter_fn(state_dict: dict) -> dict:
    """Keep the queries, ln_vision and the Q-Former's query path of a BLIP-2 file. Unknown tensors are kept, too.

    Weights of a Hugging Face folder are first given their published names.
    """
    if any(key.startswith(hf_names.QFORMER) for key in state_dict):
        state_dict = hf_names.qformer_from_hf(state_dict)
    return {key: value for key, value in state_dict.items() if not SURPLUS.match(key)}
