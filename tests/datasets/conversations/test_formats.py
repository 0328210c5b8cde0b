"""Each format as its own documentation shows it, made by hand, with the exact records."""

import base64
import codecs
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from dataset_files import picture_bytes, write_tar

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.conversations.formats import read_records
from minigpt4.datasets.conversations.record import Message, Picture, Record
from minigpt4.datasets.conversations.stream import ConversationStream

PIXEL = b"\x89PNG not opened here"


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PIXEL)


def at(folder: Path, name: str) -> Picture:
    return Picture(f"{folder}/{name}")


def turns(*contents, system: str | None = None) -> tuple[Message, ...]:
    """Messages of user and assistant in turn; a content is a text, a picture or a tuple of these."""
    messages = [Message("system", (system,))] if system else []
    for number, content in enumerate(contents):
        parts = content if isinstance(content, tuple) else (content,)
        messages.append(Message("assistant" if number % 2 else "user", parts))
    return tuple(messages)


def messages_of(records) -> list[tuple[Message, ...]]:
    return [record.messages for record in records]


def lines(*items) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def chat(*contents: str, names=("from", "value"), roles=("human", "gpt")) -> list[dict]:
    return [{names[0]: roles[number % 2], names[1]: content} for number, content in enumerate(contents)]


# Ours


def test_jsonl(tmp_path):
    pictures(tmp_path, "cat.jpg", "sub/dog.png")
    items = [
        {"image": "cat.jpg", "caption": "A cat on a red sofa."},
        {"id": "q7", "image": "cat.jpg", "prompt": "Which animal?", "answer": "A cat."},
        {"id": 8, "prompt": "What is 1 + 1?", "answer": "2"},
        {
            "images": ["cat.jpg"],
            "messages": chat("Colour?", "Red.", names=("role", "content"), roles=("user", "model")),
        },
        {
            "images": ["cat.jpg", "sub/dog.png"],
            "messages": [
                {"role": "system", "content": "Answer briefly."},
                {"role": "user", "content": "<image> and <image>: what differs?"},
                {"role": "assistant", "content": "The animal. <3 日本 🐈"},
                {"role": "user", "content": [{"type": "text", "text": "Is <image> a tag?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            ],
        },
        {
            "images": ["sub/dog.png", "cat.jpg"],
            "system": "Be kind.",
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}, {"type": "image"}]},
                {"role": "assistant", "content": "Both."},
            ],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "cat.jpg"}]},
                {"role": "assistant", "content": "Cat"},
            ]
        },
        {"image": "cat.jpg", "prompt": "", "answer": " as it is \n"},
        {"image": "cat.jpg", "prompt": "Describe.", "caption": "A cat."},
        {"image": "cat.jpg", "prompt": "Before\n<image>", "answer": "<image>"},
        {"image": "cat.jpg", "caption": "The tag <image>"},
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("\n" + lines(*items), encoding="utf-8")
    format, records = read_records(str(path))
    cat, dog = at(tmp_path, "cat.jpg"), at(tmp_path, "sub/dog.png")
    assert format == "jsonl" and len(records) == 11
    assert messages_of(records) == [
        turns(cat, "A cat on a red sofa."),
        turns((cat, "Which animal?"), "A cat."),
        turns("What is 1 + 1?", "2"),
        turns((cat, "Colour?"), "Red."),
        turns(
            (cat, " and ", dog, ": what differs?"),
            "The animal. <3 日本 🐈",
            "Is <image> a tag?",
            "Yes.",
            system="Answer briefly.",
        ),
        turns((dog, "?", cat), "Both.", system="Be kind."),
        turns(cat, "Cat"),
        turns(cat, " as it is \n"),
        turns((cat, "Describe."), "A cat."),
        turns(("Before\n", cat), "<image>"),
        turns(cat, "The tag <image>"),
    ]
    assert (records[1].id, records[2].id) == ("q7", "8")
    assert (records[0].where, records[-1].where) == (f"{path} line 2", f"{path} line 12")
    with pytest.raises(IndexError):
        records[11]


