"""Numbers that go wrong in a run: updates that are skipped, batches that are named, clipped gradients, spikes."""

import json

import pytest
import torch

from minigpt4.runners.health import BAD_BATCHES, MIN_WINDOW
from minigpt4.tracking import metrics


def weights(runner):
    return torch.cat([p.detach().flatten().clone() for p in runner._trainable().values()])


def named(runner):
    file = runner.output_dir / BAD_BATCHES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def lines_of(runner):
    return metrics.read_metrics(runner.output_dir / metrics.NAME)


class Scaled(torch.autograd.Function):
    """The same loss, with a gradient that is multiplied by a factor."""

    @staticmethod
    def forward(ctx, loss, factor):
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def plant(runner, where, at, value=float("nan")):
    """Let the micro-batches `at` (from 0) go wrong in their loss alone, or in their gradient alone."""
    step, numbers = runner.task.train_step, iter(range(10**6))

    def planted(model, samples):
        output = step(model, samples)
        if next(numbers) in at:
            output["loss"] = output["loss"] + value if where == "loss" else Scaled.apply(output["loss"], value)
        return output

    runner.task.train_step = planted


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize(("where", "value"), [("loss", "inf"), ("gradient", "nan"), ("gradient", 1e30)])
def test_a_bad_update_is_skipped_counted_and_named(build_golden_model, make_runner, pool, where, value, accum, caplog):
    """The square of a gradient of 1e30 overflows: Adam would never move that weight again."""
    caplog.set_level("INFO")
    settings = {"init_lr": 0.01, "log_freq": 1, "accum_grad_iters": accum, "iters_per_epoch": 4 * accum}
    runner = make_runner(build_golden_model(), **settings)
    plant(runner, where, {2 * accum - 1}, float(value))
    seen, update = [], runner.optimizer_step

    def watched():
        update()
        state = runner.optimizer.state_dict()["state"]
        seen.append((weights(runner), {key: {name: v.clone() for name, v in of.items()} for key, of in state.items()}))

    runner.optimizer_step = watched
    runner.train()
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[1][0], seen[2][0])
    for key, of in seen[0][1].items():
        assert all(torch.equal(of[name], seen[1][1][key][name]) for name in of)
    (entry,) = named(runner)
    assert entry["step"] == 2 * accum and ("gradient" in entry["reason"]) == (where == "gradient")
    assert [each["dataset"] for each in entry["samples"]] == ["pictures"] * 3 * accum
    assert entry["samples"][0]["key"] in caplog.text
    assert [line["skipped_updates"] for line in lines_of(runner) if "skipped_updates" in line] == [1]
    assert "Epoch 0: skipped updates: 1" in caplog.text
    assert all(line["train_loss"] < 10 for line in lines_of(runner) if "train_loss" in line)


def test_a_run_whose_updates_are_all_bad_stops(build_golden_model, make_runner):
    model = build_golden_model()
    model.llama_proj.weight.data.fill_(float("nan"))
    runner = make_runner(model, iters_per_epoch=9, max_bad_steps=3)
    with pytest.raises(FloatingPointError, match=r"Step 3: the loss is nan.*3 updates in a row.*run\.max_bad_steps"):
        runner.train()
    assert [entry["step"] for entry in named(runner)] == [1, 2, 3] and runner.last_checkpoint is None


@pytest.mark.parametrize("length", [9, 4])
def test_the_last_good_state_is_saved(build_golden_model, make_runner, length):
    """In the middle of an epoch, or at its end. A run that goes on from there trains, and keeps what was named."""
    settings = {"iters_per_epoch": length, "max_epoch": 2, "init_lr": 0.01, "lr_sched": "linear_warmup_step_lr"}
    runner = make_runner(build_golden_model(), job_id="bad", max_bad_steps=2, **settings)
    plant(runner, "gradient", {2, 3})
    seen, update = [], runner.optimizer_step
    runner.optimizer_step = lambda: (update(), seen.append(weights(runner)))
    with pytest.raises(FloatingPointError, match=r"have not changed since, are in .*checkpoint_0_4\.pth"):
        runner.train()
    resumed = make_runner(build_golden_model(), job_id="on", resume_ckpt_path=str(runner.last_checkpoint), **settings)
    assert torch.equal(weights(resumed), seen[1]) and resumed.health.in_a_row == 2
    resumed.train()
    assert resumed.step == 2 * length and named(resumed) == named(runner)


def test_bad_updates_that_are_not_in_a_row_do_not_stop_a_run(build_golden_model, make_runner):
    runner = make_runner(build_golden_model(), iters_per_epoch=6, max_bad_steps=2)
    plant(runner, "loss", {0, 2, 4})
    runner.train()
    assert [entry["step"] for entry in named(runner)] == [1, 3, 5]


