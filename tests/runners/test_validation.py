"""Evaluation while a run trains: it changes nothing, finds the best checkpoint, and reports what gets worse."""

import random
import signal

import numpy as np
import pytest
import torch
from helpers import Pictures
from PIL import Image
from torch.utils.data import IterableDataset

from minigpt4.common.registry import registry
from minigpt4.common.stopping import Stopped, StopRequest
from minigpt4.evaluation import mean
from minigpt4.tracking import metrics
from minigpt4.tracking.metrics import read_metrics

SETTINGS = {"iters_per_epoch": 5, "max_epoch": 2, "log_freq": 1, "init_lr": 0.01, "accum_grad_iters": 2}
EVALUATED = {"valid_splits": "[val]", "eval_task": "caption", "eval_every_steps": 2, "eval_samples": 3}

BY_GIVEN = {"valid_splits": "[val]", "eval_task": "given", "eval_samples": 3}


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
        first = mean([next(Given.values, 0)] * len(answers), better=Given.better)
        return {"first": first, "second": mean([1] * len(answers), better="")}


@pytest.fixture
def given():
    """Set the figure "first" of the evaluations to come, after the one that checks the settings."""

    def give(*values, better="higher"):
        Given.values, Given.better = iter([0, *values]), better

    return give


def lines_of(runner, *names):
    return [line for line in read_metrics(runner.output_dir / metrics.NAME) if line.keys() & set(names)]


def seeded_model(build_golden_model):
    """A model with two prompts, which are drawn at random in training."""
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    model = build_golden_model()
    model.prompt_list = ["<Img><ImageHere></Img> One.", "<Img><ImageHere></Img> Another one."]
    return model


def as_bytes(value):
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def assert_equal_checkpoints(first, second, *apart):
    """All numbers and states, apart from what names the run and its metric."""
    apart = {"config", "run_id", "best_metric", "evaluation", "validated", *apart}
    contents = [torch.load(path, weights_only=True) for path in (first, second)]
    flat = [
        dict(numbers(content, "")) for content in ({k: v for k, v in c.items() if k not in apart} for c in contents)
    ]
    assert flat[0] == flat[1] and len(flat[0]) > 30


def numbers(value, name):
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(part, f"{name}.{key}")
    else:
        yield name, as_bytes(value)


def test_training_with_evaluation_is_bit_equal(build_golden_model, make_runner, pool, caplog):
    """Weights, optimizer, random states; the prompts and the augmentation are drawn at random."""
    caplog.set_level("INFO")
    splits = {"train": Drawing(*pool), "val": Drawing(*pool)}
    plain = make_runner(seeded_model(build_golden_model), splits, "plain", **SETTINGS)
    plain.train()
    runner = make_runner(seeded_model(build_golden_model), splits, "evaluated", **SETTINGS, **EVALUATED)
    modes = []
    train_step = runner.train_step
    runner.train_step = lambda *args: (modes.append(runner.module.training), train_step(*args))[1]
    logged, record = [], runner.record.log
    runner.record.log = lambda step, values, *more: (logged.append((step, values)), record(step, values, *more))
    runner.train()
    assert_equal_checkpoints(plain.last_checkpoint, runner.last_checkpoint)
    assert all(modes) and len(modes) == 10
    assert [line["step"] for line in lines_of(runner, "val_CIDEr-D")] == [0, 4, 5, 7, 10]
    (first, *_) = lines_of(runner, "val_answers")
    assert first["val_answers"].count("\n") == 2 and first["val_answers"] in caplog.text
    pictures = [(step, n) for step, values in logged for n, value in values.items() if isinstance(value, Image.Image)]
    assert pictures == [(0, f"val_picture/{number}") for number in (1, 2, 3)]


