"""A profiled step of `bench train`."""

import time
from types import SimpleNamespace

import pytest
import torch

from minigpt4.benchmarks.step_timer import StepTimer
from minigpt4.benchmarks.synthetic import random_batches
from minigpt4.benchmarks.train import random_runner
from minigpt4.tasks import ImageTextPretrainTask


class SlowStep:
    """A step object with a vision side that takes 0.1 s."""

    other = "another attribute"

    def vision(self, model, image):
        time.sleep(0.1)
        return image


class TaskThatSees(ImageTextPretrainTask):
    """Calls the vision side of the model's step object, and trains the projection."""

    def train_step(self, model, samples):
        if hasattr(model, "step"):
            assert model.step.vision(model, samples["image"]) is samples["image"]
            assert model.step.other == "another attribute"
        return model.llama_proj.weight.square().mean()


@pytest.fixture
def runner(tmp_path):
    args = SimpleNamespace(small=True, load_in="16bit")
    options = [f"run.output_dir={tmp_path}", "run.device=cpu"]
    runner = random_runner(args, 1, options, torch.device("cpu"))
    runner.task = TaskThatSees()
    return runner


def test_a_step_is_timed_in_parts_and_all_is_restored(runner):
    runner.module.step = SlowStep()
    before = runner.task, runner.module.step
    weights = runner.module.llama_proj.weight.detach().clone()
    timer = StepTimer(runner, random_batches(1, 2, count=1))
    timer.profiled_step()
    assert not weights.equal(runner.module.llama_proj.weight)
    assert (runner.task, runner.module.step) == before
    timed = [*vars(runner.task), *vars(runner.module.step), *vars(runner.optimizer)]
    assert not {"train_step", "vision", "step"} & set(timed)
    assert timer.phases["vision"][0] >= 0.1
    assert all(timer.phases[name][0] > 0 for name in ("language", "backward", "optimizer"))
    assert [len(values) for values in timer.phases.values()] == [0, 1, 1, 1, 1]


def test_a_model_without_a_step_object(runner):
    vars(runner.module).pop("step", None)
    timer = StepTimer(runner, random_batches(1, 2, count=1))
    timer.profiled_step()
    assert timer.phases["vision"] == [0] and timer.phases["language"][0] > 0
    assert not hasattr(runner.module, "step")
