"""The Q-Former: learned queries that read an image through cross-attention (BLIP-2, Li et al. 2023, section 3.1).

Only the path of the queries is built: the published file's text branch (word embeddings, text feed-forward, language
head) plays no part once BLIP-2's first stage is over. Module names are those of the published checkpoint, hence
``Qformer.bert.encoder.layer.N.attention.self.query`` and the like.

B batch, Q queries, N image tokens, D width, H heads.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.weights import hf_names

# What else BLIP-2's files hold: the text branch, the language head, the projection for T5 or OPT.
SURPLUS = re.compile(
    r"Qformer\.cls\.|Qformer\.bert\.embeddings\.(word|position)_embeddings\.|"
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.|(t5|opt)_proj\."
)


class SelfOutput(nn.Module):
    """Project, drop out, add the residual, normalise: how every sub-layer of BERT ends."""

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


class Intermediate(nn.Module):
    """First half of the feed-forward network."""

    def __init__(self, dim: int, intermediate_size: int):
        super().__init__()
        self.dense = nn.Linear(dim, intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Self-attention among the queries, cross-attention to the image (in every second layer), feed-forward."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        intermediate_size: int,
        image_dim: int | None,
        attention_dropout: float,
        hidden_dropout: float,
    ):
        """image_dim: width of the image tokens; None: without cross-attention."""
        super().__init__()
        self.attention = Attention(dim, dim, num_heads, attention_dropout, hidden_dropout)
        self.crossattention = (
            Attention(dim, image_dim, num_heads, attention_dropout, hidden_dropout) if image_dim else None
        )
        self.intermediate_query = Intermediate(dim, intermediate_size)
        self.output_query = SelfOutput(intermediate_size, dim, hidden_dropout)

    def forward(self, x: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, image_embeds)
        return self.output_query(self.intermediate_query(x), x)


class Embeddings(nn.Module):
    """The queries are given, so all that is left of BERT's embeddings is their normalisation."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.LayerNorm(x))


class Encoder(nn.Module):
    def __init__(self, layers: list[Layer]):
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            x = layer(x, image_embeds)
        return x


class Bert(nn.Module):
    def __init__(self, embeddings: Embeddings, encoder: Encoder):
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder


class QFormer(nn.Module):
    """Queries [B,Q,D] and image tokens [B,N,vision_width] to query outputs [B,Q,D].

    The defaults are bert-base, which the published weights have. Dropout acts only when the module trains.
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
                f"qformer.hidden_size={hidden_size} is not a multiple of "
                f"qformer.num_attention_heads={num_attention_heads}."
            )
        self.hidden_size = hidden_size
        layers = [
            Layer(
                hidden_size,
                num_attention_heads,
                intermediate_size,
                vision_width if i % cross_attention_freq == 0 else None,
                attention_probs_dropout_prob,
                hidden_dropout_prob,
            )
            for i in range(num_hidden_layers)
        ]
        self.bert = Bert(Embeddings(hidden_size, hidden_dropout_prob), Encoder(layers))

    def forward(self, query_tokens: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        return self.bert.encoder(self.bert.embeddings(query_tokens), image_embeds)


def checkpoint_filter_fn(state_dict: dict) -> dict:
    """The queries, ln_vision and the Q-Former's query path out of a BLIP-2 file; its known surplus is dropped.

    Weights of a Hugging Face folder get their published names first.
    """
    if any(key.startswith(hf_names.QFORMER) for key in state_dict):
        state_dict = hf_names.qformer_from_hf(state_dict)
    return {key: value for key, value in state_dict.items() if not SURPLUS.match(key)}
