"""Choose between a Triton kernel and plain torch operations. This module does not import Triton."""

import torch


def use_triton(x: torch.Tensor) -> bool:
    """Whether operations on `x` run as Triton kernels: on a GPU, in float16 or bfloat16."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
