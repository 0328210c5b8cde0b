"""Whether a step is computed by a Triton kernel. Nothing of Triton is imported here."""

import torch


def use_triton(x: torch.Tensor) -> bool:
    """Whether steps with `x` are Triton kernels of ours."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
