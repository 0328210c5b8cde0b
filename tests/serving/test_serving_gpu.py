"""Answers together on a GPU, in 16 bit and in float32."""

import threading
import time

import pytest
import torch

from minigpt4.conversation import Chat
from minigpt4.models.prompt import IMAGE_SLOT
from minigpt4.serving.answer import Answer, Prompt
from minigpt4.serving.batching import Batcher
from minigpt4.serving.sampling import RowSampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_batches(build_golden_model, golden, dtype):
    _, tensors = golden("conversation")
    batcher = Batcher(lambda: Chat(build_golden_model("cuda", dtype), None, "cuda"), 8)
    batcher.start()
    while batcher.chat is None:
        assert not batcher.failure
        time.sleep(0.05)
    shown = Prompt(f"<Img>{IMAGE_SLOT}</Img> What is it?", [tensors["images"][0]], 40)
    rows = [
        (shown, RowSampling(temperature=0)),
        (shown, RowSampling(seed=1)),
        (Prompt("Hello", [], 6), RowSampling(seed=2, frequency_penalty=0.5)),
        (shown, RowSampling(seed=1)),
    ]

    def ask():
        changed = threading.Event()
        answers = [
            Answer(
                batcher.chat.model.tokenizer,
                prompt,
                sampling,
                max_tokens=20,
                stops=["###"],
                label="",
                deadline=time.monotonic() + 60,
                changed=changed.set,
            )
            for prompt, sampling in rows
        ]
        batcher.submit(answers)
        while not all(answer.finish for answer in answers):
            assert changed.wait(60)
            changed.clear()
        assert all(answer.finish in ("stop", "length") for answer in answers)
        return [answer.ids for answer in answers]

    try:
        first = ask()
        assert first[0] != first[1]
        if dtype == torch.float32:  # in 16 bit, rounding depends on how many rows a step has
            assert first == ask()
            assert first[1] == first[3]
    finally:
        batcher.close()
