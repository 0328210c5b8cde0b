"""What a usable caption is: encodings, JSON, characters."""

import json

import pytest

from minigpt4.datasets.captions import MISSING, Incomplete, Unusable, decode, load_json, read_caption, usable

TEXT = "Ein Café, 日本 😀"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark(encoding):
    assert decode(TEXT.encode(encoding)) == TEXT
    big_endian = {
        "utf-16": b"\xfe\xff" + TEXT.encode("utf-16-be"),
        "utf-32": b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"),
    }
    assert decode(big_endian.get(encoding, TEXT.encode())) == TEXT
    assert load_json(json.dumps({"caption": TEXT}, ensure_ascii=False).encode(encoding)) == {"caption": TEXT}


@pytest.mark.parametrize("content", ["café".encode("latin-1"), "“a”".encode("cp1252"), b"\xff\xfe\0", b"\x80"])
def test_other_encodings_are_not_usable(content):
    with pytest.raises(Unusable, match="not in UTF-8"):
        decode(content)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a cat", "кот"])
def test_utf_16_without_a_mark_is_not_usable(encoding, text):
    with pytest.raises(Unusable):
        usable(decode(text.encode(encoding)))


@pytest.mark.parametrize("content", [b"{", b"", b"[" * 100_000, b'{"a":' * 100_000, b'"\xff"', b"1" * 5000])
def test_json_that_cannot_be_read(content):
    with pytest.raises(Unusable, match="a JSON file that is (broken|nested too deeply)"):
        load_json(content)


@pytest.mark.parametrize(
    ("caption", "cause"),
    [
        (None, "not a text"),
        (3, "not a text"),
        (["a cat"], "not a text"),
        ({"en": "a cat"}, "not a text"),
        ("", "empty"),
        (" \n\t\u00a0\u3000", "empty"),
        ("\ufeff\u200b\u200d", "empty"),
        ("\ud83d", "lone surrogates"),
        ("a cat \udc00", "lone surrogates"),
        ("a\0c", "control characters"),
        ("\x1b[31mred", "control characters"),
    ],
)
def test_captions_that_are_not_usable(caption, cause):
    with pytest.raises(Unusable, match=cause):
        usable(caption)


@pytest.mark.parametrize(
    "caption", ["a", "  a\tb\r\n", "Ünïcode 😀👩‍👩‍👧", "###", ".", "\U000e0041x", "naïve\u00a0text"]
)
def test_usable_captions_are_unchanged(caption):
    assert usable(caption) == caption
    assert usable("\ufeff" + caption) == caption


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"json": b'{"caption": "a"}', "txt": b"b"}, "a"),
        ({"json": b'{"caption": "\\ud83d"}', "txt": b"b"}, "b"),
        ({"json": b"[" * 100_000, "txt": b"b"}, "b"),
        ({"json": b'\xef\xbb\xbf{"caption": "a"}'}, "a"),
        ({"txt": "b".encode("utf-16")}, "b"),
        ({"json": b'{"caption": "\\ud83d\\ude00"}'}, "😀"),
    ],
)
def test_the_caption_of_a_sample(files, expected):
    assert read_caption(files) == expected


@pytest.mark.parametrize(
    ("files", "kind", "cause"),
    [
        ({}, Incomplete, MISSING),
        ({"json": b"{}"}, Incomplete, MISSING),
        ({"json": b'{"caption": null}'}, Incomplete, MISSING),
        ({"json": b"["}, Unusable, "a JSON file that is broken"),
        ({"json": b"[" * 100_000}, Unusable, "a JSON file that is nested too deeply"),
        ({"json": b'{"caption": "\\ud83d"}'}, Unusable, "a caption with lone surrogates or control characters"),
        ({"json": b'{"caption": null}', "txt": b" "}, Unusable, "an empty caption"),
    ],
)
def test_the_cause_of_a_sample_without(files, kind, cause):
    with pytest.raises(Unusable) as error:
        read_caption(files)
    assert str(error.value) == cause and type(error.value) is kind