def test_resumed_equals_uninterrupted(build_golden_model, make_runner, pool):
    """Killed after the first epoch: results, earlier results and the best checkpoint are those of a whole run."""
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = SETTINGS | EVALUATED | {"best_metric": "BLEU-1"}
    whole = make_runner(build_golden_model(), splits, "whole", **settings)
    whole.train()
    path = str(whole.output_dir / "checkpoint_0.pth")
    resumed = make_runner(build_golden_model(), splits, "resumed", resume_ckpt_path=path, **settings)
    resumed.train()
    assert_equal_checkpoints(whole.last_checkpoint, resumed.last_checkpoint)
    assert whole.validation.state() == resumed.validation.state() and resumed.best_metric == whole.best_metric
    lines = [
        [{k: v for k, v in line.items() if k not in ("time", "eval_seconds")} for line in lines_of(runner, *names)]
        for runner in (whole, resumed)
        for names in [("val_loss", "val_answers", "warning/val_BLEU-1 since start")]
    ]
    assert lines[0] == lines[1] and len(lines[0]) >= 10
    best = [torch.load(runner.output_dir / "checkpoint_best.pth", weights_only=True) for runner in (whole, resumed)]
    assert all(torch.equal(best[0]["model"][name], best[1]["model"][name]) for name in best[0]["model"])


@pytest.mark.slow
def test_a_signal_during_an_evaluation(build_golden_model, make_runner, pool):
    """It ends early; the run that goes on makes up for it."""
    splits, settings = {"train": Pictures(*pool), "val": Pictures(*pool)}, SETTINGS | EVALUATED
    whole = make_runner(seeded_model(build_golden_model), splits, "whole", **settings)
    whole.train()
    stopped = make_runner(seeded_model(build_golden_model), splits, "stopped", **settings)
    stopped.stop, measure, answered = StopRequest(), stopped.validation.scorer.measure, []

    def measure_and_stop(split):
        if stopped.step == 4:
            stopped.stop.number = signal.SIGTERM
        answered.append(stopped.step)
        return measure(split)

    stopped.validation.scorer.measure = measure_and_stop
    with pytest.raises(Stopped):
        stopped.train()
    assert answered == [0, 4] and [line["step"] for line in lines_of(stopped, "val_loss")] == [0]
    resumed = make_runner(
        seeded_model(build_golden_model), splits, "resumed", resume_ckpt_path=str(stopped.output_dir), **settings
    )
    resumed.train()
    assert_equal_checkpoints(whole.last_checkpoint, resumed.last_checkpoint)
    figures = [[(line["step"], line["val_CIDEr-D"]) for line in lines_of(r, "val_CIDEr-D")] for r in (whole, resumed)]
    assert figures[0] == figures[1] and len(figures[0]) == 5


@pytest.mark.parametrize(("better", "best"), [("higher", 4), ("lower", 7)])
def test_the_best_checkpoint_by_a_named_metric(build_golden_model, make_runner, pool, given, caplog, better, best):
    """Of the evaluations at steps 4, 5, 7 and 10. Then the test splits are answered with its weights."""
    splits = {"train": Pictures(*pool), "val": Pictures(*pool), "test": Pictures(*pool)}
    given(0.5, 0.9, 0.6, 0.2, 0.7, 0.4, better=better)
    settings = BY_GIVEN | {"eval_every_steps": 2, "test_splits": "[test]", "best_metric": "first"}
    runner = make_runner(build_golden_model(), splits, **SETTINGS, **settings)
    weights = {}
    evaluate = runner.evaluate

    def evaluate_and_keep(split, *most):
        loss = evaluate(split, *most)
        weights[split, runner.step] = loss, {k: v.clone() for k, v in runner.module.llama_proj.state_dict().items()}
        return loss

    runner.evaluate = evaluate_and_keep
    runner.train()
    saved = torch.load(runner.output_dir / "checkpoint_best.pth", weights_only=True)
    for name, value in weights["val", best][1].items():
        assert torch.equal(saved["model"][f"llama_proj.{name}"], value)
        assert torch.equal(weights["test", 10][1][name], value)
    assert saved["best_metric"] == pytest.approx({"higher": 90, "lower": -20}[better])
    assert saved["evaluation"]["results"]["val"]["figures"]["first"] == abs(saved["best_metric"])
    (tested,) = lines_of(runner, "test/test_first")
    assert tested["test/test_first"] == pytest.approx(40) and (runner.output_dir / "test" / "answers.html").exists()
    with pytest.raises(ValueError, match="no optimiser state"):
        path = str(runner.output_dir / "checkpoint_best.pth")
        make_runner(build_golden_model(), splits, "again", resume_ckpt_path=path, **SETTINGS, **settings)


