"""Functions of tensors as CUDA graphs: recorded once for each combination of shapes, then replayed.

A replay is one launch for the host where the function itself is thousands, which is what small batches wait for.
"""

import logging
import threading
from collections.abc import Callable, Hashable

import torch

# Recordings per function. A function that meets more shapes runs the rest unrecorded.
LIMIT = 24
# Held while a graph is recorded: no other thread may then allocate, copy or synchronise on the GPU.
RECORDING = threading.RLock()


class GraphedFunction:
    """`fn(*tensors)` with one output that may require grad, forward and backward replayed from CUDA graphs.

    All recordings share one pool of memory: the backward of a call must come before the next call. A call that comes
    before runs unrecorded.
    """

    def __init__(self, fn: Callable, name: str):
        self.fn, self.name = fn, name
        self.pool = torch.cuda.graph_pool_handle()
        self.recorded: dict[Hashable, Callable] = {}
        self.awaits_backward = False

    def __call__(self, *tensors: torch.Tensor, static: tuple = ()) -> torch.Tensor:
        """The function's value. `static`: further arguments, not tensors; each value has a recording of its own."""
        key = (static, *((t.shape, t.dtype, t.requires_grad) for t in tensors))
        if key not in self.recorded and len(self.recorded) < LIMIT:
            self.recorded[key] = self._record(tensors, static)
        if key not in self.recorded or self.awaits_backward:
            return self.fn(*tensors, *static)
        output = self.recorded[key](*tensors)
        if output.requires_grad:
            self.awaits_backward = True
            output.register_hook(self._backward_begins)
        return output

    def _backward_begins(self, grad: torch.Tensor) -> None:
        self.awaits_backward = False

    def _record(self, tensors: tuple[torch.Tensor, ...], static: tuple) -> Callable:
        logging.info("Recording a CUDA graph of the %s for %s", self.name, static or tuple(tensors[0].shape))
        with RECORDING:
            samples = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
            recorded = torch.cuda.make_graphed_callables(lambda *args: self.fn(*args, *static), samples, pool=self.pool)
            torch.cuda.empty_cache()  # what the warm-up used outside the pool
        return recorded
