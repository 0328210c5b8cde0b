"""The blocks of a frozen vision encoder with fewer passes over memory, for training steps that are compiled.

A block of timm's ends with a sum, of which the next block takes the norm first. Compiled one by one, a block writes
the sum and the next one reads it again. Here it hands on the two terms, and the next one takes sum and norm at once, as
it does between its attention and its MLP. The sums are those of timm's blocks, in the same order.

B images, N image tokens, D width; K inputs, M outputs of a linear layer.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.eva import EvaBlock
from torch import nn

from minigpt4.models.eva_vit import EvaViT

Unit = Callable[[EvaBlock, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def fits(vit: nn.Module) -> bool:
    """Whether `forward_features` computes what this encoder does: one of ours, frozen, its blocks of the plain kind."""
    frozen = not any(p.requires_grad for p in vit.parameters())
    ours = type(vit) is EvaViT and not vit.grad_checkpointing
    return frozen and ours and all(_is_plain(block) for block in vit.blocks)


def forward_features(vit: EvaViT, image: torch.Tensor, unit: Unit) -> torch.Tensor:
    """Images [B,3,S,S] to image tokens [B,N,D], as timm's `Eva.forward_features`. unit: `run_block`, as compiled."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image))[0])
    device = x.device.type
    products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    delta = torch.zeros_like(x, dtype=products)  # so that the first block is compiled as all others are
    for block in vit.blocks:
        x, delta = unit(block, x, delta)
    return vit.norm(x + delta)


def run_block(block: EvaBlock, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block whose input is x + delta, and its output the sum of what it returns; all [B,N,D]."""
    x = x + delta
    x = x + block.attn(block.norm1(x))
    return x, _mlp(block.mlp, block.norm2(x))


def _mlp(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not _takes_linear_gelu(mlp):
        return mlp(x)
    x = linear_gelu(x.to(mlp.fc1.weight.dtype), mlp.fc1.weight, mlp.fc1.bias)
    return mlp.drop2(mlp.fc2(mlp.norm(mlp.drop1(x))))


@torch.library.custom_op("minigpt4::linear_gelu", mutates_args=())
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of a linear layer: x [...,K], weight [M,K] and bias [M] of one type to [...,M]. Without a gradient.

    On a GPU it is one product (cuBLASLt's, with its epilogue), whose sums pass GELU in float32 and are then rounded,
    once. That is GELU's tanh form, which is off by 5e-4 at most. Two steps round before GELU too, which is worse in
    bfloat16: of standard normal sums their results are off by 8.4e-4 on average, those of one step by 5.8e-4. In
    float16 the two are alike: 1.0e-4 and 1.2e-4 on average, 2.1e-4 and 1.9e-4 in the root mean square.

    An operator of its own, since torch.compile would take torch's apart into product and GELU.
    """
    if x.device.type != "cuda":
        return F.gelu(F.linear(x, weight, bias))
    rows = x.reshape(-1, x.shape[-1])
    y = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], len(weight))


@linear_gelu.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _is_plain(block: nn.Module) -> bool:
    """Whether the block adds its attention and its MLP as they are, each to the sum of what precedes it."""
    unscaled = type(block) is EvaBlock and block.gamma_1 is None and block.gamma_2 is None
    return unscaled and all(type(path) is nn.Identity for path in (block.drop_path1, block.drop_path2))


def _takes_linear_gelu(mlp: nn.Module) -> bool:
    """Whether it begins with a layer in 16 bit, on a GPU, and exact GELU. A layer in fp8 has a product of its own."""
    if type(mlp) is not Mlp or type(mlp.fc1) is not nn.Linear or mlp.fc1.bias is None:
        return False
    exact = type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
    return exact and mlp.fc1.weight.is_cuda and mlp.fc1.weight.dtype in (torch.bfloat16, torch.float16)
