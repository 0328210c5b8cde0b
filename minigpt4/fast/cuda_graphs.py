"""Functions of tensors as CUDA graphs: recorded once for each combination of shapes, then replayed.

A replay is one launch for the host where the function itself is thousands, which is what small batches wait for.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Iterator

import torch

# Recordings per function. A function that meets more shapes runs the rest unrecorded.
LIMIT = 24
# Held while a graph is recorded: no other thread may then draw random numbers on the GPU, nor, while training steps are
# recorded, allocate, copy or synchronise there.
RECORDING = threading.RLock()

Tensors = tuple[torch.Tensor, ...]

_busy = 0  # contexts of `pools_stay` that are entered
_left: list = []  # pools that nobody needs any more, and that have to stay for the time being
_entering = threading.RLock()


@contextlib.contextmanager
def pools_stay() -> Iterator[None]:
    """To be entered where a graph is recorded or a pool is in use: meanwhile no other pool goes.

    torch 2.11 aborts the process otherwise, and the garbage collector may come at any time.
    """
    global _busy
    with _entering:
        _busy += 1
    try:
        yield
    finally:
        with _entering:
            _busy -= 1
            if not _busy:
                _left.clear()


class GraphedFunction:
    """`fn(*arguments)`, replayed from a CUDA graph. It gives no gradients, neither to its arguments nor to weights.

    Tensors among the arguments may come with other values each time; a combination of their shapes and types and of the
    other arguments, which are hashable, runs as it stands when it is first met, which compiles what has to be; when it
    is met again it is recorded. `fn` gives a tuple of tensors.

    All calls share one piece of memory. Calls in inference mode, whose sizes come once, run as they stand.
    """

    def __init__(self, fn: Callable[..., Tensors], name: str):
        self.fn, self.name = fn, name
        self.memory: Memory | None = None
        self.met: set[Hashable] = set()
        self.recorded: dict[Hashable, Recording] = {}

    def __call__(self, *arguments) -> Tensors:
        if torch.is_inference_mode_enabled():
            return self.fn(*arguments)
        tensors, static = _split(arguments)
        key = (static, torch.is_autocast_enabled(tensors[0].device.type), *((t.shape, t.dtype) for t in tensors))
        self.memory = self.memory or Memory()
        with torch.no_grad():
            if key in self.met and key not in self.recorded and len(self.recorded) < LIMIT:
                logging.info("Recording a CUDA graph of the %s for %s", self.name, static or tuple(tensors[0].shape))
                self.recorded[key] = Recording(self.fn, arguments, self.memory)
            if key in self.recorded:
                results = self.recorded[key].replay(tensors)
            else:
                results = self._run(key, arguments)
            return tuple(result.clone() for result in results)  # in memory of their own

    def _run(self, key: Hashable, arguments: tuple) -> Tensors:
        """The function as it stands, in the shared memory."""
        if key not in self.met:
            torch.cuda.empty_cache()  # torch does not do it by itself when memory of this kind runs out
        with pools_stay(), self.memory.in_use():
            results = self.fn(*arguments)
        self.met.add(key)
        return results


class Memory:
    """Memory that recordings share with the calls that precede them.

    Without it a GPU would have to hold the activations of both. Torch keeps memory apart by stream, hence the stream.
    """

    def __init__(self):
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()
        self.buffers: dict[Hashable, torch.Tensor] = {}

    def __del__(self):
        if _busy:
            _left.append(getattr(self, "pool", None))

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

    def like(self, tensors: Tensors, name: str) -> Tensors:
        """A tensor like each, the same ones for all recordings."""
        keys = [(name, number, t.shape, t.dtype) for number, t in enumerate(tensors)]
        for key, tensor in zip(keys, tensors, strict=True):
            if key not in self.buffers:
                self.buffers[key] = torch.empty_like(tensor)
        return tuple(self.buffers[key] for key in keys)


class Recording:
    """A CUDA graph of a function, with the tensors that it reads and writes."""

    def __init__(self, fn: Callable[..., Tensors], arguments: tuple, memory: Memory):
        tensors, _ = _split(arguments)
        self.inputs = memory.like(tensors, "input")
        inputs, self.graph = iter(self.inputs), torch.cuda.CUDAGraph()
        with RECORDING, pools_stay(), memory.graph(self.graph):
            results = fn(*(next(inputs) if isinstance(a, torch.Tensor) else a for a in arguments))
            self.outputs = memory.like(results, "output")
            for own, result in zip(self.outputs, results, strict=True):
                own.copy_(result)

    def replay(self, tensors: Tensors) -> Tensors:
        """The function's values, until the next replay of any recording."""
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.outputs


def _split(arguments: tuple) -> tuple[Tensors, tuple]:
    """The tensors among the arguments, and the others."""
    tensors = tuple(a for a in arguments if isinstance(a, torch.Tensor))
    return tensors, tuple(a for a in arguments if not isinstance(a, torch.Tensor))
