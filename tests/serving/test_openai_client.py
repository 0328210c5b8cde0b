"""OpenAI's own client with the endpoint."""

import re
import time

import openai
import pytest
from endpoint import assistant, image, text, user
from helpers import ROOT

from minigpt4.serving.protocol import IGNORED, REFUSED

MODEL = {"model": "minigpt4", "temperature": 0}


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def talk(pictures):
    """Two turns, each with pictures, the first in OpenAI's order of text and picture."""
    return [
        {"role": "system", "content": "You name drawings."},
        user(text("What is this?"), image(pictures[0])),
        assistant("This is a cat."),
        user(image(pictures[2]), image(pictures[1]), text("And what are these?")),
    ]


def test_an_answer(client, pictures):
    answer = client.chat.completions.create(
        messages=[user(image(pictures[2]), text("What is this?"))], max_tokens=60, **MODEL
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert "sailboat" in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.model == "minigpt4"
    assert answer.usage.prompt_tokens > 16  # the picture alone has 16
    assert answer.usage.completion_tokens > 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("settings", [{}, {"n": 3, "seed": 5, "temperature": 1.0}, {"stop": ["oat", "###"]}])
def test_streaming_gives_the_same_text(client, talk, settings):
    settings = {**MODEL, "messages": talk, "max_tokens": 40, **settings}
    whole = client.chat.completions.create(**settings)
    texts = dict.fromkeys(range(len(whole.choices)), "")
    reasons, usages, ids = {}, [], set()
    for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        usages += [chunk.usage] if chunk.usage else []
        ids.add(chunk.id)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert len(ids) == 1 and whole.id not in ids
    assert [u.to_dict() for u in usages] == [whole.usage.to_dict()]


def test_text_arrives_while_the_model_generates(client, gate, talkative):
    def words():
        return "".join(choice.delta.content or "" for choice in next(stream).choices)

    gate.step(4)
    stream = iter(client.chat.completions.create(messages=[user(text("Hi"))], max_tokens=99, stream=True, **MODEL))
    said = ""
    while not said:
        said += words()
    for _ in range(3):
        before = said
        while said == before:
            gate.step()  # some tokens are only half a character or a space
            said += words()


def test_the_clients_answer_object_can_be_sent_back(client, pictures):
    messages = [user(image(pictures[0]), text("What is this?"))]
    first = client.chat.completions.create(messages=messages, max_tokens=40, **MODEL)
    messages += [first.choices[0].message, user(text("Are you sure?"))]
    second = client.chat.completions.create(messages=messages, max_tokens=40, **MODEL)
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_helper_for_streams(client, talk):
    with client.chat.completions.stream(messages=talk, max_tokens=40, **MODEL) as stream:
        stream.until_done()
        message = stream.get_final_completion().choices[0].message.content
    assert message == client.chat.completions.create(messages=talk, max_tokens=40, **MODEL).choices[0].message.content


def test_models(client):
    assert [model.id for model in client.models.list()] == ["minigpt4"]
    assert client.models.retrieve("minigpt4").owned_by == "minigpt4"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o'"):
        client.models.retrieve("gpt-4o")


def test_errors_become_the_clients_exceptions(client, talk):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4o", messages=talk)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature.*less than or equal to 2") as error:
        client.chat.completions.create(model="minigpt4", messages=talk, temperature=3)
    assert (error.value.param, error.value.type) == ("temperature", "invalid_request_error")


def test_the_end_of_a_stream(served):
    body = {"model": "minigpt4", "messages": [user(text("Hi"))], "stream": True, "max_tokens": 5, "temperature": 0}
    response = served.post(body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert all(line.startswith("data: ") for line in response.text.splitlines() if line)


def test_the_documents_example_runs_and_its_lists_are_complete(served, pictures, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    code, in_process = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "cat.png").write_bytes(pictures[0])
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:8000", served.url), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.chdir(ROOT)
    exec(in_process.replace("cat.png", str(tmp_path / "cat.png")), {})
    assert "cat" in capsys.readouterr().out.splitlines()[-1]
    for kind, names in (("ignored", IGNORED), ("refused", REFUSED)):
        (row,) = re.findall(rf"^\| {kind}.* \| (.*) \|$", page, flags=re.MULTILINE)
        assert set(names) <= set(re.findall(r"`(\w+)`", row))


def test_requests_of_lmms_eval(client, pictures):
    """Its models `openai`: text before the picture, or messages of parts; 1024 tokens unless a task says less."""
    plain = [user(text("What is this?"), image(pictures[2]))]
    before = [
        {"role": "system", "content": [text("You name drawings.")]},
        user(image(pictures[0]), text("What is it?")),
    ]
    chat = [*before, {"role": "assistant", "content": [text("It is a cat.")]}, user(text("Name it."))]
    for messages, word in ((plain, "sailboat"), (chat, "cat")):
        answer = client.chat.completions.create(messages=messages, max_tokens=1024, **MODEL)
        assert word in answer.choices[0].message.content and answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens > 0 and not answer.usage.completion_tokens_details


def test_text_comes_in_few_events(served, client, talkative):
    """At most 25 a second, however fast the model writes; the first one at once."""
    events = client.chat.completions.create(
        messages=[user(text("Hello"))], max_tokens=100, stream=True, extra_body={"min_tokens": 100}, **MODEL
    )
    start, texts = time.monotonic(), []
    for event in events:
        if event.choices and event.choices[0].delta.content:
            texts.append(event.choices[0].delta.content)
    assert 1 < len(texts) <= 25 * (time.monotonic() - start) + 2
    assert len(texts[0]) < len("".join(texts)) / 2
