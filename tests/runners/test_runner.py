"""Equalities and mistakes: accumulation, resume, validation, splits, lengths."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import Pictures
from torch.utils.data import IterableDataset

from minigpt4.common.errors import ConfigError
from minigpt4.weights import checkpoint
from minigpt4.weights.checkpoint import CheckpointError
from minigpt4.weights.fingerprint import MismatchError


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
    runner.optimizer_step = lambda: (steps.append(len(runner.labels_of_step)), update())
    runner.train()
    assert steps == [2, 2, 1] * 2
    assert all(p.grad is None for p in runner._trainable().values())


class Batches:
    """A stand-in for the loader: the same batch again and again."""

    def __init__(self, batch):
        self.batch = batch

    def epoch(self, epoch, num_batches, first=0):
        return iter([dict(self.batch)] * num_batches)

    def use_next(self):
        pass

    def state(self):
        return {"left_out": [], "restarts": []}

    def take_left_out(self):
        return Counter()

    def take_ids(self):
        return []

    def shares(self):
        return {}


def test_markers_in_captions_are_broken_up_and_counted(build_golden_model, make_runner, pool, caplog):
    """Training with markers equals training with what chat would make of them. Others are unchanged."""
    texts = {
        "a ### b</s>": "a # ## b< /s>",
        "<ImageHere>###Human: hi": "< ImageHere># ##Human: hi",
        "in C#": "in C# ",
        "plain: #1 <b>, Human": "plain: #1 <b>, Human",
    }
    trained = []
    for captions in (texts.keys(), texts.values()):
        runner = make_runner(
            build_golden_model(end_sym="###"), job_id=str(len(trained)), iters_per_epoch=3, init_lr=0.01
        )
        runner.loader = Batches({"image": pool[0][:4], "text_input": list(captions)})
        with caplog.at_level("INFO"):
            runner.train()
        trained.append(weights(runner))
    assert_same(*trained)
    (line,) = [record.getMessage() for record in caplog.records if "broke up" in record.getMessage()]
    assert "Epoch 0: captions: broke up 9 × markers" in line and "a ### b</s> (3)" in line


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


def test_prompts_follow_from_the_place_in_the_run(build_golden_model, make_runner):
    """Whatever random states the process has meanwhile: torch.compile sets them back."""
    model = build_golden_model()
    model.prompt_list = [f"###Human: {i} <Img><ImageHere></Img> ###Assistant: " for i in range(4)]
    runner = make_runner(model.train(), iters_per_epoch=12)

    def prompts(epoch, first=0):
        drawn = []
        for samples in runner._batches(epoch, first):
            drawn.append(samples["drawn_prompt"])
            random.seed(7)
        return drawn

    whole = prompts(0)
    assert prompts(0, 5) == whole[5:]
    assert prompts(1) != whole
    assert len(set(whole)) > 2


def test_resume_on_another_device_keeps_the_optimiser_of_this_one(build_golden_model, make_runner):
    """A GPU's is fused, with the loss scaler's checks in it; a checkpoint of the CPU or the first release is not."""
    first = make_runner(build_golden_model(), job_id="first", iters_per_epoch=1)
    first.train()
    path = first.output_dir / "checkpoint_0.pth"
    content = torch.load(path, weights_only=True)
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = True
    torch.save(content, path)
    again = make_runner(build_golden_model(), job_id="again", iters_per_epoch=1, resume_ckpt_path=str(path))
    assert [group["fused"] for group in again.optimizer.param_groups] == [False] * 2


def test_resume_of_a_finished_run_trains_nothing(build_golden_model, make_runner, caplog):
    caplog.set_level("INFO")
    first = make_runner(build_golden_model(), job_id="first", iters_per_epoch=1)
    first.train()
    settings = {"iters_per_epoch": 1, "resume_ckpt_path": str(first.output_dir)}
    again = make_runner(build_golden_model(), job_id="again", **settings)
    again.train()
    assert "Nothing left to train" in caplog.text
    assert_same(weights(first), weights(again))


def test_resume_refuses_a_checkpoint_without_the_trained_part(build_golden_model, make_runner, tmp_path):
    path = tmp_path / "checkpoint_0.pth"
    torch.save({"model": {"llama_proj.bias": torch.zeros(40)}, "epoch": 0}, path)
    with pytest.raises(CheckpointError, match=r"llama_proj\.weight is missing"):
        make_runner(build_golden_model(), resume_ckpt_path=str(path))


def test_resume_refuses_a_damaged_state(build_golden_model, make_runner):
    first = make_runner(build_golden_model(), job_id="first", iters_per_epoch=1)
    first.train()
    path = first.output_dir / "checkpoint_0.pth"
    whole = torch.load(path, weights_only=True)

    def resume(**changed):
        torch.save(whole | changed, path)
        return make_runner(build_golden_model(), job_id="again", iters_per_epoch=1, resume_ckpt_path=str(path))

    state = whole["optimizer"]["state"]
    broken = {**state[0], "exp_avg": torch.full_like(state[0]["exp_avg"], float("nan"))}
    with pytest.raises(CheckpointError, match=r"NaN or infinity among the numbers of optimizer\.state\.0\.exp_avg"):
        resume(optimizer=whole["optimizer"] | {"state": {**state, 0: broken}})
    with pytest.raises(CheckpointError, match="its 'epoch' is of type str '0'"):
        resume(epoch="0")
    scaler = {"scale": float("nan"), "growth_factor": 2.0}
    with pytest.raises(CheckpointError, match=r"NaN or infinity among the numbers of scaler\.scale"):
        resume(scaler=scaler)
    for entry in ({"epoch": True}, {"epoch": None}, {"optimizer": []}, {"config": "text"}, {"best_metric": "high"}):
        with pytest.raises(CheckpointError, match=f"its '{next(iter(entry))}' is of type"):
            resume(**entry)
    with pytest.raises(CheckpointError, match=r"resume_ckpt_path=null model\.ckpt="):
        resume(optimizer={"param_groups": 3, "state": {}})
    wrapped = {f"module.{name}": value for name, value in whole["model"].items()}
    resumed = resume(model=wrapped)
    assert_same(weights(first), weights(resumed))


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


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(("dataset", "what"), [(Stream(), "no end"), ([], "no samples")])
def test_splits_that_cannot_be_evaluated_are_found_at_the_start(build_golden_model, make_runner, pool, dataset, what):
    with pytest.raises(ConfigError, match=what):
        make_runner(build_golden_model(), {"train": Pictures(*pool), "val": dataset}, valid_splits="[val]")


def test_a_metric_that_is_not_a_number_is_not_compared(build_golden_model, make_runner, pool, monkeypatch, caplog):
    """Nor is one that a task makes of a loss that is not finite: `max` would give 0, better than any -loss."""
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    runner = make_runner(build_golden_model(), splits, valid_splits="[val]", iters_per_epoch=1, max_epoch=6)
    losses = iter([1.0, float("nan"), float("-inf"), 5.0, 0.5, float("inf")])
    monkeypatch.setattr(runner, "evaluate", lambda split: next(losses))
    monkeypatch.setattr(runner.task, "agg_metrics", lambda loss: 0.0 if math.isnan(loss) else -loss)
    runner.train()
    assert caplog.text.count("not a number") == 3
    best = torch.load(runner.output_dir / "checkpoint_best.pth", weights_only=True)
    assert (best["epoch"], best["best_metric"]) == (4, -0.5)
    last = torch.load(runner.output_dir / "checkpoint_5.pth", weights_only=True)
    assert (last["best_metric"], last["validated"]) == (-0.5, True)


@pytest.mark.parametrize("stop_in", ["after_epoch", "log_stats"])
def test_an_epoch_is_saved_before_all_that_could_fail(build_golden_model, make_runner, pool, monkeypatch, stop_in):
    """Killed right after the epoch, a run goes on with the validation, and has the best checkpoint of a whole run."""
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = {"valid_splits": "[val]", "iters_per_epoch": 2, "max_epoch": 2, "init_lr": 0.01}
    whole = make_runner(build_golden_model(), splits, job_id="whole", **settings)
    whole.train()
    killed = make_runner(build_golden_model(), splits, job_id="killed", **settings)

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(killed.validation if stop_in == "after_epoch" else killed, stop_in, kill)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert [p.name for p in killed.output_dir.glob("*.pth")] == ["checkpoint_0.pth"] == [killed.last_checkpoint.name]
    path = str(killed.last_checkpoint)
    # In the second run the last epoch is the worse one, so that only the validation made up for can give the best.
    worse = iter([1.0, 2.0])
    again = make_runner(build_golden_model(), splits, job_id="again", resume_ckpt_path=path, **settings)
    monkeypatch.setattr(again, "evaluate", lambda split: next(worse))
    again.train()
    assert_same(weights(whole), weights(again))
    best = torch.load(again.output_dir / "checkpoint_best.pth", weights_only=True)
    assert (best["epoch"], best["best_metric"]) == (0, -1.0)
    for name, value in torch.load(path, weights_only=True)["model"].items():
        assert torch.equal(value, best["model"][name])


def test_killed_between_the_best_checkpoint_and_the_epochs_own(build_golden_model, make_runner, pool, monkeypatch):
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = {"valid_splits": "[val]", "iters_per_epoch": 1}
    runner = make_runner(build_golden_model(), splits, job_id="killed", **settings)
    save, saved = checkpoint.save, []

    def kill(content, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(content, path)

    monkeypatch.setattr(checkpoint, "save", kill)
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert saved == ["checkpoint_0.pth", "checkpoint_best.pth"]
    monkeypatch.setattr(checkpoint, "save", save)
    path = str(runner.output_dir / "checkpoint_0.pth")
    again = make_runner(build_golden_model(), splits, job_id="again", resume_ckpt_path=path, **settings)
    again.train()
    assert (again.output_dir / "checkpoint_best.pth").exists() and again.best_metric == runner.best_metric


def test_a_log_that_cannot_be_written_does_not_end_the_run(build_golden_model, make_runner, caplog):
    runner = make_runner(build_golden_model(), iters_per_epoch=1)
    (runner.output_dir / "log.txt").unlink()
    (runner.output_dir / "log.txt").mkdir()
    runner.train()
    assert (runner.output_dir / "checkpoint_0.pth").exists()
    assert "log.txt" in caplog.text


def test_a_batch_without_labels_does_not_spoil_a_validation(build_golden_model, make_runner, pool):
    """The mean over nothing is NaN in torch's own losses."""
    runner = make_runner(build_golden_model(), {"train": Pictures(*pool), "val": Pictures(*pool)}, batch_size_eval=4)
    results = iter([(2.0, 4), (float("nan"), 0)])
    runner.task.valid_step = lambda *_: dict(zip(("loss", "num_labels"), next(results), strict=True))
    assert runner.evaluate("val") == 2.0


