"""`data convert`: the same records in another form, also after it was killed."""

import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from dataset_files import VIS, good_members, picture_bytes, write_align, write_shards, write_tar
from helpers import ROOT
from PIL import Image
from tqdm import tqdm

from minigpt4.cli.data import main
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.data_tools.opening import source_of_files, sources_of_config
from minigpt4.datasets.builders import ConversationBuilder, LaionBuilder
from minigpt4.datasets.conversations.record import Picture

PAGE = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- format: (\w+) (\S+) -->\n```\w*\n(.*?)```", PAGE, flags=re.DOTALL)


def contents(source) -> list:
    """Id, roles, texts, and the content of pictures of all records."""

    def content(part):
        if not isinstance(part, Picture):
            return part
        return Path(part.source).read_bytes() if isinstance(part.source, str) else part.source

    records = [record for part in range(source.num_parts) for record in source.read(part)]
    return [(r.id, [(m.role, [*map(content, m.parts)]) for m in r.messages]) for r in records]


def pictures(folder: Path) -> None:
    for seed, name in enumerate(("cat.jpg", "dog.jpg")):
        (folder / name).write_bytes(picture_bytes(seed, format="JPEG"))


def write_example(folder: Path, form: str) -> str:
    """A small dataset of a form; its storage."""
    if form == "folder":
        for name in ("cat", "dog"):
            (folder / f"{name}.txt").write_text(f"A {name} in <image> brackets.\n")
        pictures(folder)
        return str(folder)
    if form == "align":
        return str(write_align(folder / "align", records=5))
    if form == "shards":
        turns = [("user", "<image>What?"), ("assistant", "A cat."), ("user", "And <image>?"), ("assistant", "<image>")]
        content = [[{"type": "text", "text": "<image>"}] if text == "<image>" else text for _, text in turns]
        messages = [{"role": role, "content": text} for (role, _), text in zip(turns, content, strict=True)]
        several = [("9.0.png", picture_bytes(0)), ("9.1.png", picture_bytes(1))]
        several.append(("9.json", json.dumps({"id": 7, "system": "Be brief.", "messages": messages}).encode()))
        write_tar(folder / "0.tar", [*good_members(0, 3), *several])
        return str(folder / "0.tar")
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [{"image": {"bytes": picture_bytes(n), "path": None}, "texts": [{"user": "What?", "assistant": f"{n}"}]}
                for n in range(3)]  # fmt: skip
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
        return str(folder / "a.parquet")
    name, text = next((name, text) for format, name, text in EXAMPLES if format == form)
    (folder / name).write_text(text, encoding="utf-8")
    pictures(folder)
    return str(folder / name)


FORMS = [*(format for format, _, _ in EXAMPLES), "folder", "parquet", "shards", "align"]


