"""Evaluation while a run trains: it changes nothing, finds the best checkpoint, and reports what gets worse."""

import random

import numpy as np
import pytest
import torch
from helpers import Pictures

from minigpt4.common.registry import registry
from minigpt4.evaluation import mean
from minigpt4.tracking import metrics
from minigpt4.tracking.metrics import read_metrics

SETTINGS = {"iters_per_epoch": 4, "max_epoch": 2, "log_freq": 1, "init_lr": 0.01, "accum_grad_iters": 2}
EVALUATED = {"valid_splits": "[val]", "eval_task": "caption", "eval_every_steps": 2, "eval_samples": 3}


class Drawing(Pictures):
    """Draws random numbers for each sample, in the process that reads it."""

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(1)
        return super().__getitem__(index)


@registry.register("eval_task", "given")
class Given:
    """Figures that a test gives, evaluation by evaluation."""

    values = iter(())
    better = "higher"

    def measure(self, examples, answers):
        return {"first": mean([next(Given.values, 0)] * len(answers), better=Given.better), "second": mean([1, 0, 0])}


@pytest.fixture
def given():
    """Set the figure "first" of the evaluations to come, the check of the settings before them apart."""

    def give(*values, better="higher", checks=1):
        Given.values, Given.better = iter([0] * checks + [*values]), better

    return give


def lines_of(runner, *names):
    return [line for line in read_metrics(runner.output_dir / metrics.NAME) if line.keys() & set(names)]


def test_training_with_evaluation_is_bit_equal(build_golden_model, make_runner, pool):
    splits = {"train": Drawing(*pool), "val": Drawing(*pool)}
    runners = []
    for job, settings in (("without", {}), ("with", EVALUATED)):
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        model = build_golden_model()
        model.prompt_list = ["<Img><ImageHere></Img> One.", "<Img><ImageHere></Img> Another one."]  # drawn at random
        runners.append(make_runner(model, splits, job, **SETTINGS, **settings))
        runners[-1].train()
        print(random.random())
    first, second = (torch.load(runner.last_checkpoint, weights_only=True) for runner in runners)
    print([l for l in read_metrics(runners[1].output_dir / metrics.NAME)])
    assert 0