@pytest.mark.parametrize("labels", [0.5, 2])
def test_losses_are_weighted_by_any_number_of_labels(build_golden_model, make_runner, pool, labels):
    """Fractions count, too: a mean over equal numbers is that of the losses."""
    data = Pictures(*pool)
    runner = make_runner(build_golden_model(), {"train": data, "val": data}, valid_splits="[val]")
    expected = runner.evaluate("val")
    step = runner.task.valid_step
    runner.task.valid_step = lambda model, samples: {"loss": step(model, samples)["loss"], "num_labels": labels}
    same_weights = runner.evaluate("val")
    assert 0.5 * expected < same_weights < 2 * expected
    runner.task.valid_step = lambda model, samples: {"loss": torch.tensor(3.0), "num_labels": labels}
    assert runner.evaluate("val") == pytest.approx(3)
    runner.task.valid_step = lambda model, samples: {"loss": torch.tensor(0.0), "num_labels": 0}
    assert math.isnan(runner.evaluate("val"))


def test_a_model_without_parameters(make_runner):
    with pytest.raises(ConfigError, match="Identity has no trainable parameter"):
        make_runner(torch.nn.Identity())


def test_unknown_split(build_golden_model, make_runner):
    with pytest.raises(ValueError, match=r"No dataset has the split 'dev'.*'train'"):
        make_runner(build_golden_model(), valid_splits="[dev]")


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


