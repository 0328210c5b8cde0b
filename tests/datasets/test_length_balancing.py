"""Dealing texts to batches: all are dealt, each once, and their sums are about equal."""

import itertools
import random

import pytest
from dataset_files import write_align
from torch.utils.data import Dataset, IterableDataset

from minigpt4.benchmarks.synthetic import random_batches
from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset
from minigpt4.datasets.length_balancing import balanced_batches, deal, text_length
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
    batches = list(itertools.islice(balanced_batches(itertools.cycle(samples), 16), 16))
    for pool in (batches[:8], batches[8:]):
        sums = [sum(map(text_length, batch)) for batch in pool]
        assert max(sums) - min(sums) <= 2
    numbers = [[sample["number"] for sample in batch] for batch in batches]
    assert sorted(sum(numbers[:8], [])) == list(range(128))
    assert sorted(sum(numbers[8:], [])) == list(range(128, 256))


@pytest.mark.parametrize(("batch_size", "pool"), [(16, 0), (128, 128), (200, 128)])
def test_without_a_pool_batches_come_in_order(batch_size, pool):
    batches = list(itertools.islice(balanced_batches(itertools.count(), batch_size, pool), 2))
    assert batches == [list(range(batch_size)), list(range(batch_size, 2 * batch_size))]


def test_samples_without_a_text_are_dealt_too():
    assert text_length({"text_input": 3}) == text_length("a text") == text_length({}) == 0
    batches = list(itertools.islice(balanced_batches(itertools.count(), 64), 2))
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
    """Each rank's own texts."""

    def set_seed(self, seed, rank, world_size):
        self.rank = rank

    def __iter__(self):
        yield from texts(2000, seed=self.rank)


def spread(ranks: list[list[dict]]) -> int:
    """How many characters the rank with most has more than that with fewest, in the worst of all steps."""
    of_steps = [[sum(map(len, batch["text_input"])) for batch in step] for step in zip(*ranks, strict=True)]
    return max(max(sums) - min(sums) for sums in of_steps)


@pytest.mark.parametrize(("dataset", "most"), [(Stories, 2), (Stream, 25)])
def test_ranks_step_on_texts_of_about_the_same_length(dataset, most):
    """A stream's ranks know nothing of each other, and pools of 128 texts differ by chance: by 60 or so of 2,050."""
    ranks = [list(TrainLoader({"n": dataset()}, None, 16, 0, 7, rank, 4).epoch(0, 8)) for rank in range(4)]
    assert spread(ranks) <= most
    apart = [list(TrainLoader({"n": dataset()}, None, 16, 0, 7).epoch(rank, 8)) for rank in range(4)]
    assert dataset is Stream or spread(apart) > 3 * most


def test_the_next_pool_is_drawn_as_batches_leave():
    """All at once, a worker would keep its rank, and that the others, waiting."""
    drawn, samples = [], texts(400)
    batches = balanced_batches((drawn.append(1) or sample for sample in itertools.cycle(samples)), 16)
    counts = []
    for _ in range(20):
        next(batches)
        counts.append(len(drawn))
    assert counts == [128 + 16 * n for n in range(20)]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_benchs_ranks_do_likewise(stage):
    ranks = [list(random_batches(stage, 12, 10, rank, ranks=4)) for rank in range(4)]
    assert spread(ranks) <= (40 if stage == 1 else 16)  # two characters a token
    alone = [list(random_batches(stage, 12, 10, rank)) for rank in range(4)]
    assert spread(alone) > 60


def test_datasets_say_how_long_their_texts_are(tmp_path):
    dataset = CCSBUAlignDataset(str(write_align(tmp_path, records=3)), None)
    lengths = [dataset.text_length(i) for i in range(3)]
    assert lengths == [len(caption) for caption in dataset.captions] and min(lengths) > 0


def test_ranks_share_the_samples_of_a_step():
    """Which one takes which depends on their number; what the step has does not."""
    alone = list(TrainLoader({"n": Stories()}, None, 32, 0, 7).epoch(1, 5))
    ranks = [list(TrainLoader({"n": Stories()}, None, 16, 0, 7, rank, 2).epoch(1, 5)) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert sorted(whole["number"].tolist()) == sorted(n for part in parts for n in part["number"].tolist())
