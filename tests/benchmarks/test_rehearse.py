"""python -m minigpt4 rehearse, in small: the real commands on random weights."""

import json
import sys

import pytest

from minigpt4.benchmarks import rehearse


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


def test_a_failed_run_is_reported(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--size", "small", "--load-in", "16bit", "--work", "S1/16"]
    assert rehearse.main([*arguments, "--options", "run.no_such_key=1"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert "exit status 1, see" in row["failed"]
    assert "no_such_key" in row["failed"]
