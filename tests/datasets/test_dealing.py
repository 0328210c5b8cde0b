"""Dealing texts to batches: all are dealt, each once, and their sums are about equal."""

import itertools
import random

import pytest
from torch.utils.data import Dataset, IterableDataset

from minigpt4.datasets.dealing import deal, even_batches, text_length
from minigpt4.datasets.loaders import TrainLoader


@pytest.mark.parametrize("hands", [1, 2, 4, 8])
def test_hands_have_the_same_size_and_nearly_the_same_sum(hands):
    rng = random.Random(hands)
    lengths = [rng.randint(80, 160) for _ in range(12 * hands)]
    dealt = deal(lengths, hands)
    assert sorted(sum(dealt, [])) == list(range(12 * hands))
    assert {len(hand) for hand in dealt} == {12}
    sums = [sum(lengths[i] for i in hand) for hand in dealt]
    assert max(sums) - min(sums) <= 8  # of about 1,440, which vary by 300 where nobody deals
    assert all(hand == sorted(hand) for hand in dealt)


def test_one_hand_keeps_the_order():
    assert deal([3, 1, 2], 1) == [[0, 1, 2]]


def texts(count: int, seed: int = 1) -> list[dict]:
    rng = random.Random(seed)
    return [{"number": n, "text_input": "w" * rng.randint(8, 24)} for n in range(count)]


def test_batches_of_a_stream_are_even():
    """Pools of 128 samples, one after the other: 8 batches of 16 each."""
    samples = texts(256)
    batches = list(itertools.islice(even_batches(itertools.cycle(samples), 16), 16))
    for pool in (batches[:8], batches[8:]):
        sums = [sum(map(text_length, batch)) for batch in pool]
        assert max(sums) - min(sums) <= 2
    numbers = [[sample["number"] for sample in batch] for batch in batches]
    assert sorted(sum(numbers[:8], [])) == list(range(128))
    assert sorted(sum(numbers[8:], [])) == list(range(128, 256))


@pytest.mark.parametrize(("batch_size", "pool"), [(16, 0), (128, 128), (200, 128)])
def test_without_a_pool_batches_come_in_order(batch_size, pool):
    batches = list(itertools.islice(even_batches(itertools.count(), batch_size, pool), 2))
    assert batches == [list(range(batch_size)), list(range(batch_size, 2 * batch_size))]


def test_samples_without_a_text_are_dealt_too():
    assert text_length({"text_input": 3}) == text_length("a text") == text_length({}) == 0
    batches = list(itertools.islice(even_batches(itertools.count(), 64), 2))
    assert sorted(sum(batches, [])) == list(range(128))


class Stories(Dataset):
    """A dataset that knows how long its texts are."""

    def __init__(self):
        self.samples = texts(96)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def text_length(self, index):
        return len(self.samples[index]["text_input"])


class Stream(IterableDataset):
    def __iter__(self):
        yield from texts(2000)


@pytest.mark.parametrize("dataset", [Stories(), Stream()], ids=["with a length", "stream"])
def test_ranks_step_on_texts_of_the_same_length(dataset):
    ranks = [list(TrainLoader({"n": dataset}, None, 16, 0, 7, rank, 4).epoch(0, 8)) for rank in range(4)]
    of_steps = [[sum(map(len, batch["text_input"])) for batch in step] for step in zip(*ranks, strict=True)]
    assert max(max(sums) - min(sums) for sums in of_steps) <= 3


def test_ranks_share_the_samples_of_a_step():
    """Which one takes which depends on their number; what the step has does not."""
    alone = list(TrainLoader({"n": Stories()}, None, 32, 0, 7).epoch(1, 5))
    ranks = [list(TrainLoader({"n": Stories()}, None, 16, 0, 7, rank, 2).epoch(1, 5)) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert sorted(whole["number"].tolist()) == sorted(n for part in parts for n in part["number"].tolist())
