"""Answers that are computed together: order, shares, seeds, memory, and ends."""

import base64
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
import torch
from endpoint import assistant, image, serving, text, user
from PIL import Image

from minigpt4.conversation import CONV_VISION, open_picture
from minigpt4.fast.decoding import continuous
from minigpt4.serving import batching, together
from minigpt4.serving.answer import Answer, Prompt
from minigpt4.serving.batching import Batcher
from minigpt4.serving.prepare import image_urls, read_prompt
from minigpt4.serving.protocol import Message
from minigpt4.serving.sampling import RowChoice, RowSampling, choose
from minigpt4.serving.together import AnswersTogether, EncodedPictures


def content(response):
    assert response.status_code == 200, response.text
    return [choice["message"]["content"] for choice in response.json()["choices"]]


def picture_file(color) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, "PNG")
    return buffer.getvalue()


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


def test_waiting_requests_are_answered_together(served, requests, gate, steps):
    """All but the first request wait while the first one is held up; their answers equal those of single requests."""
    with ThreadPoolExecutor(16) as pool:
        first = pool.submit(served.ask, user(text("First")), max_tokens=1)
        served.wait_for(running=1)
        others = [pool.submit(served.ask, *messages, max_tokens=24 - n) for n, messages in enumerate(requests)]
        served.wait_for(waiting=len(requests))
        gate.open()
        content(first.result())
        together = [content(other.result()) for other in others]
    assert max(rows for rows in steps if rows != "prompt") > 4
    steps.clear()
    assert together == [content(served.ask(*m, max_tokens=24 - n)) for n, m in enumerate(requests)]
    assert {rows for rows in steps if rows != "prompt"} == {1}
    assert len(set(map(tuple, together))) > 5


def test_nobody_waits_for_a_long_answer(served, gate, talkative, steps):
    """A request joins a running answer between two of its tokens, streams at once, and leaves before it."""
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(served.ask, user(text("Tell me everything.")), max_tokens=60)
        served.wait_for(running=1)
        gate.step(5)
        while len(served.batcher.running[0].ids) < 5:
            time.sleep(0.01)
        short = pool.submit(served.ask, user(text("Hello")), max_tokens=3)
        served.wait_for(waiting=1)
        gate.step(6)  # of the long answer alone, the prompt, of both twice, and of the long one alone twice
        assert content(short.result())
        assert not long.done()
        gate.open()
        assert long.result().json()["usage"]["completion_tokens"] == 60
    assert steps.index(2) < 10 and steps.count(2) == 2 and steps[-1] == 1


@pytest.mark.parametrize("seed", range(3))
def test_answers_in_any_order_equal_those_alone(chat, requests, pictures, seed):
    """Greedy and seeded answers of mixed lengths, which join whenever there is room, with conversations that go on."""
    rng = random.Random(seed)
    batcher = Batcher(lambda: chat, 3)
    batcher.start()
    while batcher.status != "ready":
        time.sleep(0.01)

    def prepared(messages):
        parsed = [Message.model_validate(message) for message in messages]
        contents = {place: base64.b64decode(url.partition(",")[2]) for place, url in image_urls(parsed, 8).items()}
        return read_prompt(chat, parsed, contents, 10**7)

    def answer(prompt, n):
        sampling = RowSampling(temperature=0) if n % 3 else RowSampling(seed=n, repetition_penalty=1.2, temperature=1.3)
        length = (30, 3, 12, 1, 20)[n % 5]
        return Answer(chat.model.tokenizer, prompt, sampling, length, ["###"], min_tokens=min(length, n % 4))

    def wait(answers):
        for each in answers:
            while not each.finish:
                each.wait(1)
        return [each.ids for each in answers]

    prompts = [prepared(messages) for messages in (*requests, *requests[:4])]
    order = rng.sample(range(len(prompts)), len(prompts))
    together = {n: answer(prompts[n], n) for n in order}
    for each in together.values():
        batcher.submit([each])
        time.sleep(rng.random() * 0.02)
    together = wait([together[n] for n in range(len(prompts))])
    alone = []
    for n, prompt in enumerate(prompts):
        one = answer(prompt, n)
        batcher.submit([one])
        alone += wait([one])
    batcher.close()
    assert together == alone
    assert len(set(map(tuple, together))) > 8


