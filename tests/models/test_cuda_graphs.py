"""When a function is recorded, replayed or run as it stands; a stand-in records, so that no GPU is needed."""

import pytest
import torch
from torch import nn

from minigpt4.models import acceleration, cuda_graphs
from minigpt4.models.cuda_graphs import GraphedFunction


class Replay(torch.autograd.Function):
    """Like a CUDA graph, it leaves its result in the same memory each time."""

    @staticmethod
    def forward(ctx, memory, x):
        return memory.copy_(x.detach() * 2).detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient * 2


@pytest.fixture
def recordings(monkeypatch):
    """The static inputs of each recording that was made."""
    made = []

    def record(fn, samples, pool):
        assert pool == "pool" and not samples[0].is_inference()
        made.append(samples)
        memory = torch.empty(samples[0].shape)
        return lambda x, *others: Replay.apply(memory, x)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return made


@pytest.fixture
def plain():
    """Calls of the function itself."""
    return []


@pytest.fixture
def doubled(recordings, plain):
    def double(x, *static):
        plain.append(x)
        return x * 2

    return GraphedFunction(double, "test")


def test_one_recording_for_each_shape_type_and_static_value(doubled, recordings, plain):
    x = torch.ones(3)
    for tensor, static in ((x, ()), (x, ()), (x, (1,)), (x, (2,)), (x, (1,)), (torch.ones(4), ()), (x.double(), ())):
        assert torch.equal(doubled(tensor, static=static), tensor * 2)
    assert len(recordings) == 5 and not plain


def test_beyond_the_limit_calls_run_as_they_stand(doubled, recordings, plain, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LIMIT", 2)
    for n in (1, 2, 3, 3):
        assert torch.equal(doubled(torch.ones(n)), torch.full((n,), 2.0))
    assert len(recordings) == 2 and len(plain) == 2


def test_a_result_outlives_the_next_replay(doubled):
    first = doubled(torch.tensor([1.0]))
    doubled(torch.tensor([5.0]))
    assert first.item() == 2


def test_a_call_before_the_backward_of_the_last_one_is_not_replayed(doubled, plain):
    x = torch.ones(3, requires_grad=True)
    first = doubled(x)
    second = doubled(x)
    assert len(plain) == 1
    (first + second).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 4.0))
    doubled(x)
    assert len(plain) == 1


def test_a_call_whose_backward_never_comes_is_waited_for_no_longer_than_its_graph_lives(doubled, plain):
    x = torch.ones(3, requires_grad=True)
    loss = doubled(x).sum()
    doubled(x)
    assert len(plain) == 1
    del loss
    doubled(x)
    assert len(plain) == 1


def test_answers_record_nothing(doubled, recordings, plain):
    """Memory that was made in inference mode could not be written to in the training steps after it."""
    with torch.inference_mode():
        doubled(torch.ones(3))
    assert not recordings and len(plain) == 1


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
