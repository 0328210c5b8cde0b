"""Which requests are accepted, ignored or refused."""

import json

import pytest

from minigpt4.serving.errors import ApiError
from minigpt4.serving.protocol import IGNORED, REFUSED, read_request

GOOD = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def read(**fields):
    return read_request(json.dumps({**GOOD, **fields}).encode())


def test_defaults_are_those_of_chat():
    asked = read()
    assert (asked.temperature, asked.top_p, asked.top_k, asked.n, asked.stream) == (1.0, 0.9, 50, 1, False)
    assert (asked.new_tokens, asked.stop, asked.seed) == (None, [], None)
    assert asked.messages[0].content[0].text == "Hi"


def test_null_is_the_same_as_nothing():
    names = ("temperature", "top_p", "n", "stop", "stream", "stream_options", "max_tokens", "seed", "tools", "user")
    assert read(**dict.fromkeys(names)) == read()


def test_settings():
    asked = read(temperature=0, top_p=1, stop="x", max_tokens=5, max_completion_tokens=7, seed=-3, n=2, top_k=0)
    assert (asked.stop, asked.new_tokens) == (["x"], 7)
    assert asked.sampling(0).greedy
    assert [asked.sampling(n).seed for n in (0, 1)] == [-3, -2]


@pytest.mark.parametrize("name", IGNORED)
def test_ignored(name):
    assert read(**{name: {"any": ["thing"]}}) == read()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    for neutral in (None, *REFUSED[name]):
        assert read(**{name: neutral}) == read()
    for value in ([{"type": "function"}], {"a": 1}, True, "required"):
        with pytest.raises(ApiError, match=f"{name} is not supported") as error:
            read(**{name: value})
        assert (error.value.status, error.value.param) == (400, name)


def test_what_asks_for_nothing_passes():
    empty = {"tool_calls": [], "function_call": {}, "refusal": None, "audio": None, "annotations": []}
    asked = read(
        messages=[{"role": "user", "content": "Hi", **empty}], stop=[], stream_options={}, **dict.fromkeys(REFUSED, [])
    )
    assert asked == read() == read(stop="", tools=[], logit_bias={}, logprobs=False)


def test_the_url_of_a_picture_may_stand_alone():
    def part(url):
        return read(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]).messages[0]

    assert part("data:x") == part({"url": "data:x"}) == part({"url": "data:x", "detail": "low"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"n": 10**30}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x" * 101]}, "stop[0]"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user", "content": "Hi"}] * 201}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}]},
            "messages[0].content[0].image_url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url.url",
        ),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"x" * 300: 1}, "x" * 100),
        ({"messages": [{"role": "user", "content": [{"type": "x" * 5000}]}]}, "messages[0].content[0]"),
    ],
)
def test_wrong_values_are_named(fields, param):
    with pytest.raises(ApiError) as error:
        read(**fields)
    body = error.value.body()["error"]
    assert (error.value.status, body["param"]) == (400, param)
    assert param in body["message"]
    assert len(body["message"]) < 500


@pytest.mark.parametrize("fields", [{"stop": "\ud800"}, {"\udfff": 1}, {"user": ["\ud800"]}, {"model": "\udc00\ud800"}])
def test_half_characters(fields):
    with pytest.raises(ApiError, match="not JSON: .*hex escape"):
        read(**fields)


def test_a_byte_order_mark_is_passed_over():
    assert read_request(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()) == read()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 9000])
def test_no_json_object(body):
    with pytest.raises(ApiError, match="The body"):
        read_request(body)


def test_missing_fields():
    for name in GOOD:
        body = {key: value for key, value in GOOD.items() if key != name}
        with pytest.raises(ApiError, match=f"{name}: Field required"):
            read_request(json.dumps(body).encode())