def test_a_list_of_ours(tmp_path):
    pictures(tmp_path, "a.jpg")
    path = tmp_path / "my.json"
    path.write_text(
        '[\n {"image": "a.jpg",\n  "caption": "é"} ,\n\n {"image": "a.jpg", "caption": "]"}\n]\n', encoding="utf-8"
    )
    format, records = read_records(str(path))
    assert format == "jsonl"
    assert messages_of(records) == [turns(at(tmp_path, "a.jpg"), "é"), turns(at(tmp_path, "a.jpg"), "]")]
    assert [record.where for record in records] == [f"{path} record 1, line 2", f"{path} record 2, line 5"]


# LLaVA, ShareGPT, OpenAI, each as a JSON list and as lines


@pytest.fixture(params=["list", "lines"])
def write(request, tmp_path):
    """Writes records and returns the path: a JSON list with indentation, or a .json that holds lines."""

    def write(*items) -> str:
        path = tmp_path / "data.json"
        text = json.dumps(items, indent=2) if request.param == "list" else lines(*items)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_llava(tmp_path, write):
    pictures(tmp_path, "coco/train2017/000000033471.jpg", "b.png")
    bus = "coco/train2017/000000033471.jpg"
    path = write(
        {
            "id": "000000033471",
            "image": bus,
            "conversations": chat("<image>\nWhat are the colors of the bus?", "White and red.", "Stopped?", "No."),
        },
        {"id": "2", "image": bus, "conversations": chat("What is it?\n<image>", "A bus.")},
        {"id": "text", "conversations": chat("Who wrote Faust?", "Goethe.")},
        {"id": "none", "image": bus, "conversations": chat("No place.", "It stands first.", "And?", "Yes.")},
        {"id": "two", "image": [bus, "b.png"], "conversations": chat("<image><image>\nCompare.", "Equal.")},
        {"id": "later", "image": "b.png", "conversations": chat("Hello", "Hi", "And <image>?", "A b.")},
    )
    format, records = read_records(path)
    bus, b = at(tmp_path, bus), at(tmp_path, "b.png")
    assert format == "llava"
    assert messages_of(records) == [
        turns((bus, "\nWhat are the colors of the bus?"), "White and red.", "Stopped?", "No."),
        turns(("What is it?\n", bus), "A bus."),
        turns("Who wrote Faust?", "Goethe."),
        turns((bus, "No place."), "It stands first.", "And?", "Yes."),
        turns((bus, b, "\nCompare."), "Equal."),
        turns("Hello", "Hi", ("And ", b, "?"), "A b."),
    ]
    assert list(records.ids) == ["000000033471", "2", "text", "none", "two", "later"]


def test_sharegpt(tmp_path, write):
    pictures(tmp_path, "mllm/1.jpg", "mllm/2.jpg")
    path = write(
        {"conversations": chat("<image>Who are they?", "Kane and Gretzka."), "images": ["mllm/1.jpg"]},
        {
            "conversations": chat("<image>What?", "A.", "And <image>?", "B.", names=("role", "content")),
            "images": ["mllm/1.jpg", "mllm/2.jpg"],
            "system": "You know football.",
            "tools": "",
        },
        {"conversations": [{"from": "system", "value": "Short."}, *chat("Hello", "Hi")]},
        {"conversations": chat("No picture", "None"), "images": []},
    )
    format, records = read_records(path)
    one, two = at(tmp_path, "mllm/1.jpg"), at(tmp_path, "mllm/2.jpg")
    assert format == "sharegpt"
    assert messages_of(records) == [
        turns((one, "Who are they?"), "Kane and Gretzka."),
        turns((one, "What?"), "A.", ("And ", two, "?"), "B.", system="You know football."),
        turns("Hello", "Hi", system="Short."),
        turns("No picture", "None"),
    ]


