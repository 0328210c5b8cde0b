"""Two gloo ranks against one process."""

import copy
import os
import random
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from helpers import Augmented, FixedBatches, Pictures, free_port
from lora_models import LORA, trained

from minigpt4.benchmarks.scaling import ScalingTimer, without_exchange
from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.stopping import REQUEUE, STOP, Stopped
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask


def make_runner(folder, model, splits, job_id, **run):
    path = folder / "run.yaml"
    path.write_text("run: {amp: False, device: cpu, num_workers: 0, max_epoch: 1}\n")
    settings = {"output_dir": folder / "output", "iters_per_epoch": 3, "init_lr": 0.01} | run
    options = [f"run.{key}={value}" for key, value in settings.items()]
    cfg = Config(SimpleNamespace(cfg_path=str(path), options=options))
    return RunnerBase(cfg, ImageTextPretrainTask(), model, {"pictures": splits}, job_id)


def join(rank, world_size, port):
    """Join the process group, as torchrun lets a rank do."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist_utils.init_process_group(torch.device("cpu"))


def rank_main(rank, world_size, port, folder, model, pool, settings):
    join(rank, world_size, port)
    model = copy.deepcopy(model)  # torch.multiprocessing lets the ranks share its memory
    if rank == 1:  # the ranks must start from rank 0's weights
        model.llama_proj.weight.data.add_(1.0)
    job_id = dist_utils.broadcast_object(f"job of rank {rank}")
    runner = make_runner(folder, model, {"train": Pictures(*pool)}, job_id, batch_size_train=2, **settings)
    runner.loader = FixedBatches(*pool, torch.arange(12).reshape(6, 2)[rank::2] % 8)
    runner.train()
    torch.save({"stats": runner.module.llama_proj.state_dict(), "job_id": job_id}, folder / f"rank{rank}.pth")
    dist_utils.destroy_process_group()


@pytest.mark.parametrize("accum_grad_iters", [1, 2])
def test_two_ranks_equal_the_joint_batch(build_golden_model, pool, tmp_path, accum_grad_iters):
    """Captions of unequal length on the ranks: the gradient is that of the mean over all labels."""
    settings = {"accum_grad_iters": accum_grad_iters}
    args = (2, free_port(), tmp_path, build_golden_model(), pool, settings)
    mp.start_processes(rank_main, args, nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    assert [r["job_id"] for r in ranks] == ["job of rank 0"] * 2
    assert [p.name for p in (tmp_path / "output").iterdir()] == ["job of rank 0"]

    splits = {"train": Pictures(*pool)}
    single = make_runner(tmp_path, build_golden_model(), splits, "single", batch_size_train=4, **settings)
    single.loader = FixedBatches(*pool, torch.arange(12).reshape(3, 4) % 8)
    single.train()
    for name, value in single.module.llama_proj.state_dict().items():
        assert torch.equal(ranks[0]["stats"][name], ranks[1]["stats"][name])
        torch.testing.assert_close(ranks[0]["stats"][name], value, atol=2e-6, rtol=0)
    log = (tmp_path / "output/single/log.txt").read_text().splitlines()[-1]
    assert '"train_loss"' in log


LORA_RUN = {"init_lr": 0.01, "lr_groups": "{lora: {init_lr: 0.02, min_lr: 0.001, weight_decay: 0.2}}"}


def lora_rank(rank, world_size, port, folder, model, pool):
    join(rank, world_size, port)
    splits, settings = {"train": Pictures(*pool)}, {"batch_size_train": 2, **LORA_RUN}
    runner = make_runner(folder, copy.deepcopy(model), splits, "job", **settings)
    runner.loader = FixedBatches(*pool, torch.arange(12).reshape(6, 2)[rank::2] % 8)
    runner.train()
    torch.save({name: p.detach() for name, p in runner._trainable().items()}, folder / f"rank{rank}.pth")
    dist_utils.destroy_process_group()


def test_two_ranks_train_adapters_as_one(build_golden_model, pool, tmp_path):
    """At a rate of their own."""
    pytest.importorskip("peft")
    model = trained(build_golden_model(lora=LORA))
    mp.start_processes(lora_rank, (2, free_port(), tmp_path, model, pool), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    splits = {"train": Pictures(*pool)}
    single = make_runner(tmp_path, copy.deepcopy(model), splits, "single", batch_size_train=4, **LORA_RUN)
    single.loader = FixedBatches(*pool, torch.arange(12).reshape(3, 4) % 8)
    single.train()
    assert any(".lora_B." in name for name in ranks[0])
    for name, parameter in single._trainable().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], parameter.detach(), atol=2e-5, rtol=0)


def resuming_rank(rank, world_size, port, folder, model, pool):
    """Train two epochs at once, then the second again from the first's checkpoint, with a validation each time."""
    join(rank, world_size, port)
    weights, metrics, draws = [], [], []
    for job_id, resume in (("whole", "null"), ("resumed", folder / "output/whole/checkpoint_0.pth")):
        random.seed(rank)
        settings = {"batch_size_train": 2, "max_epoch": 2, "iters_per_epoch": 2, "resume_ckpt_path": resume}
        splits = {"train": Pictures(*pool), "val": Pictures(pool[0][:5], pool[1][:5])}
        own = copy.deepcopy(model)
        own.prompt_list = [f"{i} <Img><ImageHere></Img> " for i in range(4)]
        runner = make_runner(folder, own, splits, job_id, valid_splits="[val]", test_splits="[val]", **settings)
        runner.train()
        weights.append(runner.module.llama_proj.weight.detach().clone())
        metrics.append(runner.evaluate("val"))
        draws.append(random.random())
    torch.save((weights, metrics, draws), folder / f"rank{rank}.pth")
    dist_utils.destroy_process_group()


