"""Batches: mixing, epochs that do not depend on one another, ranks that share nothing, collation, refusals."""

import math
import pickle
import random
import socket
import sys
import time
from collections import Counter
from itertools import islice
from multiprocessing import resource_sharer
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import TEXT, VIS, good_members, write_align, write_shards, write_tar
from helpers import Pictures
from torch.utils.data import Dataset, IterableDataset

from minigpt4.common.registry import registry
from minigpt4.datasets import loaders, workers
from minigpt4.datasets.loaders import LeftOut, TrainLoader, eval_loader, report_left_out
from minigpt4.datasets.seeding import derive_seed, seeded


class Numbers(Dataset):
    """Samples with their index, and a random number from each of the three global generators."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        draws = torch.tensor([torch.rand(()), random.random(), np.random.rand()], dtype=torch.float64)
        return {"image": draws, "text_input": str(index)}


class Ticks(IterableDataset):
    """A plug-in's stream that ends after 5 samples and knows nothing of seeds or epochs."""

    def __iter__(self):
        for i in range(5):
            yield {"image": torch.rand(2), "text_input": f"tick {i}"}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    storage = {"laion": f"{write_shards(folder / 'a')}/*.tar", "cc_sbu": f"{write_shards(folder / 'b', 2)}/*.tar"}
    storage["cc_sbu_align"] = str(write_align(folder / "c"))

    def build(*names):
        cfg = {"vis_processor": VIS, "text_processor": TEXT}
        builders = {n: registry.get_builder_class(n)({**cfg, "build_info": {"storage": storage[n]}}) for n in names}
        built = {name: builder.build_datasets()["train"] for name, builder in builders.items()}
        for dataset in built.values():
            dataset.shuffle_buffer = 50  # of a stream: it is filled before the first sample
        return built

    return build


@pytest.fixture(scope="module")
def spoilt_shards(tmp_path_factory) -> list[str]:
    """Shards with broken pictures, a sample without a caption, one without any sample, and one that is cut off."""
    folder, broken = tmp_path_factory.mktemp("spoilt"), b"no picture"
    paths = []
    for shard in range(4):
        members = [(n, broken if n.endswith(("3.png", "8.png")) else c) for n, c in good_members(shard * 30, 30)]
        paths.append(
            write_tar(folder / f"{shard}.tar", [(n, c) for n, c in members if "00005." not in n or "png" in n])
        )
    paths[1].write_bytes(paths[1].read_bytes()[:20_000])
    return [str(path) for path in (write_tar(folder / "empty.tar", []), *paths)]


def flat(batches) -> list[str]:
    return [text for batch in batches for text in batch["text_input"]]


