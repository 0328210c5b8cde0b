"""A stand-in for an Apple GPU: it computes on the CPU, and refuses what torch refuses there.

Tensors that were brought to "mps", and what is computed from them, say that they are there. Refused are float64,
pinned memory, copies that nobody waits for, and operands on different devices. Which operations a real one has, and
what they give, it does not know.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, MPS = torch.device("cpu"), torch.device("mps", 0)
# Take a device and give no tensor.
ABOUT_DEVICES = {torch.device, torch._C._nn._parse_to}
# Take operands on both.
ACROSS = {torch.Tensor.copy_, torch.Tensor.data.__set__, torch._has_compatible_shallow_copy_type}


class PretendedMps(TorchFunctionMode):
    """In this context, of this thread."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ABOUT_DEVICES:
            return func(*args, **kwargs)
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(map(is_there, operands))
        if func == torch.Tensor.device.__get__:
            return MPS if there else func(*args)
        if there and func not in ACROSS and not all(is_there(x) for x in operands if x.dim()):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found mps:0 and cpu.")
        place = "cpu" if func is torch.Tensor.cpu else named_device(func, args, kwargs)
        if there and func is torch.Tensor.pin_memory or place == "mps" and kwargs.get("non_blocking"):
            raise AssertionError(f"{func} is not for an Apple GPU: {kwargs}")
        if place == "mps":
            args, kwargs = tree_map(on_the_cpu, (args, kwargs))
        result = func(*args, **kwargs)
        if place and operands and result is operands[0] and there != (place == "mps"):
            result = result.clone()  # on another device it is another tensor
        if place == "mps" or there and not place:
            tree_map(mark, result)
        return result


def is_there(tensor: torch.Tensor) -> bool:
    return hasattr(storage(tensor), "is_there")


def mark(value) -> None:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.float64:
            raise TypeError("MPS has no float64.")
        storage(value).is_there = True


def storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """What views, parameters and `data` share."""
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def named_device(func, args: tuple, kwargs: dict) -> str | None:
    """The kind of device that a call asks for."""
    named = [kwargs.get("device"), *(args[1:2] if func is torch.Tensor.to else ())]
    named = [torch.device(x) for x in named if isinstance(x, (str, torch.device))]
    return named[0].type if named else None


def on_the_cpu(value):
    is_device = isinstance(value, torch.device) or isinstance(value, str) and value.startswith("mps")
    return CPU if is_device else value
