"""Two gloo ranks against one process. The tests share two processes, since imports take most of the time."""

import copy
import json
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
from minigpt4.common.resumable import Lines, open_output
from minigpt4.common.stopping import REQUEUE, STOP, Stopped
from minigpt4.datasets.samples import SampleId
from minigpt4.runners import RunnerBase
from minigpt4.runners.checkpoints import BEST
from minigpt4.runners.health import BAD_BATCHES
from minigpt4.tasks import ImageTextPretrainTask
from minigpt4.tracking.metrics import read_metrics


def make_runner(folder, model, splits, job_id, **run):
    path = folder / f"run{dist_utils.get_rank()}.yaml"  # one that the other is writing would be read half
    path.write_text("run: {amp: False, device: cpu, num_workers: 0, max_epoch: 1}\n")
    settings = {"output_dir": folder / "output", "iters_per_epoch": 3, "init_lr": 0.01} | run
    options = [f"run.{key}={value}" for key, value in settings.items()]
    cfg = Config(SimpleNamespace(cfg_path=str(path), options=options))
    return RunnerBase(cfg, ImageTextPretrainTask(), model, {"pictures": splits}, job_id)


def as_rank(rank, port, function, *args):
    """Call `function` with the rank, in the process group, as torchrun lets a rank do."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    dist_utils.init_process_group(torch.device("cpu"))
    try:
        function(rank, *args)
    finally:  # a rank that waits for one that failed gets an error
        dist_utils.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks():
    """Function that calls another on two ranks: on_two_ranks(function, *args)."""
    with mp.get_context("spawn").Pool(2) as processes:

        def run(function, *args):
            port = free_port()
            calls = [processes.apply_async(as_rank, (rank, port, function, *args)) for rank in range(2)]
            deadline = time.monotonic() + 200
            while not all(call.ready() for call in calls) and time.monotonic() < deadline:
                for call in calls:  # the other may wait for one that has failed
                    assert not call.ready() or call.successful(), call.get()
                time.sleep(0.01)
            for call in calls:
                call.get(timeout=0)

        yield run


def rank_main(rank, folder, model, pool, settings):
    model = copy.deepcopy(model)  # torch.multiprocessing lets the ranks share its memory
    if rank == 1:  # the ranks must start from rank 0's weights
        model.llama_proj.weight.data.add_(1.0)
    job_id = dist_utils.broadcast_object(f"job of rank {rank}")
    runner = make_runner(folder, model, {"train": Pictures(*pool)}, job_id, batch_size_train=2, **settings)
    runner.loader = FixedBatches(*pool, torch.arange(12).reshape(6, 2)[rank::2] % 8)
    runner.train()
    torch.save({"stats": runner.module.llama_proj.state_dict(), "job_id": job_id}, folder / f"rank{rank}.pth")


@pytest.mark.parametrize("accum_grad_iters", [1, 2])
def test_two_ranks_equal_the_joint_batch(on_two_ranks, build_golden_model, pool, tmp_path, accum_grad_iters):
    """Captions of unequal length on the ranks: the gradient is that of the mean over all labels."""
    settings = {"accum_grad_iters": accum_grad_iters}
    on_two_ranks(rank_main, tmp_path, build_golden_model(), pool, settings)
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


def lora_rank(rank, folder, model, pool):
    splits, settings = {"train": Pictures(*pool)}, {"batch_size_train": 2, **LORA_RUN}
    runner = make_runner(folder, copy.deepcopy(model), splits, "job", **settings)
    runner.loader = FixedBatches(*pool, torch.arange(12).reshape(6, 2)[rank::2] % 8)
    runner.train()
    torch.save({name: p.detach() for name, p in runner._trainable().items()}, folder / f"rank{rank}.pth")


def test_two_ranks_train_adapters_as_one(on_two_ranks, build_golden_model, pool, tmp_path):
    """At a rate of their own."""
    pytest.importorskip("peft")
    model = trained(build_golden_model(lora=LORA))
    on_two_ranks(lora_rank, tmp_path, model, pool)
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    splits = {"train": Pictures(*pool)}
    single = make_runner(tmp_path, copy.deepcopy(model), splits, "single", batch_size_train=4, **LORA_RUN)
    single.loader = FixedBatches(*pool, torch.arange(12).reshape(3, 4) % 8)
    single.train()
    assert any(".lora_B." in name for name in ranks[0])
    for name, parameter in single._trainable().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], parameter.detach(), atol=2e-5, rtol=0)


EVALUATED = {"eval_task": "caption", "eval_every_steps": 1, "eval_samples": 3}


def resuming_rank(rank, folder, model, pool):
    """Train two epochs at once, the second again from the first's checkpoint, and both with answers at each step."""
    weights, metrics, draws = [], [], []
    runs = {"whole": {}, "resumed": {"resume_ckpt_path": folder / "output/whole/checkpoint_0.pth"}}
    for job_id, changed in {**runs, "evaluated": EVALUATED}.items():
        random.seed(rank)
        settings = {"batch_size_train": 2, "max_epoch": 2, "iters_per_epoch": 2} | changed
        splits = {"train": Pictures(*pool), "val": Pictures(pool[0][:5], pool[1][:5])}
        own = copy.deepcopy(model)
        own.prompt_list = [f"{i} <Img><ImageHere></Img> " for i in range(4)]
        runner = make_runner(folder, own, splits, job_id, valid_splits="[val]", test_splits="[val]", **settings)
        runner.train()
        weights.append(runner.module.llama_proj.weight.detach().clone())
        metrics.append(runner.evaluate("val"))
        draws.append(random.random())
    torch.save((weights, metrics, draws), folder / f"rank{rank}.pth")


