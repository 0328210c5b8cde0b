"""The blocks of a frozen vision encoder with fewer passes over memory, for training steps that are compiled.

A block of timm's ends with a sum, of which the next block takes the norm first. Compiled one by one, a block writes
the sum and the next one reads it again. Here it hands on the two terms, and the next one takes sum and norm at once, as
it does between its attention and its MLP. The sums are those of timm's blocks, in the same order (in fp8 in 16 bit).
Patches are embedded by a product, for which a GPU has quicker kernels than for a convolution; attention is a kernel of
ours there (`vit_kernels.py`).

B images, N image tokens, D width; K inputs, M outputs of a linear layer.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp, PatchEmbed
from timm.models.eva import EvaAttention, EvaBlock
from torch import nn

from minigpt4.kernels.dispatch import use_triton
from minigpt4.models.eva_vit import EvaViT
from minigpt4.quantization import fp8, fp8_rounding

Unit = Callable[[EvaBlock, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def fits(vit: nn.Module) -> bool:
    """Whether `forward_features` computes what this encoder does: one of ours, frozen, its blocks of the plain kind."""
    frozen = not any(p.requires_grad for p in vit.parameters())
    ours = type(vit) is EvaViT and type(vit.patch_embed) is PatchEmbed and not vit.grad_checkpointing
    return frozen and ours and all(_is_plain(block) for block in vit.blocks)


def forward_features(vit: EvaViT, image: torch.Tensor, unit: Unit) -> torch.Tensor:
    """Images [B,3,S,S] to image tokens [B,N,D], as timm's `Eva.forward_features`. unit: `run_block`, as compiled."""
    x = vit.norm_pre(vit._pos_embed(_embed_patches(vit.patch_embed, image))[0])
    device = x.device.type
    products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if isinstance(vit.blocks[0].attn.qkv, fp8.Fp8):
        x = x.to(products)  # 16 bit for the sums too: fp8 rounds more than that
    delta = torch.zeros_like(x, dtype=products)  # so that the first block is compiled as all others are
    for block in vit.blocks:
        x, delta = unit(block, x, delta)
    return vit.norm(x + delta)


def _embed_patches(patch_embed: PatchEmbed, image: torch.Tensor) -> torch.Tensor:
    """Images [B,3,S,S] to the embeddings [B,G*G,D] of their patches: the convolution, as a product."""
    conv = patch_embed.proj
    weight, (p, _) = conv.weight.flatten(1), conv.kernel_size  # [D,3*p*p]
    grid = image.to(weight.dtype).unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [B,3,G,p,G,p]
    rows = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    padding = (0, -rows.shape[-1] % 8)  # to sizes that a GPU multiplies quickly
    return patch_embed.norm(F.linear(F.pad(rows, padding), F.pad(weight, padding), conv.bias))


def run_block(block: EvaBlock, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block whose input is x + delta, and its output the sum of what it returns; all [B,N,D]."""
    attn, mlp, shape = block.attn, block.mlp, x.shape
    _, normed = _sum_norm(block.norm1, attn.qkv, x, delta)
    qkv = _linear(attn.qkv, normed, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
    attended = attn.proj(_attention(qkv.view(*shape[:2], -1), attn.num_heads))
    x, normed = _sum_norm(block.norm2, mlp.fc1, x, delta, attended)
    return x, _mlp(mlp, normed).view(shape)


def _sum_norm(norm: nn.LayerNorm, layer: nn.Linear, *terms: torch.Tensor) -> tuple:
    """The sum of terms [B,N,D], and its norm as `layer` takes it: [B,N,D], or in fp8 rows [B*N,D] with scales.

    The kernel gives the sum of three terms alone: that of two is added up again with the third.
    """
    in_fp8 = isinstance(layer, fp8.Fp8)
    if use_triton(terms[-1]):
        from minigpt4.kernels import vit as vit_kernels

        results = vit_kernels.add_layer_norm(list(terms), norm.weight, norm.bias, norm.eps, in_fp8)
        total, *normed = results if len(terms) > 2 else (None, *results)
        return total, normed if in_fp8 else normed[0]
    total = functools.reduce(torch.add, terms)
    return total, fp8_rounding.quantize_rows(norm(total).flatten(0, 1)) if in_fp8 else norm(total)


def _attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Of all tokens of an image to each other: [B,N,3*H*d], queries first, to [B,N,H*d]."""
    if use_triton(qkv) and torch.cuda.get_device_capability(qkv.device) >= (8, 0):
        from minigpt4.kernels.vit import vit_attention

        return vit_attention(qkv, heads)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _linear(layer: nn.Linear, normed, bias: torch.Tensor | None) -> torch.Tensor:
    """The layer's product with what `_sum_norm` returned for it, plus a bias."""
    if isinstance(layer, fp8.Fp8):
        return fp8.product(normed, layer.weight, layer.scale, bias)
    return F.linear(normed, layer.weight, bias)


def _mlp(mlp: Mlp, normed) -> torch.Tensor:
    """Of what `_sum_norm` returned for its first layer. The other one, of the same sizes, is in fp8 where that is."""
    if isinstance(mlp.fc1, fp8.Fp8):
        hidden = _linear(mlp.fc1, normed, mlp.fc1.bias)
        return fp8.product(fp8_rounding.round_gelu(hidden), mlp.fc2.weight, mlp.fc2.scale, mlp.fc2.bias)
    if _takes_linear_gelu(mlp.fc1):
        return mlp.fc2(linear_gelu(normed.to(mlp.fc1.weight.dtype), mlp.fc1.weight, mlp.fc1.bias))
    return mlp(normed)


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
    nothing_dropped = all(type(path) is nn.Identity for path in (block.drop_path1, block.drop_path2))
    norms = all(_is_plain_norm(norm) for norm in (block.norm1, block.norm2))
    return unscaled and nothing_dropped and norms and _is_plain_attention(block.attn) and _is_plain_mlp(block.mlp)


def _is_plain_norm(norm: nn.Module) -> bool:
    """Whether it is a layer norm with weight and bias."""
    return type(norm) in (nn.LayerNorm, LayerNorm) and norm.weight is not None and norm.bias is not None


def _is_plain_attention(attn: nn.Module) -> bool:
    """Whether it is a joint product with biases, attention and another product, and nothing between."""
    joint = type(attn) is EvaAttention and attn.qkv is not None and attn.q_bias is not None and attn.gate is None
    parts = (attn.q_norm, attn.k_norm, attn.norm) if joint else ()
    return joint and all(type(part) is nn.Identity for part in parts) and not attn.attn_drop.p and not attn.proj_drop.p


def _is_plain_mlp(mlp: nn.Module) -> bool:
    """Whether it is two layers, and nothing but exact GELU between."""
    if type(mlp) is not Mlp or type(mlp.act) is not nn.GELU or mlp.act.approximate != "none":
        return False
    return type(mlp.norm) is nn.Identity and not mlp.drop1.p and not mlp.drop2.p


def _takes_linear_gelu(layer: nn.Linear) -> bool:
    """Whether the layer is in 16 bit, with a bias, on a GPU. One in fp8 has a product of its own."""
    return type(layer) is nn.Linear and layer.bias is not None and use_triton(layer.weight)
