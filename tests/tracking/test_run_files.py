"""config.yaml and environment.json: a run can be started again, and no secret is written."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT

from minigpt4.common.config import Config
from minigpt4.tracking import report, run_files

STAGES = sorted(ROOT.glob("train_configs/*.yaml"))


def load(path, *options, imports=()):
    return Config(SimpleNamespace(cfg_path=str(path), options=list(options), imports=list(imports)))


def written(cfg, folder, processes=1):
    run_files.write_run_files(cfg, folder, processes)
    return json.loads((folder / run_files.ENVIRONMENT).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_the_config_is_read_as_it_was(tmp_path, path):
    """With texts that YAML, or OmegaConf, would read as something else."""
    texts = ["run.output_dir=2024_01_05", "model.ckpt=007", "model.prompt_template=[INST] {} \\n# é", "run.name=1e3"]
    texts += ["model.end_sym='###'", "run.seed=7", "run.valid_splits=[no, 2024]"]
    cfg = load(path, *texts)
    written(cfg, tmp_path)
    again = load(tmp_path / run_files.CONFIG)
    assert again.to_dict() == cfg.to_dict()
    assert again.changes() == cfg.changes()


def test_changed_settings_are_those_of_file_and_options(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run: {init_lr: 1e-4, max_epoch: 3}\ndatasets: {cc_sbu: {sample_ratio: 2}}\n")
    cfg = load(path, "run.seed=42", "datasets.cc_sbu.build_info.storage=x.tar", "model.max_txt_len=9")
    changed = written(cfg, tmp_path)["changed_settings"]
    assert changed.pop("datasets.cc_sbu.build_info.storage")[1] == "x.tar"
    assert changed == {
        "run.max_epoch": [1, 3],
        "model.max_txt_len": [32, 9],
        "datasets.cc_sbu.sample_ratio": [1.0, 2.0],
    }


def test_imports_of_the_command_line_are_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("one_plug_in", "other_plug_in"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "run.yaml").write_text("run: {imports: [one_plug_in]}")
    cfg = load(tmp_path / "run.yaml", imports=["other_plug_in", "one_plug_in"])
    written(cfg, tmp_path)
    assert load(tmp_path / run_files.CONFIG).run_cfg.imports == ["one_plug_in", "other_plug_in"]


def test_no_secret_is_written(tmp_path, monkeypatch):
    secrets = {"WANDB_API_KEY": "s3cret-1", "HF_TOKEN": "s3cret-2", "TORCH_AUTH_TOKEN": "s3cret-3", "MINE": "s3cret-4"}
    for name, value in (
        secrets | {"OMP_NUM_THREADS": "3", "HF_ENDPOINT": "https://me:s3cret-5@mirror.example/hub"}
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--options", "a=https://u:s3cret-6@host/x.tar"])
    path = tmp_path / "run.yaml"
    path.write_text("datasets: {cc_sbu: {build_info: {storage: 'https://u:s3cret-7@host/y.tar'}}}")
    described = written(load(path), tmp_path)
    assert "s3cret" not in json.dumps(described)
    (tmp_path / "metrics.jsonl").touch()
    page = report.report(tmp_path)
    assert "s3cret" not in page and "https://…@host/y.tar" in page
    assert "s3cret-7" in (tmp_path / run_files.CONFIG).read_text(encoding="utf-8")  # it starts the run again
    shown = {"HF_ENDPOINT": "https://…@mirror.example/hub", "OMP_NUM_THREADS": "3"}
    assert shown.items() <= described["variables"].items() and "MINE" not in described["variables"]
    assert described["command"][-1] == "a=https://…@host/x.tar"


def test_the_environment_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "my plug-ins")
    described = written(load(STAGES[0]), tmp_path, processes=4)
    path = tmp_path / run_files.CONFIG
    assert described["again"] == f"PYTHONPATH='my plug-ins' torchrun --nproc_per_node 4 train.py --cfg-path {path}"
    assert described["again"] in path.read_text(encoding="utf-8")
    assert {"torch", "omegaconf"} <= described["packages"].keys()
    assert described["machine"]["cores"] >= 1 and described["processes"] == 4


def test_the_state_of_a_repository(tmp_path):
    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *arguments], check=True, capture_output=True)

    assert run_files.git_states(tmp_path / "nowhere", tmp_path) == []
    git("init", "--initial-branch", "trunk")
    git("remote", "add", "origin", "https://me:secret@host/mine.git")
    (tmp_path / "model.py").write_text("width = 1\n")
    git("add", "model.py")
    git("commit", "-m", "first")
    (tmp_path / "model.py").write_text("width = 2\n")
    (tmp_path / "new.py").touch()
    (state,) = run_files.git_states(tmp_path, tmp_path)
    assert (state["branch"], state["remote"]) == ("trunk", "https://…@host/mine.git")
    assert len(state["commit"]) == 40 and state["new_files"] == ["new.py"]
    assert "-width = 1\n+width = 2" in state["diff"]


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert written(load(STAGES[0]), tmp_path)["git"] == []
