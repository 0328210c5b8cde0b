"""Which differences between a run and the checkpoint that it resumes are refused, and which are only reported."""

from types import SimpleNamespace

import pytest
import torch
from helpers import Pictures
from torch.utils.data import IterableDataset

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.runners import resume
from minigpt4.weights.checkpoint import CheckpointError, read_file

SETTINGS = {"iters_per_epoch": 2, "max_epoch": 2}


class Endless(IterableDataset):
    num_parts = 3

    def __iter__(self):
        raise AssertionError("not read here")


@pytest.fixture
def first(build_golden_model, make_runner):
    """A run of one epoch's checkpoint."""
    runner = make_runner(build_golden_model(), job_id="first", **SETTINGS)
    runner.save_checkpoint(0)
    return runner


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size_train": 4},
        {"accum_grad_iters": 2},
        {"iters_per_epoch": 3},
        {"seed": 43},
        {"max_epoch": 5},
        {"init_lr": 0.02},
        {"min_lr": 1e-6},
        {"warmup_steps": 1},
        {"warmup_lr": 1e-6},
        {"weight_decay": 0.0},
        {"beta2": 0.9},
        {"lr_sched": "linear_warmup_step_lr"},
        {"lr_decay_rate": 0.5},
        {"train_splits": "[val]"},
    ],
)
def test_what_breaks_exactness_is_refused(build_golden_model, make_runner, first, pool, changed, caplog):
    ((key, value),) = changed.items()
    path = str(first.last_checkpoint)
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    with pytest.raises(ConfigError) as caught:
        make_runner(build_golden_model(), splits, "again", resume_ckpt_path=path, **SETTINGS | changed)
    own = first.cfg.to_dict()["run"][key]
    name = "micro-batches per epoch" if key == "iters_per_epoch" else f"run.{key}"
    said = f"{value}" if key == "train_splits" else f"{value!r}"
    assert f"{name}: {own!r} in the checkpoint, {said.replace('[val]', repr(['val']))} here" in str(caught.value)
    assert "run.resume_anyway=True" in str(caught.value) and path in str(caught.value)

    again = make_runner(
        build_golden_model(), splits, "again", resume_ckpt_path=path, resume_anyway=True, **SETTINGS | changed
    )
    assert again.start_epoch == 1
    assert [r.levelname for r in caplog.records if f"{name}: {own!r}" in r.getMessage()] == ["WARNING"]


@pytest.mark.parametrize(
    "changed",
    [
        {"log_freq": 7},
        {"num_workers": 2},
        {"batch_size_eval": 5},
        {"packed": False},
        {"amp": True},
        {"test_splits": "[train]"},
        {"name": "another"},
        {"trackers": "[tensorboard]"},
        {"report": False},
    ],
)
def test_what_is_harmless_is_reported(build_golden_model, make_runner, first, changed, caplog):
    """Workers matter to streams alone, and `amp` on a GPU alone."""
    caplog.set_level("INFO")
    ((key, _),) = changed.items()
    path = str(first.last_checkpoint)
    again = make_runner(build_golden_model(), job_id="again", resume_ckpt_path=path, **SETTINGS | changed)
    assert again.start_epoch == 1
    own = first.cfg.to_dict()["run"][key]
    (line,) = [r for r in caplog.records if f"run.{key}: {own!r} in the checkpoint, " in r.getMessage()]
    assert line.levelname == "INFO"


def test_a_finished_run_goes_on_for_more_epochs(build_golden_model, make_runner, first, caplog):
    caplog.set_level("INFO")
    first.save_checkpoint(1)
    again = make_runner(
        build_golden_model(), job_id="again", resume_ckpt_path=str(first.last_checkpoint), **SETTINGS | {"max_epoch": 5}
    )
    assert again.start_epoch == 2 and "run.max_epoch: 2 in the checkpoint, 5 here" in caplog.text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"facts": ["a"]}, "'facts' is of type list"),
        ({"validated": "no"}, "'validated' is of type str"),
        ({"config": {"run": 5}}, "run in its config is 5"),
        ({"config": {"datasets": ["a"]}}, "datasets in its config"),
        ({"config": {"datasets": {"a": 3}}}, r"datasets\.a in its config"),
        ({"rng": [{}]}, "random states"),
    ],
)
def test_entries_of_another_kind(build_golden_model, make_runner, first, changed, words):
    path = first.last_checkpoint
    torch.save(torch.load(path, weights_only=True) | changed, path)
    with pytest.raises(CheckpointError, match=words):
        make_runner(build_golden_model(), job_id="again", resume_ckpt_path=str(path), **SETTINGS)


def test_the_same_settings_are_no_difference(build_golden_model, make_runner, first, caplog):
    caplog.set_level("INFO")
    make_runner(build_golden_model(), job_id="again", resume_ckpt_path=str(first.last_checkpoint), **SETTINGS)
    assert "Differences" not in caplog.text


@pytest.mark.parametrize("kind", ["size", "name", "prompts", "frozen weights"])
def test_other_data_or_frozen_weights(build_golden_model, make_runner, first, pool, kind, monkeypatch):
    """They are found where the settings are the same."""
    splits, model = {"train": Pictures(*pool)}, build_golden_model()
    if kind == "size":
        splits["train"].captions = splits["train"].captions[:7]
    elif kind == "name":
        monkeypatch.setattr(resume, "_extent", lambda dataset: "8 drawings")
    elif kind == "prompts":
        model.prompt_list = ["<Img><ImageHere></Img> another prompt"]
    else:
        model.visual_encoder.pos_embed.data += 0.01
    expected = {"prompts": r"prompts: \[\] in", "frozen weights": "frozen weights: '"}.get(
        kind, r"data: \['pictures: 8 samples'\] in"
    )
    with pytest.raises(ConfigError, match=expected):
        make_runner(model, splits, "again", resume_ckpt_path=str(first.last_checkpoint), **SETTINGS)


