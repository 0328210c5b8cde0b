"""Length balancing: each text is in one batch, and the batches have about the same total length."""

import itertools
import random

import pytest
from dataset_files import write_align
from torch.utils.data import Dataset, IterableDataset

from minigpt4.benchmarks.synthetic import random_batches
from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset
from minigpt4.datasets.length_balancing import balanced_batches, balanced_bins, text_length
from minigpt4.datasets.loaders import TrainLoader


@pytest.mark.parametrize("num_bins", [1, 2, 4, 8])
def test_bins_have_the_same_size_and_nearly_the_same_sum(num_bins):
    rng = random.Random(num_bins)
    lengths = [rng.randint(80, 160) for _ in range(12 * num_bins)]
    bins = balanced_bins(lengths, num_bins)
    assert sorted(sum(bins, [])) == list(range(12 * num_bins))
    assert {len(indices) for indices in bins} == {12}
    sums = [sum(lengths[i] for i in indices) for indices in bins]
    assert max(sums) - min(sums) <= 8  # of about 1,440; without balancing they vary by 300
    assert all(indices == sorted(indices) for indices in bins)


def test_one_bin_keeps_the_order():
    assert balanced_bins([3, 1, 2], 1) == [[0, 1, 2]]


def texts(count: int, seed: int = 1) -> list[dict]:
    rng = random.Random(seed)
    return [{"number": n, "text_input": "w" * rng.randint(8, 24)} for n in range(count)]


def test_batches_of_a_stream_are_balanced():
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


def test_samples_without_a_text_are_distributed_too():
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
    """The largest difference in characters between two ranks of a step."""
    of_steps = [[sum(map(len, batch["text_input"])) for batch in step] for step in zip(*ranks, strict=True)]
    return max(max(sums) - min(sums) for sums in of_steps)


@pytest.mark.parametrize(("dataset", "most"), [(Stories, 2), (Stream, 25)])
def test_ranks_step_on_texts_of_about_the_same_length(dataset, most):
    """Ranks of a stream are balanced each by itself; pools of 128 texts differ by chance, by about 60 of 2,050."""
    ranks = [list(TrainLoader({"n": dataset()}, None, 16, 0, 7, rank, 4).epoch(0, 8)) for rank in range(4)]
    assert spread(ranks) <= most
    apart = [list(TrainLoader({"n": dataset()}, None, 16, 0, 7).epoch(rank, 8)) for rank in range(4)]
    assert dataset is Stream or spread(apart) > 3 * most


def test_the_next_pool_is_drawn_as_batches_leave():
    """If a worker drew it at once, its rank would wait, and the other ranks with it."""
    drawn, samples = [], texts(400)
    batches = balanced_batches((drawn.append(1) or sample for sample in itertools.cycle(samples)), 16)
    counts = []
    for _ in range(20):
        next(batches)
        counts.append(len(drawn))
    assert counts == [128 + 16 * n for n in range(20)]


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_of_the_benchmark_are_balanced(stage):
    ranks = [list(random_batches(stage, 12, 10, rank, ranks=4)) for rank in range(4)]
    assert spread(ranks) <= (40 if stage == 1 else 16)  # two characters a token
    alone = [list(random_batches(stage, 12, 10, rank)) for rank in range(4)]
    assert spread(alone) > 60


def test_a_dataset_gives_the_lengths_of_its_texts(tmp_path):
    dataset = CCSBUAlignDataset(str(write_align(tmp_path, records=3)), None)
    lengths = [dataset.text_length(i) for i in range(3)]
    assert lengths == [len(caption) for caption in dataset.captions] and min(lengths) > 0


def test_ranks_share_the_samples_of_a_step():
    """The number of ranks decides which rank takes a sample, not which samples are in the step."""
    alone = list(TrainLoader({"n": Stories()}, None, 32, 0, 7).epoch(1, 5))
    ranks = [list(TrainLoader({"n": Stories()}, None, 16, 0, 7, rank, 2).epoch(1, 5)) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert sorted(whole["number"].tolist()) == sorted(n for part in parts for n in part["number"].tolist())
