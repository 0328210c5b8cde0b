"""Two gloo ranks against one process."""

import copy
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from helpers import FixedBatches, Pictures

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def make_runner(folder, model, pool, job_id, **run):
    path = folder / "run.yaml"
    path.write_text("run: {amp: False, device: cpu, num_workers: 0, max_epoch: 1}\n")
    settings = {"output_dir": folder / "output", "iters_per_epoch": 3, "init_lr": 0.01} | run
    options = [f"run.{key}={value}" for key, value in settings.items()]
    cfg = Config(SimpleNamespace(cfg_path=str(path), options=options))
    return RunnerBase(cfg, ImageTextPretrainTask(), model, {"pictures": {"train": Pictures(*pool)}}, job_id)


def rank_main(rank, world_size, port, folder, model, pool, settings):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    model = copy.deepcopy(model)  # torch.multiprocessing lets the ranks share its memory
    dist_utils.init_process_group(torch.device("cpu"))
    if rank == 1:  # the ranks must start from rank 0's weights
        model.llama_proj.weight.data.add_(1.0)
    job_id = dist_utils.broadcast_object(f"job of rank {rank}")
    runner = make_runner(folder, model, pool, job_id, batch_size_train=2, **settings)
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

    single = make_runner(tmp_path, build_golden_model(), pool, "single", batch_size_train=4, **settings)
    single.loader = FixedBatches(*pool, torch.arange(12).reshape(3, 4) % 8)
    single.train()
    for name, value in single.module.llama_proj.state_dict().items():
        assert torch.equal(ranks[0]["stats"][name], ranks[1]["stats"][name])
        torch.testing.assert_close(ranks[0]["stats"][name], value, atol=2e-6, rtol=0)
    log = (tmp_path / "output/single/log.txt").read_text().splitlines()[-1]
    assert '"train_loss"' in log


def test_random_states_of_all_ranks_are_kept(build_golden_model, pool, tmp_path):
    args = (2, free_port(), tmp_path, build_golden_model(), pool, {})
    mp.start_processes(rank_main, args, nprocs=2, start_method="spawn")
    content = torch.load(tmp_path / "output/job of rank 0/checkpoint_0.pth", weights_only=True)
    assert len(content["rng"]) == 2
