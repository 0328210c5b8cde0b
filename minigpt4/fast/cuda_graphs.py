"""Functions of tensors as CUDA graphs: captured once for each combination of shapes, then replayed.

A replay is one launch for the host, where the function itself is thousands. Small batches wait for those launches.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Iterator

import torch

# Graphs of one function. For further combinations of shapes it runs eagerly.
MAX_GRAPHS = 24
# Held while a graph is captured. No other thread may then draw random numbers on the GPU. While a training step is
# captured, no other thread may allocate, copy or synchronise there either.
CAPTURE_LOCK = threading.RLock()

Tensors = tuple[torch.Tensor, ...]

_keepers = 0  # how many `keep_memory_pools` are entered
_kept_pools: list = []  # unused pools that must not be freed yet
_pools_lock = threading.RLock()


@contextlib.contextmanager
def keep_memory_pools() -> Iterator[None]:
    """While a graph is captured or a pool is in use, no other pool is freed.

    torch 2.11 aborts the process otherwise, and the garbage collector may free one at any time.
    """
    global _keepers
    with _pools_lock:
        _keepers += 1
    try:
        yield
    finally:
        with _pools_lock:
            _keepers -= 1
            if not _keepers:
                _kept_pools.clear()


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Around the capture of a graph: no other thread captures, and no memory pool is freed.

    After a capture that failed none is ever freed: torch 2.11 takes it to be still under way (pytorch #180395).
    """
    global _keepers
    with CAPTURE_LOCK, keep_memory_pools():
        try:
            yield
        except BaseException:
            with _pools_lock:
                _keepers += 1
            raise


class GraphedFunction:
    """`fn(*arguments)`, replayed from a CUDA graph. It gives no gradients, neither to its arguments nor to weights.

    The values of tensors among the arguments may differ from call to call. The key of a call is their shapes and
    dtypes, and the other arguments, which must be hashable. The first call with a new key runs eagerly, so that
    torch.compile can compile. The second captures a CUDA graph; later calls replay it. `fn` returns a tuple of tensors.

    All calls share one pool of memory. Calls in inference mode run eagerly: their sizes seldom come twice.
    """

    def __init__(self, fn: Callable[..., Tensors], name: str):
        self.fn, self.name = fn, name
        self.memory: GraphMemory | None = None
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, CapturedGraph] = {}

    def __call__(self, *arguments) -> Tensors:
        if torch.is_inference_mode_enabled():
            return self.fn(*arguments)
        tensors, static = _split(arguments)
        key = (static, torch.is_autocast_enabled(tensors[0].device.type), *((t.shape, t.dtype) for t in tensors))
        self.memory = self.memory or GraphMemory()
        with torch.no_grad():
            if key in self.seen and key not in self.graphs and len(self.graphs) < MAX_GRAPHS:
                logging.info("Recording a CUDA graph of the %s for %s", self.name, static or tuple(tensors[0].shape))
                self.graphs[key] = CapturedGraph(self.fn, arguments, self.memory)
            if key in self.graphs:
                results = self.graphs[key].replay(tensors)
            else:
                results = self._run_eagerly(key, arguments)
            return tuple(result.clone() for result in results)  # outside of the shared memory

    def _run_eagerly(self, key: Hashable, arguments: tuple) -> Tensors:
        """Run the function in the shared memory."""
        if key not in self.seen:
            torch.cuda.empty_cache()  # torch does not do it by itself when memory of a pool runs out
        with keep_memory_pools(), self.memory.in_use():
            results = self.fn(*arguments)
        self.seen.add(key)
        return results


class GraphMemory:
    """Memory that all graphs of a function share with the eager calls before them.

    Without it a GPU would have to hold the activations of both. torch keeps memory of different streams apart, so there
    is one stream for all.
    """

    def __init__(self):
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()
        self.buffers: dict[Hashable, torch.Tensor] = {}

    def __del__(self):
        if _keepers:
            _kept_pools.append(getattr(self, "pool", None))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        try:
            with torch.cuda.use_mem_pool(self.pool), torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def capture(self, graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
        """Context in which a graph is captured."""
        return torch.cuda.graph(graph, pool=self.pool.id, stream=self.stream)

    def like(self, tensors: Tensors, name: str) -> Tensors:
        """A tensor like each; the same ones for all graphs."""
        keys = [(name, number, t.shape, t.dtype) for number, t in enumerate(tensors)]
        for key, tensor in zip(keys, tensors, strict=True):
            if key not in self.buffers:
                self.buffers[key] = torch.empty_like(tensor)
        return tuple(self.buffers[key] for key in keys)


class CapturedGraph:
    """A CUDA graph of a function, with the tensors that it reads and writes."""

    def __init__(self, fn: Callable[..., Tensors], arguments: tuple, memory: GraphMemory):
        tensors, _ = _split(arguments)
        self.inputs = memory.like(tensors, "input")
        inputs, self.graph = iter(self.inputs), torch.cuda.CUDAGraph()
        with capturing(), memory.capture(self.graph):
            results = fn(*(next(inputs) if isinstance(a, torch.Tensor) else a for a in arguments))
            self.outputs = memory.like(results, "output")
            for own, result in zip(self.outputs, results, strict=True):
                own.copy_(result)

    def replay(self, tensors: Tensors) -> Tensors:
        """The function's results, valid until the next replay of any graph."""
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.outputs


def _split(arguments: tuple) -> tuple[Tensors, tuple]:
    """The tensors among the arguments, and the others."""
    tensors = tuple(a for a in arguments if isinstance(a, torch.Tensor))
    return tensors, tuple(a for a in arguments if not isinstance(a, torch.Tensor))
