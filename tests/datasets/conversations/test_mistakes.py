"""A mistake in a user's file gives one error that names the place, what stands there, and the fix."""

import json
import re
import sys
from pathlib import Path

import pytest
from dataset_files import write_tar

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.conversations.formats import read_records
from minigpt4.datasets.conversations.stream import ConversationStream

GOOD = {"image": "a.jpg", "caption": "A cat."}


def chat(*pairs: tuple[str, object]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


def openai(*pairs: tuple[str, object], **rest) -> list[dict]:
    """A list with one record; the keys in `rest` belong to its last message."""
    messages = chat(*pairs)
    messages[-1] |= rest
    return [{"messages": messages}]


def image_url(*url: str) -> list[dict]:
    return [{"type": "image_url", **({"image_url": {"url": url[0]}} if url else {})}]


def llava(*pairs: tuple[str, str], **rest) -> dict:
    return {"id": "1", "conversations": [{"from": role, "value": value} for role, value in pairs], **rest}


def mistake(path: Path | str, **options) -> str:
    with pytest.raises(ConfigError) as error:
        read_records(str(path), **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"picture")
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("[1]", ["[1]", "{…}"]),
        ('"text"', ["'text'", "{…}"]),
        ('{"image": "a.jpg", "caption": "x"', ["JSON", "delimiter"]),
        ('{"caption": ' + "[" * 100_000, ["nested too deeply"]),
        (b'{"image": "a.jpg", "caption": "\xe9cole"}', ["UTF-8", "\\xe9cole", "iconv"]),
        ({"image": "a.jpg"}, ["'image'", "'caption'"]),
        ({}, ["keys []", "'caption'"]),
        ({"caption": "x"}, ["no picture", "'image'"]),
        ({"image": "a.jpg", "caption": 7}, ["has 7", "text"]),
        ({"image": "a.jpg", "caption": ""}, ["nothing in message 2"]),
        ({"image": "a.jpg", "prompt": "Q"}, ["['image', 'prompt']", "'answer'"]),
        ({"prompt": "", "answer": "A"}, ["nothing in message 1"]),
        ({"image": 5, "caption": "x"}, ["5", "path"]),
        ({"image": "none.jpg", "caption": "x"}, ["'none.jpg'", "FOLDER/none.jpg", "--images"]),
        ({"image": "c/a.jpg", "caption": "x"}, ["FOLDER/c/a.jpg"]),
        ({"image": "folder.jpg", "caption": "x"}, ["FOLDER/folder.jpg"]),
        ({"image": "/none/a.jpg", "caption": "x"}, ["no file /none/a.jpg"]),
        ({"image": "a\0.jpg", "caption": "x"}, ["no file"]),
        ({"image": "", "prompt": "<image>", "answer": "x"}, ["0 pictures", "1 place for"]),
        ({"image": "http://x.org/a.jpg", "caption": "x"}, ["http://x.org/a.jpg", "Download"]),
        ({"image": "data:image/png;base64,@@", "caption": "x"}, ["data:image/png;base64"]),
        ({"images": ["a.jpg", "b.jpg"], "caption": "x"}, ["2 pictures", "0 places", "<image>"]),
        ({"images": ["a.jpg"], "prompt": "<image> <image>", "answer": "x"}, ["1 picture and", "2 places"]),
        ({"messages": []}, ["'messages'", "role"]),
        ({"messages": "hello"}, ["'hello'", "role"]),
        ({"messages": [{"from": "human", "value": "x"}]}, ["message 1", "'role'"]),
        ({"messages": chat(("tool", "x"))}, ["'tool'", "message 1", "assistant"]),
        ({"messages": chat((["user"], "x"))}, ["['user']", "message 1"]),
        ({"messages": chat(("user", "x"))}, ["no answer at its end", "in turn"]),
        ({"messages": chat(("assistant", "x"))}, ["message 1 of assistant", "user belongs"]),
        ({"messages": chat(("system", "x"))}, ["no answer at its end"]),
        (
            {"messages": chat(("user", "a"), ("user", "b"), ("assistant", "c"))},
            ["message 2 of user", "assistant belongs"],
        ),
        ({"messages": chat(("user", "a"), ("assistant", "b"), ("user", "c"))}, ["no answer at its end"]),
        ({"messages": chat(("user", "a"), ("system", "s"), ("assistant", "c"))}, ["message 2 of system"]),
        (
            {"system": "s", "messages": chat(("system", "s"), ("user", "a"), ("assistant", "c"))},
            ["message 2 of system", "one system text"],
        ),
        ({"messages": chat(("user", None), ("assistant", "c"))}, ["None", "list of parts"]),
        ({"messages": chat(("user", [{"type": "video"}]), ("assistant", "c"))}, ["'video'", '"image"']),
        ({"messages": chat(("user", ["x"]), ("assistant", "c"))}, ["'x'", '"text"']),
        ({"messages": chat(("user", [{"type": "text", "text": None}]), ("assistant", "c"))}, ["None", '"text"']),
        ({"image": "a.jpg", "messages": chat(("user", "x"), ("gpt", "<image>"))}, ["picture", "message 2"]),
    ],
)
def test_jsonl(folder, record, words):
    path = folder / "my.jsonl"
    line = record if isinstance(record, bytes) else (record if isinstance(record, str) else json.dumps(record)).encode()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n" + json.dumps(GOOD).encode() + b"\n")
    message = mistake(path, format="jsonl")
    assert message.startswith(f"{path} line 3 ")
    for word in words:
        assert word.replace("FOLDER", str(folder)) in message


