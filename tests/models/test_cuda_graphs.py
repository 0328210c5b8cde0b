"""When a function is recorded, replayed or run as it stands, and in which memory.

Stand-ins for CUDA's graphs and memory let it run without a GPU; test_acceleration_gpu.py has the real ones.
"""

import contextlib

import pytest
import torch
from torch import nn

from minigpt4.models import acceleration, cuda_graphs
from minigpt4.models.cuda_graphs import GraphedFunction, Recording


class Graph:
    """Computes again what was recorded, into the same memory. What that is, the recording below says."""

    def replay(self):
        self.compute()


class Doubling(Recording):
    """The recording of a function that doubles."""

    made = None

    def __init__(self, fn, tensors, static, memory):
        assert not tensors[0].is_inference()
        super().__init__(fn, tensors, static, memory)
        self.made.append(self)
        self.forward_graph.compute = lambda: self.output.copy_(self.inputs[0].detach() * 2)
        if self.output_requires_grad:
            self.backward_graph.compute = lambda: self.gradients[0].copy_(self.grad_output * 2)

    @property
    def output_requires_grad(self):
        return hasattr(self, "backward_graph")


class Memory:
    """Counts its uses."""

    made = None

    def __init__(self):
        self.uses = 0
        self.made.append(self)

    @contextlib.contextmanager
    def in_use(self):
        self.uses += 1
        yield

    def graph(self, graph):
        return contextlib.nullcontext()


@pytest.fixture
def recordings(monkeypatch):
    """The recordings that were made."""
    monkeypatch.setattr(Doubling, "made", [])
    monkeypatch.setattr(Memory, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda_graphs, "Recording", Doubling)
    monkeypatch.setattr(cuda_graphs, "Memory", Memory)
    return Doubling.made


@pytest.fixture
def plain():
    """Calls of the function itself."""
    return []


@pytest.fixture
def doubled(recordings, plain):
    """Doubles; its results share memory, as those in a pool may."""
    pool = {}

    def double(x, *static):
        plain.append(x)
        result = x * 2
        if not result.requires_grad:
            result = pool.setdefault((x.shape, x.dtype), torch.empty_like(x)).copy_(result)
        return result

    return GraphedFunction(double, "test")


def test_what_is_met_again_is_recorded_for_each_shape_type_and_static_value(doubled, recordings, plain):
    x = torch.ones(3)
    kinds = ((x, ()), (x, (1,)), (x, (2,)), (torch.ones(4), ()), (x.double(), ()))
    for times in range(3):
        for tensor, static in kinds:
            assert torch.equal(doubled(tensor, static=static), tensor * 2)
        assert len(recordings) == (5 if times else 0)
    assert len(plain) == 5 + 5  # each once as it stands, once while it is recorded
    assert [memory.uses for memory in Memory.made] == [5]


def test_with_and_without_gradients_are_recorded_apart(doubled, recordings):
    x = torch.ones(3, requires_grad=True)
    for times in range(3):
        doubled(x).sum().backward()
        with torch.no_grad():
            assert not doubled(x).requires_grad
        doubled(x.detach())
        assert len(recordings) == (3 if times else 0)
    assert torch.equal(x.grad, torch.full((3,), 6.0))


def test_autocast_is_recorded_apart(doubled, recordings):
    for _ in range(2):
        doubled(torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        doubled(torch.ones(3))
    assert len(recordings) == 1


def test_what_has_not_gone_through_is_not_recorded(doubled, recordings):
    """Its backward pass, or all of it, would be compiled while it is recorded, which CUDA forbids."""
    x = torch.ones(3, requires_grad=True)
    for _ in range(3):
        doubled(x)
    assert not recordings
    usual, doubled.fn = doubled.fn, None
    for _ in range(2):
        with pytest.raises(TypeError):
            doubled(torch.ones(5))
    doubled.fn = usual
    doubled(torch.ones(5))
    assert not recordings


def test_a_second_backward_pass_is_refused(doubled, recordings):
    for _ in range(3):  # as it stands, recorded, replayed
        x = torch.ones(3, requires_grad=True)
        loss = doubled(x).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward"):
            loss.backward()


def test_beyond_the_limit_calls_run_as_they_stand(doubled, recordings, plain, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LIMIT", 2)
    for _ in range(3):
        for n in (1, 2, 3):
            assert torch.equal(doubled(torch.ones(n)), torch.full((n,), 2.0))
    assert len(recordings) == 2 and len(plain) == 3 + 2 + 2


def test_a_result_outlives_the_next_call(doubled, recordings):
    results = [doubled(torch.tensor([float(n)])) for n in range(4)]
    assert len(recordings) == 1
    assert [result.item() for result in results] == [0, 2, 4, 6]


def test_gradients_outlive_the_next_call(doubled, recordings):
    inputs = [torch.tensor([float(n)], requires_grad=True) for n in range(4)]
    gradients = [torch.autograd.grad(doubled(x), x, torch.tensor([float(n)]))[0] for n, x in enumerate(inputs)]
    assert len(recordings) == 1
    assert [gradient.item() for gradient in gradients] == [0, 2, 4, 6]


@pytest.mark.parametrize("met_before", [0, 1, 2])
def test_a_call_before_the_backward_of_the_last_one_is_not_replayed(doubled, recordings, met_before):
    """It would write over what that backward pass reads, as would one that runs in the same memory."""
    x = torch.ones(3, requires_grad=True)
    for _ in range(met_before):
        doubled(x).sum().backward()
    x.grad = None
    first = doubled(x)
    uses, made = Memory.made[0].uses, len(recordings)
    second = doubled(x)
    assert (Memory.made[0].uses, len(recordings)) == (uses, made)
    (first + second).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 4.0))
    doubled(x)
    assert Memory.made[0].uses == uses and len(recordings) == 1


def test_a_call_whose_backward_never_comes_is_waited_for_no_longer_than_its_graph_lives(doubled, recordings):
    x = torch.ones(3, requires_grad=True)
    doubled(x).sum().backward()
    loss = doubled(x).sum()
    doubled(x)
    assert Memory.made[0].uses == 1 and len(recordings) == 1
    recordings.clear()
    del loss
    doubled(torch.ones(4, requires_grad=True))
    assert Memory.made[0].uses == 2


def test_answers_record_nothing(doubled, recordings, plain):
    """Memory that was made in inference mode could not be written to in the training steps after it."""
    with torch.inference_mode():
        for _ in range(3):
            doubled(torch.ones(3))
    assert not recordings and len(plain) == 3


@pytest.mark.parametrize(
    ("trains", "graphed"),
    [
        (None, {"query_outputs", "language_loss"}),
        ("Qformer", {"language_loss"}),
        ("visual_encoder", {"language_loss"}),
        ("llama_model", set()),
        ("own", set()),
    ],
)
def test_what_trains_is_not_recorded(build_golden_model, monkeypatch, trains, graphed):
    """A recording gives gradients to its arguments alone: those of weights inside it would be lost in silence."""
    model = build_golden_model()
    model.own = nn.Linear(2, 2).requires_grad_(False)
    if trains:
        next(getattr(model, trains).parameters()).requires_grad_(True)
    monkeypatch.setattr(acceleration, "fuse_projections", lambda llm: 0)
    acceleration.accelerate(model, packed=True, compiled=True)
    assert {"query_outputs", "language_loss"} & set(vars(model)) == graphed
    acceleration.accelerate(model, packed=False, compiled=False)
    assert not {"query_outputs", "language_loss", "sum_of_losses"} & set(vars(model))
    assert not model.packed