def test_ranks_resume_and_evaluate_together(on_two_ranks, build_golden_model, pool, tmp_path):
    """Each rank gets its own random state back; evaluation shares the samples, agrees on the mean, changes nothing."""
    on_two_ranks(resuming_rank, tmp_path, build_golden_model(), pool)
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    for weights, metrics, draws in ranks:
        assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
        assert metrics[0] == metrics[1] == metrics[2]
        assert draws[0] == draws[1] == draws[2]
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

    splits = {"train": Pictures(*pool), "val": Pictures(pool[0][:5], pool[1][:5])}
    own = build_golden_model()
    own.prompt_list = ["0 <Img><ImageHere></Img> "]
    alone = make_runner(tmp_path, own, splits, "alone", valid_splits="[val]", batch_size_train=2, **EVALUATED)
    alone.validation.before_training()
    lines = [
        [line for line in read_metrics(tmp_path / "output" / job / "metrics.jsonl") if line["step"] == 0]
        for job in ("alone", "evaluated")
    ]
    first, second = ({k: v for line in each for k, v in line.items() if k.startswith("val_")} for each in lines)
    assert first.pop("val_loss") == pytest.approx(second.pop("val_loss"), rel=1e-6)
    assert first == second and len(first) > 10


def faulty_rank(rank, folder, model, pool):
    """Errors that rank 0 alone can have: in the run's folder, its checkpoints, and the file of a command."""
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    runner = make_runner(folder, model, splits, "job", valid_splits="[val]", test_splits="[val]", batch_size_train=2)
    ours, lines = folder / f"{rank}.jsonl", Lines("minigpt4 try", "line", b"{", lambda entry: entry["id"])
    ours.write_text("somebody else's\n")
    ours.with_name("1.jsonl").unlink(missing_ok=True)
    missing = folder / "missing" / "checkpoint.pth"
    runner.saving.files._failures, runner.saving.files.folder = 2, missing.parent
    (runner.output_dir / BEST).write_text("broken")
    attempts = {
        "folder": lambda: make_runner(folder, model, splits, "job", batch_size_train=2),
        "save": runner.saving.save_best,
        "best": runner.validation.of_test_splits,
        "output": lambda: open_output(ours, {}, lines).__enter__(),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"
    torch.save(messages, folder / f"rank{rank}.pth")


def test_an_error_on_rank_0_alone_ends_all_ranks_with_its_message(on_two_ranks, build_golden_model, pool, tmp_path):
    on_two_ranks(faulty_rank, tmp_path, build_golden_model(), pool)
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert first == second and len(first) == 4, (first, second)
    assert first["folder"].startswith("FileExistsError") and "3rd time" in first["save"]
    assert BEST in first["best"] and "0.jsonl" in first["output"]


def timed_rank(rank, folder, model, pool):
    """Steps with and without exchange, one that rank 0 takes alone, and one with NaN in a picture of rank 1."""
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
    bad = {**samples, "image": samples["image"] * float("nan")} if rank else samples
    runner.loader.take_ids = lambda: [SampleId("pictures", f"of rank {rank}", "")]
    skipped = [runner.module.llama_proj.weight.detach().clone()]
    for taken in (bad, samples):
        runner.train_step(taken, is_update=True)
        skipped.append(runner.module.llama_proj.weight.detach().clone())
    torch.save((weights, steps, skipped), folder / f"rank{rank}.pth")


def test_steps_without_exchange_and_with_nan_on_one_rank(on_two_ranks, build_golden_model, pool, tmp_path):
    """A rank can take such steps while the others wait; afterwards all ranks exchange gradients again.

    NaN on one rank: all skip the update, and the samples of that rank are named.
    """
    on_two_ranks(timed_rank, tmp_path, build_golden_model(), pool)
    (first, steps, skipped), (second, others, also) = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert steps == others == [2, 2, 3]
    assert not first[1].equal(first[0])
    assert first[0].equal(second[0]) and first[2].equal(second[2]) and not first[2].equal(first[0])
    assert skipped[0].equal(skipped[1]) and also[0].equal(also[1])
    assert not skipped[1].equal(skipped[2]) and not also[1].equal(also[2])
    (entry,) = map(json.loads, (tmp_path / "output/job" / BAD_BATCHES).read_text().splitlines())
    assert entry["rank"] == 1 and [each["key"] for each in entry["samples"]] == ["of rank 1"]


class Stalls(Augmented):
    """Rank 1 gets a signal while it waits for data that do not come."""

    stalls = False

    def __getitem__(self, index):
        if self.stalls and index == 5 and dist_utils.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return super().__getitem__(index)


def stopped_rank(rank, folder, model, pool):
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


def test_ranks_stop_together(build_golden_model, pool, tmp_path):
    """At the same step, although one waits for data and the other for that one; and they go on exactly."""
    args = (free_port(), stopped_rank, tmp_path, build_golden_model(), pool)
    mp.start_processes(as_rank, args, nprocs=2, start_method="spawn")  # of their own, since they ignore SIGTERM then
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pth")
        assert found["status"] == REQUEUE
        torch.testing.assert_close(found["resumed"], found["whole"], rtol=0, atol=0)
    assert list((tmp_path / "output/stopped").glob("checkpoint_?_?.pth"))