def test_a_model_without_our_loop_answers_one_by_one(served, chat, requests, monkeypatch):
    def asked(served):
        greedy = [content(served.ask(*messages, max_tokens=12)) for messages in requests[:3]]
        return greedy, content(served.ask(*requests[0], seed=3, temperature=1.2, max_tokens=12, min_tokens=5))

    expected = asked(served)
    monkeypatch.setattr(chat, "decoding_loop", None)
    with serving(lambda: chat) as other:
        other.wait_for(status="ready")
        assert asked(other) == expected


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


def test_pictures_are_encoded_once(served, chat, pictures, monkeypatch):
    """Once for all choices, turns and clients; those that were used last are kept, up to a number of bytes."""
    seen, encode = [], chat.model.encode_img
    monkeypatch.setattr(chat.model, "encode_img", lambda images: seen.append(len(images)) or encode(images))
    new = [picture_file(color) for color in ("#123456", "#654321")]
    first = [user(*map(image, new), text("What is this?"))]
    said = content(served.ask(*first, n=4, max_tokens=2))[0]
    assert sum(seen) == 2
    content(served.ask(*first, assistant(said), user(text("Sure?")), max_tokens=2))
    content(served.ask(user(image(new[1])), max_tokens=2))
    assert sum(seen) == 2
    size = encode(torch.zeros(1, 3, 64, 64))[0].nbytes
    kept, images = EncodedPictures(chat, max_bytes=2 * size), list(torch.randn(3, 3, 64, 64))
    seen.clear()
    for use in ([0, 1], [0], [2], [0, 2], [1]):
        torch.testing.assert_close(torch.cat(kept([images[n] for n in use])), encode(torch.stack(images)[use])[0])
    assert seen == [2, 1, 1]


@pytest.mark.parametrize("cause", ["prompt", "step"])
def test_without_memory_one_request_fails(served, chat, talkative, monkeypatch, cause):
    """Where a prompt or a step needs more than there is, the others go on."""
    forward, short = chat.model.llama_model.forward, []

    def failing(*args, **kwargs):
        rows, length = kwargs["inputs_embeds"].shape[:2]
        if short and (rows == 3 if cause == "step" else length > 100):
            raise torch.OutOfMemoryError("no memory")
        return forward(*args, **kwargs)

    def answers():
        texts = [f"###Human: {word}###Assistant:" for word in ("a", "b", "c " * 150)]
        prompts = [Prompt(words, [], chat.num_tokens(words)) for words in texts]
        return [Answer(chat.model.tokenizer, prompt, RowSampling(temperature=0), 40, ["###"]) for prompt in prompts]

    def wait(answers):
        for each in answers:
            while not each.finish:
                each.wait(1)

    expected, found = answers(), answers()
    for each in expected[:2]:
        served.batcher.submit([each])
        wait([each])
    monkeypatch.setattr(chat.model.llama_model, "forward", failing)
    short.append(True)
    served.batcher.submit(found)
    wait(found)
    assert [each.finish for each in found] == ["length", "length", "error"]
    assert [each.ids for each in found[:2]] == [each.ids for each in expected[:2]]
    if cause == "prompt":
        response = served.ask(user(text("c " * 150)))
        assert response.status_code == 503 and response.json()["error"]["code"] == "out_of_memory"


def answers_in_rounds(chat, texts, give_way, most=2):
    """Seeded answers, all of which begin in the first round if there is room. give_way: is called with them."""
    rows = AnswersTogether(chat, most)
    answers = [
        Answer(chat.model.tokenizer, Prompt(text, [], chat.num_tokens(text)), RowSampling(seed=3), 12, ["###"])
        for text in texts
    ]
    waiting = [*answers]

    def take():
        if waiting:
            waiting[0].begin_turn()
            return waiting.pop(0)

    def interrupted():
        waiting.extend(found := [*filter(None, [give_way(answers)])])
        return found[0] if found else None

    with torch.no_grad():
        while not all(answer.finish for answer in answers):
            rows.round(take, interrupted)
    return answers


