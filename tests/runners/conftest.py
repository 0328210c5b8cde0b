"""A runner around the golden model, fed with given batches."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Augmented, FixedBatches, Pictures

from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask


@pytest.fixture
def pool(golden):
    """The images [8,3,28,28] and captions of the golden runs."""
    described, tensors = golden("optim")
    return tensors["image_pool"], described["captions"]


@pytest.fixture
def make_runner(tmp_path, pool):
    """Builder of a runner. Arguments: the model, {split: dataset}, the job id, and keys of `run:`."""

    def make(model, splits=None, job_id="job", **run):
        path = tmp_path / "run.yaml"
        path.write_text("run: {amp: False, device: cpu, num_workers: 0}\n")
        run = {"output_dir": str(tmp_path / "output"), "batch_size_train": 3, "max_epoch": 1, **run}
        options = [f"run.{key}={'null' if value is None else value}" for key, value in run.items()]
        cfg = Config(SimpleNamespace(cfg_path=str(path), options=options))
        datasets = {"pictures": splits or {"train": Pictures(*pool)}}
        assert registry.get_runner_class(cfg.run_cfg.runner) is RunnerBase
        return RunnerBase(cfg, ImageTextPretrainTask(), model, datasets, job_id)

    return make


@pytest.fixture
def golden_runner(golden, pool, build_golden_model, make_runner):
    """Builder of a golden run, ready to train."""
    described, tensors = golden("optim")

    def make(name, **run):
        case = described["runs"][name]
        model = build_golden_model(
            max_txt_len=case["max_txt_len"], end_sym=case["end_sym"], freeze_qformer=case["freeze_qformer"]
        )
        model.prompt_list = [case["prompt"]] if case["prompt"] else []
        settings = {k: v for k, v in case["run_config"].items() if k != "resume_ckpt_path"}
        runner = make_runner(model, **(settings | run))
        runner.loader = FixedBatches(*pool, tensors["batch_indices"])
        return runner, case

    return make


@pytest.fixture
def run(build_golden_model, make_runner, pool):
    """Function that trains: the runner after its run, which may be one that is resumed."""

    def train(job_id, **more):
        model = build_golden_model(end_sym="###")
        model.prompt_list = [f"###Human: {i} <Img><ImageHere></Img> ###Assistant: " for i in range(4)]
        is_new = more.get("resume_ckpt_path", "auto") == "auto"
        random.seed(7 if is_new else 8), np.random.seed(7), torch.manual_seed(7)
        settings = {"iters_per_epoch": 3, "max_epoch": 2, "init_lr": 0.01, "log_freq": 2}
        settings |= {"warmup_steps": 3, "warmup_lr": 1e-4}
        splits = {"train": Augmented(*pool), "val": Pictures(*pool)}
        runner = make_runner(model, splits, job_id=job_id, **(settings | more))
        runner.train()
        return runner

    return train
