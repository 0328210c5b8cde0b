"""What a run writes into its metrics.jsonl, and takes over from the run that it goes on with."""

import json

import pytest
from helpers import Pictures

from minigpt4.runners.health import BAD_BATCHES
from minigpt4.tracking import metrics
from minigpt4.tracking.metrics import read_metrics
from minigpt4.tracking.record import PICTURES


def lines_of(runner):
    return read_metrics(runner.output_dir / metrics.NAME)


def test_a_run_writes_its_numbers(build_golden_model, make_runner, pool, caplog):
    caplog.set_level("INFO")
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = {"iters_per_epoch": 5, "log_freq": 2, "max_epoch": 2, "valid_splits": "[val]", "test_splits": "[val]"}
    runner = make_runner(build_golden_model(), splits, **settings)
    runner.train()
    lines = lines_of(runner)
    at_lines = [line for line in lines if "loss" in line]
    assert [(line["epoch"], line["step"]) for line in at_lines] == [
        (epoch, 5 * epoch + i) for epoch in (0, 1) for i in (1, 3, 5)
    ]
    for line in at_lines:
        assert f"loss: {line['loss']:.4f}" in caplog.text and f"lr: {line['lr']:.6f}" in caplog.text
        assert line["grad_norm"] > 0 and line["step_seconds"] >= line["data_seconds"] >= 0
        assert line["tokens_per_second"] > line["images_per_second"] > 0 and line["host_memory_mib"] > 50
    others = [set(line) - {"step", "time", "epoch"} for line in lines if "loss" not in line]
    cut = {"cut_off/texts/the end of a text longer than model.max_txt_len tokens"}
    assert others == [cut, {"train_lr", "train_loss"}, {"val_loss"}] * 2 + [{"test/val_loss"}]
    logged = [json.loads(line) for line in (runner.output_dir / "log.txt").read_text().splitlines()[-5:]]
    measured = [line for line in lines if line.keys() & {"train_loss", "val_loss", "test/val_loss"}]
    for rounded, exact in zip(logged, measured, strict=True):
        assert rounded == {name: f"{exact.get(name, exact.get(f'test/{name}')):.3f}" for name in rounded}


def test_the_norm_is_that_of_the_gradient_of_the_update(build_golden_model, make_runner, pool):
    """With accumulation: of all micro-batches, at each log line, and read there only."""
    runner = make_runner(
        build_golden_model(), iters_per_epoch=4, accum_grad_iters=2, log_freq=3, init_lr=0.0, min_lr=0.0
    )
    runner.train()
    big = make_runner(
        build_golden_model(), job_id="big", batch_size_train=6, iters_per_epoch=2, init_lr=0.0, min_lr=0.0
    )
    norms = []
    big.optimizer.step = lambda *_, **__: norms.append(sum(p.grad.square().sum() for p in big._trainable().values()))
    big.train()
    found = [(line["step"], line.get("grad_norm")) for line in lines_of(runner) if "loss" in line]
    expected = [float(norm.sqrt()) for norm in norms]
    assert found == [(1, None), (4, pytest.approx(expected[1], rel=1e-5))]