def test_a_task_may_return_a_loss_alone(build_golden_model, make_runner):
    runner = make_runner(build_golden_model(), iters_per_epoch=2)
    model_step = runner.task.train_step
    runner.task.train_step = lambda model, samples: model_step(model, samples)["loss"]
    before = weights(runner)
    runner.train()
    assert not torch.equal(before["llama_proj.bias"], weights(runner)["llama_proj.bias"])


def test_all_train_splits_are_trained_on(build_golden_model, make_runner, pool):
    images, captions = pool
    splits = {"train": Pictures(images[:4], captions[:4]), "val": Pictures(images[4:], captions[4:])}
    runner = make_runner(build_golden_model(), splits, train_splits="[train,val]", batch_size_train=2)
    seen = {text for batch in runner.loader.epoch(0, 30) for text in batch["text_input"]}
    assert seen == set(captions)


def test_evaluation_does_not_depend_on_chance(build_golden_model, make_runner, pool):
    model = build_golden_model(end_sym="###")
    model.prompt_list = [f"###Human: {i} <Img><ImageHere></Img> ###Assistant: " for i in range(4)]
    runner = make_runner(model, {"train": Pictures(*pool), "val": Pictures(*pool)}, valid_splits="[val]")
    state = random.getstate()
    assert len({runner.evaluate("val") for _ in range(4)}) == 1
    assert random.getstate() == state


