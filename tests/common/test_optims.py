"""Schedules against the golden traces, and the optimiser's parameter groups."""

import json

import pytest
import torch
from helpers import GOLDEN
from torch import nn

from minigpt4.common.optims import create_optimizer
from minigpt4.common.registry import registry

TRACES = json.loads((GOLDEN / "lr_traces.json").read_text())


def fake_optimizer():
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=1.0)


@pytest.mark.parametrize("name", TRACES)
def test_traces(name):
    trace = TRACES[name]
    optimizer = fake_optimizer()
    schedule = registry.get_lr_scheduler_class(trace["kind"])(
        optimizer, trace["max_epoch"], trace["iters_per_epoch"], **trace["args"]
    )
    lrs = []
    for epoch in range(trace["max_epoch"]):
        for step in range(trace["iters_per_epoch"]):
            schedule.step(cur_epoch=epoch, cur_step=step)
            lrs.append(optimizer.param_groups[1]["lr"])
    assert len(lrs) == len(trace["lr"])
    assert lrs == pytest.approx(trace["lr"], rel=1e-15, abs=0)


def test_every_schedule_has_a_trace():
    assert {trace["kind"] for trace in TRACES.values()} == set(registry.list_lr_schedulers())


def test_parameter_groups():
    model = nn.ModuleDict({"fc": nn.Linear(3, 2), "bn": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    model["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    decayed, kept = create_optimizer(model, 0.1, 0.05, 0.98).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert decayed["betas"] == (0.9, 0.98)
    assert decayed["params"] == [model["fc"].weight]
    assert len(kept["params"]) == 5


def test_nothing_to_train():
    with pytest.raises(ValueError, match="no trainable parameter"):
        create_optimizer(nn.Linear(2, 2).requires_grad_(False), 0.1, 0.0, 0.999)
