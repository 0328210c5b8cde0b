"""The endpoint on the tiny model, served from a thread to real clients."""

import tarfile
import threading
from types import SimpleNamespace

import pytest
import torch
from endpoint import Served, serving
from helpers import ROOT

from minigpt4.common.config import Config
from minigpt4.conversation.loading import load_chat
from minigpt4.fast.decoding.loop import cached_decoding

EVAL = ROOT / "eval_configs/minigpt4_tiny_eval.yaml"


@pytest.fixture(scope="session")
def chat():
    return load_chat(Config(SimpleNamespace(cfg_path=EVAL, options=[])), torch.device("cpu"))


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Drawings: a cat, an apple, a sailboat, a car."""
    with tarfile.open(ROOT / "dataset/tiny/fluent.tar.gz") as tar:
        return [tar.extractfile(f"{code}.webp").read() for code in ("1f431", "1f34e", "26f5", "1f697")]


@pytest.fixture(scope="session")
def served(chat):
    """The endpoint with its default settings."""
    with serving(lambda: chat) as served:
        served.wait_for(status="ready")
        yield served


@pytest.fixture
def serve(chat):
    """serve(**settings) starts another endpoint."""
    stack = []

    def start(**settings) -> Served:
        stack.append(serving(lambda: chat, **settings))
        served = stack[-1].__enter__()
        served.wait_for(status="ready")
        return served

    yield start
    for context in stack:
        context.__exit__(None, None, None)


class Gate:
    """Lets the language model compute one step for each permit that `step` gives, or any number after `open`."""

    def __init__(self):
        self._permits, self._open = threading.Semaphore(0), False

    def step(self, count: int = 1) -> None:
        self._permits.release(count)

    def open(self) -> None:
        self._open = True
        self._permits.release(1)

    def wait(self) -> None:
        if not self._open:
            assert self._permits.acquire(timeout=60)  # longer than any other timeout in these tests


@pytest.fixture
def gate(chat, monkeypatch):
    """The language model waits at this gate before each step."""
    cached_decoding.supports(chat.model.llama_model)  # its self-check takes steps, too
    gate, forward = Gate(), chat.model.llama_model.forward

    def waiting(*args, **kwargs):
        gate.wait()
        return forward(*args, **kwargs)

    monkeypatch.setattr(chat.model.llama_model, "forward", waiting)
    yield gate
    gate.open()


@pytest.fixture
def steps(chat, monkeypatch):
    """How many answers each step of the language model continues, and "prompt" where it reads a part of one."""
    seen, forward = [], chat.model.llama_model.forward

    def watched(*args, **kwargs):
        rows, length = kwargs["inputs_embeds"].shape[:2]
        seen.append(rows if length == 1 else "prompt")
        return forward(*args, **kwargs)

    monkeypatch.setattr(chat.model.llama_model, "forward", watched)
    return seen


@pytest.fixture
def talkative(chat, monkeypatch):
    """The language model never ends an answer by itself."""
    tokenizer, forward = chat.model.tokenizer, chat.model.llama_model.forward
    signs = [i for i in range(chat.model.llama_model.config.vocab_size) if "#" in tokenizer.decode([i])]
    silent = [*signs, *tokenizer.special_tokens.values()]

    def talking(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., silent] = -1e9
        return output

    monkeypatch.setattr(chat.model.llama_model, "forward", talking)