def test_the_lead_decides_what_is_fatal(folder):
    path = folder / "my.jsonl"
    path.write_text("\n".join(map(json.dumps, [GOOD, {"image": "none.jpg", "caption": "x"}, {"caption": 5}, GOOD])))
    _, records = read_records(str(path), check=False)
    kinds = [isinstance(each, ConfigError) for each in records.checked()]
    assert kinds == [False, True, True, False]
    assert records[1].where == f"{path} line 2"  # pictures are looked for once, at the start
    with pytest.raises(ConfigError, match="line 3"):
        records[2]


@pytest.mark.parametrize(
    ("format", "content", "place", "word"),
    [
        ("llava", [llava(("human", "Q"), ("gpt", "A")), llava(("human", "<image>"))], "record 2, line 1", "0 pictures"),
        ("llava", [llava(("gpt", "A"), ("human", "Q"))], "record 1, line 1", "message 1 of assistant"),
        ("llava", [{"id": 1, "conversation": []}], "record 1, line 1", "'conversations'"),
        ("sharegpt", [llava(("human", "Q"), ("observation", "A"))], "record 1, line 1", "'observation'"),
        ("sharegpt", [{"conversations": [{"from": "human"}]}], "record 1, line 1", "'value'"),
        ("openai", openai(("user", "Q"), ("tool", "A")), "record 1, line 1", "'tool'"),
        ("openai", openai(("user", "Q")), "record 1, line 1", "no answer"),
        ("openai", openai(("user", "Q"), ("assistant", "A"), weight=0), "record 1, line 1", "weight"),
        ("openai", openai(("user", image_url("https://x.org/a.png")), ("gpt", "A")), "record 1, line 1", "Download"),
        ("openai", openai(("user", image_url()), ("assistant", "A")), "record 1, line 1", "None"),
        ("llava", '[\n {"id": 1},\n {"id": 2\n]', "record 2, line 4", "JSON"),
        ("llava", '[\n {"conversations": [{"from": "human", "value": "Q"}]}\n {"id": 2}]', "record 1, line 3", "','"),
        ("llava", '[{"id": 1}', "record 1, line 1", "']'"),
        ("llava", '[{"id": 1}] [{"id": 2}]', "record 1, line 1", "id"),
        ("llava", '[{"id": 1},]', "record 2, line 1", "JSON"),
        ("llava", '[\n\n' + '[' * 100_000, "record 1, line 3", "nested too deeply"),
        ("llava", '[\n\n"x"]', "record 1, line 3", "'x'"),
        ("llava", b'[\n{"conversations": [{"from": "human", "value": "\xe9cole"}]}]', "record 1, line 2", "iconv"),
        ("llava", '{"id": 1}\n{"id": 2', "line 1", "'conversations'"),
        ("csv", "image,caption\na.jpg,x\na.jpg,x,y\n", "line 3", "3 fields"),
        ("csv", "image,caption\na.jpg,x\na.jpg\n", "line 3", "1 fields"),
        ("csv", 'image,caption\na.jpg,x\na.jpg,"x\na.jpg,x\n', "line 3", "quotation mark"),
        ("csv", 'image,caption\na.jpg,"x" y\n', "line 2", "quotation mark"),
        ("csv", b"image,caption\na.jpg,x\na.jpg,\xe9cole\n", "line 3", "iconv"),
        ("csv", "image,caption\na.jpg,x\nnone.jpg,x\n", "line 3", "none.jpg"),
        ("csv", "image,caption\na.jpg,x\na.jpg,\n", "line 3", "nothing in message 2"),
        ("csv", "image,question,answer\n,,x\n", "line 2", "nothing in message 1"),
        ("tsv", "image\tcaption\na.jpg\tx\na.jpg x\n", "line 3", "1 fields"),
        ("flickr", "a.jpg#0\tx\na.jpg#1 x\n", "line 2", "tab"),
        ("flickr", "a.jpg#0\tx\nb.jpg.1#1\tx\n", "line 2", "b.jpg.1"),
        # The 20,000th line of Flickr30k's own results.csv has this form.
        ("flickr", "image_name| comment_number| comment\na.jpg| 0| x\na.jpg| 4   A dog runs .\n", "line 3", "2 fields"),
    ],
)  # fmt: skip
def test_other_text_files(folder, format, content, place, word):
    path = folder / "data.txt"
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = mistake(path, format=format)
    assert message.startswith(f"{path} {place}") and word in message