def test_batches_without_labels_change_nothing(build_golden_model, make_runner, pool):
    model = build_golden_model(end_sym="")
    runner = make_runner(model, init_lr=0.01, weight_decay=0)
    before = weights(runner)
    loss = runner.train_step({"image": pool[0][:2], "text_input": ["", ""]}, is_update=True)
    assert loss == 0
    assert_same(before, weights(runner))
    runner.train_step({"image": pool[0][:2], "text_input": pool[1][:2]}, is_update=True)
    assert all(p.isfinite().all() for p in weights(runner).values())


def test_fp16_gradients_have_the_scale_of_a_mean(build_golden_model, make_runner, pool, monkeypatch):
    """The scaler starts at 65536; a loss summed over labels would overflow float16 there."""
    runner = make_runner(build_golden_model())
    seen = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (seen.append(loss.detach()), backward(loss)))
    loss = runner.train_step({"image": pool[0], "text_input": pool[1]}, is_update=True)
    torch.testing.assert_close(seen[0], loss)


def test_a_broken_model_is_not_saved(build_golden_model, make_runner):
    runner = make_runner(build_golden_model())
    runner.module.llama_proj.bias.data[0] = float("inf")
    with pytest.raises(FloatingPointError, match="Not saved after epoch 3: not all of llama_proj.bias is finite"):
        runner.save_checkpoint(3)
    assert not list(runner.output_dir.glob("*.pth"))


def test_first_release_checkpoints_resume_here(build_golden_model, make_runner, golden_weights, tmp_path):
    """Its files hold dead buffers, an optimiser state of the same groups, and no random states."""
    settings = {"iters_per_epoch": 3, "max_epoch": 2, "init_lr": 0.01}
    reference = make_runner(build_golden_model(), job_id="reference", **settings)
    reference.train()
    content = torch.load(reference.output_dir / "checkpoint_0.pth", weights_only=True)
    buffers = {k: v for k, v in golden_weights.items() if k.endswith(("position_ids", "inv_freq"))}
    assert len(buffers) == 3
    theirs = {k: content[k] for k in ("optimizer", "config", "scaler", "epoch")} | {"model": content["model"] | buffers}
    path = tmp_path / "theirs.pth"
    torch.save(theirs, path)
    resumed = make_runner(build_golden_model(), job_id="resumed", resume_ckpt_path=str(path), **settings)
    resumed.train()
    assert_same(weights(reference), weights(resumed))


def test_amp_runs_keep_a_scaler_state_for_the_first_release(build_golden_model, make_runner):
    runner = make_runner(build_golden_model(), amp=True, iters_per_epoch=1)
    runner.train()
    content = torch.load(runner.output_dir / "checkpoint_0.pth", weights_only=True)
    torch.amp.GradScaler("cpu").load_state_dict(content["scaler"])
    assert content["scaler"]["scale"] == 65536


def test_best_metric_survives_a_resume(build_golden_model, make_runner, pool):
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = {"valid_splits": "[val]", "iters_per_epoch": 1}
    first = make_runner(build_golden_model(), splits, job_id="first", **settings)
    first.train()
    path = str(first.output_dir / "checkpoint_0.pth")
    again = make_runner(build_golden_model(), splits, job_id="again", resume_ckpt_path=path, **settings)
    assert again.best_metric == first.best_metric > float("-inf")


def test_weights_alone_cannot_be_resumed(build_golden_model, make_runner, tmp_path):
    path = tmp_path / "published.pth"
    model = build_golden_model()
    torch.save({"model": {f"llama_proj.{k}": v for k, v in model.llama_proj.state_dict().items()}}, path)
    with pytest.raises(CheckpointError, match=r"no optimiser state that fits .*model\.ckpt="):
        make_runner(model, resume_ckpt_path=str(path))