def test_overflows_of_float16_are_the_scalers(build_golden_model, make_runner):
    """It halves its scale. Only an overflow at a scale below 1 is a bad update."""
    runner = make_runner(build_golden_model(), iters_per_epoch=5, init_lr=0.01)
    runner.scaler = runner.health.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plant(runner, "gradient", {0, 1, 2}, float("inf"))
    before = weights(runner)
    runner.train()
    assert [entry["step"] for entry in named(runner)] == [3]
    assert [line["float16_overflows"] for line in lines_of(runner) if "float16_overflows" in line] == [2]
    assert not torch.equal(before, weights(runner)) and weights(runner).isfinite().all()


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_after_they_are_accumulated(build_golden_model, make_runner, scaled):
    """Of all parts together. A limit that is not reached changes nothing, bit for bit."""
    norms, found = [], {}
    for clip in (None, 1e9, 0.01):
        settings = {"accum_grad_iters": 2, "iters_per_epoch": 4, "init_lr": 0.01, "log_freq": 1, "grad_clip": clip}
        runner = make_runner(build_golden_model(freeze_qformer=False), job_id=str(clip), **settings)
        if scaled:
            runner.scaler = runner.health.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        step = runner.optimizer.step
        runner.optimizer.step = lambda step=step, runner=runner: (
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in runner._trainable().values()]).item()),
            step(),
        )
        runner.train()
        found[clip] = weights(runner), [line.get("grad_norm") for line in lines_of(runner) if "loss" in line]
    assert torch.equal(found[None][0], found[1e9][0]) and not torch.equal(found[None][0], found[0.01][0])
    assert norms[4:] == pytest.approx([0.01, 0.01], rel=1e-3) and found[0.01][1][1] == norms[0] > 0.02


@pytest.mark.parametrize("of_another_dataset", [0.0, 10.0])
def test_a_spike_of_the_loss_is_named(of_another_dataset, build_golden_model, make_runner, caplog):
    """Every fourth loss is higher by `of_another_dataset`, which is no spike."""
    runner = make_runner(build_golden_model(), iters_per_epoch=MIN_WINDOW + 10, init_lr=1e-6, min_lr=0)
    # The first is not judged, the last goes on.
    plant(runner, "loss", {3, MIN_WINDOW + 5, MIN_WINDOW + 6}, 50.0)
    plant(runner, "loss", range(0, MIN_WINDOW + 4, 4), of_another_dataset)
    runner.train()
    (entry,) = named(runner)
    assert entry["step"] == MIN_WINDOW + 6 and "spike" in entry["reason"] and len(entry["samples"]) == 3
    assert "the update was made" in caplog.text


def test_what_was_watched_goes_on_in_a_resumed_run(build_golden_model, make_runner, pool):
    """The digest of the samples is that of the whole run."""
    settings = {"iters_per_epoch": 3, "max_epoch": 2, "log_freq": 1}
    whole = make_runner(build_golden_model(), job_id="whole", **settings)
    whole.train()
    path = str(whole.output_dir / "checkpoint_0.pth")
    resumed = make_runner(build_golden_model(), job_id="resumed", resume_ckpt_path=path, **settings)
    resumed.train()
    digests = [[line["samples"] for line in lines_of(each) if "samples" in line] for each in (whole, resumed)]
    assert digests[0] == digests[1] and len(set(digests[0])) == 6
    assert whole.health.state_dict() == resumed.health.state_dict()
    other = make_runner(build_golden_model(), job_id="other", seed=1, **settings)
    other.train()
    assert other.health.digest != whole.health.digest


def test_a_fused_optimizer_skips_by_itself(build_golden_model, make_runner):
    """As on a GPU, where the host waits for nothing. Sound updates are the same, bit for bit."""
    found = []
    for job_id, bad in (("plain", set()), ("watched", set()), ("bad", {1})):
        runner = make_runner(build_golden_model(), job_id=job_id, iters_per_epoch=3, init_lr=0.01)
        for group in runner.optimizer.param_groups:
            group["fused"] = True
        if job_id == "plain":
            runner.health.update = lambda optimizer, norm, step: optimizer.step()
        plant(runner, "gradient", bad)
        seen, update = [], runner.optimizer_step
        runner.optimizer_step = lambda seen=seen, update=update, runner=runner: (update(), seen.append(weights(runner)))
        runner.train()
        found.append((seen, {float(of["step"]) for of in runner.optimizer.state_dict()["state"].values()}))
    (plain, _), (watched, steps), (skipped, steps_of_bad) = found
    assert all(map(torch.equal, plain, watched)) and steps == {3} and steps_of_bad == {2}
    assert torch.equal(skipped[0], skipped[1]) and not torch.equal(skipped[1], skipped[2])
