"""Prompts that a `ContinuousBatch` answers together, for tests on a CPU and on a GPU."""

import random

import torch

from minigpt4.fast.decoding.continuous import ContinuousBatch, NewRow


@torch.no_grad()
def answer_together(batch: ContinuousBatch, work: list[tuple[torch.Tensor, int]], max_rows: int, seed: int) -> list:
    """The likeliest ids for each (prompt [S,D], number of new tokens). Prompts join in random order at random steps.

    Up to three join at once. Each step computes all rows that are active; as in serving, the last token of an answer
    may be computed once more.
    """
    rng = random.Random(seed)
    waiting, ids, joining = list(range(len(work))), [[] for _ in work], None
    rng.shuffle(waiting)
    while waiting or batch.owners or joining:
        if running := batch.owners:
            read = batch.read_ids()
            batch.step()
            for number, token in zip(running, read(), strict=True):
                ids[number].append(token)
                if len(ids[number]) == work[number][1]:
                    batch.leave(number, ids[number])
            if batch.owners:
                batch.set_ids(batch.logits.argmax(dim=-1))
        free = max_rows - len(batch.owners)
        if joining is None and waiting and free and (not batch.owners or rng.random() < 0.4):
            count = rng.randint(1, min(3, free, len(waiting)))
            joining = batch.join([NewRow(number, *work[number]) for number in waiting[-count:]], likeliest)
            del waiting[-count:]
        if joining and next(joining, None) is None:  # all have been read
            joining = None
    return ids


def likeliest(owners: list, logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)
