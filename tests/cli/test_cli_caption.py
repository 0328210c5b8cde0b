"""python -m minigpt4 caption."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter

import pytest
import torch
from dataset_files import picture_bytes
from helpers import GOLDEN, ROOT, free_port
from video_files import bad_videos, write_video

from minigpt4.__main__ import main
from minigpt4.cli.caption import LINES
from minigpt4.cli.caption_sources import named_sources
from minigpt4.common.output import only_run
from minigpt4.common.resumable import whole_lines

IMAGES = sorted((GOLDEN / "images").glob("*.png"))


@pytest.fixture
def run(golden_config, tmp_path):
    """run(*arguments) runs the command with an output file. Returns (status, lines)."""

    def command(*arguments):
        out = tmp_path / "out.jsonl"
        torch.manual_seed(0)  # the model's vision side is random
        status = main(
            ["caption", "--out", str(out), *map(str, arguments), "--cfg-path", str(golden_config)]
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
    out, beams = tmp_path / "out.jsonl", ("--num-beams", 2)  # with which `generate` writes the captions
    _, lines = run(*IMAGES[:2], *beams)
    assert [line["caption"] for line in lines] == [text] * 2
    before = out.read_bytes()
    out.write_bytes(before[: before.rindex("猫".encode()) + 1])
    _, lines = run(*IMAGES[:3], *beams)
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
    settings = ("--frames", 2, "--num-beams", 2)
    run(IMAGES[0], write_video(tmp_path / "clip.mp4"), *settings, "--prompt", "Is <Img><ImageHere></Img> new?")
    (tmp_path / "out.jsonl").unlink()
    run(write_video(tmp_path / "other.mp4"), *settings, "--prompt", "<ImageHere>")
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


def test_prompts(run, golden_config, monkeypatch, tmp_path):
    from minigpt4.models import MiniGPT4

    prompts = []
    monkeypatch.setattr(
        MiniGPT4, "generate", lambda self, images, texts, **o: prompts.append(texts) or ["x"] * len(texts)
    )
    template = ["--options", "model.prompt_template=###Human: {} ###Assistant: "]
    for arguments in ([IMAGES[0]], [IMAGES[1], "--prompt", "What is it?", *template]):
        run("--num-beams", 2, *arguments)
        (tmp_path / "out.jsonl").unlink()
    run(IMAGES[2], "--num-beams", 2, "--prompt", "<ImageHere> is", *template)
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


@pytest.mark.parametrize("settings", [[], ["--min-length", 5], ["--repetition-penalty", 1.3]])
def test_together_token_by_token_or_in_batches(run, monkeypatch, tmp_path, settings):
    """The captions and their order are the same, with videos and unreadable files among the pictures."""
    (tmp_path / "bad.png").write_text("no picture")
    items = [*IMAGES[:2], write_video(tmp_path / "clip.mp4"), tmp_path / "bad.png", *IMAGES[2:]]
    _, together = run(*items, "--batch-size", 3, "--frames", 2, *settings)
    (tmp_path / "out.jsonl").unlink()
    monkeypatch.setattr("minigpt4.serving.together.computes_together", lambda chat: False)
    _, in_batches = run(*items, "--batch-size", 3, "--frames", 2, *settings)
    assert together == in_batches and [line["image"] for line in together] == [
        str(i) for i in items if "bad" not in str(i)
    ]


def test_a_long_caption_holds_up_nobody(run, monkeypatch):
    """The captions after it are computed while it is written, and the lines keep their order."""
    from minigpt4.serving.answer import Answer

    made, ended = [], []
    prepare, end = Answer.__post_init__, Answer.end

    def with_a_length(answer):
        answer.max_tokens = answer.min_tokens = 2 if made else 8
        made.append(answer)
        prepare(answer)

    monkeypatch.setattr(Answer, "__post_init__", with_a_length)
    monkeypatch.setattr(Answer, "end", lambda self, *how: ended.append(made.index(self)) or end(self, *how))
    _, lines = run(*IMAGES[:3], "--batch-size", 2)
    assert list(dict.fromkeys(ended)) == [1, 2, 0]
    assert [line["image"] for line in lines] == [str(path) for path in IMAGES[:3]]


def test_causes_are_kept_in_a_file(run, folder, tmp_path, monkeypatch):
    (folder / "bad.png").write_text("no picture")
    errors = tmp_path / "out.jsonl.errors.jsonl"
    status, _ = run("--dir", folder)
    (line,) = map(json.loads, errors.read_text().splitlines())
    assert status == 1 and line["name"] == str(folder / "bad.png") and "not a picture" in line["error"]
    shutil.copy(IMAGES[0], folder / "bad.png")
    assert run("--dir", folder)[0] == 0
    assert errors.read_text() == ""
    errors.write_text("mine")
    assert "out.jsonl.errors.jsonl beside it is not a file of causes" in run("--dir", folder)[0]
    assert errors.read_text() == "mine"


def test_parts_of_a_job_array(run, folder, tmp_path):
    found = []
    for part in range(3):
        status, _ = run("--dir", folder, "--part", f"{part}/3")
        assert status == 0
        out = tmp_path / f"out-{part:05}-of-00003.jsonl"
        found += [json.loads(line)["image"] for line in out.read_text().splitlines()]
    assert sorted(found) == sorted(map(str, folder.rglob("*.png"))) and not (tmp_path / "out.jsonl").exists()
    assert "has nothing to describe" in run(IMAGES[0], "--part", "1/2")[0]


def test_a_file_for_each_shard(golden_config, tmp_path):
    shards = []
    for number in range(3):
        shards.append(tmp_path / f"{number:05}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            tar.add(IMAGES[number], f"{IMAGES[number].stem}.png")
    out = tmp_path / "captions"
    command = ["caption", "--out-dir", str(out), "--cfg-path", str(golden_config), "--max-new-tokens", "2", "--shards"]
    assert main([*command, str(tmp_path / "{00000..00002}.tar"), "--part", "1/2"]) == 0
    assert [path.name for path in sorted(out.glob("0*.jsonl"))] == ["00001.jsonl"]
    assert main([*command, str(tmp_path / "{00000..00002}.tar")]) == 0
    for number, shard in enumerate(shards):
        (line,) = (out / f"{number:05}.jsonl").read_text().splitlines()
        assert json.loads(line)["image"] == f"{shard}/{IMAGES[number].stem}.png"
    (tmp_path / "more").mkdir()
    other = shutil.copy(shards[0], tmp_path / "more" / "00000.tar")
    assert "have the same name" in main([*command, str(shards[0]), str(other)])


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
        ([str(IMAGES[0]), "--out", str(ROOT / "train.py" / "out.jsonl")], "train.py/out.jsonl cannot be written"),
        ([str(IMAGES[0]), "--out", "/dev/null"], "--out /dev/null is no file that can be written"),
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
        (["a.png", "--workers", "0"], "--workers 0 must be more than 0"),
        (["a.png", "--part", "4/4"], "'4/4' is not I/N with I from 0 to N - 1"),
        (["a.png", "--out-dir", "x"], "--out-dir writes a file for each shard"),
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
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl", "out.jsonl.settings.json"]


OTHERS = {
    "json": b'{"accuracy": 0.9}',
    "note": b"line 1\nline 2",
    "brace": b"{",
    "start of a caption": b'{"image": "a.png", "boxes": [1',
    "captions and a note": b'{"image": "a", "caption": "b"}\nline 2',
    "no caption": b'{"image": "a"}',
    "list": b"[1]",
    "data set": b'{"image": "a", "caption": "b", "id": 3}\n{"image": "c", "caption": "d", "id": 4}\n',
    "jpeg": picture_bytes(0, size=32, format="JPEG"),
    "blank": b"\n",
    "deep": b"[" * 100_000,
    "an image that is a list": b'{"image": ["a"], "caption": "b"}\n',
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.part0", "out.jsonl.settings.json"])
def test_files_of_others_stay_as_they_are(golden_config, tmp_path, monkeypatch, name, content):
    monkeypatch.setattr("minigpt4.conversation.loading.load_chat", lambda *_: pytest.fail("loaded the model"))
    path = tmp_path / name
    path.write_bytes(content)
    message = main(["caption", str(IMAGES[0]), "--out", f"{tmp_path}/out.jsonl", "--cfg-path", str(golden_config)])
    assert str(tmp_path / "out.jsonl") in message
    assert path.read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} - {golden_config.name} == {name}  # nothing is left beside it


def test_captions_of_other_settings_are_not_mixed(run, tmp_path, monkeypatch):
    """The message names the settings that differ."""
    run(*IMAGES[:2], "--prompt", "<ImageHere> is")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    message, _ = run(*IMAGES, "--prompt", "<ImageHere> has", "--frames", 3)
    assert "prompt: '<ImageHere> is' there, '<ImageHere> has' here" in message and "frames: 8 there, 3 here" in message
    message, _ = run(*IMAGES, "--prompt", "<ImageHere> is", "--options", "model.max_txt_len=77")
    assert "\n  model.max_txt_len: " in message and message.endswith(" there, 77 here")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before
    status, lines = run(*IMAGES, "--prompt", "<ImageHere> is", "--batch-size", 1)
    assert (status, len(lines)) == (0, len(IMAGES))
    (tmp_path / "out.jsonl").unlink()
    status, lines = run(IMAGES[0], "--prompt", "<ImageHere> has")
    assert (status, len(lines)) == (0, 1)
    message, _ = run(IMAGES[0], "--prompt", "<ImageHere> is")
    assert "prompt: '<ImageHere> has' there" in message


def test_an_edited_prompt_file_is_another_prompt(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    options = ["--options", f"model.prompt_path={prompts}", "model.prompt_template={}"]
    prompts.write_text("A comment\n<ImageHere> is\n<ImageHere> has\n")
    assert run(IMAGES[0], *options)[0] == 0
    prompts.write_text("<ImageHere> is\n")
    assert run(IMAGES[1], *options)[0] == 0
    prompts.write_text("<ImageHere> has\n")
    assert "prompt: '<ImageHere> is' there, '<ImageHere> has' here" in run(IMAGES[2], *options)[0]


def test_a_file_of_before_there_were_settings_files_is_continued(run, tmp_path, caplog):
    (tmp_path / "out.jsonl").write_text(json.dumps({"image": str(IMAGES[0]), "caption": "Of before."}))
    status, lines = run(*IMAGES[:2])
    assert (status, [line["image"] for line in lines]) == (0, [str(path) for path in IMAGES[:2]])
    assert lines[0]["caption"] == "Of before." and "has no settings file" in caplog.text


def test_a_second_run_cannot_have_the_same_file(run, tmp_path):
    _, lines = run(IMAGES[0])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "out.jsonl")
    with only_run(tmp_path / "out.jsonl"):
        message, same = run(*IMAGES)
        assert "another run is writing there" in message and same == lines
        message, same = run(*IMAGES, "--out", tmp_path / "link.jsonl")
        assert "another run is writing there" in message and same == lines
    assert run(*IMAGES)[0] == 0


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_shards_and_read_no_picture_twice(tmp_path, monkeypatch, ranks):
    """Nor the content of a picture that has its caption already."""
    shards = [tmp_path / f"{number}.tar" for number in range(5)]
    for number, shard in enumerate(shards):
        with tarfile.open(shard, "w") as tar:
            for path in IMAGES[:3]:
                tar.add(path, f"{number}{path.name}")
                tar.add(ROOT / "train.py", f"{number}{path.stem}.json")
                tar.add(ROOT / "train.py", f"{number}{path.stem}.npz")
    opened, read = [], []
    open_tar, extract = tarfile.open, tarfile.TarFile.extractfile
    monkeypatch.setattr(tarfile, "open", lambda path: opened.append(path) or open_tar(path))
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda tar, m: read.append(m.name) or extract(tar, m))
    names = [f"{shard}/{number}{path.name}" for number, shard in enumerate(shards) for path in IMAGES[:3]]
    done, seen, passed = set(names[::2]), [], Counter()
    for rank in range(ranks):
        sources = named_sources([], None, list(map(str, shards)))
        for name, content in sources.share(done, rank, ranks)[1]:
            seen.append(name)
            assert content == IMAGES[[path.name for path in IMAGES].index(name.rsplit("/", 1)[1][1:])].read_bytes()
        passed += sources.passed_in_shards
    assert sorted(seen) == names[1::2]
    assert len(read) == len(seen)
    assert len(opened) == 5 // ranks * ranks + 5 % ranks * ranks  # the last ones are read by all
    assert passed == {".npz": 15}


def test_folders_are_read_by_content(run, folder, tmp_path, caplog):
    """Whatever the suffix. Linked folders are read once, and links in a circle end."""
    for name in ("a.jfif", "b.JPE", "no_suffix", "deep/c.dat"):
        (folder / name).write_bytes(picture_bytes(0, size=32, format="JPEG"))
    for name, form in (("d.avif", "AVIF"), ("avif", "AVIF"), ("e.tif", "TIFF"), ("f.tiff", "TIFF"), ("tiff.1", "TIFF")):
        (folder / name).write_bytes(picture_bytes(0, size=32, format=form))
    for name in ("notes.txt", "more.TXT", "table.csv", "README", "._a.jfif"):
        (folder / name).write_text("no picture")
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.png")
    other = tmp_path / "other"
    (other / "sub").mkdir(parents=True)
    for path in (other / "x.png", other / "sub" / "y.png"):
        shutil.copy(IMAGES[0], path)
    for link, target in {
        "linked": other, "again": other, "sub": other / "sub", "itself": folder, "up": tmp_path, "root": "/",
        "deep/back": folder, "gone": tmp_path / "nothing",
    }.items():  # fmt: skip
        (folder / link).symlink_to(target)
    (other / "sub" / "circle").symlink_to(folder / "linked")
    status, lines = run("--dir", folder)
    assert status == 0
    names = {line["image"].removeprefix(f"{folder}/") for line in lines}
    own = {str(path.relative_to(folder)) for path in folder.rglob("*.png") if path.name in {p.name for p in IMAGES}}
    others = {"a.jfif", "b.JPE", "no_suffix", "deep/c.dat", "d.avif", "avif", "e.tif", "f.tiff", "tiff.1"}
    assert names == own | others | {"again/x.png", "again/sub/y.png"}
    assert len(lines) == len(names)
    said = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("Passed over"))
    for part in ("2 × .txt", "1 × .csv", "1 × without suffix", "1 × .jfif", "3 × not a file"):
        assert part in said


def test_pictures_that_only_look_so_and_empty_folders(run, tmp_path, caplog):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.heic").write_text("no picture")
    (tmp_path / "d" / "photo").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (tmp_path / "d" / "b.png").symlink_to(tmp_path / "nothing")
    status, lines = run("--dir", tmp_path / "d")
    assert (status, lines) == (1, [])
    assert "Skipped, 3 in all" in caplog.text
    assert all(f"{tmp_path}/d/{name}: " in caplog.text for name in ("a.heic", "b.png", "photo"))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "c.pdf").write_text("no picture")
    assert run("--dir", tmp_path / "e")[0] == (
        f"Error: --dir {tmp_path}/e holds no pictures or videos. It has other files: 1 × .pdf."
    )


def test_a_last_caption_without_its_end_is_kept(tmp_path):
    path, line = tmp_path / "file", '{"image": "a", "caption": "b"}'
    path.write_text(line)
    assert whole_lines(path, LINES) == [f"{line}\n".encode()]
    assert path.read_text() == f"{line}\n"


@pytest.mark.parametrize("rest", ["", "{", '{"image": "b', '{"image": "b", "caption": "c'])
def test_a_line_that_was_cut_off_is_written_again(tmp_path, rest):
    path, whole = tmp_path / "file", '{"image": "a", "caption": "b"}\n'
    path.write_text(whole + rest)
    assert whole_lines(path, LINES) == [whole.encode()]
    assert path.read_text() == whole


def test_a_folder_that_cannot_be_listed_is_reported(run, folder, caplog, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (folder / "secret").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    status, lines = run("--dir", folder)
    assert (status, len(lines)) == (1, len(IMAGES))
    assert f"{folder}/secret: " in caplog.text
