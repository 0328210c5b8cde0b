"""The queue: batches, order, seeds, and ends of answers."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
import torch
from endpoint import assistant, image, text, user

from minigpt4.conversation import CONV_VISION, open_picture
from minigpt4.serving import batching
from minigpt4.serving.batching import Answer, Batcher, Prompt
from minigpt4.serving.sampling import RowSampler, RowSampling


def content(response):
    assert response.status_code == 200, response.text
    return [choice["message"]["content"] for choice in response.json()["choices"]]


@pytest.fixture
def requests(pictures):
    """Messages of many lengths with none to three pictures."""
    cat, apple, boat, car = map(image, pictures)
    return [
        [user(cat, text("What is this?"))],
        [user(text("Describe this image in detail."), boat)],
        [user(text("Hello"))],
        [user(car, apple, cat, text("What do these pictures have in common, and what sets them apart? " * 5))],
        [user(apple, text("What is this?")), assistant("This is an apple."), user(car, text("And this?"))],
        [{"role": "system", "content": "Be brief."}, user(car, text("Name it."))],
        [user(text("What colour is the sky on a clear day?"))],
        [user(boat)],
    ]


def test_waiting_requests_share_a_batch(served, requests, gate, batches):
    """All but the first request wait while the first one is held up; their answers equal those of single requests."""
    with ThreadPoolExecutor(16) as pool:
        first = pool.submit(served.ask, user(text("First")), max_tokens=1)
        served.wait_for(running=1)
        others = [pool.submit(served.ask, *messages, max_tokens=24 - n) for n, messages in enumerate(requests)]
        served.wait_for(waiting=len(requests))
        gate.open()
        content(first.result())
        together = [content(other.result()) for other in others]
    assert [len(prompts) for prompts in batches] == [1, len(requests)]
    batches.clear()
    assert together == [content(served.ask(*m, max_tokens=24 - n)) for n, m in enumerate(requests)]
    assert [len(prompts) for prompts in batches] == [1] * len(requests)
    assert len(set(map(tuple, together))) > 5


@pytest.mark.parametrize("own_loop", [True, False])
def test_filled_batches(served, requests, gate, batches, monkeypatch, own_loop):
    """A batch of three is filled up, as on a GPU. The answers stay the same, with our loop and with transformers'."""
    if not own_loop:
        monkeypatch.setattr("minigpt4.fast.decoding.loop.cached_decoding.supports", lambda llm: False)
    gate.open()
    single = [content(served.ask(*messages, max_tokens=12)) for messages in requests[:3]]
    monkeypatch.setattr(served.batcher, "fill_batches", True)
    monkeypatch.setattr(batching, "GATHER_SECONDS", 1.0)
    with ThreadPoolExecutor(3) as pool:
        together = [pool.submit(served.ask, *messages, max_tokens=12) for messages in requests[:3]]
        assert [content(request.result()) for request in together] == single
    assert len(batches[-1]) == 3


def test_streams_share_batches_with_others(served, gate, batches):
    ask = {"max_tokens": 8, "seed": 3, "temperature": 1.0}
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(served.ask, user(text("First")), max_tokens=1)
        served.wait_for(running=1)
        stream = pool.submit(served.ask, user(text("Hello")), stream=True, **ask)
        whole = pool.submit(served.ask, user(text("Hello")), **ask)
        served.wait_for(waiting=2)
        gate.open()
        first.result()
    assert [len(prompts) for prompts in batches] == [1, 2]
    assert content(whole.result())[0].split()[0] in stream.result().text


def test_seeds_give_the_same_answer_in_any_batch(served, pictures, gate):
    gate.open()
    ask = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "max_tokens": 16}
    messages = [user(image(pictures[0]), text("Tell me a story."))]
    alone = content(served.ask(*messages, seed=7, **ask))
    together = content(served.ask(*messages, seed=7, n=4, **ask))
    assert together[:1] == alone
    assert len(set(together)) == 4
    assert content(served.ask(*messages, seed=8, **ask)) != alone
    assert content(served.ask(*messages, **ask)) != content(served.ask(*messages, **ask))


