"""Functions of tensors as CUDA graphs: recorded once for each combination of shapes, then replayed.

A replay is one launch for the host where the function itself is thousands, which is what small batches wait for.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Hashable

import torch

# Recordings per function. A function that meets more shapes runs the rest unrecorded.
LIMIT = 24
# Held while a graph is recorded: no other thread may then allocate, copy or synchronise on the GPU.
RECORDING = threading.RLock()


class GraphedFunction:
    """`fn(*tensors)` with one output that may require grad, forward and backward replayed from CUDA graphs.

    Gradients reach the tensors only: nothing else that `fn` uses may train. All recordings share one pool of memory, so
    the backward of a call must come before the next call; one that comes before runs unrecorded, as do calls in
    inference mode, whose sizes come once.
    """

    def __init__(self, fn: Callable, name: str):
        self.fn, self.name = fn, name
        self.pool = None
        self.recorded: dict[Hashable, Callable] = {}
        self.pending: Callable[[], _Backward | None] = lambda: None  # of the last call, while its graph lives

    def __call__(self, *tensors: torch.Tensor, static: tuple = ()) -> torch.Tensor:
        """The function's value. `static`: further arguments, not tensors; each value has a recording of its own."""
        pending = self.pending()
        if torch.is_inference_mode_enabled() or (pending and not pending.begun):
            return self.fn(*tensors, *static)
        autocast = torch.is_autocast_enabled(tensors[0].device.type)
        key = (static, autocast, *((t.shape, t.dtype, t.requires_grad) for t in tensors))
        if key not in self.recorded and len(self.recorded) < LIMIT:
            self.recorded[key] = self._record(tensors, static)
        if key not in self.recorded:
            return self.fn(*tensors, *static)
        output = self.recorded[key](*tensors).clone()  # the next replay writes over the graph's own
        if output.requires_grad:
            pending = _Backward()
            output.register_hook(pending)
            self.pending = weakref.ref(pending)
        return output

    def _record(self, tensors: tuple[torch.Tensor, ...], static: tuple) -> Callable:
        logging.info("Recording a CUDA graph of the %s for %s", self.name, static or tuple(tensors[0].shape))
        with RECORDING:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            samples = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
            recorded = torch.cuda.make_graphed_callables(lambda *args: self.fn(*args, *static), samples, pool=self.pool)
            torch.cuda.empty_cache()  # what the warm-up used outside the pool
        return recorded


class _Backward:
    """Knows whether the backward pass of a call has begun. It lives as long as the call's autograd graph."""

    begun = False

    def __call__(self, grad: torch.Tensor) -> None:
        self.begun = True
