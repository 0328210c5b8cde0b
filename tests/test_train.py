"""train.py as its users run it: both stages on the CPU, alone and under torchrun, and every kind of bad input."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from dataset_files import picture_bytes, write_align, write_shards, write_tar
from helpers import ROOT
from safetensors.torch import save_file

from minigpt4.common.config import ConfigError
from minigpt4.weights.checkpoint import CheckpointError
from train import main


def run_folder(tmp_path, stage):
    (folder,) = (tmp_path / stage).iterdir()
    return folder


def test_stage1_then_stage2_then_captions(configs, tmp_path, caplog):
    caplog.set_level("INFO")
    main(["--cfg-path", str(configs["stage1"])])
    stage1 = run_folder(tmp_path, "stage1")
    told = {"log.txt", "metrics.jsonl", "result", "config.yaml", "environment.json", "console.log", "report.html"}
    assert {p.name for p in stage1.iterdir()} == {"checkpoint_0.pth", "checkpoint_1.pth", *told}
    main(["--cfg-path", str(configs["stage2"]), "--options", f"model.ckpt={stage1}"])
    stage2 = run_folder(tmp_path, "stage2")
    text = "\n".join(r.getMessage() for r in caplog.records)
    for line in (
        "=====  Running Parameters    =====",
        "number of trainable parameters: 1000",
        "Computing in float32 on cpu.",
        f"model.ckpt={stage1}: reading {stage1}/checkpoint_1.pth",
        f"Loaded 2 tensors, 1,000 parameters from {stage1}",
        "Start training epoch 1, 4 iters per inner epoch.",
        "Averaged stats: lr: ",
        f"Saving checkpoint at epoch 1 to {stage2}/checkpoint_1.pth.",
    ):
        assert line in text
    first, second = (torch.load(folder / "checkpoint_1.pth", weights_only=True) for folder in (stage1, stage2))
    assert not torch.equal(first["model"]["llama_proj.weight"], second["model"]["llama_proj.weight"])
    assert second["config"]["model"]["end_sym"] == "###"
    stats = [json.loads(line) for line in (stage2 / "log.txt").read_text().splitlines()[-2:]]
    assert [set(s) for s in stats] == [{"train_lr", "train_loss"}] * 2

    from types import SimpleNamespace

    from minigpt4.common.config import Config
    from minigpt4.models import MiniGPT4

    options = [f"model.ckpt={stage2}"]
    model = MiniGPT4.from_config(Config(SimpleNamespace(cfg_path=configs["stage2"], options=options)).model_cfg)
    assert torch.equal(model.llama_proj.weight.data, second["model"]["llama_proj.weight"])
    answers = model.generate(torch.randn(2, 3, 28, 28), model.prompt_list[:2], max_new_tokens=5)
    assert [type(a) for a in answers] == [str, str]


def test_the_lines_that_a_tutorial_waits_for(tmp_path, caplog):
    """Both stages on the tiny default say what the first release said, in its order, beside our own lines."""
    caplog.set_level("INFO")
    for name in ("laion", "cc_sbu"):
        write_shards(tmp_path / name, count=2, samples=8)
    write_align(tmp_path / "align", records=9)
    run = [f"run.output_dir={tmp_path}/out", "run.iters_per_epoch=1", "run.max_epoch=1", "run.num_workers=0"]
    run += ["run.batch_size_train=2", "run.device=cpu"]
    shards = [f"datasets.{name}.build_info.storage={tmp_path}/{name}/*.tar" for name in ("laion", "cc_sbu")]
    main(["--cfg-path", f"{ROOT}/train_configs/minigpt4_tiny_stage1_pretrain.yaml", "--options", *run, *shards])
    (stage1,) = (tmp_path / "out").iterdir()
    parts = [f"Loading {part}{end}" for part in ("VIT", "Q-Former", "LLAMA") for end in ("", " Done")]
    parts.insert(1, f"cache_file_path: {ROOT}/minigpt4/assets/tiny/vision.safetensors")
    end = ["No validation splits found.", "Start training", "Start training epoch 0, 1 iters per inner epoch."]
    assert_in_order(caplog, [*parts, *end])
    assert "Loaded 0 records" not in caplog.text and "dataset_ratios not specified" not in caplog.text

    caplog.clear()
    align = [f"datasets.cc_sbu_align.build_info.storage={tmp_path}/align", f"model.ckpt={stage1}"]
    main(["--cfg-path", f"{ROOT}/train_configs/minigpt4_tiny_stage2_finetune.yaml", "--options", *run, *align])
    prompt = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: "
    middle = [f"Load 4 training prompts\nPrompt Example \n{prompt}", f"Load BLIP2-LLM Checkpoint: {stage1}"]
    middle += ["Loaded 9 records for train split from the dataset.", "dataset_ratios not specified, "]
    assert_in_order(caplog, [*parts, *middle, *end])


def assert_in_order(caplog, lines):
    """Each line begins a log message, and comes after the line before it."""
    messages = iter([record.getMessage() for record in caplog.records])
    for line in lines:
        assert any(message.startswith(line) for message in messages), line


@pytest.mark.slow
def test_a_run_is_repeatable_and_its_seed_matters(configs, tmp_path):
    losses = []
    for i, seed in enumerate((1, 1, 2)):
        options = [f"run.output_dir={tmp_path}/{i}", f"run.seed={seed}", "run.max_epoch=1"]
        main(["--cfg-path", str(configs["stage1"]), "--options", *options])
        losses.append(run_folder(tmp_path, str(i)).joinpath("log.txt").read_text().splitlines()[-1])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_samples_are_shown_first_and_change_nothing(configs, tmp_path, monkeypatch, caplog, stage):
    """Also where the dataset is read in the main process."""
    caplog.set_level("INFO")
    options, results = ["run.max_epoch=1", "run.num_workers=0", "model.ckpt=null"], []
    for name in ("shown", "not"):
        main(["--cfg-path", str(configs[stage]), "--options", *options, f"run.output_dir={tmp_path}/{name}"])
        results.append(torch.load(run_folder(tmp_path, name) / "checkpoint_0.pth", weights_only=True))
        monkeypatch.setattr("minigpt4.runners.data.log_samples", lambda *_: None)
    for first, second in zip(results[0]["model"].values(), results[1]["model"].values(), strict=True):
        assert torch.equal(first, second)
    assert str(results[0]["rng"]) == str(results[1]["rng"])
    shown = [r.getMessage() for r in caplog.records if "as the model reads it" in r.getMessage()]
    names = {"stage1": ["laion", "cc_sbu"], "stage2": ["cc_sbu_align"]}[stage]
    assert [text.split()[0] for text in shown] == names and all(text.count("learnt:") == 2 for text in shown)
    learnt = {"stage1": "<ImageHere>«sample 0", "stage2": "###Assistant: «Caption <unk>umber 0!###»"}[stage]
    assert learnt in shown[0] and ("blip_caption" in shown[0]) == (stage == "stage1")


@pytest.mark.parametrize("stage", [pytest.param("stage1", marks=pytest.mark.slow), "stage2"])
def test_a_share_for_validation(configs, tmp_path, stage):
    names = {"stage1": ("laion", "cc_sbu"), "stage2": ("cc_sbu_align",)}[stage]
    options = [f"datasets.{name}.build_info.val=0.2" for name in names]
    options += ["run.valid_splits=[val]", "run.max_epoch=1", "run.num_workers=1", "model.ckpt=null"]
    options += ["preprocess.vis_processor.eval.image_size=28"]
    main(["--cfg-path", str(configs[stage]), "--options", *options])
    folder = run_folder(tmp_path, stage)
    assert (folder / "checkpoint_best.pth").exists()
    assert "val_loss" in (folder / "log.txt").read_text().splitlines()[-1]


@pytest.mark.slow
def test_torchrun_with_two_ranks(configs, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    done = subprocess.run(
        [*command, "--cfg-path", str(configs["stage1"]), "--options", "run.max_epoch=1", "run.num_workers=1"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (run_folder(tmp_path, "stage1") / "checkpoint_0.pth").exists()
    assert done.stderr.count("Start training epoch 0") == 1  # rank 0 alone logs
    assert done.stderr.count("| distributed init (rank 0, world 2): env://") == 1


@pytest.mark.slow
def test_resume_through_the_command_line(configs, tmp_path, caplog):
    caplog.set_level("INFO")
    path = str(configs["stage1"])
    main(["--cfg-path", path])
    whole = run_folder(tmp_path, "stage1")
    resume = [f"run.resume_ckpt_path={whole}/checkpoint_0.pth", f"run.output_dir={tmp_path}/resumed"]
    main(["--cfg-path", path, "--options", *resume])
    resumed = run_folder(tmp_path, "resumed")
    assert "Resuming after epoch 0" in caplog.text
    first, second = (torch.load(f / "checkpoint_1.pth", weights_only=True) for f in (whole, resumed))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name])


def fails(configs, stage, *options, error=ConfigError, match, early=None):
    """early: part of the error of preflight; `match`: part of the error of loading and training without it."""
    arguments = ["--cfg-path", str(configs[stage]), "--options", *options]
    with pytest.MonkeyPatch.context() as patch:
        if early:
            with pytest.raises(ConfigError, match=f"(?s)This cannot work.*{early}"):
                main(arguments)
            patch.setattr("train.preflight", lambda *_, **__: [])
        with pytest.raises(error, match=match):
            main(arguments)


def test_missing_paths(configs, parts):
    key = "datasets.laion.build_info.storage"
    match = rf"model\.llama_model = '/no/such' \(set in --options\)(?s:.*){key} = .*--options {key}="
    fails(configs, "stage1", "model.llama_model=/no/such", f"{key}=/no/such/{{00..09}}.tar", match=match)
    folder, match = parts["folder"] / "laion", "2 of 6 shards are missing"
    fails(configs, "stage1", f"{key}={folder}/{{00000..00005}}.tar", error=FileNotFoundError, match=match)


def test_a_checkpoint_of_another_width(configs, tmp_path):
    path = tmp_path / "13b.pth"
    torch.save({"model": {"llama_proj.weight": torch.zeros(5120, 24), "llama_proj.bias": torch.zeros(5120)}}, path)
    fails(
        configs,
        "stage2",
        f"model.ckpt={path}",
        error=CheckpointError,
        match=r"13b\.pth was trained with a language model 5120 \(as in Vicuna-13B\) wide; .* is 40 wide",
        early=r"13b\.pth was trained with a language model 5120 \(as in Vicuna-13B\) wide; .* is 40 wide",
    )


def test_a_checkpoint_without_projection(configs, tmp_path):
    save_file({"something.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    option = f"model.ckpt={tmp_path}/other.safetensors"
    fails(configs, "stage2", option, error=CheckpointError, match=r"llama_proj\.bias is missing", early="model.ckpt")


def test_weights_of_another_encoder(configs):
    option = "model.vit_model={patch_size: 14, embed_dim: 32, depth: 4, num_heads: 4, mlp_ratio: 4.3637}"
    fails(configs, "stage1", option, error=CheckpointError, match=r"blocks\.3\..* is missing", early="model.vit_model")
    option = "model.vit_model={patch_size: 14, embed_dim: 48, depth: 3, num_heads: 4, mlp_ratio: 4.3637}"
    fails(configs, "stage1", option, error=CheckpointError, match=r"has shape .*, the model's", early="model.vit_model")


def test_vision_settings_that_make_no_sense(configs):
    match = "vit_model='eva_clip_h' is not known"
    fails(
        configs, "stage1", "model.vit_model=eva_clip_h", error=ValueError, match=match, early="'eva_clip_h' is not kn"
    )
    match = "image_size=30 is not a multiple"
    fails(configs, "stage1", "model.image_size=30", error=ValueError, match=match, early="30 is not a multiple")
    match = "vit_weights is required"
    fails(configs, "stage1", "model.vit_weights=published", error=ValueError, match=match, early=match)


def test_pictures_of_another_size_than_the_encoders(configs):
    options = [f"datasets.{name}.vis_processor.train.image_size=42" for name in ("laion", "cc_sbu")]
    match = r"images are 42 x 42 pixels, the encoder takes 28 x 28\. Set model\.image_size"
    early = r"datasets\.cc_sbu\.vis_processor\.train\.image_size: 42, but model\.image_size=28"
    fails(configs, "stage1", *options, error=ValueError, match=match, early=early)


def test_evaluation_without_a_split(configs):
    fails(configs, "stage1", "run.evaluate=True", error=ValueError, match="needs run.test_splits")


def test_undistributed_run_under_torchrun(configs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(configs, "stage1", "run.distributed=False", error=ValueError, match="torchrun started 2 processes")


def test_a_prompt_without_image_slot(configs, tmp_path, parts):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Describe this image.\n")
    ckpt = tmp_path / "ckpt.pth"
    torch.save({"model": {"llama_proj.weight": torch.zeros(40, 24), "llama_proj.bias": torch.zeros(40)}}, ckpt)
    options = [f"model.prompt_path={prompts}", f"model.ckpt={ckpt}"]
    match = r"No line of model\.prompt_path=.*holds <ImageHere>"
    fails(configs, "stage2", *options, error=ValueError, match=match, early="model.prompt_path")
    options = [f"model.ckpt={ckpt}", "model.prompt_template=Human:"]
    match = r"prompt_template='Human:' must have one \{\}"
    fails(configs, "stage2", *options, error=ValueError, match=match, early="model.prompt_template")


def test_a_dataset_smaller_than_a_batch(configs, tmp_path):
    ckpt = tmp_path / "ckpt.pth"
    torch.save({"model": {"llama_proj.weight": torch.zeros(40, 24), "llama_proj.bias": torch.zeros(40)}}, ckpt)
    options = [f"model.ckpt={ckpt}", "run.batch_size_train=96"]
    match = "batch_size_train=96 needs at least 96 samples per rank; cc_sbu_align has 20"
    fails(configs, "stage2", *options, error=ValueError, match=match)


def test_shards_without_captions(configs, tmp_path):
    members = [(f"{i:09d}.png", picture_bytes(i)) for i in range(200)]
    write_tar(tmp_path / "0.tar", members)
    options = [f"datasets.{name}.build_info.storage={tmp_path}/0.tar" for name in ("laion", "cc_sbu")]
    fails(configs, "stage1", *options, "run.num_workers=0", error=RuntimeError, match="a sample without caption")


def test_the_command_line_prints_an_error_without_a_traceback(configs):
    done = subprocess.run(
        [sys.executable, "train.py", "--cfg-path", str(configs["stage1"]), "--options", "run.int_lr=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Unknown key run.int_lr in --options. Did you mean 'init_lr'?")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(configs, tmp_path):
    """In the second epoch, as a shell sends it: to the data-loading process too."""
    log = tmp_path / "log"
    command = [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(configs["stage1"])]
    options = ["--options", "run.iters_per_epoch=20", "run.max_epoch=2000", "run.num_workers=1", "run.log_freq=1"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # a background job, which a test may be, ignores SIGINT unless told otherwise
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    deadline = time.monotonic() + 200
    while "data epoch: [1]" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    said = log.read_text()
    saved = re.findall(r"Stopped by Ctrl-C.* run.resume_ckpt_path=(.*)", said)[-1]
    assert torch.load(saved, weights_only=True)["model"]
    assert "Traceback" not in said


@pytest.mark.parametrize(("path", "reason"), [("/dev/null/out", "Not a directory"), ("a" * 300, "File name too long")])
def test_files_that_cannot_be_used_are_named_without_a_traceback(configs, monkeypatch, tmp_path, path, reason):
    """Whatever the error's class, and although no check has seen it coming."""
    monkeypatch.setattr("minigpt4.doctor.checks.preflight", lambda *_, **__: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--cfg-path", str(configs["stage1"]), "--options", f"run.output_dir={path}"]
    )
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert str(caught.value).startswith(f"Error: {path}") and str(caught.value).endswith(f": {reason}.")


