"""The EVA-CLIP vision encoder on timm's `Eva` (EVA, Fang et al. 2022; LAVIS's `eva_clip_g`).

timm's parameter names are the published ones. Unlike timm's own EVA models, this encoder has absolute positions only,
no final norm and no head. Its position embeddings are resized by plain bicubic interpolation; timm's is antialiased.
"""

from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva

from minigpt4.common import facts
from minigpt4.common.errors import ConfigError
from minigpt4.weights import hf_names


class EvaViT(Eva):
    """Images [B,3,S,S] to image tokens [B,1+(S/patch)^2,D], the class token first.

    sizes: the keys VIT_KEYS.
    """

    def __init__(self, image_size: int, drop_path_rate: float = 0.0, **sizes: float):
        if image_size % sizes["patch_size"]:
            raise ConfigError(f"image_size={image_size} is not a multiple of patch_size={sizes['patch_size']}.")
        super().__init__(
            img_size=image_size,
            drop_path_rate=drop_path_rate,
            **sizes,
            qkv_bias=True,
            use_abs_pos_emb=True,
            use_rot_pos_emb=False,
            use_post_transformer_norm=False,
            use_fc_norm=False,
            num_classes=0,
            global_pool="",
        )
        self.image_size = image_size

    def give_buffers_memory(self, device: torch.device) -> None:
        """Fill the buffers of an encoder built on the meta device: the keys' bias, which is zero and in no file."""
        for block in self.blocks:
            block.attn.k_bias = torch.zeros_like(block.attn.k_bias, device=device)

    def check_image(self, image: torch.Tensor) -> None:
        """Raise ConfigError for images of another size than the encoder's."""
        if image.shape[-2:] != (self.image_size, self.image_size):
            height, width = image.shape[-2:]
            raise ConfigError(
                f"The images are {height} x {width} pixels, the encoder takes {self.image_size} x {self.image_size}. "
                "Set model.image_size and the image_size of every vis_processor to the same number."
            )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.check_image(image)
        return self.forward_features(image)


def create_vit(
    vit_model: str | Mapping, image_size: int, drop_path_rate: float = 0.0, use_grad_checkpoint: bool = False
) -> EvaViT:
    """Build the encoder, with random weights, from its name or sizes. Raises the errors of `facts.vit_sizes`."""
    vit = EvaViT(image_size, drop_path_rate=drop_path_rate, **facts.vit_sizes(vit_model))
    vit.set_grad_checkpointing(use_grad_checkpoint)
    return vit


def checkpoint_filter_fn(state_dict: dict, vit: EvaViT) -> dict:
    """Adapt published weights to `vit`: drop surplus blocks, final norm and head, and resize position embeddings.

    Weights of a Hugging Face folder are first given their published names.
    """
    if any(key.startswith(hf_names.VISION) for key in state_dict):
        state_dict = hf_names.vision_from_hf(state_dict)
    depth = len(vit.blocks)

    def used(key: str) -> bool:
        if key.startswith("blocks."):
            return int(key.split(".")[1]) < depth
        return not key.startswith(("norm.", "fc_norm.", "head."))

    state_dict = {key: value for key, value in state_dict.items() if used(key)}
    if "pos_embed" in state_dict:
        pos_embed, grid = state_dict["pos_embed"], list(vit.patch_embed.grid_size)
        state_dict["pos_embed"] = resample_abs_pos_embed(pos_embed, grid, antialias=False)
    return state_dict