@pytest.mark.parametrize(("form", "to"), itertools.product(FORMS, ["shards", "jsonl"]))
def test_records_stay_the_same(tmp_path, form, to, capsys):
    (tmp_path / "data").mkdir()
    storage = write_example(tmp_path / "data", form)
    assert main(["convert", storage, "--to", to, "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    (written,) = re.findall(r"storage: (\S+)", capsys.readouterr().out)
    before, after = contents(source_of_files([storage], {})), contents(source_of_files([written], {}))
    assert after == before and len(after) >= 2


def test_the_captions_of_laion(tmp_path, monkeypatch, capsys):
    """Converted shards are also read by laion itself."""
    monkeypatch.chdir(ROOT)
    for name in ("laion", "cc_sbu"):
        write_shards(tmp_path / name, count=2, samples=4)

    def arguments(folder):
        storages = [f"datasets.{name}.build_info.storage={folder}/{name}/*.tar" for name in ("laion", "cc_sbu")]
        return ["--cfg-path", "train_configs/minigpt4_tiny_stage1_pretrain.yaml", "--options", *storages]

    def read(folder):
        _, cfg_path, _, *options = arguments(folder)
        return [
            contents(each) for each in sources_of_config(Config(SimpleNamespace(cfg_path=cfg_path, options=options)))
        ]

    main(["convert", *arguments(tmp_path), "--to", "shards", "--out", str(tmp_path / "out"), "--workers", "2"])
    before, after = read(tmp_path), read(tmp_path / "out")
    assert [len(dataset) for dataset in after] == [8, 8] and after == before


def test_the_share_for_validation_stays_the_same(tmp_path, capsys):
    pictures(tmp_path)
    records = [{"image": "cat.jpg", "caption": f"Number {number}."} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))

    def val_ids(storage):
        builder = ConversationBuilder({"build_info": {"storage": storage, "val": 0.2}, "vis_processor": VIS})
        builder.name = "mine"
        dataset = builder.build_datasets()["val"]
        return [dataset.records[index].id for index in range(len(dataset))]

    main(["convert", str(tmp_path / "a.jsonl"), "--to", "jsonl", "--out", str(tmp_path / "out"), "--workers", "1"])
    assert val_ids(f"{tmp_path}/out/*.jsonl") == val_ids(f"{tmp_path}/a.jsonl")
    assert len(list((tmp_path / "out/images").glob("*/*"))) == 1  # one picture, once


@pytest.mark.parametrize("builder", [ConversationBuilder, LaionBuilder])
def test_the_share_of_shards_stays_the_same(tmp_path, builder, capsys):
    """Samples of shards have no ids: their pictures decide."""
    write_shards(tmp_path / "a", count=2, samples=15)

    def val_ids(storage):
        config = {"build_info": {"storage": storage, "val": 0.3}, "vis_processor": VIS | {"eval": VIS["train"]}}
        return [sample["image_id"] for sample in builder(config).build_datasets()["val"].one_pass(0, 1)]

    main(["convert", f"{tmp_path}/a/*.tar", "--to", "shards", "--out", str(tmp_path / "out"), "--workers", "1"])
    assert val_ids(f"{tmp_path}/out/*.tar") == val_ids(f"{tmp_path}/a/*.tar")
    assert 0 < len(val_ids(f"{tmp_path}/out/*.tar")) < 30


def slowly(samples):
    for sample in samples:
        time.sleep(0.05)
        yield sample


def convert_apart(command):
    """The command in a process that may be killed: it must not hold tqdm's lock, which a fork shares."""
    tqdm.set_lock(threading.RLock())
    main(command)


@pytest.mark.parametrize("to", ["shards", "jsonl"])
def test_a_killed_conversion_goes_on_where_it_stopped(tmp_path, monkeypatch, to, capsys):
    from minigpt4.data_tools import convert, sources

    monkeypatch.setattr(sources, "PART", 4)
    pictures(tmp_path)
    records = [{"image": "dog.jpg", "caption": f"Number {number}."} for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    command = ["convert", str(tmp_path / "a.jsonl"), "--to", to, "--out", str(tmp_path / "out"), "--workers", "1"]
    with monkeypatch.context() as patched:
        read = convert.read_samples
        patched.setattr(convert, "read_samples", lambda *arguments: slowly(read(*arguments)))
        child = multiprocessing.get_context("fork").Process(target=convert_apart, args=(command,))
        child.start()
        while not list((tmp_path / "out").glob("00001.*")):
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert child.exitcode == -signal.SIGKILL
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*")}
    assert 2 <= len(there) < 5
    assert main(command) == 0
    assert f"{len(there)} files there already" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*")}
    assert len(after) == 5 and there.items() <= after.items()
    suffix = {"shards": "tar", "jsonl": "jsonl"}[to]
    written = contents(source_of_files([f"{tmp_path}/out/*.{suffix}"], {}))
    assert written == contents(source_of_files([str(tmp_path / "a.jsonl")], {}))
    assert not list((tmp_path / "out").glob(".*.part"))


def test_other_data_or_settings_in_the_same_folder_are_refused(tmp_path):
    write_align(tmp_path / "a", records=3)
    write_align(tmp_path / "b", records=4)
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    main(["convert", str(tmp_path / "a"), "--to", "shards", *out])
    for changed in (
        ["convert", str(tmp_path / "b"), "--to", "shards"],
        ["convert", str(tmp_path / "a"), "--to", "jsonl"],
    ):
        with pytest.raises(ConfigError, match="was begun with other settings or data"):
            main([*changed, *out])
    write_align(tmp_path / "a", records=5)
    with pytest.raises(ConfigError, match="fingerprint"):
        main(["convert", str(tmp_path / "a"), "--to", "shards", *out])
    with pytest.raises(ConfigError, match="Nothing was changed"):
        main(["convert", str(tmp_path / "a"), "--to", "shards", "--out", str(tmp_path / "b")])
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["filter_cap.json", "image"]


def test_a_caption_that_has_changed_is_other_data(tmp_path, capsys):
    pictures(tmp_path)
    (tmp_path / "dog.txt").write_text("A dog.")
    command = ["convert", str(tmp_path), "--to", "jsonl", "--out", str(tmp_path.with_name("out")), "--workers", "1"]
    assert main([*command, "--leave-out"]) == 0
    (tmp_path / "dog.txt").write_text("A cat.")
    with pytest.raises(ConfigError, match="fingerprint"):
        main([*command, "--leave-out"])


def test_faults_end_it_or_are_left_out(tmp_path, capsys):
    write_align(tmp_path / "a", records=4)
    (tmp_path / "a/image/2.jpg").unlink()
    command = ["convert", str(tmp_path / "a"), "--to", "shards", "--out", str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(ConfigError, match=r"annotations\[2\].*--leave-out"):
        main(command)
    assert not list((tmp_path / "out").glob("*.tar"))
    assert main([*command, "--leave-out"]) == 0
    out = capsys.readouterr().out
    assert "3 records written" in out and "1 fault left out" in out and "annotations[2]" in out
    source = source_of_files([f"{tmp_path}/out/*.tar"], {})
    assert [id for id, _ in contents(source)] == ["0", "1", "3"]


def test_texts_and_formats_that_a_form_cannot_hold(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.ppm")
    pictures(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"id": "\\udcff", "image": "cat.jpg", "caption": "x \\ud800"}\n')
    assert main(["convert", f"{tmp_path}/a.jsonl", "--to", "jsonl", "--out", f"{tmp_path}/a"]) == 0
    assert contents(source_of_files([f"{tmp_path}/a/*.jsonl"], {})) == contents(
        source_of_files([f"{tmp_path}/a.jsonl"], {})
    )
    (tmp_path / "b.csv").write_text("image,caption\na.ppm,x\n")
    with pytest.raises(ConfigError, match="line 2.*a.ppm is in the format PPM"):
        main(["convert", f"{tmp_path}/b.csv", "--to", "shards", "--out", f"{tmp_path}/b"])


def test_no_conversion_into_the_folder_that_is_read(tmp_path):
    storage = write_example(tmp_path, "folder")
    with pytest.raises(ConfigError, match="inside the data"):
        main(["convert", storage, "--to", "jsonl", "--out", f"{tmp_path}/sub/out"])
    assert not (tmp_path / "sub").exists()
