"""When a function runs eagerly, is captured or replayed, and in which memory.

Stand-ins for CUDA's graphs and memory let it run without a GPU; test_training_step_gpu.py has the real ones.
"""

import contextlib
import gc

import pytest
import torch
from torch import nn

from minigpt4.fast import cuda_graphs
from minigpt4.fast.cuda_graphs import CapturedGraph, GraphedFunction


class Graph:
    """Computes again what was captured, into the same memory. What that is, the graph below says."""

    def replay(self):
        self.compute()


class Doubling(CapturedGraph):
    """The graph of a function that doubles."""

    made = None

    def __init__(self, fn, arguments, memory):
        assert not arguments[0].is_inference()
        super().__init__(fn, arguments, memory)
        self.made.append(self)
        self.graph.compute = lambda: self.outputs[0].copy_(self.inputs[0] * 2)


class Memory(cuda_graphs.GraphMemory):
    """Counts its uses."""

    made = None

    def __init__(self):
        self.uses, self.buffers, self.pool = 0, {}, None
        self.made.append(self)

    @contextlib.contextmanager
    def in_use(self):
        self.uses += 1
        yield

    def capture(self, graph):
        return contextlib.nullcontext()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were made."""
    monkeypatch.setattr(Doubling, "made", [])
    monkeypatch.setattr(Memory, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda_graphs, "CapturedGraph", Doubling)
    monkeypatch.setattr(cuda_graphs, "GraphMemory", Memory)
    return Doubling.made


@pytest.fixture
def plain():
    """Calls of the function itself."""
    return []


@pytest.fixture
def doubled(graphs, plain):
    """Doubles; its results share memory, as those in a pool may."""
    pool = {}

    def double(x, *static):
        plain.append(x)
        return (pool.setdefault((x.shape, x.dtype), torch.empty_like(x)).copy_(x * 2),)

    return GraphedFunction(double, "test")


def test_the_second_call_with_a_key_captures_a_graph(doubled, graphs, plain):
    x = torch.ones(3)
    kinds = ((x,), (x, 1), (x, 2), (torch.ones(4),), (x.double(),))
    for times in range(3):
        for arguments in kinds:
            assert torch.equal(doubled(*arguments)[0], arguments[0] * 2)
        assert len(graphs) == (5 if times else 0)
    assert len(plain) == 5 + 5  # each once eagerly, once while it is captured
    assert [memory.uses for memory in Memory.made] == [5]


def test_graphs_share_their_inputs_and_outputs(doubled, graphs):
    for _ in range(2):
        for number in (1, 2):
            doubled(torch.ones(3), number)
    first, second = graphs
    assert first.inputs[0] is second.inputs[0] and first.outputs[0] is second.outputs[0]


def test_results_have_no_gradient(doubled, graphs):
    x = torch.ones(3, requires_grad=True)
    assert not any(doubled(x)[0].requires_grad for _ in range(3))
    assert len(graphs) == 1


def test_autocast_is_part_of_the_key(doubled, graphs):
    for _ in range(2):
        doubled(torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        doubled(torch.ones(3))
    assert len(graphs) == 1


def test_a_call_that_failed_is_not_captured(doubled, graphs):
    """It would be compiled while it is captured, which CUDA forbids."""
    usual, doubled.fn = doubled.fn, None
    for _ in range(2):
        with pytest.raises(TypeError):
            doubled(torch.ones(5))
    doubled.fn = usual
    doubled(torch.ones(5))
    assert not graphs


def test_beyond_the_limit_calls_run_eagerly(doubled, graphs, plain, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    for _ in range(3):
        for n in (1, 2, 3):
            assert torch.equal(doubled(torch.ones(n))[0], torch.full((n,), 2.0))
    assert len(graphs) == 2 and len(plain) == 3 + 2 + 2


def test_a_result_outlives_the_next_call(doubled, graphs):
    results = [doubled(torch.tensor([float(n)]))[0] for n in range(4)]
    assert len(graphs) == 1
    assert [result.item() for result in results] == [0, 2, 4, 6]


def test_inference_mode_captures_nothing(doubled, graphs, plain):
    """Memory that was made in inference mode could not be written to in the training steps after it."""
    with torch.inference_mode():
        for _ in range(3):
            doubled(torch.ones(3))
    assert not graphs and len(plain) == 3


@pytest.mark.parametrize(
    ("trains", "vision", "language"),
    [
        (None, True, True),
        ("Qformer", False, True),
        ("visual_encoder", False, True),
        ("llama_model", False, False),
        ("own", False, False),
    ],
)
def test_what_trains_is_not_captured(build_golden_model, trains, vision, language):
    """A graph gives gradients to its arguments alone: those of weights inside it would be lost in silence."""
    model = build_golden_model()
    model.own = nn.Linear(2, 2).requires_grad_(False)
    if trains:
        next(getattr(model, trains).parameters()).requires_grad_(True)
    model.accelerate(packed=True, compiled=True)
    step = model.step
    assert (isinstance(step.graphed_vision, GraphedFunction), isinstance(step.loss_and_gradient, GraphedFunction)) == (
        vision,
        language,
    )
    model.accelerate(packed=False, compiled=False)
    assert not (model.step.graphed_vision or model.step.loss_and_gradient or model.step.packed)


def test_float16_and_padded_batches_keep_their_graph(build_golden_model):
    """A loss in float16 is scaled before its gradient is computed, so the gradient cannot come first."""
    for dtype, packed, at_once in ((torch.bfloat16, True, True), (torch.float16, True, False), (None, False, False)):
        model = build_golden_model(**({"dtype": dtype} if dtype else {}))
        model.accelerate(packed=packed, compiled=True)
        assert bool(model.step.loss_and_gradient) == at_once


def garbage() -> tuple[list[GraphedFunction], int]:
    """A function in a cycle of references, as a model's are; out of the list, it goes at any time. And its pool."""
    function, pool = GraphedFunction(lambda x: (x * 2,), "double"), object()
    function(torch.ones(2))
    function.memory.pool, function.itself = pool, function
    Memory.made.clear()
    return [function], id(pool)


@pytest.mark.parametrize("calls", [1, 2])
def test_garbage_pools_are_kept_while_another_is_in_use_or_captured(graphs, calls):
    """torch 2.11 would abort the process."""
    old, pool = garbage()
    there = []

    def compute(x):
        if len(there) == calls - 1:
            old.clear()
            gc.collect()
        there.append([*map(id, cuda_graphs._kept_pools)])
        return (x * 2,)

    function = GraphedFunction(compute, "double")
    for _ in range(calls):
        function(torch.ones(2))
    assert there == [[]] * (calls - 1) + [[pool]]
    assert cuda_graphs._kept_pools == []


def test_no_pool_is_freed_after_a_failed_capture(graphs, monkeypatch):
    """torch 2.11 takes it to be still under way, and would abort the process."""
    monkeypatch.setattr(cuda_graphs, "_keepers", 0)
    monkeypatch.setattr(cuda_graphs, "_kept_pools", [])
    old, pool = garbage()
    with pytest.raises(RuntimeError, match="not permitted"), cuda_graphs.capturing():
        raise RuntimeError("operation not permitted when stream is capturing")
    old.clear()
    gc.collect()
    assert [*map(id, cuda_graphs._kept_pools)] == [pool]


def test_garbage_pools_are_freed_at_once_otherwise(graphs):
    old, _ = garbage()
    old.clear()
    gc.collect()
    assert cuda_graphs._kept_pools == []