def test_ranks_resume_and_evaluate_together(build_golden_model, pool, tmp_path):
    """Each rank gets its own random state back; evaluation shares the samples and agrees on the mean."""
    mp.start_processes(
        resuming_rank, (2, free_port(), tmp_path, build_golden_model(), pool), nprocs=2, start_method="spawn"
    )
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    for weights, metrics, draws in ranks:
        assert torch.equal(*weights)
        assert metrics[0] == metrics[1]
        assert draws[0] == draws[1]
    assert ranks[0][2] != ranks[1][2]
    assert ranks[0][1] == ranks[1][1]
    model = build_golden_model().eval()
    model.prompt_list = ["0 <Img><ImageHere></Img> "]
    model.llama_proj.weight.data = ranks[0][0][0]
    content = torch.load(tmp_path / "output/whole/checkpoint_1.pth", weights_only=True)["model"]
    model.llama_proj.load_state_dict({k.removeprefix("llama_proj."): v for k, v in content.items()})
    with torch.no_grad():
        expected = model({"image": pool[0][:5], "text_input": pool[1][:5]})["loss"].item()
    assert ranks[0][1][0] == pytest.approx(expected, abs=1e-5)


def timed_rank(rank, world_size, port, folder, model, pool):
    """Steps with and without exchange, and one that rank 0 takes alone."""
    join(rank, world_size, port)
    samples = {"image": pool[0][rank::2][:2], "text_input": pool[1][rank::2][:2]}
    runner = make_runner(folder, copy.deepcopy(model), {"train": Pictures(*pool)}, "job", batch_size_train=2)
    projection = runner.module.llama_proj.weight
    runner.train_step(samples, is_update=True)
    weights = [projection.detach().clone()]
    if rank == 0:
        with without_exchange(runner):
            runner.train_step(samples, is_update=True)
    weights.append(projection.detach().clone())
    projection.data.copy_(weights[0])
    runner.optimizer.state.clear()
    runner.train_step(samples, is_update=True)
    weights.append(projection.detach().clone())
    timer = ScalingTimer(runner, iter([samples] * 7))
    for _ in range(2):
        timer.step()
    timer.step_alone(3)
    steps = [len(each.seconds) for each in (timer, timer.no_exchange, timer.alone)]
    torch.save((weights, steps), folder / f"rank{rank}.pth")
    dist_utils.destroy_process_group()


def test_steps_without_exchange(build_golden_model, pool, tmp_path):
    """A rank can take such steps while the others wait; afterwards all ranks exchange gradients again."""
    args = (2, free_port(), tmp_path, build_golden_model(), pool)
    mp.start_processes(timed_rank, args, nprocs=2, start_method="spawn")
    (first, steps), (second, others) = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert steps == others == [2, 2, 3]
    assert not first[1].equal(first[0])
    assert first[0].equal(second[0]) and first[2].equal(second[2]) and not first[2].equal(first[0])


class Stalls(Augmented):
    """Rank 1 gets a signal while it waits for data that do not come."""

    stalls = False

    def __getitem__(self, index):
        if self.stalls and index == 5 and dist_utils.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return super().__getitem__(index)


def stopped_rank(rank, world_size, port, folder, model, pool):
    join(rank, world_size, port)
    found = {}
    for job_id, stalls in (("whole", False), ("stopped", True), ("resumed", False)):
        random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
        own, data = copy.deepcopy(model), Stalls(*pool)
        own.prompt_list = [f"{i} <Img><ImageHere></Img> " for i in range(4)]
        settings = {"batch_size_train": 2, "max_epoch": 2, "resume_ckpt_path": "auto", "log_freq": 1}
        settings |= {"output_dir": folder / ("whole" if job_id == "whole" else "output"), "accum_grad_iters": 2}
        runner = make_runner(folder, own, {"train": data}, job_id, **settings)
        data.stalls = stalls
        try:
            with STOP:
                runner.train()
        except Stopped as stop:
            found["status"] = stop.status
        found[job_id] = [each.detach().clone() for each in runner._trainable().values()], random.random()
    torch.save(found, folder / f"rank{rank}.pth")
    dist_utils.destroy_process_group()


def test_ranks_stop_together(build_golden_model, pool, tmp_path):
    """At the same step, although one waits for data and the other for that one; and they go on exactly."""
    args = (2, free_port(), tmp_path, build_golden_model(), pool)
    mp.start_processes(stopped_rank, args, nprocs=2, start_method="spawn")
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pth")
        assert found["status"] == REQUEUE
        torch.testing.assert_close(found["resumed"], found["whole"], rtol=0, atol=0)
    assert list((tmp_path / "output/stopped").glob("checkpoint_?_?.pth"))
