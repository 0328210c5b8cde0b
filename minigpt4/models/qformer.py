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
from minigpt4.weights import hf_names

# Tensors of BLIP-2's files that are not used: the text branch, the language head, the projection for T5 or OPT.
SURPLUS = re.compile(
    r"Qformer\.cls\.|Qformer\.bert\.embeddings\.(word|position)_embeddings\.|"
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.|(t5|opt)_proj\."
)


class SelfOutput(nn.Module):
    """The end of every sub-layer of BERT: projection, dropout, sum with the residual, norm."""

    def __init__(self, in_dim: int, dim: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(in_dim, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class MultiHeadAttention(nn.Module):
    """Attention of queries [B,Q,D] over `context` [B,N,context_dim]."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
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

    def __init__(self, dim: int, context_dim: int, num_heads: int, attention_dropout: float, hidden_dropout: float):
        super().__init__()
        self.self = MultiHeadAttention(dim, context_dim, num_heads, attention_dropout)
        self.output = SelfOutput(dim, dim, hidden_dropout)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.output(self.self(x, context), x)


class Layer(nn.Module):
    """Self-attention among the queries, cross-attention to the image (in some of the layers), feed-forward."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        intermediate_size: int,
        image_dim: int | None,
        attention_dropout: float,
        hidden_dropout: float,
    ):
        """image_dim: width of the image tokens; None: the layer has no cross-attention."""
        super().__init__()
        self.attention = Attention(dim, dim, num_heads, attention_dropout, hidden_dropout)
        self.crossattention = (
            Attention(dim, image_dim, num_heads, attention_dropout, hidden_dropout) if image_dim else None
        )
        self.intermediate_query = nn.Sequential(OrderedDict(dense=nn.Linear(dim, intermediate_size), gelu=nn.GELU()))
        self.output_query = SelfOutput(intermediate_size, dim, hidden_dropout)

    def forward(self, x: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, image_embeds)
        return self.output_query(self.intermediate_query(x), x)


class QFormer(nn.Module):
    """Queries [B,Q,D] and image tokens [B,N,vision_width] to query outputs [B,Q,D].

    The defaults are the sizes of bert-base and of the published weights. Dropout acts in train mode only.
    """

    def __init__(
        self,
        vision_width: int,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        cross_attention_freq: int = 2,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
    ):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ConfigError(
                f"model.qformer.hidden_size={hidden_size} is not a multiple of "
                f"model.qformer.num_attention_heads={num_attention_heads}."
            )
        self.hidden_size = hidden_size
        layers = nn.ModuleList(
            Layer(
                hidden_size,
                num_attention_heads,
                intermediate_size,
                vision_width if i % cross_attention_freq == 0 else None,
                attention_probs_dropout_prob,
                hidden_dropout_prob,
            )
            for i in range(num_hidden_layers)
        )
        # BERT's embeddings without the embedding: the queries are given.
        norm, dropout = nn.LayerNorm(hidden_size, eps=1e-12), nn.Dropout(hidden_dropout_prob)
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
