"""When a function is recorded, replayed or run as it stands; a stand-in records, so that no GPU is needed."""

import contextlib

import pytest
import torch
from torch import nn

from minigpt4.models import acceleration, cuda_graphs
from minigpt4.models.cuda_graphs import GraphedFunction


class Recording:
    """Like a CUDA graph, it leaves its result in the same memory each time."""

    made = None

    def __init__(self, fn, tensors, static, memory):
        assert not tensors[0].is_inference()
        self.made.append(tensors)
        self.memory = torch.empty(tensors[0].shape)

    def replay(self, tensors):
        return self.memory.copy_(tensors[0].detach() * 2).clone()

    def replay_backward(self, gradient):
        return [gradient * 2]


class Memory:
    def in_use(self):
        return contextlib.nullcontext()


@pytest.fixture
def recordings(monkeypatch):
    """The inputs of each recording that was made."""
    monkeypatch.setattr(Recording, "made", [])
    monkeypatch.setattr(cuda_graphs, "Recording", Recording)
    monkeypatch.setattr(cuda_graphs, "Memory", Memory)
    return Recording.made


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


def test_what_is_met_again_is_recorded_for_each_shape_type_and_static_value(doubled, recordings, plain):
    x = torch.ones(3)
    kinds = ((x, ()), (x, (1,)), (x, (2,)), (torch.ones(4), ()), (x.double(), ()))
    for times in range(3):
        for tensor, static in kinds:
            assert torch.equal(doubled(tensor, static=static), tensor * 2)
        assert len(recordings) == (5 if times else 0) and len(plain) == 5


def test_without_gradients_there_is_another_recording(doubled, recordings):
    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        doubled(x).sum().backward()
    with torch.no_grad():
        assert not doubled(x).requires_grad
    assert len(recordings) == 1


def test_beyond_the_limit_calls_run_as_they_stand(doubled, recordings, plain, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LIMIT", 2)
    for _ in range(3):
        for n in (1, 2, 3):
            assert torch.equal(doubled(torch.ones(n)), torch.full((n,), 2.0))
    assert len(recordings) == 2 and len(plain) == 3 + 2


def test_a_result_outlives_the_next_replay(doubled, recordings):
    results = [doubled(torch.tensor([float(n)])).item for n in range(4)]
    assert len(recordings) == 1
    assert [result() for result in results] == [0, 2, 4, 6]


@pytest.mark.parametrize("met_before", [0, 1, 2])
def test_a_call_before_the_backward_of_the_last_one_is_not_replayed(doubled, recordings, plain, met_before):
    """It would write over what that backward pass reads, as would a call that is not yet recorded."""
    x = torch.ones(3, requires_grad=True)
    for _ in range(met_before):
        doubled(x).sum().backward()
    x.grad = None
    first = doubled(x)
    before, made = len(plain), len(recordings)
    second = doubled(x)
    assert (len(plain), len(recordings)) == (before + 1, made)
    (first + second).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 4.0))
    doubled(x)
    assert len(plain) == before + 1 and len(recordings) == 1


def test_a_call_whose_backward_never_comes_is_waited_for_no_longer_than_its_graph_lives(doubled, recordings, plain):
    x = torch.ones(3, requires_grad=True)
    loss = doubled(x).sum()
    doubled(x)
    assert len(plain) == 2 and not recordings
    del loss
    doubled(x)
    assert len(plain) == 2 and len(recordings) == 1


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