@pytest.mark.parametrize("cause", ["choose", "step", "prompt"])
def test_a_failure_while_answers_begin_changes_no_other(chat, talkative, monkeypatch, cause):
    """A choice of first tokens is made again; a step, or a long prompt after an interruption, fails its own answers."""
    monkeypatch.setattr(continuous, "PART", 32)
    monkeypatch.setattr(together, "STALL_SECONDS", 0)
    texts = ["###Human: a###Assistant:", f"###Human: {'c ' * 150}###Assistant:"]
    expected = [answers_in_rounds(chat, [words], lambda _: None)[0].ids for words in texts]
    forward, choose_ids, due = chat.model.llama_model.forward, together.choose, [cause]

    def fail(error):
        due.clear()
        raise error("broken")

    def failing_forward(*args, **kwargs):
        is_step = kwargs["inputs_embeds"].shape[1] == 1
        if due == ["step"] and is_step:
            fail(RuntimeError)
        if due == ["interrupted"] and not is_step:
            fail(torch.OutOfMemoryError)
        return forward(*args, **kwargs)

    def failing_choice(*args):
        found = choose_ids(*args)
        return fail(torch.OutOfMemoryError) if due == ["choose"] else found

    def give_way(answers):
        if due == ["prompt"]:
            due[:] = ["interrupted"]
            return answers[0]

    monkeypatch.setattr(chat.model.llama_model, "forward", failing_forward)
    monkeypatch.setattr(together, "choose", failing_choice)
    found = answers_in_rounds(chat, texts, give_way)
    failed = {"choose": [], "step": [0], "prompt": [1]}[cause]
    assert [n for n, answer in enumerate(found) if answer.finish == "error"] == failed
    assert [each.ids for n, each in enumerate(found) if n not in failed] == [
        ids for n, ids in enumerate(expected) if n not in failed
    ]


