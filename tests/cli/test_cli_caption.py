"""python -m minigpt4 caption."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from helpers import GOLDEN, ROOT, free_port
from video_files import bad_videos, write_video

from minigpt4.__main__ import main
from minigpt4.cli.caption import _whole_lines
from minigpt4.common.errors import ConfigError

IMAGES = sorted((GOLDEN / "images").glob("*.png"))


@pytest.fixture
def run(golden_config, tmp_path):
    """run(*arguments) runs the command with an output file. Returns (status, lines)."""

    def command(*arguments):
        out = tmp_path / "out.jsonl"
        torch.manual_seed(0)  # the model's vision side is random
        status = main(
            ["caption", *map(str, arguments), "--out", str(out), "--cfg-path", str(golden_config)]
            + ["--max-new-tokens", "8"]
        )
        return status, [json.loads(line) for line in out.read_bytes().splitlines()] if out.exists() else []

    return command


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for n, path in enumerate(IMAGES):
        shutil.copy(path, tmp_path / "pictures" / ("deep" if n else "") / path.name)
    return tmp_path / "pictures"


def test_pictures_folders_and_shards(run, folder, tmp_path):
    status, lines = run(*IMAGES)
    assert status == 0
    assert [line["image"] for line in lines] == [str(path) for path in IMAGES]
    (tmp_path / "out.jsonl").unlink()
    status, of_folder = run("--dir", folder)
    assert {line["image"] for line in of_folder} == {str(path) for path in folder.rglob("*.png")}
    (tmp_path / "out.jsonl").unlink()
    _, named_twice = run(folder / IMAGES[0].name, "--dir", folder)
    assert sorted(line["image"] for line in named_twice) == sorted(line["image"] for line in of_folder)
    (tmp_path / "out.jsonl").unlink()
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05}.tar", "w") as tar:
            for path in IMAGES[shard::2]:
                tar.add(path, f"{path.stem}.png")
                tar.add(ROOT / "train.py", f"{path.stem}.txt")
    status, of_shards = run("--shards", tmp_path / "{00000..00001}.tar")
    assert [line["image"] for line in of_shards] == [
        f"{tmp_path}/{shard:05}.tar/{path.stem}.png" for shard in range(2) for path in IMAGES[shard::2]
    ]


def test_continues_where_it_stopped(run, folder, tmp_path, caplog):
    _, lines = run("--dir", folder)
    out = tmp_path / "out.jsonl"
    text = out.read_text()
    out.write_text(text[: text.index("\n") + 15])  # the second line was cut short
    caplog.set_level("INFO")
    _, again = run("--dir", folder)
    assert [line["image"] for line in again] == [line["image"] for line in lines]
    assert f"{len(lines) - 1} captions written; 1 were there already." in caplog.text
    (tmp_path / "out.jsonl.part1").write_text(text.splitlines()[0] + "\n{")  # left by a run of several ranks
    out.unlink()
    _, again = run("--dir", folder)
    assert sorted(line["image"] for line in again) == sorted(line["image"] for line in lines)
    assert not list(tmp_path.glob("*.part*"))


def test_captions_with_any_character_in_them_do_not_break_resuming(run, monkeypatch, tmp_path):
    """U+2028 and others end a line for `str.splitlines`, and a run may be interrupted within a character."""
    from minigpt4.models import MiniGPT4

    text = "a\u2028b\u2029c\u0085d\x1ce\r\nf ✓ 猫"
    monkeypatch.setattr(MiniGPT4, "generate", lambda self, images, texts, **options: [text] * len(texts))
    out = tmp_path / "out.jsonl"
    _, lines = run(*IMAGES[:2])
    assert [line["caption"] for line in lines] == [text] * 2
    before = out.read_bytes()
    out.write_bytes(before[: before.rindex("猫".encode()) + 1])
    _, lines = run(*IMAGES[:3])
    assert out.read_bytes().startswith(before)
    assert [line["image"] for line in lines] == [str(path) for path in IMAGES[:3]]


def test_file_names_that_are_not_utf_8(run, tmp_path):
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.png")
    shutil.copy(IMAGES[0], strange)
    for _ in range(2):  # the second time, the file has its line
        status, (line,) = run(strange)
        assert (status, line["image"]) == (0, strange)


def test_videos(run, folder, tmp_path):
    """Videos may be named or be in a folder, and are described in the same batches as pictures."""
    videos = [write_video(folder / name) for name in ("clip.mp4", "deep/clip.webm")]
    status, lines = run("--dir", folder, "--frames", 3)
    assert status == 0
    assert len(lines) == len(IMAGES) + 2
    frames = {line["image"]: line.get("frames") for line in lines}
    assert {path for path, count in frames.items() if count == 3} == {str(path) for path in videos}
    together = {line["image"]: line["caption"] for line in lines}
    (tmp_path / "out.jsonl").unlink()
    status, single = run(*videos, "--frames", 3, "--batch-size", 1)
    assert [line["caption"] for line in single] == [together[str(path)] for path in videos]


def test_prompts_for_videos(run, monkeypatch, tmp_path):
    from minigpt4.models import MiniGPT4

    seen = []
    monkeypatch.setattr(
        MiniGPT4, "generate", lambda self, images, texts, **o: seen.append((len(images), texts)) or ["x"] * len(texts)
    )
    run(IMAGES[0], write_video(tmp_path / "clip.mp4"), "--frames", 2, "--prompt", "Is <Img><ImageHere></Img> new?")
    run(write_video(tmp_path / "other.mp4"), "--frames", 2, "--prompt", "<ImageHere>")
    picture = "<Img><ImageHere></Img>"
    assert seen == [(3, [f"Is {picture} new?", f"Is {picture} {picture} new?"]), (2, ["<ImageHere> <ImageHere>"])]


def test_what_the_model_cannot_hold_is_skipped_and_listed(run, tmp_path, caplog):
    """The golden model holds 2,000 tokens, and a picture is 8 of them."""
    video = write_video(tmp_path / "clip.mp4", frames=64)
    status, lines = run(video, IMAGES[0], "--frames", 64, "--prompt", f"{'Hm? ' * 400} <ImageHere>")
    assert status == 1
    assert [line["image"] for line in lines] == [str(IMAGES[0])]
    assert re.search(
        r"clip.mp4 takes \d+ tokens with .* up to 8; the model has room for 2000. Lower --frames", caplog.text
    )


def test_bad_videos_are_skipped_and_listed(run, tmp_path, caplog):
    messages = bad_videos(tmp_path)
    status, lines = run(*(tmp_path / name for name in messages), IMAGES[0])
    assert status == 1
    assert [line["image"] for line in lines] == [str(IMAGES[0])]
    for name, message in messages.items():
        assert re.search(f"{name} .*{message}", caplog.text)


def test_a_damaged_tar_is_skipped_and_listed(run, tmp_path, caplog):
    with tarfile.open(tmp_path / "good.tar", "w") as tar:
        for path in IMAGES[:2]:
            tar.add(path, path.name)
    content = (tmp_path / "good.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[: content.index(IMAGES[1].name.encode()) + 600])
    (tmp_path / "1.tar").write_text("this is no tar")
    status, lines = run("--shards", tmp_path / "{0..1}.tar", tmp_path / "good.tar")
    assert status == 1
    assert [line["image"] for line in lines] == [
        f"{tmp_path}/{shard}.tar/{path.name}"
        for shard, path in (("0", IMAGES[0]), ("good", IMAGES[0]), ("good", IMAGES[1]))
    ]
    assert f"{tmp_path}/0.tar: the rest of this tar cannot be read" in caplog.text
    assert f"{tmp_path}/1.tar: the rest of this tar cannot be read" in caplog.text


def test_unreadable_files_are_skipped_and_listed(run, folder, caplog):
    (folder / "bad.png").write_text("x")
    (folder / "notes.txt").write_text("no picture")
    status, lines = run("--dir", folder)
    assert status == 1
    assert len(lines) == len(IMAGES)
    assert "Skipped, 1 in all" in caplog.text
    assert "bad.png is not a picture" in caplog.text


def test_prompts(run, golden_config, monkeypatch):
    from minigpt4.models import MiniGPT4

    prompts = []
    monkeypatch.setattr(
        MiniGPT4, "generate", lambda self, images, texts, **o: prompts.append(texts) or ["x"] * len(texts)
    )
    template = ["--options", "model.prompt_template=###Human: {} ###Assistant: "]
    run(IMAGES[0])
    run(IMAGES[1], "--prompt", "What is it?", *template)
    run(IMAGES[2], "--prompt", "<ImageHere> is", *template)
    assert prompts == [
        ["<ImageHere>"],
        ["###Human: <Img><ImageHere></Img> What is it? ###Assistant: "],
        ["<ImageHere> is"],
    ]


def test_batches_equal_single_pictures(run, tmp_path):
    _, together = run(*IMAGES)
    (tmp_path / "out.jsonl").unlink()
    _, single = run(*IMAGES, "--batch-size", 1)
    assert together == single
    assert len({line["caption"] for line in single}) > 1


def test_seeds_make_sampling_repeatable(run, tmp_path):
    def captions(seed):
        _, lines = run(*IMAGES, "--sample", "--seed", seed)
        (tmp_path / "out.jsonl").unlink()
        return [line["caption"] for line in lines]

    assert captions(1) == captions(1) != captions(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dir", "/nowhere"], "--dir /nowhere is not a folder"),
        (["--shards", "/nowhere/{0..1}.tar"], "2 of 2 shards are missing, e.g. /nowhere/0.tar"),
        ([str(IMAGES[0]), "gone.png", "docs"], "There is no file gone.png, docs."),
        ([f"{n}.png" for n in range(9)], "There is no file 0.png, 1.png, 2.png (and 6 more)."),
        ([str(IMAGES[0]), "--out", "/"], "--out / is a folder"),
        ([str(IMAGES[0]), "--out", str(ROOT / "train.py")], "train.py exists, and its line"),
        ([str(IMAGES[0]), "--prompt", "<ImageHere> or <ImageHere>"], "must have <ImageHere> once"),
    ],
)
def test_wrong_arguments(run, golden_config, arguments, message):
    assert message in main(["caption", *arguments, "--cfg-path", str(golden_config)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "--temperature", "-1"], "temperature=-1.0 must be more than 0"),
        (["a.png", "--frames", "65"], "frames=65 must be at most 64"),
        (["a.png", "--batch-size", "0"], "--batch-size 0 must be more than 0"),
        ([], "give pictures, --dir or --shards"),
    ],
)
def test_wrong_numbers(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["caption", *arguments, "--cfg-path", "x"])
    assert message in capsys.readouterr().err


def test_several_ranks(golden_config, tmp_path):
    """Each rank describes files of its own. The lines of an interrupted run of several ranks are kept."""
    out, kept = tmp_path / "out.jsonl", ["of an earlier run", "of its first rank", "of its second rank"]
    left = [json.dumps({"image": str(path), "caption": text}) + "\n" for path, text in zip(IMAGES, kept, strict=False)]
    out.write_text(left[0])
    (tmp_path / "out.jsonl.part0").write_text(left[1] + left[2][:20])
    (tmp_path / "out.jsonl.part1").write_text(left[2])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command += ["-m", "minigpt4", "caption", *map(str, IMAGES), "--out", str(out), "--batch-size", "1"]
    command += ["--cfg-path", str(golden_config), "--max-new-tokens", "5"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["image"] for line in lines) == sorted(map(str, IMAGES))  # none twice
    assert [line["caption"] for line in lines[:3]] == kept
    assert not {line["caption"] for line in lines[3:]} & {*kept}
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]


@pytest.mark.parametrize(
    "content",
    ['{"accuracy": 0.9}', "line 1\nline 2", '{"image": "a", "caption": "b"}\nline 2', '{"image": "a"}', "[1]"],
)
def test_files_of_others_stay_as_they_are(tmp_path, content):
    """A last line without its end is cut off only where this command wrote it."""
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is not a caption"):
        _whole_lines(path)
    assert path.read_text() == content


def test_a_last_caption_without_its_end_is_kept(tmp_path):
    path, line = tmp_path / "file", '{"image": "a", "caption": "b"}'
    path.write_text(line)
    assert _whole_lines(path) == [f"{line}\n".encode()]
    assert path.read_text() == f"{line}\n"


@pytest.mark.parametrize("rest", ["", "{", '{"image": "b', '{"image": "b", "caption": "c'])
def test_a_line_that_was_cut_off_is_written_again(tmp_path, rest):
    path, whole = tmp_path / "file", '{"image": "a", "caption": "b"}\n'
    path.write_text(whole + rest)
    assert _whole_lines(path) == [whole.encode()]
    assert path.read_text() == whole