def image_url(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def test_openai(tmp_path, write):
    pictures(tmp_path, "art.png", "a b.png")
    data = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    system = {"role": "system", "content": "You identify artworks."}
    answer = {"role": "assistant", "content": "The Kiss, by Klimt."}
    path = write(
        # OpenAI's own example has two messages of the user in a row.
        {
            "messages": [
                system,
                {"role": "user", "content": "Describe this artwork."},
                {"role": "user", "content": [image_url(data)]},
                answer,
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}, image_url("art.png")]}, answer]},
        {"messages": [{"role": "user", "content": [image_url((tmp_path / "a b.png").as_uri())]}, answer]},
        {"messages": [{"role": "user", "content": "Is <image> a tag?"}, answer]},
        {
            "messages": [
                {"role": "user", "content": [image_url("art.png"), image_url(data), {"type": "text", "text": "Both?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Both."}]},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes.", "weight": 1},
            ]
        },
    )
    format, records = read_records(path)
    art, kiss = at(tmp_path, "art.png"), "The Kiss, by Klimt."
    assert format == "openai"
    assert messages_of(records) == [
        turns(("Describe this artwork.", Picture(PIXEL)), kiss, system="You identify artworks."),
        turns(("Who?", art), kiss),
        turns(at(tmp_path, "a b.png"), kiss),
        turns("Is <image> a tag?", kiss),
        turns((art, Picture(PIXEL), "Both?"), "Both.", "Sure?", "Yes."),
    ]


# Tables and lines of captions


def test_csv(tmp_path):
    pictures(tmp_path, "a.jpg", "b.jpg")
    path = tmp_path / "vqa.csv"
    rows = ['a.jpg,"Two lines\r\nof ""text"", really",Yes.,7', "", 'b.jpg,Ünï?,"a,b",x', ",No picture?,None,"]
    text = "\r\n".join(["image,question,answer,id", *rows, ""])
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    format, records = read_records(str(path))
    assert format == "csv"
    assert messages_of(records) == [
        turns((at(tmp_path, "a.jpg"), 'Two lines\r\nof "text", really'), "Yes."),
        turns((at(tmp_path, "b.jpg"), "Ünï?"), "a,b"),
        turns("No picture?", "None"),
    ]
    assert [record.where for record in records] == [f"{path} line {line}" for line in (2, 5, 6)]
    assert list(records.ids)[:2] == ["7", "x"] and len(records.ids[2]) == 16


def test_a_table_of_questions_and_captions(tmp_path):
    pictures(tmp_path, "a.jpg")
    path = tmp_path / "both.csv"
    path.write_text("image,caption,question,answer\na.jpg,A cat.,,\na.jpg,,Which?,This.\n")
    _, records = read_records(str(path))
    here = at(tmp_path, "a.jpg")
    assert messages_of(records) == [turns((here,), "A cat."), turns((here, "Which?"), "This.")]


def test_tsv_with_named_columns(tmp_path):
    pictures(tmp_path, "pics/a.jpg")
    path = tmp_path / "vqa.tsv"
    path.write_text("file_name\twhat\tlabel\na.jpg\tColour, please?\tred\na.jpg\tKind?\tcat\n")
    columns = {"image": "file_name", "prompt": "what", "answer": "label"}
    format, records = read_records(str(path), images=str(tmp_path / "pics"), columns=columns)
    picture = at(tmp_path, "pics/a.jpg")
    assert format == "tsv"
    assert messages_of(records) == [turns((picture, "Colour, please?"), "red"), turns((picture, "Kind?"), "cat")]


