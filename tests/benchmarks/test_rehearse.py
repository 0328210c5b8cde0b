"""python -m minigpt4 rehearse, in small: the real commands on random weights."""

import json
import sys

import pytest

from minigpt4.benchmarks import rehearse
from minigpt4.common.errors import ConfigError
from minigpt4.common.output import only_run


@pytest.mark.slow
def test_training_and_chat_are_run_and_measured(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--size", "small", "--load-in", "16bit", "--work", "S2/12", "chat"]
    options = ["run.batch_size_train=2", "run.num_workers=0"]
    assert rehearse.main([*arguments, "--steps", "2", "--jobs", "2", "--options", *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [json.loads(line) for line in (tmp_path / "rehearsal.jsonl").read_text().splitlines()]
    assert [row["work"] for row in rows] == ["S2/12", "chat"]
    for row in rows:
        assert 0 < row["ready_s"] <= row["total_s"]
        assert row["rss_GB"] > 0.1
        if sys.platform.startswith("linux"):
            assert 0.05 < row["host_GB"] <= row["rss_GB"]
    log = (tmp_path / "small-16bit-S2_12.log").read_text()
    assert "Train: data epoch: [0]  [1/2]" in log
    assert "[image 1:" in (tmp_path / "small-16bit-chat.log").read_text()


def test_the_data_have_the_workloads_lengths(tmp_path):
    rehearse.make_data(tmp_path, count=20)
    records = json.loads((tmp_path / "cc_sbu_align/filter_cap.json").read_text())["annotations"]
    assert len(records) == 20
    assert all(79 <= len(record["caption"].split()) <= 159 for record in records)  # without the one that ends it
    assert all((tmp_path / f"cc_sbu_align/image/{record['image_id']}.jpg").is_file() for record in records)
    rehearse.make_data(tmp_path, count=1)  # the files exist
    assert len(list((tmp_path / "cc_sbu_align/image").iterdir())) == 20


@pytest.mark.parametrize("name", ["data/shards/00000.tar", "data/cc_sbu_align/image/0.jpg", "small-16bit-S1_16.log"])
def test_a_folder_with_files_of_others_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("of the user")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"--out {tmp_path} has files that this command did not write"):
        rehearse.main(["--out", str(tmp_path), "--size", "small"])
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / name).read_text() == "of the user"
    if "data" in name:  # also in a folder that is a rehearsal's
        (tmp_path / "rehearsal.jsonl").touch()
        with pytest.raises(ConfigError, match=f"--out {tmp_path}/data has files that this command did not write"):
            rehearse.main(["--out", str(tmp_path), "--size", "small"])
        assert (tmp_path / name).read_text() == "of the user"


def test_a_second_rehearsal_in_the_same_folder_is_refused(tmp_path):
    with only_run(tmp_path):
        (tmp_path / "rehearsal.jsonl").touch()
        with pytest.raises(ConfigError, match="another run is writing there"):
            rehearse.main(["--out", str(tmp_path), "--size", "small"])


def test_interrupted_data_are_written_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rehearse.json, "dumps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rehearse.make_data(tmp_path / "data", count=2)
    rehearse.make_data(tmp_path / "data", count=2)
    assert len(list((tmp_path / "data").rglob("*.*"))) == 5  # two shards, two pictures, filter_cap.json


def test_a_failed_run_is_reported(tmp_path, capsys, monkeypatch):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('no such key')")
    monkeypatch.setattr(rehearse, "_command", lambda *_: [str(script)])
    out = str(tmp_path / "rehearsal")
    assert rehearse.main(["--out", out, "--size", "small", "--load-in", "16bit", "--work", "S1/16"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert "exit status 1, see" in row["failed"]
    assert "no such key" in row["failed"]