def test_choices_share_the_encoding_of_pictures(served, chat, pictures, monkeypatch):
    seen, encode = [], chat.model.encode_img
    monkeypatch.setattr(chat.model, "encode_img", lambda images: seen.append(len(images)) or encode(images))
    content(served.ask(user(image(pictures[0]), image(pictures[1])), n=4, max_tokens=2))
    assert seen == [2]


def test_greedy_equals_the_chat(served, chat, pictures):
    """The answers equal those of `Chat`, which the page and the terminal use."""
    for content_, question in zip(pictures, ("What is this?", "Describe it.", "Hm?", "###"), strict=True):
        conv, img_list = CONV_VISION.copy(), []
        chat.upload_img(open_picture(BytesIO(content_), "picture"), conv, img_list)
        chat.ask(question, conv)
        expected = chat.answer(conv, img_list, do_sample=False, max_new_tokens=20)[0]
        assert content(served.ask(user(image(content_), text(question)), max_tokens=20)) == [expected]


def test_length_and_stop(served, talkative):
    cut = served.ask(user(text("Hello")), max_tokens=12).json()
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["completion_tokens"] == 12
    full = cut["choices"][0]["message"]["content"]
    stop = full[3:6]
    stopped = served.ask(user(text("Hello")), max_tokens=12, stop=[stop, "never said"]).json()
    assert stopped["choices"][0] == {
        **cut["choices"][0],
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": full.split(stop)[0].strip(), "refusal": None},
    }
    newer = served.ask(user(text("Hello")), max_completion_tokens=3, max_tokens=99).json()
    assert newer["usage"]["completion_tokens"] == 3


def test_fewest_tokens(served):
    """Each of the answers that are computed together has its own; stop texts of a request count as ours does."""
    ask = user(text("Hello"))
    short = served.ask(ask, temperature=0).json()
    assert short["choices"][0]["finish_reason"] == "stop" and short["usage"]["completion_tokens"] < 30
    long = served.ask(ask, min_tokens=30, max_tokens=60, n=2, seed=1, stop=["e", ". "]).json()
    assert long["usage"]["completion_tokens"] > 2 * 30
    assert not [choice for choice in long["choices"] if {"e", "#"} & set(choice["message"]["content"])]
    assert served.ask(ask, temperature=0).json()["choices"] == short["choices"]
    refused = served.ask(ask, min_tokens=9, max_tokens=8)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "min_tokens"


def test_an_answer_ends_where_the_window_does(served, chat, talkative, monkeypatch):
    tokens = served.ask(user(text("Hello")), max_tokens=1).json()["usage"]["prompt_tokens"]
    monkeypatch.setattr(chat, "window", lambda: tokens + 5)
    answer = served.ask(user(text("Hello")), max_tokens=50).json()
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"
    monkeypatch.setattr(chat, "window", lambda: tokens)
    refused = served.ask(user(text("Hello")))
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_a_long_prompt_and_a_long_answer_do_not_share_a_batch(chat):
    def answer(prompt_tokens, max_tokens):
        prompt = Prompt("x", [], prompt_tokens)
        return Answer(chat.model.tokenizer, prompt, RowSampling(), max_tokens, ["###"], "", time.monotonic() + 60)

    batcher = Batcher(lambda: chat, 8)
    batcher.chat, window = chat, chat.window()
    assert batcher._fits([answer(window - 10, 10)])
    assert batcher._fits([answer(10, 20), answer(window - 30, 20)])
    assert not batcher._fits([answer(10, window - 10), answer(window - 10, 10)])


def test_penalties(served, talkative):
    repeated = content(served.ask(user(text("Hello")), max_tokens=40))[0].split()
    varied = content(served.ask(user(text("Hello")), max_tokens=40, frequency_penalty=2, presence_penalty=2))[0].split()
    assert len(set(varied)) > len(set(repeated))


def test_a_label_that_the_model_repeats_is_removed(chat):
    def read(words, finish):
        answer = Answer(
            chat.model.tokenizer, None, RowSampling(), 99, ["###", "END"], "Assistant:", time.monotonic() + 60
        )
        texts = []
        for token in chat.model.tokenizer.encode(words):
            answer.add_token(token)
            texts.append(answer.text())
        answer.end(finish)
        texts.append(answer.text())
        assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))
        return texts[-1], answer.finish

    assert read("Assistant: a dog Assistant: b", "length") == ("a dog Assistant: b", "length")
    assert read("Assist", "length") == ("Assist", "length")
    assert read("a dog ###Human: x", "length") == ("a dog", "stop")
    assert read("a # dog END of it ###", "length") == ("a # dog", "stop")
    assert read("a dog </s> b", "length") == ("a dog", "stop")