def test_named_columns_win(tmp_path):
    pictures(tmp_path, "a.jpg", "b.jpg")
    path = tmp_path / "x.csv"
    path.write_text("path,Image,question,answer,text,label\nb.jpg,a.jpg,Q,A,T,L\n")
    a = at(tmp_path, "a.jpg")
    assert messages_of(read_records(str(path))[1]) == [turns((a, "Q"), "A")]
    assert messages_of(read_records(str(path), columns={"caption": "label"})[1]) == [turns(a, "L")]
    named = {"image": "path", "prompt": "text", "answer": "label"}
    assert messages_of(read_records(str(path), columns=named)[1]) == [turns((at(tmp_path, "b.jpg"), "T"), "L")]
    with pytest.raises(ConfigError, match="columns is for tables"):
        read_records(str(tmp_path), columns=named)


def test_a_table_with_semicolons_and_huggingface_names(tmp_path):
    pictures(tmp_path, "0001.png")
    (tmp_path / "metadata.csv").write_text("file_name;text\n0001.png;This is a golden retriever, playing\n")
    format, records = read_records(str(tmp_path / "metadata.csv"))
    assert format == "csv"
    assert messages_of(records) == [turns(at(tmp_path, "0001.png"), "This is a golden retriever, playing")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Flickr30k.token", "1000092795.jpg#0\tTwo young guys .\n"
         '1000092795.jpg#1\t"Men" in a yard .\n36979.jpg#0\tA child\n'),
        ("results.csv", "image_name| comment_number| comment\n1000092795.jpg| 0| Two young guys .\n"
         '1000092795.jpg| 1| "Men" in a yard .\n36979.jpg| 0| A child\n'),
        ("results_comma.csv", "image_name,comment_number,comment\n1000092795.jpg,0,Two young guys .\n"
         '1000092795.jpg,1,"""Men"" in a yard ."\n36979.jpg,0,A child\n'),
    ],
)  # fmt: skip
def test_flickr(tmp_path, name, content):
    pictures(tmp_path, "flickr30k-images/1000092795.jpg", "flickr30k-images/36979.jpg")
    (tmp_path / name).write_text(content)
    format, records = read_records(str(tmp_path / name), images=str(tmp_path / "flickr30k-images"))
    guys, child = (at(tmp_path, f"flickr30k-images/{n}.jpg") for n in ("1000092795", "36979"))
    assert format == "flickr"
    assert messages_of(records) == [
        turns(guys, "Two young guys ."),
        turns(guys, '"Men" in a yard .'),
        turns(child, "A child"),
    ]
    if name == "Flickr30k.token":
        assert list(records.ids) == ["1000092795.jpg#0", "1000092795.jpg#1", "36979.jpg#0"]


def test_flickr8k_captions(tmp_path):
    pictures(tmp_path, "a.jpg")
    (tmp_path / "captions.txt").write_text('image,caption\na.jpg,A child .\na.jpg,"A girl , going in ."\n')
    format, records = read_records(str(tmp_path / "captions.txt"))
    assert format == "csv"
    assert messages_of(records) == [turns(at(tmp_path, "a.jpg"), t) for t in ("A child .", "A girl , going in .")]


def test_folder(tmp_path):
    pictures(tmp_path, "a.jpg", "sub/b.PNG", "sub/._b.PNG", ".hidden/c.jpg", "v1.0.webp")
    (tmp_path / "a.txt").write_bytes("\ufeffÄ cat\r\n".encode())
    (tmp_path / "sub/b.txt").write_bytes("Zwei\nZeilen\n".encode("utf-16"))
    (tmp_path / "v1.0.txt").write_text(" {x} \n")
    format, records = read_records(str(tmp_path))
    assert format == "folder"
    assert messages_of(records) == [
        turns(at(tmp_path, "a.jpg"), "Ä cat"),
        turns(at(tmp_path, "v1.0.webp"), " {x} "),
        turns(at(tmp_path, "sub/b.PNG"), "Zwei\nZeilen"),
    ]
    assert list(records.ids) == ["a.jpg", "v1.0.webp", "sub/b.PNG"]
    assert records[2].where == f"{tmp_path}/sub/b.PNG"


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["00000.parquet", "00000.tar", "00001.parquet", "00000_stats.json", "a.txt"], "*.tar"),
        (["x/a.jsonl", "a.txt"], "x/*.jsonl"),
        (["a.txt"], "*.parquet"),
    ],
)
def test_a_folder_without_pictures_names_the_files_that_it_has(tmp_path, names, pattern):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=re.escape(f"or as {tmp_path}/{pattern}.")):
        read_records(str(tmp_path))