@pytest.mark.parametrize("content", ["", " \n\n", "[]", "[ \n ]"])
@pytest.mark.parametrize("format", ["jsonl", "llava"])
def test_no_records(folder, content, format):
    (folder / "my.json").write_text(content)
    assert "no records" in mistake(folder / "my.json", format=format)


def test_tables(folder):
    path = folder / "my.csv"
    path.write_text("picture,words\na.jpg,x\n")
    assert "['picture', 'words']" in mistake(path) and "columns" in mistake(path)
    message = mistake(path, columns={"image": "picture", "caption": "word"})
    assert "columns.caption=word" in message and "'words'" in message
    assert "columns.title" in mistake(path, columns={"title": "words"})
    path.write_text("image,caption\n")
    assert "no records" in mistake(path)
    path.write_text("")
    assert "no records" in mistake(path, format="csv")


def test_folders(folder):
    (folder / "a.txt").write_text("x")
    message = mistake(folder)
    assert message.startswith(f"{folder}/b.jpg ") and f"{folder}/b.txt" in message
    (folder / "b.txt").write_bytes(b"\xe9cole")
    assert mistake(folder).startswith(f"{folder}/b.jpg ") and "iconv" in mistake(folder)
    (folder / "b.txt").write_bytes(b"\n")
    assert "nothing in message 2" in mistake(folder)
    (folder / "other").mkdir()
    (folder / "other/x.parquet").touch()
    assert "other/*.parquet" in mistake(folder / "other")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": []}, ["lacks images", "cc_sbu_align"]),
        ({"annotations": []}, ["lacks annotations"]),
        ({"annotations": [{"image_id": "2", "caption": "x"}]}, ["lacks 'id'", "cc_sbu_align"]),
        ({"annotations": [7]}, ["lacks"]),
        ({"annotations": [{"id": 1, "image_id": 9, "caption": "x"}]}, ["annotations[0]", "image_id 9"]),
        ({"annotations": [{"id": 1, "image_id": 1, "bbox": []}]}, ["annotations[0]", "captions_*.json"]),
        ({"annotations": [{"id": 1, "caption": "x"}]}, ["'image_id'"]),
        ({"images": [{"file_name": "a.jpg"}]}, ["'id'"]),
        ({"images": [{"id": 1, "file_name": "none.jpg"}]}, ["annotations[0]", "none.jpg", "--images"]),
        ({"images": [{"id": 1}]}, ["annotations[0]", "file_name"]),
    ],
)
def test_coco(folder, change, words):
    pytest.importorskip("pycocotools")
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}
    (folder / "captions.json").write_text(json.dumps(content | change))
    message = mistake(folder / "captions.json", format="coco")
    assert message.startswith(f"{folder}/captions.json ")
    for word in words:
        assert word in message


def test_coco_that_is_no_json(folder):
    pytest.importorskip("pycocotools")
    for content in (b'{"images": [{', b'{"images": [{"file_name": "\xe9"}]}', b'{"a": ' + b"[" * 100_000, b"[]"):
        (folder / "captions.json").write_bytes(content)
        assert mistake(folder / "captions.json", format="coco").startswith(f"{folder}/captions.json ")


@pytest.mark.parametrize(
    ("module", "content"), [("pycocotools.coco", b'{"images": [{}]}'), ("pyarrow.parquet", b"PAR1")]
)
def test_packages_that_are_not_installed(folder, monkeypatch, module, content):
    monkeypatch.setitem(sys.modules, module, None)
    (folder / "data").write_bytes(content)
    message = mistake(folder / "data")
    assert f"{folder}/data" in message and message.endswith(f"pip install {module.split('.')[0]}")


def test_parquet(folder):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = folder / "x.parquet"
    pq.write_table(pa.table({"image": [b"1", None], "caption": ["a", "b"]}), path)
    assert mistake(path).startswith(f"{path} row 1 has a caption and no picture")
    pq.write_table(pa.table({"image": [b"1", b"2"], "caption": ["a", None]}), path)
    assert mistake(path).startswith(f"{path} row 1 has")
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "none.jpg"}], "caption": ["a"]}), path)
    assert f"{folder}/none.jpg" in mistake(path)
    pq.write_table(pa.table({"picture": [b"1"], "label": [3]}), path)
    assert "['picture', 'label']" in mistake(path)
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}), path)
    assert "no records" in mistake(path)
    path.write_bytes(b"PAR1 and no more")
    assert "Parquet" in mistake(path)