@pytest.mark.slow
def test_what_gets_worse_is_a_warning(build_golden_model, make_runner, pool, given, caplog):
    """Worse than before training by more than 5 points, and than what `model.ckpt` records for the same questions."""
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = SETTINGS | BY_GIVEN | {"max_epoch": 3}
    given(0.5, 0.46, 0.44, 0.55)
    first = make_runner(build_golden_model(), splits, "first", **settings)
    first.train()
    (line,) = lines_of(first, since_start := "warning/val_first since start")
    assert line["step"] == 10 and "44" in line[since_start] and "50" in line[since_start]
    assert line[since_start] in caplog.text

    given(0.54, 0.49, 0.48, 0.6)  # start, and after each epoch
    second = make_runner(build_golden_model(), splits, "second", **settings)
    second.cfg.model_cfg.ckpt = str(first.output_dir)
    second.train()
    warned = lines_of(second, since_ckpt := "warning/val_first since ckpt", since_start)
    assert [(line["step"], since_ckpt in line) for line in warned] == [(5, True), (10, True), (10, False)]
    state = torch.load(second.output_dir / "checkpoint_1.pth", weights_only=True)["evaluation"]
    assert state["earlier"]["ckpt"]["val"]["figures"]["first"] == pytest.approx(55)

    others = {"train": Pictures(*pool), "val": Pictures(pool[0][1:], pool[1][1:])}  # other questions: not compared
    given(0.1, 0.1, 0.1, 0.1)
    third = make_runner(build_golden_model(), others, "third", **settings)
    third.cfg.model_cfg.ckpt = str(first.output_dir)
    third.train()
    assert not lines_of(third, "warning/val_first since ckpt", since_start)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval_every_steps": 2}, "run.eval_every_steps needs run.valid_splits"),
        ({"best_metric": "loss"}, "run.best_metric needs run.valid_splits"),
        ({"valid_splits": "[val]", "best_metric": "F1"}, "run.best_metric=F1 needs run.eval_task"),
        (BY_GIVEN | {"best_metric": "F1"}, "run.best_metric=F1 .* given .*Known: loss, first"),
        (BY_GIVEN | {"best_metric": "second"}, "run.best_metric=second"),
        ({"valid_splits": "[val]", "eval_task": "capt"}, "Did you mean 'caption'"),
        ({"valid_splits": "[val]", "eval_task": "yes_no"}, "yes_no needs the references yes or no"),
    ],
)
def test_settings_that_do_not_go_together(build_golden_model, make_runner, pool, given, settings, words):
    given()
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    with pytest.raises((ValueError, KeyError), match=words):
        make_runner(build_golden_model(), splits, **settings)


def test_a_model_that_writes_no_answers(make_runner, pool):
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    with pytest.raises(ValueError, match="Linear writes no answers"):
        make_runner(torch.nn.Linear(1, 1), splits, valid_splits="[val]", eval_task="caption")


class Shards(IterableDataset):
    """A stream of pictures or features, in which each reader has a part."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)

    def one_pass(self, reader, num_readers):
        return iter(self.samples[reader::num_readers])


@pytest.mark.slow
def test_streams_and_cached_features(build_golden_model, make_runner, pool):
    """The same samples give the same loss and answers, as a stream, with a length, and from a cache of features."""
    model, (images, captions) = build_golden_model(), pool
    with torch.no_grad():
        features = model.query_outputs(images)
    records = [{"text_input": caption} for caption in captions]
    pictures = [{"image": image, **record} for image, record in zip(images, records, strict=True)]
    cached = [{"image_features": each, **record} for each, record in zip(features, records, strict=True)]
    found = []
    for number, val in enumerate([Pictures(images[:5], captions[:5]), Shards(pictures), Shards(cached)]):
        settings = {"iters_per_epoch": 1, "valid_splits": "[val]", "eval_task": "auto", "eval_samples": 5}
        settings |= {"num_workers": 2} if number == 1 else {}
        runner = make_runner(build_golden_model(), {"train": Pictures(*pool), "val": val}, f"{number}", **settings)
        runner.train()
        (start, _), (said, _) = lines_of(runner, "val_CIDEr-D"), lines_of(runner, "val_answers")
        found.append((pytest.approx(start["val_loss"], rel=1e-5), start["val_CIDEr-D"], said["val_answers"]))
    assert found[0][1:] == found[1][1:] == found[2][1:]
    assert found[0][0].expected == found[1][0] == found[2][0]