def test_folder_of_texts_beside_a_folder_of_pictures(tmp_path):
    pictures(tmp_path, "images/x/a.jpg")
    (tmp_path / "texts/x").mkdir(parents=True)
    (tmp_path / "texts/x/a.txt").write_text("A cat")
    _, records = read_records(str(tmp_path / "texts"), images=str(tmp_path / "images"))
    assert messages_of(records) == [turns(at(tmp_path, "images/x/a.jpg"), "A cat")]


def coco_file() -> dict:
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"id": 1, "name": "Attribution"}],
        "images": [
            {"license": 1, "file_name": "000000397133.jpg", "height": 427, "width": 640, "id": 397133},
            {"license": 1, "file_name": "000000037777.jpg", "height": 230, "width": 352, "id": 37777},
        ],
        "annotations": [
            {"image_id": 397133, "id": 370509, "caption": "A man is in a kitchen making pizzas."},
            {"image_id": 37777, "id": 370510, "caption": "The dining table\nnear the kitchen"},
            {"image_id": 397133, "id": 370511, "caption": "Man in apron standing on front of oven"},
        ],
    }


@pytest.mark.parametrize("indent", [None, 1])
def test_coco(tmp_path, indent, capsys):
    pytest.importorskip("pycocotools")
    pictures(tmp_path, "val2017/000000397133.jpg", "val2017/000000037777.jpg")
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps(coco_file(), indent=indent))
    format, records = read_records(str(path), images=str(tmp_path / "val2017"))
    man, table = (at(tmp_path, f"val2017/000000{n}.jpg") for n in ("397133", "037777"))
    assert format == "coco" and list(records.ids) == ["370509", "370510", "370511"]
    assert messages_of(records) == [
        turns(man, "A man is in a kitchen making pizzas."),
        turns(table, "The dining table\nnear the kitchen"),
        turns(man, "Man in apron standing on front of oven"),
    ]
    assert records[1].where == f"{path} annotations[1]"
    assert capsys.readouterr().out == ""


# Parquet


def write_parquet(path: Path, columns: dict, group: int = 2) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return str(path)


def test_parquet_with_captions(tmp_path):
    rows = [{"bytes": picture_bytes(i), "path": f"{i}.png"} for i in range(5)]
    path = write_parquet(tmp_path / "0000.parquet", {"image": rows, "text": [f"Caption {i}" for i in range(5)]})
    format, records = read_records(path)
    assert format == "parquet" and len(records) == 5
    assert messages_of(records) == [turns(Picture(picture_bytes(i)), f"Caption {i}") for i in range(5)]
    assert records[3] == list(records)[3] and records[3].where == f"{path} row 3"
    assert [record.id for record in records] == list(records.ids) and len(set(records.ids)) == 5


def test_parquet_with_paths(tmp_path):
    pictures(tmp_path, "a.jpg")
    rows = [{"bytes": None, "path": "a.jpg"}, {"bytes": PIXEL, "path": "not there.jpg"}, None]
    columns = {"image": rows, "question": ["Q", "R", "S"], "answer": ["A", "B", "C"]}
    _, records = read_records(write_parquet(tmp_path / "x.parquet", columns))
    assert messages_of(records) == [
        turns((at(tmp_path, "a.jpg"), "Q"), "A"),
        turns((Picture(PIXEL), "R"), "B"),
        turns("S", "C"),
    ]
    assert [record.id for record in records] == list(records.ids)
    _, records = read_records(write_parquet(tmp_path / "y.parquet", {"image_path": ["a.jpg"], "caption": ["A"]}))
    assert messages_of(records) == [turns(at(tmp_path, "a.jpg"), "A")]
    _, records = read_records(write_parquet(tmp_path / "z.parquet", {"image": [PIXEL], "caption": ["A"]}))
    assert messages_of(records) == [turns(Picture(PIXEL), "A")]