def test_a_batch_that_fails_is_an_error_and_the_next_one_is_not(served, chat, monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("secret of the server")

    with monkeypatch.context() as patch:
        patch.setattr(chat.model.llama_model, "forward", broken)
        for stream in (False, True):
            response = served.ask(user(text("Hello")), stream=stream)
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"
            assert "secret" not in response.text
    assert "secret of the server" in caplog.text
    content(served.ask(user(text("Hello")), max_tokens=2))


def test_a_failure_in_the_middle_of_a_stream_is_an_event(served, chat, talkative, monkeypatch):
    steps, forward = [], chat.model.llama_model.forward

    def failing(*args, **kwargs):
        steps.append(1)
        if len(steps) > 6:
            raise RuntimeError("broken")
        return forward(*args, **kwargs)

    monkeypatch.setattr(chat.model.llama_model, "forward", failing)
    response = served.ask(user(text("Hello")), stream=True)
    assert response.status_code == 200
    *_, error, done = [line for line in response.text.splitlines() if line]
    assert error.startswith('data: {"error": {"message": "The model failed')
    assert done == "data: [DONE]"


def test_loading_that_fails_is_reported(chat):
    failed = threading.Event()

    def load():
        raise ValueError("no such weights")

    batcher = Batcher(load, 8, failed=failed.set)
    batcher.start()
    assert failed.wait(5)
    assert str(batcher.failure) == "no such weights"


def test_closing_ends_all_answers(chat, gate, talkative):
    def answer():
        return Answer(
            chat.model.tokenizer,
            Prompt("Hello", [], 5),
            RowSampling(temperature=0),
            99,
            ["###"],
            "",
            time.monotonic() + 60,
        )

    batcher = Batcher(lambda: chat, max_batch=1)
    batcher.start()
    running, waiting = answer(), answer()
    batcher.submit([running, waiting])
    gate.step(3)
    while len(running.ids) < 3:
        time.sleep(0.01)
    gate.open()
    batcher.close()
    assert (running.finish, waiting.finish) == ("length", "error")
    assert 3 <= len(running.ids) < 99
    assert not batcher.is_alive()
    late = answer()
    batcher.submit([late])
    assert late.finish == "error"


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_tokens_are_sampled_as_by_transformers(top_p):
    """The frequencies over many rows equal the probabilities after transformers' filters."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rows, scores = 20_000, torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    expected = scores[None]
    for warper in (TemperatureLogitsWarper(1.3), TopKLogitsWarper(4), TopPLogitsWarper(top_p)):
        expected = warper(None, expected)
    expected = expected.softmax(-1)[0]
    sampling = [RowSampling(temperature=1.3, top_k=4, top_p=top_p, seed=n) for n in range(rows)]
    sampler = RowSampler(sampling, 1, torch.device("cpu"))
    chosen = sampler(torch.empty(rows, 0, dtype=torch.long), scores.expand(rows, -1)).argmax(-1)
    frequencies = chosen.bincount(minlength=6) / rows
    assert torch.allclose(frequencies, expected, atol=0.015)
    assert not frequencies[expected == 0].any()


def test_each_row_is_sampled_by_its_own_settings():
    scores = torch.tensor([[1.0, 3.0, 2.9, 0.0]]).repeat(4, 1)
    rows = [
        RowSampling(temperature=0),
        RowSampling(temperature=0, presence_penalty=1.0),
        RowSampling(temperature=0, frequency_penalty=0.06),
        RowSampling(top_p=0.0, seed=1),
    ]
    sampler = RowSampler(rows, 3, torch.device("cpu"))
    so_far = torch.tensor([[1, 1]] * 4)
    assert sampler(so_far, scores).argmax(-1).tolist() == [1, 2, 2, 1]
    assert sampler(so_far[:, :0], scores).argmax(-1).tolist() == [1, 1, 1, 1]
