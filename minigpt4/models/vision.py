"""The vision side: image -> EVA-ViT -> ln_vision -> Q-Former. It is the base class of MiniGPT-4 and usable by itself.

Its output [B,Q,W] can be cached (`datasets/feature_cache.py`).

B batch, Q query tokens, N image tokens, W width of the Q-Former.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models import eva_vit, loading, qformer
from minigpt4.models.base_model import BaseModel


def is_vision(name: str) -> bool:
    """Whether a parameter is one of the vision side. A plug-in's name may begin alike, such as `query_tokens_2`."""
    return name.partition(".")[0] in loading.PARTS[:4]


class Vision(BaseModel):
    """Maps each image to Q vectors.

    Args:
        visual_encoder, Qformer: the parts.
        num_query_token: vectors per image (Q).
        dtype: dtype of the computation.
    """

    def __init__(
        self,
        visual_encoder: eva_vit.EvaViT,
        Qformer: qformer.QFormer,
        num_query_token: int = 32,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.visual_encoder = visual_encoder
        self.ln_vision = LayerNorm(visual_encoder.embed_dim)
        self.query_tokens = nn.Parameter(torch.empty(1, num_query_token, Qformer.hidden_size).normal_(0, 0.02))
        self.Qformer = Qformer
        self.dtype = dtype

    def query_outputs(self, image: torch.Tensor, encoder: Callable | None = None) -> torch.Tensor:
        """Normalised images [B,3,H,W] to the Q-Former's output [B,Q,W].

        encoder: used instead of `visual_encoder`; computes the same image tokens.
        """
        if self.visual_encoder is None:
            raise ConfigError("The model was built for cached features (model.load_vision=False): it sees no images.")
        if not image.is_floating_point():
            raise ConfigError(f"Images must be normalised, floating-point numbers; these are {image.dtype}.")
        with self.autocast(image.device):
            image_tokens = self.ln_vision((encoder or self.visual_encoder)(image))  # [B,N,encoder's width]
            # Cast once, not in each layer that reads them. If they need gradients, these are summed in float32.
            if not image_tokens.requires_grad:
                image_tokens = image_tokens.to(self.dtype)
            return self.Qformer(self.query_tokens.expand(len(image), -1, -1), image_tokens)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Compute in `dtype`. Casts are not cached, because a CUDA graph cannot contain such a cache."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    @classmethod
    def from_config(
        cls, cfg: Mapping, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Vision":
        """Build the vision side alone, frozen, from the `model:` section.

        Arguments and errors are those of `MiniGPT4.from_config`. Parts that were trained are loaded from `ckpt`.
        """
        cfg, device = MiniGPT4Config.from_section(cfg), torch.device(device)
        sources = loading.open_sources(cfg)
        parts = loading.vision_parts(cfg, sources, device, dtype)
        with torch.device(device):
            model = cls(**parts)
        loading.load_rest(model, cfg, sources, device)
        return model.requires_grad_(False).eval()


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 and returned in the type of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)
