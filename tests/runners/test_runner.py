"""Equalities and mistakes: accumulation, resume, validation, splits, lengths."""

import random

import numpy as np
import pytest
import torch
from helpers import Pictures

from minigpt4.common.checkpoint import CheckpointError, resolve
from minigpt4.datasets.loaders import TrainLoader


def weights(runner):
    return {name: p.detach().clone() for name, p in runner._trainable().items()}


def assert_same(first, second, atol=0.0):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=atol, rtol=0)


def test_micro_batches_equal_one_big_batch(build_golden_model, make_runner, pool):
    """Captions of unequal length: the mean is over the labels of the whole step, not of the micro-batches' means."""
    images, captions = pool
    big = make_runner(build_golden_model(), job_id="big", init_lr=0.01)
    big.train_step({"image": images[:6], "text_input": captions[:6]}, is_update=True)
    small = make_runner(build_golden_model(), job_id="small", init_lr=0.01)
    for i in range(3):
        part = slice(2 * i, 2 * i + 2)
        small.train_step({"image": images[part], "text_input": captions[part]}, is_update=i == 2)
    assert_same(weights(big), weights(small), atol=1e-6)


def test_a_remainder_of_micro_batches_is_used_within_its_epoch(build_golden_model, make_runner):
    runner = make_runner(build_golden_model(), iters_per_epoch=5, accum_grad_iters=2, max_epoch=2)
    steps = []
    update = runner.optimizer_step
    runner.optimizer_step = lambda: (steps.append(runner.num_labels), update())
    runner.train()
    assert len(steps) == 2 * 3
    assert runner.num_labels == 0
    assert all(p.grad is None for p in runner._trainable().values())


def test_resumed_equals_uninterrupted(build_golden_model, make_runner):
    """At an epoch boundary, bit by bit: weights, optimiser, data order, prompts and random states."""
    settings = {"iters_per_epoch": 4, "init_lr": 0.01, "warmup_steps": 3, "warmup_lr": 1e-4, "max_epoch": 3}
    prompts = [f"###Human: {i} <Img><ImageHere></Img> ###Assistant: " for i in range(4)]

    def run(job_id, **more):
        model = build_golden_model(end_sym="###")
        model.prompt_list = prompts
        random.seed(7), np.random.seed(7), torch.manual_seed(7)
        runner = make_runner(model, job_id=job_id, **(settings | more))
        runner.train()
        return runner

    whole = run("whole")
    random.seed(99), torch.manual_seed(99)
    resumed = run("resumed", resume_ckpt_path=str(whole.output_dir / "checkpoint_0.pth"))
    assert_same(weights(whole), weights(resumed))
    assert_same(whole.optimizer.state_dict()["state"][0], resumed.optimizer.state_dict()["state"][0])
    assert [p.name for p in sorted(resumed.output_dir.glob("*.pth"))] == ["checkpoint_1.pth", "checkpoint_2.pth"]


def test_resume_of_a_finished_run_trains_nothing(build_golden_model, make_runner, caplog):
    caplog.set_level("INFO")
    first = make_runner(build_golden_model(), job_id="first", iters_per_epoch=1)
    first.train()
    again = make_runner(build_golden_model(), job_id="again", resume_ckpt_path=str(first.output_dir))
    again.train()
    assert "Nothing left to train" in caplog.text
    assert_same(weights(first), weights(again))


def test_resume_refuses_a_checkpoint_without_the_trained_part(build_golden_model, make_runner, tmp_path):
    path = tmp_path / "checkpoint_0.pth"
    torch.save({"model": {"llama_proj.bias": torch.zeros(40)}, "epoch": 0}, path)
    with pytest.raises(CheckpointError, match=r"llama_proj\.weight is missing"):
        make_runner(build_golden_model(), resume_ckpt_path=str(path))


def test_validation_keeps_the_best_and_the_last(build_golden_model, make_runner, pool, caplog):
    caplog.set_level("INFO")
    train = Pictures(*pool)
    valid = Pictures(pool[0][:5], pool[1][:5])
    runner = make_runner(
        build_golden_model(),
        {"train": train, "val": valid},
        valid_splits="[val]",
        test_splits="[val]",
        iters_per_epoch=3,
        max_epoch=2,
        init_lr=0.01,
    )
    runner.train()
    names = {p.name for p in runner.output_dir.glob("*.pth")}
    assert names == {"checkpoint_0.pth", "checkpoint_1.pth", "checkpoint_best.pth"}
    assert -10 < runner.best_metric < 0
    assert runner.evaluate("val") == pytest.approx(-runner.best_metric, abs=1e-5)


def test_evaluation_is_the_mean_over_all_labels(build_golden_model, make_runner, pool):
    images, captions = pool
    model = build_golden_model()
    data = Pictures(images, captions)
    runner = make_runner(model, {"val": data}, evaluate=True, test_splits="[val]", batch_size_eval=3)
    with torch.no_grad():
        whole = model({"image": images, "text_input": captions})["loss"]
    assert runner.evaluate("val") == pytest.approx(float(whole), abs=1e-5)
    runner.train()
    assert not list(runner.output_dir.glob("*.pth"))


def test_unknown_split(build_golden_model, make_runner):
    with pytest.raises(ValueError, match=r"No dataset has the split 'dev'.*'train'"):
        make_runner(build_golden_model(), valid_splits="[dev]")


def test_dataset_smaller_than_a_batch(build_golden_model, make_runner):
    with pytest.raises(ValueError, match=r"batch_size_train=96 needs at least 96 samples per rank; pictures has 8"):
        make_runner(build_golden_model(), batch_size_train=96)


def test_epoch_length_defaults_to_one_pass(build_golden_model, make_runner):
    assert make_runner(build_golden_model(), iters_per_epoch=None).iters_per_epoch == 2


def test_a_stream_needs_an_epoch_length(build_golden_model, make_runner):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {}

    with pytest.raises(ValueError, match=r"--options run\.iters_per_epoch=500"):
        make_runner(build_golden_model(), {"train": Stream()}, iters_per_epoch=None)


def test_a_run_is_never_overwritten(build_golden_model, make_runner):
    make_runner(build_golden_model())
    with pytest.raises(FileExistsError):
        make_runner(build_golden_model())


def test_non_finite_loss_stops_the_run(build_golden_model, make_runner):
    model = build_golden_model()
    model.llama_proj.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss is nan.*run\.init_lr"):
        make_runner(model, iters_per_epoch=2).train()


def test_a_task_may_return_a_loss_alone(build_golden_model, make_runner):
    runner = make_runner(build_golden_model(), iters_per_epoch=2)
    model_step = runner.task.train_step
    runner.task.train_step = lambda model, samples: {"loss": model_step(model, samples)["loss"]}
    before = weights(runner)
    runner.train()
    assert not torch.equal(before["llama_proj.bias"], weights(runner)["llama_proj.bias"])


def test_checkpoint_folder_means_its_newest(tmp_path):
    for epoch in (0, 9, 10):
        (tmp_path / f"checkpoint_{epoch}.pth").touch()
    assert resolve(str(tmp_path)).name == "checkpoint_10.pth"
    with pytest.raises(FileNotFoundError, match="without a checkpoint_N"):
        resolve(str(tmp_path.parent))


def test_loader_is_ours(build_golden_model, make_runner):
    assert isinstance(make_runner(build_golden_model()).loader, TrainLoader)
