"""Functions of tensors as CUDA graphs: recorded once for each combination of shapes, then replayed.

A replay is one launch for the host where the function itself is thousands, which is what small batches wait for.
"""

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator

import torch
from torch.autograd.function import once_differentiable

# Recordings per function. A function that meets more shapes runs the rest unrecorded.
LIMIT = 24
# Held while a graph is recorded: no other thread may then draw random numbers on the GPU, nor, while training steps are
# recorded, allocate, copy or synchronise there.
RECORDING = threading.RLock()


class GraphedFunction:
    """`fn(*tensors)` with one output that may require grad, forward and backward replayed from CUDA graphs.

    A combination of shapes runs as it stands when it is first met, which compiles what has to be; when it is met again
    it is recorded. Gradients reach the tensors only: nothing else that `fn` uses may train.

    All calls share one piece of memory: each has one backward pass, before the next call. A call that comes earlier
    runs as it stands, in memory of its own; so do calls in inference mode, whose sizes come once.
    """

    def __init__(self, fn: Callable, name: str):
        self.fn, self.name = fn, name
        self.memory: Memory | None = None
        self.met: set[Hashable] = set()  # whose forward and backward passes have run
        self.recorded: dict[Hashable, Recording] = {}
        self.pending: Callable[[], _Backward | None] = lambda: None  # of the last call, while its graph lives

    def __call__(self, *tensors: torch.Tensor, static: tuple = ()) -> torch.Tensor:
        """The function's value. `static`: further arguments, not tensors; each value has a recording of its own."""
        pending = self.pending()
        if torch.is_inference_mode_enabled() or (pending and not pending.begun):
            return self.fn(*tensors, *static)
        modes = (torch.is_autocast_enabled(tensors[0].device.type), torch.is_grad_enabled())
        key = (static, modes, *((t.shape, t.dtype, t.requires_grad) for t in tensors))
        self.memory = self.memory or Memory()
        if key in self.met and key not in self.recorded and len(self.recorded) < LIMIT:
            logging.info("Recording a CUDA graph of the %s for %s", self.name, static or tuple(tensors[0].shape))
            self.recorded[key] = Recording(self.fn, tensors, static, self.memory)
        if key in self.recorded:
            output = _Replayed.apply(self.recorded[key], *tensors)
        else:
            output = self._run(key, tensors, static)
        if output.requires_grad:
            pending = _Backward()
            output.register_hook(pending)
            self.pending = weakref.ref(pending)
        return output

    def _run(self, key: Hashable, tensors: tuple[torch.Tensor, ...], static: tuple) -> torch.Tensor:
        """The function as it stands, in the shared memory."""
        if key not in self.met:
            torch.cuda.empty_cache()  # torch does not do it by itself when memory of this kind runs out
        with self.memory.in_use():
            output = self.fn(*tensors, *static)
        if output.requires_grad:
            learning = next(t for t in tensors if t.requires_grad)
            learning.register_hook(lambda gradient: self.met.add(key))  # at the end of the backward pass
        else:
            self.met.add(key)
        return output.clone()  # in memory of its own


class Memory:
    """Memory that recordings share with the calls that precede them.

    Without it a GPU would have to hold the activations of both. Torch keeps memory apart by stream, hence the stream.
    """

    def __init__(self):
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        try:
            with torch.cuda.use_mem_pool(self.pool), torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def graph(self, graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
        """Context in which a graph is recorded."""
        return torch.cuda.graph(graph, pool=self.pool.id, stream=self.stream)


class Recording:
    """CUDA graphs of a function's forward and backward pass, with the tensors that they read and write."""

    def __init__(self, fn: Callable, tensors: tuple[torch.Tensor, ...], static: tuple, memory: Memory):
        self.inputs = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
        self.forward_graph = torch.cuda.CUDAGraph()
        with RECORDING:
            with memory.graph(self.forward_graph):
                output = fn(*self.inputs, *static)
            self.output = output.detach()
            if output.requires_grad:
                self.grad_output, self.backward_graph = torch.empty_like(output), torch.cuda.CUDAGraph()
                learning = [t for t in self.inputs if t.requires_grad]
                with memory.graph(self.backward_graph):
                    self.gradients = torch.autograd.grad(output, learning, self.grad_output)

    def replay(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.forward_graph.replay()
        return self.output.clone()  # the next replay writes over the graph's own

    def replay_backward(self, grad_output: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradient of each input that requires one."""
        self.grad_output.copy_(grad_output)
        self.backward_graph.replay()
        gradients = iter(self.gradients)
        return [next(gradients).clone() if t.requires_grad else None for t in self.inputs]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording: Recording, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.recording = recording
        return recording.replay(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple:
        return None, *ctx.recording.replay_backward(grad_output)


class _Backward:
    """Knows whether the backward pass of a call has begun. It lives as long as the call's autograd graph."""

    begun = False

    def __call__(self, grad: torch.Tensor) -> None:
        if self.begun:
            raise RuntimeError(
                "A second backward pass through what CUDA graphs computed: the first has written over what it needs. "
                "Compute the loss again, or set run.compile=False."
            )
        self.begun = True
