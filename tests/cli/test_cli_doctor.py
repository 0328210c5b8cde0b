"""python -m minigpt4 doctor, as people and scripts call it."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from dataset_files import write_align, write_shards
from helpers import ROOT

from minigpt4.benchmarks import probe as probing
from minigpt4.cli.cache_features import main as cache_features
from minigpt4.cli.doctor import is_training, main
from minigpt4.common.config import Config
from minigpt4.runners.runner_base import RunnerBase

TINY = {stage: ROOT / f"train_configs/minigpt4_tiny_{name}.yaml" for stage, name in
        {"stage1": "stage1_pretrain", "stage2": "stage2_finetune"}.items()}  # fmt: skip
TINY["chat"] = ROOT / "eval_configs/minigpt4_tiny_eval.yaml"


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Builder of the command line for a tiny config."""
    monkeypatch.chdir(ROOT)
    for name in ("laion", "cc_sbu"):
        write_shards(tmp_path / name, count=2, samples=20)
    write_align(tmp_path / "align", records=20)

    def build(stage, *options):
        given = {
            "stage1": [f"datasets.{n}.build_info.storage={tmp_path}/{n}/*.tar" for n in ("laion", "cc_sbu")],
            "stage2": [f"datasets.cc_sbu_align.build_info.storage={tmp_path}/align"],
            "chat": ["run.seed=1"],
        }[stage]
        return ["--cfg-path", str(TINY[stage]), "--options", *given, *options]

    return build


@pytest.mark.parametrize("stage", TINY)
def test_the_tiny_default_is_healthy(arguments, capsys, stage):
    assert main(arguments(stage)) == 0
    out = capsys.readouterr().out
    assert "ERROR" not in out
    assert "0 errors" in out.splitlines()[-1]


def test_an_error_shows_in_the_status_and_comes_with_its_fix(arguments, capsys):
    assert main(arguments("chat", "model.ckpt=/no/such")) == 1
    out = capsys.readouterr().out
    assert "ERROR   model.ckpt: '/no/such' (set in --options) does not exist\n        -> Change it there" in out
    assert "1 error, " in out.splitlines()[-1]


def test_json(arguments, capsys):
    assert main([*arguments("stage1", "model.image_size=66"), "--json"]) == 1
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(f) == {"check", "status", "what", "fix"} for f in findings)
    (wrong,) = [f for f in findings if f["status"] == "error"]
    assert wrong["check"] == "model.image_size" and wrong["fix"] == "--options model.image_size=64"


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_config_that_cannot_be_read(arguments, capsys, as_json):
    assert main([*arguments("chat", "run.int_lr=1"), *as_json]) == 2
    assert "Did you mean 'init_lr'?" in capsys.readouterr().out


def test_hours(arguments, capsys):
    main([*arguments("stage1"), "--gpus", "4", "--step-time", "6", "--gpu-memory", "24"])
    out = capsys.readouterr().out
    assert "batch 32 per GPU, 128 in total (4 GPUs)" in out
    assert "600 steps, 76,800 samples; 60 min at 6.0 s a step" in out
    assert "4 × a GPU of 24 GB" in out


@pytest.mark.parametrize(
    ("module", "stage", "option"),
    [
        ("minigpt4.cli.doctor", "stage1", "model.llama_model=/no/such"),
        ("train", "stage2", "run.device=tpu"),
        ("demo", "chat", "run.device=tpu"),
    ],
)
def test_quick_errors_need_no_torch(arguments, module, stage, option):
    code = (
        f"import sys\nfrom {module} import main\n"
        f"try:\n    print(main({arguments(stage, option)!r}))\nexcept ValueError as error:\n    print(error)\n"
        "heavy = {'torch', 'transformers', 'timm', 'webdataset', 'gradio'} & set(sys.modules)\n"
        "sys.exit(str(heavy or 'nothing heavy'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "nothing heavy", done.stderr
    assert re.search(f"ERROR +{option.split('=')[0]}: ", done.stdout)


def test_skipped_checks_are_announced(arguments, capsys):
    assert main([*arguments("stage1", "model.llama_model=/no/such"), "--json"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["check"], last["status"]) == ("deeper checks", "warning")


def test_what_counts_as_training():
    for stage, path in TINY.items():
        cfg = Config(SimpleNamespace(cfg_path=path, options=None))
        assert is_training(cfg) == (stage != "chat")


@pytest.mark.parametrize("keys", ["run: {valid_splits: [val]}", "run: {}"])
def test_a_file_that_names_data_of_ones_own_is_of_training(tmp_path, capsys, keys):
    records = tmp_path / "my.jsonl"
    records.write_text('{"prompt": "Hello", "answer": "Hi"}\n' * 3, encoding="utf-8")
    data = f"datasets: {{mine: {{builder: conversation, build_info: {{storage: {records}}}}}}}"
    (tmp_path / "run.yaml").write_text(f"model: {{model_type: tiny}}\n{data}\n{keys}\n", encoding="utf-8")
    assert main(["--cfg-path", str(tmp_path / "run.yaml")]) == 1
    assert "needs at least 16 samples per rank; mine has 3" in capsys.readouterr().out


@pytest.mark.parametrize(("stage", "said"), [("stage2", "a step of 4 × "), ("chat", "an answer of 32 tokens took ")])
def test_probe(arguments, capsys, stage, said):
    options = ["run.batch_size_train=4"] if stage == "stage2" else []
    assert main([*arguments(stage, *options), "--probe"]) == 0
    assert f"ok      probe: {said}" in capsys.readouterr().out


def test_probe_times_a_step_that_neither_compiles_nor_records(arguments, capsys, monkeypatch):
    """As on a GPU: the first step compiles, the second records CUDA graphs, and from the third on they are replayed."""
    clock, durations, plain = [0.0], iter([30, 20]), RunnerBase.train_step

    def train_step(self, *args, **kwargs):
        clock[0] += next(durations, 0.25)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(RunnerBase, "train_step", train_step)
    monkeypatch.setattr(probing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert main([*arguments("stage2", "run.batch_size_train=4"), "--probe"]) == 0
    assert " tokens took 0.25 s, loss " in capsys.readouterr().out


def test_probe_from_cached_features(arguments, capsys, tmp_path):
    assert cache_features([*arguments("stage2"), "--out", f"{tmp_path}/features"]) == 0
    options = ["run.batch_size_train=4", f"datasets.cc_sbu_align.build_info.features={tmp_path}/features/cc_sbu_align"]
    assert main([*arguments("stage2", *options), "--probe"]) == 0
    assert "ok      probe: a step of 4 × " in capsys.readouterr().out


def test_probe_waits_for_the_errors(arguments, capsys, monkeypatch):
    monkeypatch.setattr(probing, "probe", lambda context: 1 / 0)
    assert main([*arguments("chat", "model.ckpt=/no/such"), "--probe"]) == 1
    assert "No step was taken: the errors come first." in capsys.readouterr().out