def test_a_resumed_run_has_each_step_once(build_golden_model, make_runner, pool, caplog):
    """Killed in its second epoch, with a line cut off. Lines of that epoch are written again, not taken over."""
    caplog.set_level("INFO")
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = {"iters_per_epoch": 4, "log_freq": 1, "max_epoch": 2, "valid_splits": "[val]", "init_lr": 0.01}
    whole = make_runner(build_golden_model(), splits, job_id="whole", **settings)
    whole.train()
    earlier = whole.output_dir / metrics.NAME
    earlier.write_bytes(earlier.read_bytes()[:-100])
    bad = [b'{"step": 2, "samples": ["\xff"]}\n', b'{"step": 4}\n', b'{"step": 5}\n', b'{"step"']
    (whole.output_dir / BAD_BATCHES).write_bytes(b"".join(bad))
    (whole.output_dir / PICTURES).mkdir()
    (whole.output_dir / PICTURES / "a picture.jpg").touch()
    first = whole.output_dir / "checkpoint_0.pth"
    resumed = make_runner(build_golden_model(), splits, job_id="resumed", resume_ckpt_path=str(first), **settings)
    resumed.train()
    assert [path.name for path in (resumed.output_dir / PICTURES).iterdir()] == ["a picture.jpg"]
    names = ("loss", "lr", "train_loss", "val_loss", "grad_norm")
    steps = [line["step"] for line in lines_of(resumed) if "loss" in line]
    assert steps == list(range(1, 9)) and "Taken over from " in caplog.text
    expected = {(line["step"], name): line[name] for line in lines_of(whole) for name in names if name in line}
    found = [((line["step"], name), line[name]) for line in lines_of(resumed) for name in names if name in line]
    assert len(found) == len(dict(found))
    assert {key: dict(found)[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert resumed.run_id == whole.run_id
    assert (resumed.output_dir / BAD_BATCHES).read_bytes() == b"".join(bad[:2])


def test_a_validation_that_is_made_up_for_is_there_once(build_golden_model, make_runner, pool, monkeypatch):
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = {"iters_per_epoch": 1, "max_epoch": 1, "valid_splits": "[val]"}
    killed = make_runner(build_golden_model(), splits, job_id="killed", **settings)

    def kill(loss):
        raise KeyboardInterrupt

    monkeypatch.setattr(killed.task, "agg_metrics", kill)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert sum("val_loss" in line for line in lines_of(killed)) == 1
    path = str(killed.last_checkpoint)
    again = make_runner(build_golden_model(), splits, job_id="again", resume_ckpt_path=path, **settings)
    again.train()
    assert sum("val_loss" in line for line in lines_of(again)) == 1


def test_a_checkpoint_that_moved_starts_anew(build_golden_model, make_runner, tmp_path, caplog):
    caplog.set_level("INFO")
    runner = make_runner(build_golden_model(), job_id="first", iters_per_epoch=1)
    runner.train()
    moved = tmp_path / "checkpoint_0.pth"
    (runner.output_dir / "checkpoint_0.pth").rename(moved)
    settings = {"iters_per_epoch": 1, "max_epoch": 2, "resume_ckpt_path": str(moved)}
    again = make_runner(build_golden_model(), job_id="again", **settings)
    again.train()
    assert "start at its checkpoint" in caplog.text
    # The averages of the epoch that is saved are recorded again, since this folder lacks them.
    assert [line["step"] for line in lines_of(again) if "loss" in line] == [2]
    assert [line["step"] for line in lines_of(again) if "train_loss" in line] == [1, 2]


@pytest.mark.parametrize("best", [0, 1])
def test_test_splits_are_measured_with_the_best_checkpoint(build_golden_model, make_runner, pool, best, caplog):
    """And the model keeps the weights of the last epoch. A resumed run has the best checkpoint of the earlier one."""
    caplog.set_level("INFO")
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = {"iters_per_epoch": 2, "max_epoch": 2, "valid_splits": "[val]", "init_lr": 0.01}
    runner = make_runner(build_golden_model(), splits, test_splits="[val]", **settings)
    metric = iter([1.0, 0.0] if best == 0 else [0.0, 1.0])
    runner.task.agg_metrics = lambda loss: next(metric)
    runner.train()
    lines = lines_of(runner)
    validated = [line["val_loss"] for line in lines if "val_loss" in line]
    (measured,) = [line["test/val_loss"] for line in lines if "test/val_loss" in line]
    assert validated[0] != validated[1] and measured == validated[best]
    assert runner.evaluate("val") == validated[1]
    assert f"The test splits are measured with {runner.output_dir}/checkpoint_best.pth" in caplog.text

    path = str(runner.output_dir / "checkpoint_0.pth")
    again = make_runner(build_golden_model(), splits, "again", resume_ckpt_path=path, test_splits="[val]", **settings)
    metric = iter([0.5])
    again.task.agg_metrics = lambda loss: next(metric)
    again.train()
    (measured,) = [line["test/val_loss"] for line in lines_of(again) if "test/val_loss" in line]
    assert measured == pytest.approx(validated[0 if best == 0 else 1], rel=1e-6)


def test_without_validation_the_last_weights_are_tested_and_the_log_says_so(
    build_golden_model, make_runner, pool, caplog
):
    caplog.set_level("INFO")
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    make_runner(build_golden_model(), splits, iters_per_epoch=1, test_splits="[val]").train()
    assert "measured with the weights of the last epoch" in caplog.text
