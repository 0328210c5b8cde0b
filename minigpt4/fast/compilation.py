"""torch.compile with the same kernels in each process, so that a run can be repeated and resumed exactly.

By default torch (2.11 and 2.14) times kernels that add up in different orders, and chooses others by the sizes of the
batch that it compiles first. That is another one in a resumed run. `tests/fast/test_same_kernels_gpu.py` and
`test_same_kernels.py` fail where this module does not suffice.
"""

import functools
from collections.abc import Callable

import torch

from minigpt4.common import compat

USUAL_TOKENS = 1009  # a prime, because torch.compile takes equal sizes for one size, and a model's widths are no primes


def same_kernels(split_sums: bool = True) -> dict[str, bool]:
    """Options of torch.compile with which no kernel is chosen by timing.

    If torch.compile takes them no longer (it then raises "Unexpected optimization option"), write a kernel for each
    sum.

    split_sums: whether long sums may be split into parts. Their number depends on the sizes of the first batch.
    """
    return {"deterministic": True, "split_reductions": split_sums}


def compile_for_any_length(function: Callable, options: dict[str, bool]) -> Callable:
    """torch.compile a function of tensors [1,T,...], with the same kernels whichever T it is compiled with.

    Kernels of ten loads and sums or more would add up in shorter blocks if the first T is over 512.

    In the function, T may stand only in shapes that follow from these tensors. Operators that torch.compile does not
    look into may use it.
    """
    compiled = torch.compile(function, dynamic=True, options=options)

    @functools.wraps(function)
    def call(*args):
        for each in args:
            if isinstance(each, torch.Tensor) and each.shape[1] > 1:  # a single token is compiled by itself
                compat.choose_kernels_for(each, 1, USUAL_TOKENS)
        return compiled(*args)

    return call