def test_parquet_as_the_cauldron(tmp_path):
    images = [[{"bytes": b"1", "path": None}], [{"bytes": b"2", "path": None}, {"bytes": b"3", "path": None}], []]
    texts = [
        [{"user": "Q1", "assistant": "A1", "source": "VQAv2"}, {"user": "Q2", "assistant": "A2", "source": "VQAv2"}],
        [{"user": "Compare", "assistant": "Same", "source": "nlvr2"}],
        [{"user": "Text", "assistant": "Only", "source": "x"}],
    ]
    _, records = read_records(write_parquet(tmp_path / "train.parquet", {"images": images, "texts": texts}))
    assert messages_of(records) == [
        turns((Picture(b"1"), "Q1"), "A1", "Q2", "A2"),
        turns((Picture(b"2"), Picture(b"3"), "Compare"), "Same"),
        turns("Text", "Only"),
    ]


def test_parquet_with_conversations_and_messages(tmp_path):
    image = [{"bytes": b"1", "path": "a.jpg"}]
    columns = {"id": ["r1"], "image": image, "conversations": [chat("<image>\nQ", "A")]}
    _, records = read_records(write_parquet(tmp_path / "a.parquet", columns))
    assert messages_of(records) == [turns((Picture(b"1"), "\nQ"), "A")] and records[0].id == "r1"
    content = [[{"type": "image", "text": None}, {"type": "text", "text": "Q"}], [{"type": "text", "text": "A"}]]
    message = [{"role": role, "content": parts} for role, parts in zip(("user", "assistant"), content, strict=True)]
    _, records = read_records(write_parquet(tmp_path / "b.parquet", {"images": [image], "messages": [message]}))
    assert messages_of(records) == [turns((Picture(b"1"), "Q"), "A")]


def test_parquet_reads_no_pictures_to_check(tmp_path):
    image = [{"bytes": b"1" * 1000, "path": "x"}] * 3
    path = write_parquet(tmp_path / "a.parquet", {"image": image, "my.other": image, "caption": list("abc")})
    _, records = read_records(path, check=False)
    assert messages_of(records.checked()) == [turns(Picture(b""), c) for c in "abc"]
    assert messages_of(records) == [turns(Picture(b"1" * 1000), c) for c in "abc"]


# Shards


def of_shards(records):
    return [
        raw.record for part in range(len(records.shards)) for raw in ConversationStream(records, str, "").part(part)
    ]