def test_a_run_does_not_go_on_with_another_language_model(build_golden_model, make_runner, tmp_path):
    first = make_runner(build_golden_model(), job_id="first", iters_per_epoch=1)
    first.train()
    path = str(first.output_dir / "checkpoint_0.pth")
    assert torch.load(path, weights_only=True)["llm_fingerprint"]["layers"] == first.module.fingerprint["layers"]
    other = build_golden_model()
    other.fingerprint = other.fingerprint | {"embedding_rows": other.fingerprint["embedding_rows"].flip(0)}
    with pytest.raises(MismatchError, match="trained with another language model"):
        make_runner(other, job_id="second", iters_per_epoch=1, resume_ckpt_path=path)


@pytest.mark.parametrize("datasets", [None, {"pictures": None}])
def test_a_builder_that_returns_nothing(build_golden_model, make_runner, datasets):
    runner = make_runner(build_golden_model())
    with pytest.raises(ConfigError, match="returned None, not a dict"):
        runner.check_data(runner.cfg, datasets)


@pytest.mark.parametrize("recorded", [float("nan"), float("inf")])
def test_a_best_metric_that_is_not_a_number_is_not_taken_over(build_golden_model, make_runner, pool, recorded):
    """Old checkpoints may hold one, which no epoch could beat."""
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = {"valid_splits": "[val]", "iters_per_epoch": 1}
    first = make_runner(build_golden_model(), splits, job_id="first", **settings)
    first.best_metric = recorded
    first.save_checkpoint(0)
    path = str(first.last_checkpoint)
    settings |= {"resume_ckpt_path": path, "max_epoch": 2}
    again = make_runner(build_golden_model(), splits, job_id="again", **settings)
    again.train()
    assert (again.output_dir / "checkpoint_best.pth").exists() and -10 < again.best_metric < 0


def test_other_validation_splits_start_a_new_comparison(build_golden_model, make_runner, pool):
    """The metric of the epoch that is resumed is made up for."""
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = {"iters_per_epoch": 1}
    first = make_runner(build_golden_model(), splits, job_id="first", valid_splits="[train]", **settings)
    first.best_metric = 7.0
    first.save_checkpoint(0)
    path = str(first.last_checkpoint)
    again = make_runner(
        build_golden_model(), splits, job_id="again", valid_splits="[val]", resume_ckpt_path=path, **settings
    )
    assert again.best_metric == float("-inf")
    again.train()
    best = torch.load(again.output_dir / "checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == 0 and -10 < best["best_metric"] < 0


class NoLength:
    def __getitem__(self, index):
        return {"x": index}


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_dataset_without_length(build_golden_model, make_runner, pool, split):
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)} | {split: NoLength()}
    with pytest.raises(ConfigError, match=rf"datasets\.pictures: its split '{split}' is a NoLength without __len__"):
        make_runner(build_golden_model(), splits, valid_splits="[val]")


@pytest.mark.parametrize("step", ["train_step", "valid_step"])
@pytest.mark.parametrize(
    ("result", "what"),
    [
        (None, "a NoneType"),
        ((torch.tensor(1.0), 3), "a tuple"),
        ({"logits": 1, "labels": 2}, "a dict with the keys logits, labels"),
        ({}, "a dict with the keys none"),
        ({"loss": None}, "a dict with the keys loss"),
        ({"loss": torch.ones(3)}, r"a loss of shape \[3\]"),
        (torch.ones(2, 1), r"a loss of shape \[2, 1\]"),
    ],
)
def test_steps_without_a_loss(build_golden_model, make_runner, pool, step, result, what):
    runner = make_runner(build_golden_model(), {"train": Pictures(*pool), "val": Pictures(*pool)}, iters_per_epoch=1)
    setattr(runner.task, step, lambda *_: result)
    with pytest.raises(ConfigError, match=rf"ImageTextPretrainTask\.{step} .*returned {what}\. It must return"):
        runner.train() if step == "train_step" else runner.evaluate("val")


def test_a_loss_without_gradient(build_golden_model, make_runner):
    runner = make_runner(build_golden_model(), iters_per_epoch=1)
    runner.task.train_step = lambda *_: {"loss": torch.tensor(1.0)}
    with pytest.raises(ConfigError, match="a loss that depends on no trainable parameter"):
        runner.train()