def test_a_broken_split_is_found_before_the_model_is_loaded(configs, monkeypatch):
    monkeypatch.setattr("minigpt4.tasks.base_task.BaseTask.build_model", lambda *_: pytest.fail("loads"))
    fails(configs, "stage1", "run.valid_splits=[dev]", match="No dataset has the split 'dev'")
    fails(configs, "stage1", "run.iters_per_epoch=null", match="run.iters_per_epoch must say how long")
    monkeypatch.delattr("minigpt4.datasets.datasets.shard_stream.ShardStream.one_pass")  # as in a plug-in's stream
    fails(configs, "stage1", "run.valid_splits=[train]", match="no method `one_pass`, so it cannot be evaluated")


def test_a_resume_with_another_seed_is_refused_before_the_model_is_loaded(configs, tmp_path, monkeypatch):
    main(["--cfg-path", str(configs["stage1"]), "--options", "run.max_epoch=1", "run.num_workers=0"])
    path = run_folder(tmp_path, "stage1")
    monkeypatch.setattr("minigpt4.tasks.base_task.BaseTask.build_model", lambda *_: pytest.fail("loads"))
    options = [f"run.resume_ckpt_path={path}", "run.seed=7", "run.num_workers=2"]
    match = r"(?s)run.resume_ckpt_path=.*checkpoint_0.pth.*run.seed: 42 .*, 7 here"
    fails(configs, "stage1", *options, match=match)
    assert run_folder(tmp_path, "stage1") == path  # the refused run leaves no folder


def test_a_mistake_is_reported_once_per_machine(configs, tmp_path):
    (tmp_path / "attempt").mkdir()
    torchrun = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt" / "0" / "error.json")}
    command = [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(configs["stage1"]), "--options", "run.sed=1"]
    env = {**os.environ, **torchrun}
    first = subprocess.run(command, env=env | {"LOCAL_RANK": "0"}, capture_output=True, text=True, timeout=60)
    assert first.returncode == 1 and "seed" in first.stderr
    second = subprocess.Popen(command, env=env | {"LOCAL_RANK": "1"}, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):  # it waits until torchrun, for which the first has failed, ends it
        second.wait(timeout=5)
    second.terminate()
    assert second.communicate(timeout=60)[1] == ""