def test_shards(tmp_path):
    pair = {"conversations": chat("<image> or <image>?", "Neither.")}
    write_tar(
        tmp_path / "00000.tar",
        [
            ("000.jpg", b"0"), ("000.json", b'{"caption": "Zero", "url": "https://x/0.jpg"}'), ("000.txt", b"no"),
            ("001.txt", b"One\n"), ("001.png", b"1"),
            ("002.0.jpg", b"2a"), ("002.1.jpg", b"2b"), ("002.json", json.dumps(pair).encode()),
        ],
    )  # fmt: skip
    named = {
        "id": "own",
        "images": ["1.jpg", "003.0.jpg"],
        "messages": chat("<image>b<image>", "x", names=("role", "content")),
    }
    openai = {"messages": [{"role": "user", "content": [image_url("004.jpg")]}, {"role": "assistant", "content": "y"}]}
    llava = {"image": "coco/000123.jpg", "conversations": chat("Q", "A")}
    write_tar(
        tmp_path / "00001.tar",
        [
            ("003.0.jpg", b"3a"), ("003.1.jpg", b"3b"), ("003.json", json.dumps(named).encode()),
            ("004.jpg", b"4"), ("004.json", json.dumps(openai).encode()),
            ("005.jpg", b"5"), ("005.json", json.dumps(llava).encode()),
            ("006.json", json.dumps({"prompt": "Q", "answer": "A"}).encode()),
            ("a/007.jpg", b"7"), ("a/007.json", b'{"status": "success"}'), ("a/007.txt", b"Seven"),
        ],
    )  # fmt: skip
    format, records = read_records(f"{tmp_path}/{{00000..00001}}.tar")
    found = of_shards(records)
    assert format == "shards"
    assert messages_of(found) == [
        turns(Picture(b"0"), "Zero"),
        turns(Picture(b"1"), "One"),
        turns((Picture(b"2a"), " or ", Picture(b"2b"), "?"), "Neither."),
        turns((Picture(b"3b"), "b", Picture(b"3a")), "x"),
        turns(Picture(b"4"), "y"),
        turns((Picture(b"5"), "Q"), "A"),
        turns(Picture(b"7"), "Seven"),
        turns("Q", "A"),
    ]
    assert [record.id for record in found][2:5] == ["00000.tar/002", "own", "00001.tar/004"]
    assert found[0].where == f"{tmp_path}/00000.tar member 000"
    _, records = read_records([str(tmp_path / "*.tar"), str(tmp_path / "00000.tar")])
    assert len(of_shards(records)) == 11


# Several files, encodings, ids, workers


