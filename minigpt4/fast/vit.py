"""The blocks of a frozen vision encoder with fewer passes over memory, for compiled training steps.

A block of timm's ends with an addition, and the next block begins with the norm of the sum. When blocks are compiled
one by one, the sum is written and read again. Here a block returns the two terms, and the next block computes sum and
norm together, as it does between its attention and its MLP. The sums are those of timm's blocks, in the same order (in
fp8 in 16 bit). Patches are embedded by a matrix product, for which a GPU has faster kernels than for a convolution. On
a GPU attention is a kernel of ours (`kernels/vit.py`).

B images, N image tokens, D width; K inputs, M outputs of a linear layer.
"""

import functools

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.models.eva import EvaBlock
from torch import nn

from minigpt4.common import compat
from minigpt4.fast.compilation import same_kernels
from minigpt4.kernels.dispatch import use_triton
from minigpt4.models.eva_vit import EvaViT
from minigpt4.quantization.fp8 import Fp8Linear, fp8_matmul
from minigpt4.quantization.fp8_rounding import quantize_gelu, quantize_rows


def supports_fused_vit(vit: nn.Module) -> bool:
    """Whether `FusedViT` may compute an encoder: an `EvaViT`, frozen, that keeps no activations.

    Whether its blocks compute what they do in timm's plain form is left to `self_check.sees_like_the_library`.
    """
    frozen = not any(p.requires_grad for p in vit.parameters())
    return frozen and type(vit) is EvaViT and not vit.grad_checkpointing


class FusedViT:
    """Image tokens of an encoder that `supports_fused_vit`, computed with the encoder's own weights."""

    def __init__(self, vit: EvaViT, compiled: bool):
        """compiled: by torch.compile, with one compilation for all blocks."""
        self.vit = vit
        self.block_fn = torch.compile(run_block, options=same_kernels()) if compiled else run_block

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Images [B,3,S,S] to image tokens [B,N,D], as `EvaViT.forward`."""
        vit = self.vit
        vit.check_image(image)
        x = vit.norm_pre(compat.add_positions(vit, embed_patches(vit.patch_embed, image)))
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if isinstance(vit.blocks[0].attn.qkv, Fp8Linear):
            x = x.to(dtype)  # sums in 16 bit: fp8 rounds more than that
        delta = torch.zeros_like(x, dtype=dtype)  # the first block gets two terms as all others do: one compilation
        for block in vit.blocks:
            x, delta = self.block_fn(block, x, delta)
        return vit.norm(x + delta)


def embed_patches(patch_embed: PatchEmbed, image: torch.Tensor) -> torch.Tensor:
    """Images [B,3,S,S] to the embeddings [B,G*G,D] of their patches: the convolution, as a matrix product."""
    conv = patch_embed.proj
    weight, (p, _) = conv.weight.flatten(1), conv.kernel_size  # [D,3*p*p]
    grid = image.to(weight.dtype).unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [B,3,G,p,G,p]
    rows = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    padding = (0, -rows.shape[-1] % 8)  # to sizes that a GPU multiplies fast
    return patch_embed.norm(F.linear(F.pad(rows, padding), F.pad(weight, padding), conv.bias))


def run_block(block: EvaBlock, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block with the input x + delta; returns its output as two terms. All are [B,N,D]."""
    attn, mlp, shape = block.attn, block.mlp, x.shape
    _, normed = _add_layer_norm(block.norm1, attn.qkv, x, delta)
    qkv = _linear(attn.qkv, normed, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
    attended = attn.proj(_attention(qkv.view(*shape[:2], -1), attn.num_heads))
    x, normed = _add_layer_norm(block.norm2, mlp.fc1, x, delta, attended)
    return x, _mlp(mlp, normed).view(shape)


def _add_layer_norm(norm: nn.LayerNorm, layer: nn.Linear, *terms: torch.Tensor) -> tuple:
    """The sum of terms [B,N,D], and its norm as input of `layer`: [B,N,D], or in fp8 rows [B*N,D] with scales.

    The kernel returns the sum of three terms only. The sum of two is added up again with the third.
    """
    in_fp8 = isinstance(layer, Fp8Linear)
    if use_triton(terms[-1]):
        from minigpt4.kernels import vit as vit_kernels

        results = vit_kernels.add_layer_norm(list(terms), norm.weight, norm.bias, norm.eps, in_fp8)
        total, *normed = results if len(terms) > 2 else (None, *results)
        return total, normed if in_fp8 else normed[0]
    total = functools.reduce(torch.add, terms)
    normed = norm(total)
    return total, quantize_rows(normed.flatten(0, 1)) if in_fp8 else normed


def _attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of all tokens of an image to each other: [B,N,3*H*d], queries first, to [B,N,H*d]."""
    if use_triton(qkv) and torch.cuda.get_device_capability(qkv.device) >= (8, 0):
        from minigpt4.kernels import vit as vit_kernels

        return vit_kernels.vit_attention(qkv, heads)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _linear(layer: nn.Linear, normed, bias: torch.Tensor | None) -> torch.Tensor:
    """The layer's product with what `_add_layer_norm` returned for it, plus a bias."""
    if isinstance(layer, Fp8Linear):
        return fp8_matmul(normed, layer.weight, layer.scale, bias)
    return F.linear(normed, layer.weight, bias)


def _mlp(mlp: Mlp, normed) -> torch.Tensor:
    """The MLP of what `_add_layer_norm` returned for its first layer. Its layers have the same sizes, so both are in
    fp8 or neither is.
    """
    if isinstance(mlp.fc1, Fp8Linear):
        hidden = _linear(mlp.fc1, normed, mlp.fc1.bias)
        return fp8_matmul(quantize_gelu(hidden), mlp.fc2.weight, mlp.fc2.scale, mlp.fc2.bias)
    if _takes_linear_gelu(mlp.fc1):
        return mlp.fc2(linear_gelu(normed.to(mlp.fc1.weight.dtype), mlp.fc1.weight, mlp.fc1.bias))
    return mlp(normed)


@torch.library.custom_op("minigpt4::linear_gelu", mutates_args=())
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of a linear layer: x [...,K], weight [M,K] and bias [M] of one type to [...,M]. Without a gradient.

    On a GPU it is one product (cuBLASLt's, with its epilogue): its sums pass GELU in float32 and are rounded once. The
    epilogue has GELU's tanh form, which is off by 5e-4 at most. Two steps round before GELU too, which is worse in
    bfloat16: for standard normal sums their results are off by 8.4e-4 on average, those of one step by 5.8e-4. In
    float16 both are alike: 1.0e-4 and 1.2e-4 on average, 2.1e-4 and 1.9e-4 in the root mean square.

    It is an operator of its own because torch.compile would split torch's into product and GELU.
    """
    if x.device.type != "cuda":
        return F.gelu(F.linear(x, weight, bias))
    rows = x.reshape(-1, x.shape[-1])
    return compat.linear_gelu_cuda(bias, rows, weight).view(*x.shape[:-1], len(weight))


@linear_gelu.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _takes_linear_gelu(layer: nn.Linear) -> bool:
    """Whether the layer is in 16 bit, with a bias, on a GPU. A layer in fp8 has a product of its own."""
    return type(layer) is nn.Linear and layer.bias is not None and use_triton(layer.weight)
