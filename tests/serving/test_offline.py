"""Answers about many pictures, without a queue."""

import threading

import torch

from minigpt4.conversation import Decoding
from minigpt4.serving.offline import OfflineAnswers


def test_an_answer_does_not_wait_for_pictures_of_later_ones(chat):
    complete, waited = threading.Event(), []

    def load(item):
        if item:
            waited.append(complete.wait(10))
        return str(item), [torch.zeros(3, 64, 64)]

    def entry(name, images, answer):
        complete.set()
        return {"name": name}

    decoding = Decoding(do_sample=False, max_new_tokens=3)
    offline = OfflineAnswers(
        chat, lambda count: "###Human: <Img><ImageHere></Img>###Assistant:", decoding, 4, threads=1
    )
    lines = [line for batch in offline.batches(range(3), load, entry) for line in batch.lines]
    assert lines == [{"name": "0"}, {"name": "1"}, {"name": "2"}]
    assert waited == [True, True]