def test_several_files_of_several_formats(tmp_path):
    pictures(tmp_path, "one/a.jpg", "two/a.jpg", "three/b.jpg")
    (tmp_path / "one/x.jsonl").write_text(lines({"image": "a.jpg", "caption": "1"}, {"image": "a.jpg", "caption": "2"}))
    (tmp_path / "two/x.csv").write_text("image,caption\na.jpg,3\n")
    (tmp_path / "three/b.txt").write_text("4")
    format, records = read_records([f"{tmp_path}/{name}" for name in ("one/*.jsonl", "two/x.csv", "three")])
    assert format == "jsonl, csv, folder" and len(records) == 4
    sources = [at(tmp_path, name) for name in ("one/a.jpg", "one/a.jpg", "two/a.jpg", "three/b.jpg")]
    assert messages_of(records) == [turns(source, str(n)) for n, source in enumerate(sources, 1)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.token"])
def test_encodings(tmp_path, encoding, name):
    pictures(tmp_path, "ä.jpg")
    item = {"image": "ä.jpg", "caption": "🐈 ½"}
    text = {
        "x.jsonl": lines(item, item),
        "x.json": json.dumps([item, item], ensure_ascii=False),
        "x.csv": "image,caption\nä.jpg,🐈 ½\nä.jpg,🐈 ½\n",
        "x.token": "ä.jpg#0\t🐈 ½\nä.jpg#1\t🐈 ½\n",
    }[name]
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    _, records = read_records(str(tmp_path / name))
    assert messages_of(records) == [turns(at(tmp_path, "ä.jpg"), "🐈 ½")] * 2


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_an_encoding_that_nothing_announces(tmp_path, encoding):
    (tmp_path / "x.jsonl").write_bytes(lines({"prompt": "q", "answer": "a"}).encode(encoding))
    with pytest.raises(ConfigError, match=r"x\.jsonl begins with .*UTF-16 without a mark"):
        read_records(str(tmp_path / "x.jsonl"))


def test_ids_are_stable_when_records_are_added(tmp_path):
    pictures(tmp_path, "a.jpg")
    items = [{"image": "a.jpg", "caption": f"Caption {n}"} for n in range(4)]
    path = tmp_path / "my.jsonl"
    path.write_text(lines(*items[:2]))
    _, records = read_records(str(path))
    before = list(records.ids)
    (tmp_path / "my.jsonl").write_text(lines(items[3], *[dict(reversed(item.items())) for item in items]))
    _, records = read_records(str(path))
    assert list(records.ids)[1:3] == before and len(set(records.ids)) == 4
    assert before == [record.id for record in records][1:3]


def test_relative_storage_gives_absolute_paths(tmp_path, monkeypatch):
    pictures(tmp_path, "data/a.jpg", "data/sub/b.jpg", "pics/a.jpg")
    (tmp_path / "data/my.jsonl").write_text(lines({"image": "a.jpg", "caption": "x"}))
    (tmp_path / "data/sub/b.txt").write_text("y")
    monkeypatch.chdir(tmp_path)
    assert read_records("data/my.jsonl")[1][0] == Record(
        turns(at(tmp_path, "data/a.jpg"), "x"), read_records("data/my.jsonl")[1].ids[0], "data/my.jsonl line 1"
    )
    assert messages_of(read_records("data/sub")[1]) == [turns(at(tmp_path, "data/sub/b.jpg"), "y")]
    assert messages_of(read_records("data/my.jsonl", images="pics")[1]) == [turns(at(tmp_path, "pics/a.jpg"), "x")]


def test_workers_get_small_copies(tmp_path):
    """What a spawned worker is sent: 24 bytes a record and its id, not the file."""
    pictures(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_text("a")
    path = tmp_path / "my.jsonl"
    path.write_text(lines(*[{"image": "a.jpg", "caption": f"{n} " * 1000} for n in range(200)]))
    (tmp_path / "x.csv").write_text("image,caption\na.jpg,x\n")
    _, records = read_records([str(path), str(tmp_path / "x.csv"), str(tmp_path)])
    sent = pickle.dumps(records)
    assert len(sent) < 25_000 < path.stat().st_size
    assert list(pickle.loads(sent)) == list(records)
    _, records = read_records(
        write_parquet(tmp_path / "a.parquet", {"image": [b"1" * 50_000] * 5, "text": list("abcde")})
    )
    third = records[3]
    sent = pickle.dumps(records)
    assert len(sent) < 5_000 and pickle.loads(sent)[3] == third


def test_each_folder_of_pictures_is_listed_once(tmp_path, monkeypatch):
    pictures(tmp_path, "x/a.jpg", "x/b.jpg", "y/c.jpg")
    for name in ("1.jsonl", "2.jsonl"):
        (tmp_path / name).write_text(
            lines(*[{"image": n, "caption": "c"} for n in ("x/a.jpg", "x/b.jpg", "y/c.jpg")] * 5)
        )
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(str(folder)) or scandir(folder))
    _, records = read_records([str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl")])
    assert sorted(listed) == [f"{tmp_path}/x", f"{tmp_path}/y"]
    assert len(list(records)) == 30 and len(listed) == 2


def test_numpy_indices(tmp_path):
    pictures(tmp_path, "a.jpg")
    (tmp_path / "my.jsonl").write_text(lines(*[{"image": "a.jpg", "caption": str(n)} for n in range(3)]))
    _, records = read_records(str(tmp_path / "my.jsonl"))
    assert records[np.int64(2)] == records[-1]


def test_a_link_to_a_folder_above_adds_nothing(tmp_path):
    pictures(tmp_path, "a/cat.jpg")
    (tmp_path / "a/cat.txt").write_text("A cat.")
    (tmp_path / "a/loop").symlink_to("..")
    assert len(read_records(str(tmp_path))[1]) == 1


def test_a_picture_inside_a_table(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(b"1" * 200_000).decode()
    (tmp_path / "a.csv").write_text(f'image,caption\n"{url}",A cat.\n')
    assert messages_of(read_records(f"{tmp_path}/a.csv")[1]) == [turns(Picture(b"1" * 200_000), "A cat.")]