def test_streams_depend_on_the_workers(build_golden_model, make_runner):
    """0 workers read like 1."""

    def run(job_id, **settings):
        return make_runner(build_golden_model(), {"train": Endless()}, job_id, **SETTINGS | settings)

    runner = run("first", num_workers=1)
    runner.save_checkpoint(0)
    path = str(runner.last_checkpoint)
    assert run("zero", num_workers=0, resume_ckpt_path=path).start_epoch == 1
    with pytest.raises(ConfigError, match="num_workers of streams: 1 in the checkpoint, 2 here"):
        run("two", num_workers=2, resume_ckpt_path=path)


def test_data_of_which_an_earlier_version_knew_the_size_alone(first):
    content, own = read_file(first.last_checkpoint), {resume.DATA: ["mine: 12 samples, 0f3a"]}
    for recorded, breaks in (("mine: 12 samples", 0), ("mine: 12 samples, 0f3a", 0), ("mine: 1 sample", 1), ("m", 1)):
        content[resume.FACTS] |= {resume.DATA: [recorded]}
        assert len(resume.differences(content, first.cfg, own)[0]) == breaks


def test_a_text_processor_that_is_not_used_does_not_matter(compare):
    option = "datasets.cc_sbu_align.text_processor.train={name: blip_caption, max_words: 3}"
    assert compare("stage2", option) == ([], [])


def test_another_number_of_ranks(first):
    """It is allowed, and the log says that the run does not go on exactly."""
    content = read_file(first.last_checkpoint)
    for _ in range(2):
        breaking, (line,) = resume.differences(content, first.cfg, {resume.RANKS: 2})
        assert not breaking and line.startswith("number of ranks: 1 in the checkpoint, 2 here.") and "not those" in line
        content.pop(resume.FACTS, None)  # older checkpoints have it in their random states


@pytest.fixture
def compare(configs):
    """Function that compares a stage's config with itself under other options."""

    def of(stage, *options, then=None):
        before, now = (
            Config(SimpleNamespace(cfg_path=str(configs[each]), options=[*given]))
            for each, given in ((stage, ()), (then or stage, options))
        )
        return resume.differences({"config": before.to_dict()}, now, {})

    return of


@pytest.mark.parametrize(
    "option",
    [
        "datasets.cc_sbu.build_info.storage=/elsewhere/{00000..00003}.tar",
        "datasets.cc_sbu.sample_ratio=99",
        "datasets.cc_sbu.vis_processor.train.image_size=56",
        "datasets.cc_sbu.text_processor.train.prompt=now",
        "datasets.cc_sbu.build_info.val=0.1",
        "model.end_sym=###",
        "model.max_txt_len=99",
        "model.prompt_template=Human: {}",
        "model.freeze_qformer=False",
        "model.drop_path_rate=0.1",
        "model.vit_precision=fp32",
        "run.fp8=True",
        "run.amp_dtype=fp16",
    ],
)
def test_settings_of_model_and_data(compare, option):
    (line,) = compare("stage1", option)[0]
    assert line.startswith(option.split("=")[0] + ": ")


@pytest.mark.parametrize(
    "option",
    [
        "datasets.cc_sbu.vis_processor.eval.image_size=56",
        "datasets.cc_sbu.build_info.val=/data/cc_sbu/00004.tar",
        "model.llm_grad_checkpoint=2",
        "model.ckpt=/elsewhere.pth",
        "model.vit_weights=/moved/vit.pth",
        "run.output_dir=/elsewhere",
        "run.device=cuda:1",
    ],
)
def test_settings_without_a_say(compare, option):
    breaking, harmless = compare("stage1", option)
    assert breaking == []
    assert [line.split(":")[0] for line in harmless] in ([option.split("=")[0]], [])


def test_another_stages_config(compare):
    breaking = "\n".join(compare("stage1", then="stage2")[0])
    for key in (
        "datasets.cc_sbu_align.build_info.storage: None in",
        "datasets.laion.build_info.storage: ",
        "model.end",
    ):
        assert key in breaking


def test_low_resource_is_one_way_to_say_8bit(compare):
    assert compare("stage1", "model.load_in=16bit") == ([], [])
    (line,) = compare("stage1", "model.low_resource=True")[0]
    assert line == "model.load_in: '16bit' in the checkpoint, '8bit' here"


def test_a_checkpoint_without_settings(first, tmp_path, caplog):
    """That of the first release has some; one without is resumed with a warning."""
    content = read_file(first.last_checkpoint)
    del content["config"], content[resume.FACTS]
    assert resume.differences(content, first.cfg, {})[0] == []
    resume.report(content, [], [])
    assert "holds no settings" in caplog.text


def test_settings_that_a_release_did_not_have_are_their_defaults(first):
    content = {"config": {"run": {"seed": 42, "iters_per_epoch": 2, "amp": False}, "model": {}, "datasets": {}}}
    breaking, harmless = resume.differences(content, first.cfg, {})
    assert breaking == [
        "run.batch_size_train: 16 in the checkpoint, 3 here",
        "run.num_workers: 4 in the checkpoint, 0 here",
    ]
    assert [line.split(":")[0] for line in harmless] == ["run.max_epoch", "run.output_dir", "run.device"]
