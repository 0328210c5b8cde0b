"""A stand-in for an Apple GPU: it computes on the CPU and raises the errors that torch raises there.

Tensors that were moved to "mps", and results computed from them, report that device. Errors are raised for float64,
pinned memory, non-blocking copies, and operands on different devices. The stand-in does not know which operations a
real Apple GPU supports, nor how its results are rounded.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, MPS = torch.device("cpu"), torch.device("mps", 0)
# Functions that take a device and return no tensor.
ABOUT_DEVICES = {torch.device, torch._C._nn._parse_to}
# Functions that take operands on both devices.
ACROSS = {torch.Tensor.copy_, torch.Tensor.data.__set__, torch._has_compatible_shallow_copy_type}


class PretendedMps(TorchFunctionMode):
    """Inside this context, in the thread that entered it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ABOUT_DEVICES:
            return func(*args, **kwargs)
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_mps = any(map(is_on_mps, operands))
        if func == torch.Tensor.device.__get__:
            return MPS if on_mps else func(*args)
        if on_mps and func not in ACROSS and not all(is_on_mps(x) for x in operands if x.dim()):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found mps:0 and cpu.")
        target = "cpu" if func is torch.Tensor.cpu else requested_device(func, args, kwargs)
        if on_mps and func is torch.Tensor.pin_memory or target == "mps" and kwargs.get("non_blocking"):
            raise AssertionError(f"{func} is not available on an Apple GPU: {kwargs}")
        if target == "mps":
            args, kwargs = tree_map(to_cpu, (args, kwargs))
        result = func(*args, **kwargs)
        if target and operands and result is operands[0] and on_mps != (target == "mps"):
            result = result.clone()  # on another device it is another tensor
        if target == "mps" or on_mps and not target:
            tree_map(mark, result)
        return result


def is_on_mps(tensor: torch.Tensor) -> bool:
    return hasattr(storage(tensor), "is_on_mps")


def mark(value) -> None:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.float64:
            raise TypeError("MPS has no float64.")
        storage(value).is_on_mps = True


def storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """The storage, which views, parameters and `data` share."""
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def requested_device(func, args: tuple, kwargs: dict) -> str | None:
    """The type of the device in the arguments of a call."""
    given = [kwargs.get("device"), *(args[1:2] if func is torch.Tensor.to else ())]
    devices = [torch.device(x) for x in given if isinstance(x, (str, torch.device))]
    return devices[0].type if devices else None


def to_cpu(value):
    is_device = isinstance(value, torch.device) or isinstance(value, str) and value.startswith("mps")
    return CPU if is_device else value