def same(first: list[dict], second: list[dict]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(a["text_input"] == b["text_input"] and torch.equal(a["image"], b["image"]) for a, b in pairs)


# --- epochs


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_does_not_depend_on_earlier_ones(datasets, num_workers):
    """Exact resume at an epoch boundary: order of the samples, crops, and the mix of the datasets."""

    def loader():
        ratios = {"laion": 2, "cc_sbu": 1, "cc_sbu_align": 1}
        return TrainLoader(datasets(*ratios), ratios, batch_size=4, num_workers=num_workers, seed=42)

    one = loader()
    epochs = [list(one.epoch(e, 12)) for e in range(3)]
    assert [len(batches) for batches in epochs] == [12, 12, 12]
    resumed = loader()
    torch.manual_seed(123)  # the process's own generators play no part
    assert same(list(resumed.epoch(2, 12)), epochs[2])
    assert same(list(resumed.epoch(1, 12)), epochs[1])
    assert len({tuple(flat(batches)) for batches in epochs}) == 3
    batch = epochs[0][0]
    assert batch["image"].shape == (4, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert batch["image_mean"].shape == batch["image_std"].shape == (4, 3)
    assert isinstance(batch["text_input"], list) and len(batch["text_input"]) == len(batch["image_id"]) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_that_was_broken_off_leaves_no_trace(datasets, num_workers):
    loader = TrainLoader(datasets("laion", "cc_sbu_align"), None, batch_size=4, num_workers=num_workers, seed=42)
    whole = list(loader.epoch(0, 8))
    assert len(list(islice(loader.epoch(0, 8), 3))) == 3
    assert same(list(loader.epoch(0, 8)), whole)


@pytest.mark.parametrize(("num_workers", "then", "ranks"), [(0, 0, 1), (2, 2, 1), (2, 3, 1), (3, 0, 2), (1, 2, 2)])
def test_an_epoch_goes_on_after_any_batch(datasets, spoilt_shards, num_workers, then, ranks, monkeypatch):
    """With the same samples, crops and counts, whatever the number of workers; pools of several batches included."""
    monkeypatch.setattr(loaders, "POOL", 12)
    ratios = {"laion": 3, "cc_sbu": 1, "cc_sbu_align": 1}

    def loader(workers):
        sets = datasets(*ratios)
        for name in ("laion", "cc_sbu"):
            sets[name].shards, sets[name].shuffle_buffer = spoilt_shards, 20
        return TrainLoader(sets, ratios, 4, workers, seed=42, rank=ranks - 1, world_size=ranks)

    whole, batches, states = loader(num_workers), [], []
    for batch in whole.epoch(1, 40):
        batches.append(batch)
        whole.use_next()
        states.append(pickle.loads(pickle.dumps(whole.state())))
    left_out = whole.take_left_out()
    assert left_out.total() > 5
    for first in (1, 16, 39):
        resumed = loader(then)
        resumed.num_readers = whole.num_readers
        resumed.load_state(**states[first - 1])
        assert same(list(resumed.epoch(1, 40, first)), batches[first:])
        assert resumed.take_left_out() == left_out
        assert same(list(resumed.epoch(1, 40)), batches)


def test_a_plug_ins_stream_goes_on_after_any_batch():
    """It is read again from its start, under the same seeds."""
    whole = TrainLoader({"t": Ticks()}, None, 3, 2, seed=0)
    batches, states = [], []
    for batch in whole.epoch(0, 9):
        batches.append(batch)
        whole.use_next()
        states.append(whole.state())
    for first in (1, 6):
        resumed = TrainLoader({"t": Ticks()}, None, 3, 2, seed=0)
        resumed.load_state(**states[first - 1])
        assert same(list(resumed.epoch(0, 9, first)), batches[first:])


def test_no_worker_is_like_one_worker_and_walks_do_not_depend_on_workers(datasets):
    def batches(names, num_workers):
        return list(TrainLoader(datasets(*names), None, 4, num_workers, seed=1).epoch(1, 6))

    assert same(batches(["laion", "cc_sbu_align"], 0), batches(["laion", "cc_sbu_align"], 1))
    assert same(batches(["cc_sbu_align"], 0), batches(["cc_sbu_align"], 2))


def test_seeds_ranks_and_epochs_differ(datasets):
    def batches(seed=0, rank=0, epoch=0):
        loader = TrainLoader(datasets("laion"), None, 4, 0, seed=seed, rank=rank, world_size=2)
        return flat(loader.epoch(epoch, 5))

    assert len({tuple(batches(**kwargs)) for kwargs in ({}, {"seed": 1}, {"rank": 1}, {"epoch": 1})}) == 4
    assert batches() == batches()


def test_workers_of_a_stream_read_different_samples(datasets):
    batches = list(TrainLoader(datasets("laion"), None, 8, 2, seed=0).epoch(0, 8))
    assert flat(batches[0::2]) != flat(batches[1::2])


def test_two_streams_over_the_same_shards_differ(datasets):
    both = {"a": datasets("laion")["laion"], "b": datasets("laion")["laion"]}
    loader = TrainLoader(both, None, 8, 0, seed=0)
    names, batches = loader._draw(0, 20), list(loader.epoch(0, 20))
    first = {name: batches[names.index(name)]["text_input"] for name in both}
    assert first["a"] != first["b"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_are_left_alone(num_workers):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    batches = list(TrainLoader({"n": Numbers(10)}, None, 2, num_workers, seed=0).epoch(0, 5))
    list(eval_loader(Numbers(10), 2, num_workers))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    draws = torch.cat([batch["image"] for batch in batches])
    assert len(set(draws.flatten().tolist())) == draws.numel()  # no two samples drew the same number


# --- walks through datasets with a length


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_a_pass_without_repeats(world_size):
    """3 epochs of 2 batches of 2 for each rank: 12 samples a rank, one pass for each rank's share of 12 · ranks."""
    loaders = [
        TrainLoader({"n": Numbers(12 * world_size)}, None, 2, 0, 7, rank, world_size) for rank in range(world_size)
    ]
    for pass_number in range(2):
        epochs = range(3 * pass_number, 3 * pass_number + 3)
        seen = [flat(batch for e in epochs for batch in loader.epoch(e, 2)) for loader in loaders]
        assert sorted(map(int, sum(seen, []))) == list(range(12 * world_size))


def test_passes_differ_in_order_and_run_on_over_epochs():
    loader = TrainLoader({"n": Numbers(10)}, None, 4, 0, seed=7)
    texts = flat(batch for epoch in range(3) for batch in loader.epoch(epoch, 5))
    passes = [texts[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(map(int, p)) == list(range(10)) for p in passes)
    assert len(set(map(tuple, passes))) == 6


def test_mixed_walks_run_on_over_epochs():
    """What a walk has done before an epoch follows from the draws of the epochs before."""
    loader = TrainLoader({"a": Numbers(6), "b": Numbers(8)}, {"a": 1, "b": 3}, 2, 0, seed=3)
    batches = [
        (name, batch) for e in range(5) for name, batch in zip(loader._draw(e, 7), loader.epoch(e, 7), strict=True)
    ]
    for name, length in (("a", 6), ("b", 8)):
        texts = flat(batch for drawn, batch in batches if drawn == name)
        for start in range(0, len(texts) - length + 1, length):
            assert sorted(map(int, texts[start : start + length])) == list(range(length))


# --- mixing


def test_each_batch_is_whole_and_drawn_by_ratio(datasets):
    loader = TrainLoader({"a": Numbers(50), "ticks": Ticks()}, {"a": 3, "ticks": 1}, 4, 0, seed=0)
    kinds = []
    for batch in loader.epoch(0, 400):
        (kind,) = {text.startswith("tick") for text in batch["text_input"]}
        kinds.append(kind)
    assert 0.19 < sum(kinds) / 400 < 0.31
    assert loader.shares() == {"a": 1 - sum(kinds) / 400, "ticks": sum(kinds) / 400}


def test_missing_ratio_is_one_zero_is_never_and_others_are_ignored():
    def counts(ratios):
        return Counter(TrainLoader({"a": Numbers(9), "b": Numbers(9)}, ratios, 3, 0, seed=0)._draw(0, 1000))

    assert 420 < counts(None)["a"] < 580 and 420 < counts({"a": 1})["a"] < 580
    assert counts({"a": 0, "not_in_this_split": 9}) == {"b": 1000}


@pytest.mark.parametrize("ratios", [{"a": 0}, {"a": -1}, {"a": float("nan")}, {"a": float("inf")}])
def test_ratios_that_cannot_be_drawn_by(ratios):
    with pytest.raises(ValueError, match="sample_ratio are {'a': "):
        TrainLoader({"a": Numbers(9)}, ratios, 3, 0, seed=0)


def test_no_datasets():
    with pytest.raises(ValueError, match="Nothing to draw batches from"):
        TrainLoader({}, None, 3, 0, seed=0)


# --- refusals and plug-ins


def test_dataset_smaller_than_a_batch():
    with pytest.raises(
        ValueError, match=r"^batch_size_train=96 needs at least 96 samples per rank; few has 14 to train on\. Lower run"
    ):
        TrainLoader({"few": Numbers(14)}, None, 96, 0, seed=0)
    with pytest.raises(ValueError, match=r"few has 14 \(7 for each of 2 ranks\).*run.batch_size_train=7"):
        TrainLoader({"few": Numbers(14)}, None, 8, 0, seed=0, world_size=2)
    with pytest.raises(ValueError, match="batch_size_train=0 must be at least 1"):
        TrainLoader({"few": Numbers(14)}, None, 0, 0, seed=0)
    assert len(flat(TrainLoader({"few": Numbers(14)}, None, 14, 0, seed=0).epoch(0, 3))) == 42


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_a_stream_reach_the_caller(tmp_path, num_workers):
    write_shards(tmp_path, count=1)
    builder = registry.get_builder_class("laion")({"build_info": {"storage": f"{tmp_path}/00000.tar"}})
    loader = TrainLoader({"laion": builder.build_datasets()["train"]}, None, 4, num_workers, seed=0)
    (tmp_path / "00000.tar").write_bytes(b"not a tar")
    with pytest.raises(RuntimeError, match="datasets.laion: of the last 100 samples only 0 could be used"):
        list(loader.epoch(0, 2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_that_ends_begins_again(num_workers):
    batches = list(TrainLoader({"t": Ticks()}, None, 3, num_workers, seed=0).epoch(0, 6))
    worker_0 = flat(batches[:: max(num_workers, 1)])
    assert worker_0[:6] == [f"tick {i}" for i in (0, 1, 2, 3, 4, 0)]


def test_a_stream_without_samples():
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="nothing is a stream without any sample"):
        list(TrainLoader({"nothing": Nothing()}, None, 2, 0, seed=0).epoch(0, 1))


@pytest.mark.parametrize("name", ["collater", "collate_fn"])
def test_a_dataset_may_collate_itself(name):
    dataset = Numbers(8)
    setattr(dataset, name, lambda samples: {"texts": [sample["text_input"] for sample in samples]})
    assert all(list(batch) == ["texts"] for batch in TrainLoader({"n": dataset}, None, 2, 0, seed=0).epoch(0, 3))
    assert [batch["texts"] for batch in eval_loader(dataset, 5, 0)] == [["0", "1", "2", "3", "4"], ["5", "6", "7"]]


def test_what_goes_to_the_workers_can_be_pickled(datasets):
    """Python 3.14 starts workers by forkserver, and macOS by spawn."""
    loader = TrainLoader(datasets("laion", "cc_sbu_align"), None, 4, 0, seed=0)
    copy = pickle.loads(pickle.dumps(loader._loader.loader.dataset))
    request = loader._requests(0, 1)[0]
    batch = copy[request].batch
    assert same([batch], list(loader.epoch(0, 1)))


# --- what is left out


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_batches_left_out_is_counted(tmp_path, num_workers):
    write_align(tmp_path, records=12)
    broken = tmp_path / "image" / "5.jpg"
    broken.write_bytes(b"text")
    cfg = {"vis_processor": VIS, "text_processor": TEXT, "build_info": {"storage": str(tmp_path)}}
    dataset = registry.get_builder_class("cc_sbu_align")(cfg).build_datasets()["train"]
    loader = TrainLoader({"cc_sbu_align": dataset}, None, 4, num_workers, seed=0)
    for epoch in range(2):
        assert len(flat(loader.epoch(epoch, 6))) == 24  # twice the dataset
        key = LeftOut("cc_sbu_align", "an image that is not one, or is broken", str(broken))
        assert loader.take_left_out() == {key: 2}
        assert not loader.take_left_out()


def test_a_report_names_the_worst_shards():
    counts = {LeftOut("laion", "no caption", f"{i}.tar"): i for i in range(1, 6)}
    counts |= {LeftOut("cc_sbu", "no picture", "a.tar"): 1}
    assert report_left_out(counts) == [
        "cc_sbu: left out 1 × no picture: a.tar (1).",
        "laion: left out 15 × no caption: 5.tar (5), 4.tar (4), 3.tar (3) and 2 more.",
    ]
    assert report_left_out({}) == []


class Texts(Dataset):
    """A plug-in's set of records that nobody has checked."""

    def __init__(self, *texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        number = {"NaN": math.nan, "infinity": -math.inf}.get(self.texts[index], 0.0)
        return {"image": torch.tensor([number, 0.0]), "text_input": self.texts[index], "image_id": str(index)}


class EndlessTexts(Texts, IterableDataset):
    def __iter__(self):
        while True:
            yield from (Texts.__getitem__(self, i) for i in range(len(self)))


@pytest.mark.parametrize("kind", [Texts, EndlessTexts])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_that_cannot_be_used_are_left_out_of_any_dataset(kind, num_workers, caplog):
    dataset = kind("a", "", "b", "\ud83d", None, "c", "NaN", "infinity")
    loader = TrainLoader({"mine": dataset}, None, 3, num_workers, seed=0)
    texts = [text for batch in loader.epoch(0, 20) for text in batch["text_input"]]
    assert len(texts) == 60 and set(texts) == set("abc")
    left_out = loader.take_left_out()
    assert {key.cause.split()[-1] for key in left_out} == {"text", "caption", "characters", "processors"}
    assert {key.shard for key in left_out} == {*"13467"} and all(key.dataset == "mine" for key in left_out)
    assert min(left_out.values()) >= 7
    if kind is Texts:
        batches = list(eval_loader(dataset, 3, num_workers))
        assert [text for batch in batches for text in batch["text_input"]] == [*"abc"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_samples_of_a_batch_have_names(datasets, num_workers):
    """Of each kind of dataset: its name, the sample's key, and the file or shard. They follow batches one by one."""
    found = datasets("laion", "cc_sbu_align") | {"mine": Texts(*"abcdef")}
    loader = TrainLoader(found, None, 4, num_workers, seed=0)
    seen = set()
    for batch in loader.epoch(0, 12):
        ids = loader.take_ids()
        assert [each.key for each in ids] == batch["image_id"] and len({each.dataset for each in ids}) == 1
        dataset, key, shard = ids[0]
        seen.add(dataset)
        if dataset == "mine":
            assert shard == ""
        else:
            assert Path(shard).is_file() and (Path(key).stem in shard or key.startswith(f"{Path(shard).name}/"))
    assert seen == found.keys() and loader.take_ids() == []


def test_a_sample_without_a_key_is_named_by_its_index():
    pictures = Pictures(torch.zeros(6, 3, 2, 2), [*"abcdef"])
    loader = TrainLoader({"mine": pictures}, None, 3, 0, seed=0)
    (batch,) = loader.epoch(0, 1)
    assert [f"[{'abcdef'.index(text)}]" for text in batch["text_input"]] == [each.key for each in loader.take_ids()]


def test_nothing_but_texts_that_cannot_be_used():
    with pytest.raises(RuntimeError, match=r"datasets.mine: an empty caption: 1000 samples in a row"):
        next(TrainLoader({"mine": EndlessTexts("", " ")}, None, 1, 0, seed=0).epoch(0, 1))


def test_evaluation_leaves_them_out_too():
    batches = list(eval_loader(Texts("a", "", "\ud83d", "", "b"), 2, 0))
    assert [batch["text_input"] for batch in batches] == [["a"], ["b"]]


def test_a_report_says_what_else_was_done():
    counts = {LeftOut("laion", "a file that was out of reach", "0.tar", "waited for"): 2}
    assert report_left_out(counts) == ["laion: waited for 2 × a file that was out of reach: 0.tar (2)."]


# --- evaluation


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 2), (3, 0), (9, 0)])
def test_eval_takes_every_sample_once(world_size, num_workers):
    parts = [flat(eval_loader(Numbers(7), 2, num_workers, rank, world_size)) for rank in range(world_size)]
    assert sorted(map(int, sum(parts, []))) == list(range(7))
    assert parts[0] == [str(i) for i in range(0, 7, world_size)]


# --- seeds


def test_derived_seeds():
    seeds = {
        derive_seed(*parts)
        for parts in [(s, e, r, w) for s in range(4) for e in range(9) for r in range(9) for w in range(9)]
    }
    assert len(seeds) == 4 * 9**3 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(42, 0, 0, 0) == 4193219165860551584  # a change would change every run


def test_seeded_is_the_same_each_time_and_puts_everything_back():
    def draws():
        return random.random(), np.random.rand(), float(torch.rand(()))

    with seeded(5):
        first = draws()
    before = draws()
    with seeded(5):
        assert draws() == first != before
    with pytest.raises(KeyError), seeded(5):
        raise KeyError
    assert draws() != first


class WorkerAddress(Dataset):
    """Its item is the address at which the worker offers its batches."""

    def __getitem__(self, number):
        resource_sharer.DupFd(0)
        return resource_sharer._resource_sharer._address


@pytest.mark.skipif(sys.platform != "linux", reason="depends on how workers send batches on Linux")
@pytest.mark.parametrize("quiet", [True, False])
def test_a_worker_prints_no_traceback_when_its_main_process_ends(monkeypatch, capfd, quiet):
    """The receiver of a batch hangs up, like a stopped process. By default, the worker prints a traceback."""
    if not quiet:
        monkeypatch.setattr(workers, "_silence_hangups", lambda: None)
    watched = workers.WatchedLoader(WorkerAddress(), [0], 1, 60.0)
    (address,) = set(batches := iter(watched.loader))
    for _ in range(2):  # the second is answered after the first was handled
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(address)
            time.sleep(0.2)
    batches._shutdown_workers()
    assert ("Traceback" in capfd.readouterr().err) is not quiet


def test_a_worker_reports_other_errors(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: reported.append(error))
    workers._silence_hangups()
    errors = [OSError("got end of file during message"), OSError(24, "Too many open files"), ValueError()]
    for error in errors:
        sys.excepthook(type(error), error, None)
    assert reported == errors[1:]
