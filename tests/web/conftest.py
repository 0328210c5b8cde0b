"""The page, served, and the golden model, slowed down."""

import io
import time
from contextlib import ExitStack, redirect_stdout

import pytest
from helpers import free_port

from minigpt4.web.server import answer_with, serve


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The page, without a model."""
    pytest.importorskip("gradio")
    feedback = tmp_path_factory.mktemp("page") / "feedback.jsonl"
    with ExitStack() as stack:
        with redirect_stdout(io.StringIO()) as printed:
            page = stack.enter_context(serve(port=free_port(), max_upload_mb=1, feedback=str(feedback)))
        page.printed, page.feedback = printed.getvalue(), feedback
        yield page


@pytest.fixture(scope="session")
def chat(build_golden_model):
    """The golden model, slowed down to `chat.pause` seconds a step. It ends no answer itself."""
    from minigpt4.conversation import Chat
    from minigpt4.processors import Blip2ImageEvalProcessor

    model = build_golden_model()
    llm, tokenizer = model.llama_model, model.tokenizer
    separators = [i for i in range(llm.config.vocab_size) if "#" in tokenizer.decode([i])]
    silent = [*separators, *tokenizer.special_tokens.values()]
    forward = llm.forward

    def slow(*args, **kwargs):
        time.sleep(chat.pause)
        output = forward(*args, **kwargs)
        output.logits[..., silent] = -1e9
        return output

    llm.forward = slow
    chat = Chat(model, Blip2ImageEvalProcessor(28))
    chat.pause = 0.0
    return chat


@pytest.fixture(scope="session")
def answering(served, chat):
    """The page with the golden model."""
    answer_with(served, chat)
    return served


@pytest.fixture
def page(answering, chat, monkeypatch):
    """The page as it was at first: full speed, nothing uploaded."""
    monkeypatch.setattr(chat, "pause", 0.0)
    answering.uploads.by_id.clear()
    return answering


@pytest.fixture
def one_at_a_time(page, chat, monkeypatch):
    """The page, which computes one answer at a time."""
    together = page._answering
    monkeypatch.setattr(page, "batch", 1)
    answer_with(page, chat)
    yield page
    page.batcher.close()
    page._answering = together


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
