"""Prompts that a `ContinuousBatch` answers together, for tests on a CPU and on a GPU."""

import random

import torch

from minigpt4.fast.decoding.continuous import ContinuousBatch


@torch.no_grad()
def answer_together(batch: ContinuousBatch, work: list[tuple[torch.Tensor, int]], max_rows: int, seed: int) -> list:
    """The likeliest ids for each (prompt [S,D], number of new tokens). Prompts join in random order at random steps.

    Each step computes all rows that are active; as in serving, the last token of an answer may be computed once more.
    """
    rng = random.Random(seed)
    waiting, running, ids, joining = list(range(len(work))), [], [[] for _ in work], None
    rng.shuffle(waiting)
    while waiting or running or joining:
        if running:
            read = batch.read_ids()
            batch.step()
            for number, token in zip(running, read(), strict=True):
                ids[number].append(token)
            for place in reversed(range(len(running))):
                if len(ids[running[place]]) == work[running[place]][1]:
                    batch.leave(place, ids[running[place]])
                    last = running.pop()
                    if place < len(running):
                        running[place] = last
            if running:
                batch.set_ids(batch.logits.argmax(dim=-1))
        if waiting and joining is None and len(running) < max_rows and (not running or rng.random() < 0.4):
            number = waiting.pop()
            joining = number, batch.join(*work[number])
        if joining and (logits := next(joining[1])) is not None:
            running.append(joining[0])
            batch.set_ids(logits.argmax(dim=-1), len(running) - 1)
            joining = None
    return ids