def test_an_answer_that_goes_on_is_not_read_again(chat, talkative, monkeypatch):
    forward, lengths = chat.model.llama_model.forward, []

    def watched(*args, **kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    def give_way(answers):
        return answers[0] if len(answers[0].ids) in (4, 8) else None

    monkeypatch.setattr(chat.model.llama_model, "forward", watched)
    answers_in_rounds(chat, ["###Human: Hello###Assistant:"], give_way, most=1)
    assert lengths[0] > 2 and max(lengths[1:]) == 1


def test_an_answer_that_is_cancelled_before_it_begins_is_not_read(chat, talkative, monkeypatch, steps):
    monkeypatch.setattr(continuous, "PART", 32)
    monkeypatch.setattr(together, "STALL_SECONDS", 0)
    texts = ["###Human: a###Assistant:", *(f"###Human: {word * 150}###Assistant:" for word in ("c ", "d "))]
    expected = [each.ids for each in answers_in_rounds(chat, texts[:2], lambda _: None)]
    num_parts = steps.count("prompt")
    texts.insert(1, texts.pop())
    found = answers_in_rounds(chat, texts, lambda answers: answers[1].end("cancelled"), most=3)
    assert [found[0].ids, found[2].ids] == expected and not found[1].ids
    assert steps.count("prompt") == 2 * num_parts


def test_clients_get_equal_shares(chat, gate):
    """Of the waiting answers, those of the client with the fewest running ones are next."""
    prompt = Prompt("x", [], 3)
    batcher = Batcher(lambda: chat, 8)
    batcher.submit([Answer(chat.model.tokenizer, prompt, RowSampling(), 9, [], client=c) for c in "aaabac"])
    assert [batcher._take().client for _ in range(6)] == ["a", "b", "c", "a", "a", "a"]
    assert batcher._take() is None


def test_answers_give_way_and_go_on_where_they_were(chat, gate, talkative, monkeypatch):
    """To clients without a place, and after their turn to anyone who waits; each answer is what it is alone."""
    monkeypatch.setattr(batching, "TURN_TOKENS", 10)
    batcher, prompt = Batcher(lambda: chat, 2), Prompt("###Human: Hello###Assistant:", [], 9)
    batcher.start()

    def ask(n, client=None):
        sampling = RowSampling(temperature=float(n % 2), seed=n, frequency_penalty=0.3)
        length = 80 if client else 15
        answer = Answer(chat.model.tokenizer, prompt, sampling, length, ["###"], min_tokens=3, client=client)
        batcher.submit([answer])
        return answer

    def wait(*answers):
        for each in answers:
            while not each.finish:
                each.wait(1)
        return [each.ids for each in answers]

    clients = ["busy"] * 2 + [None] * 3
    found = [ask(n, client) for n, client in enumerate(clients[:2])]
    gate.step(6)
    while not all(each.ids for each in found):
        time.sleep(0.001)
    found += [ask(n, client) for n, client in enumerate(clients) if n >= 2]
    gate.open()
    wait(*found[2:])
    assert not any(each.finish for each in found[:2])
    assert wait(*found) == [wait(ask(n, client))[0] for n, client in enumerate(clients)]
    batcher.close()


def test_the_chat_answers_through_it(served, chat, pictures, talkative, monkeypatch):
    """`Chat.stream_answer`, for the page: the same text, the place in the queue, and an end while it waits."""

    def conversation():
        conv, img_list = CONV_VISION.copy(), []
        chat.upload_img(open_picture(BytesIO(pictures[1]), "picture"), conv, img_list)
        chat.ask("What is this?", conv)
        return conv, img_list

    settings, places = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.3}, []
    alone, ids = chat.answer(*conversation(), **settings)
    monkeypatch.setattr(chat, "batcher", served.batcher)
    texts = list(chat.stream_answer(*conversation(), in_line=places.append, **settings))
    assert texts[-1] == alone and all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert chat.answer(*conversation(), **settings)[1].tolist() == ids.tolist()
    monkeypatch.setattr(served.batcher, "_take", lambda: None)
    conv, img_list = conversation()
    places.clear()
    answering = chat.stream_answer(conv, img_list, lambda: places == [1], in_line=places.append, **settings)
    assert list(answering) == [""]
    assert places == [1] and not served.batcher.waiting


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


def test_a_failure_is_an_error_and_the_next_one_is_not(served, chat, monkeypatch, caplog):
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
    sampling, rng = RowSampling(temperature=1.3, top_k=4, top_p=top_p), random.Random(0)
    chosen = choose(scores.repeat(rows, 1), [RowChoice(sampling, [], rng.random()) for _ in range(rows)])
    frequencies = chosen.bincount(minlength=6) / rows
    assert torch.allclose(frequencies, expected, atol=0.015)
    assert not frequencies[expected == 0].any()


def test_each_row_is_sampled_by_its_own_settings():
    scores = torch.tensor([[1.0, 3.0, 2.9, 0.0]]).repeat(5, 1)
    rows = [
        RowSampling(temperature=0),
        RowSampling(temperature=0, presence_penalty=1.0),
        RowSampling(temperature=0, frequency_penalty=0.06),
        RowSampling(temperature=0, repetition_penalty=1.1),
        RowSampling(top_p=0.0, seed=1),
    ]
    for ids, expected in (([1, 1], [1, 2, 2, 2, 1]), ([], [1, 1, 1, 1, 1])):
        assert choose(scores.clone(), [RowChoice(row, ids, 0.9) for row in rows]).tolist() == expected


def test_repetitions_are_penalized_as_by_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    scores, ids = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)), [3, 8, 3, 9]
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([ids]), scores.clone())
    choose(scores, [RowChoice(RowSampling(temperature=0, repetition_penalty=1.4), ids, 0.0)])
    assert torch.equal(scores, expected)