def test_shards_go_on_after_a_mistake(folder):
    members = [
        ("000.jpg", b"0"), ("000.json", b"{"),
        ("001.jpg", b"1"), ("001.txt", b"One"),
        ("002.jpg", b"2"),
        ("003.0.jpg", b"3"), ("003.1.jpg", b"3"), ("003.txt", b"Two pictures"),
        ("004.jpg", b"4"), ("004.1.jpg", b"4"), ("004.json", b'{"image": "x.jpg", "caption": "x"}'),
        ("005.jpg", b"5"), ("005.txt", b"\xe9cole"),
        ("006.json", b'{"image": "https://x.org/a.jpg", "caption": "x"}'),
        ("007.jpg", b"7"), ("007.txt", b"Seven"),
    ]  # fmt: skip
    path = write_tar(folder / "0.tar", members)
    _, records = read_records(str(path))
    stream, found = ConversationStream(records, str, "mine"), []
    stream.read.drop = lambda cause, where, detail: found.append(detail.partition(f"{path} member ")[2] or detail)
    assert [raw.record.messages[1].parts[0] for raw in stream.part(0)] == ["One", "Seven"]
    words = ["000 is not JSON", "002 has .jpg", "003 names 2 pictures", "004 has the picture 'x.jpg'"]
    words += ["005 is not text in UTF-8", "006 has the picture 'https://x.org/a.jpg'. Download"]
    assert all(text.startswith(word) for text, word in zip(sorted(found), words, strict=True)), found


def test_shards_that_are_not_there(folder):
    with pytest.raises(FileNotFoundError, match="datasets.mine.build_info.storage"):
        read_records(str(folder / "{0..3}.tar"), name="mine")


def test_storage(folder):
    (folder / "my.jsonl").write_text(json.dumps(GOOD))
    (folder / "words.txt").write_text("Hello world\n")
    (folder / "keys.json").write_text('{"picture": "a.jpg", "words": "x"}')
    write_tar(folder / "0.tar", [])
    assert f"{folder}/none.jsonl" in mistake(folder / "none.jsonl", name="mine")
    assert "datasets.mine.build_info.storage" in mistake(folder / "none.jsonl", name="mine")
    assert "build_info.storage" in mistake("")
    with pytest.raises(ConfigError, match="Make them two datasets"):
        read_records([f"{folder}/my.jsonl", f"{folder}/0.tar"])
    assert "'Hello world" in mistake(folder / "words.txt") and "docs/own_data.md" in mistake(folder / "words.txt")
    assert "keys.json is of no known format" in mistake(folder / "keys.json")
    assert "build_info.format=lava" in mistake(folder / "my.jsonl", format="lava")
    assert "'llava'" in mistake(folder / "my.jsonl", format="lava")
    assert "build_info.format=coco" in mistake(folder, format="coco")
    assert "build_info.format=folder" in mistake(folder / "my.jsonl", format="folder")
    assert f"{folder}/none" in mistake(folder / "my.jsonl", images=f"{folder}/none")


def test_a_file_that_changes_meanwhile(folder):
    path = folder / "my.jsonl"
    path.write_text(json.dumps(GOOD))
    _, records = read_records(str(path))
    path.write_text(json.dumps(GOOD | {"caption": "Another cat."}))
    with pytest.raises(ConfigError, match="has changed"):
        records[0]


def test_two_messages_of_a_user_of_which_one_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    messages = chat(("user", None), ("user", "Q"), ("assistant", "A"))
    path.write_text(json.dumps({"messages": messages}))
    assert "line 1 has None for a text" in mistake(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image,caption,caption\na.jpg,first,second\n", "several columns 'caption'"),
        ("image,caption\ra.jpg,x\r", "line 1.*carriage return"),
        (" \n\n", "is empty"),
    ],
)
def test_broken_tables(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert re.search(words, mistake(tmp_path / "a.csv"))


def test_values_that_are_no_paths(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\nQ,A\n")
    assert "build_info.images=5" in mistake(tmp_path / "a.csv", images=5)
    for storage in (5, True):
        with pytest.raises(ConfigError, match=f"storage={storage} names no file"):
            read_records(storage)


def test_a_row_group_that_is_broken(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    rows = {"prompt": [f"Question {number}" for number in range(300)], "answer": ["A"] * 300}
    parquet.write_table(table(rows), tmp_path / "a.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[20:800] = b"\xff" * 780
    (tmp_path / "a.parquet").write_bytes(content)
    assert "row 0 is in a part of the file that is broken" in mistake(tmp_path / "a.parquet").replace("\n", " ")
