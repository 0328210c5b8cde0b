"""Files out of reach for a while: local shards, URLs, commands, pictures of a folder, cached features."""

import http.server
import shutil
import threading
from functools import partial
from itertools import islice

import pytest
from dataset_files import good_members, write_align, write_shards, write_tar

from minigpt4.datasets import patience
from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset
from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
from minigpt4.processors import BaseProcessor


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(patience, "WAIT_FOR_ONE", 0.3)


def stream(storage, timeout=30.0) -> ImageTextStream:
    dataset = ImageTextStream(storage, BaseProcessor(), BaseProcessor(), "laion", shuffle_buffer=5)
    dataset.patience.timeout_s = timeout
    return dataset


class Clock:
    """A clock that only pauses move."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(patience, "time", Clock())
    return patience.time


def waits(dataset) -> dict[str, int]:
    """{file: number of waits}; nothing else may have been left out."""
    taken = dataset.take_left_out()
    assert all(key[0] == "a file that was out of reach" and key[2] == "waited for" for key in taken)
    return {key[1]: count for key, count in taken.items()}


def test_local_shards_that_come_back(tmp_path, later):
    folder = write_shards(tmp_path / "shards", count=2, samples=4)
    dataset = stream(f"{folder}/*.tar")
    away = folder.rename(tmp_path / "away")
    later(lambda: away.rename(folder))
    assert [raw.caption for raw in dataset.part(0)] == [f"Sample {i}." for i in range(4)]
    assert waits(dataset) == {f"{folder}/00000.tar": 1}


def test_a_stream_is_the_same_as_without_the_outage(tmp_path, later):
    folder = write_shards(tmp_path / "shards", count=3, samples=10)
    expected = [sample["image_id"] for sample in islice(stream(f"{folder}/*.tar"), 100)]
    samples = iter(stream(f"{folder}/*.tar"))
    found = [sample["image_id"] for sample in islice(samples, 40)]
    away = folder.rename(tmp_path / "away")
    later(lambda: away.rename(folder))
    assert found + [sample["image_id"] for sample in islice(samples, 60)] == expected


def test_a_read_error_in_the_middle_of_a_shard(tmp_path, monkeypatch):
    """What a file server does that is restarted: reading goes on at the same byte."""
    path = write_tar(tmp_path / "0.tar", good_members(0, 200))
    opened = []

    class Failing:
        def __init__(self, shard):
            self.file = open(shard, "rb", buffering=0)  # noqa: SIM115
            self.seek, self.close, self.reads = self.file.seek, self.file.close, 0
            opened.append(self)

        def read(self, size):
            self.reads += 1
            if self.reads > 1 and len(opened) < 4:
                raise OSError(116, "Stale file handle")
            return self.file.read(min(size, 30_000))

    monkeypatch.setattr(patience, "open_shard", Failing)
    dataset = stream(str(path))
    assert len(list(dataset.part(0))) == 200
    assert len(opened) == 4 and waits(dataset) == {str(path): 3}


def test_a_command_that_fails_at_first_and_in_the_middle(tmp_path):
    path = write_tar(tmp_path / "0.tar", good_members(0, 200))
    script = tmp_path / "read.sh"
    script.write_text(
        f"echo x >> {tmp_path}/calls\n"
        f"case $(wc -l < {tmp_path}/calls) in\n"
        f"1) exit 7;;\n2) head -c 100000 {path}; exit 56;;\n*) cat {path};;\nesac\n"
    )
    dataset = stream(f"pipe:sh {script}")
    assert [raw.key for raw in dataset.part(0)] == [f"{i:09d}" for i in range(200)]
    assert waits(dataset) == {f"pipe:sh {script}": 2}


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_a_server_that_comes_back(tmp_path, monkeypatch, later):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    write_tar(tmp_path / "0.tar", good_members(0, 20))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = server.server_address
    server.server_close()  # nobody listens at this port
    servers = []

    def start():
        servers.append(http.server.ThreadingHTTPServer(address, handler))
        threading.Thread(target=servers[0].serve_forever, daemon=True).start()

    url = f"http://127.0.0.1:{address[1]}/0.tar"
    dataset = stream(url)
    later(start)
    try:
        assert len(list(dataset.part(0))) == 20
        assert waits(dataset) == {url: 1}
    finally:
        servers[0].shutdown()
        servers[0].server_close()


def test_pictures_of_a_folder_that_comes_back(tmp_path, later):
    dataset = CCSBUAlignDataset(str(write_align(tmp_path / "align")), BaseProcessor())
    dataset.patience.timeout_s = 30
    away = (tmp_path / "align").rename(tmp_path / "away")
    later(lambda: away.rename(tmp_path / "align"))
    assert [dataset[i]["image_id"] for i in range(12)] == [str(i) for i in range(12)]
    assert waits(dataset) == {f"{tmp_path}/align/image/0.jpg": 1}


def test_an_outage_ends_the_run_when_the_time_is_over(tmp_path, clock):
    folder = write_shards(tmp_path / "shards", count=3)
    samples = iter(stream(f"{folder}/*.tar", timeout=300))
    assert len(list(islice(samples, 5))) == 5
    folder.rename(tmp_path / "away")
    with pytest.raises(RuntimeError, match="cannot be read") as error:
        list(islice(samples, 3000))
    assert clock.now == pytest.approx(1300)
    assert f"{folder}/0000" in str(error.value)


def test_one_shard_that_is_gone_does_not_stop_the_others(tmp_path, clock):
    """It is waited for once, and for a short time, since the others can be read."""
    folder = write_shards(tmp_path / "shards", count=4, samples=4)
    dataset = stream(f"{folder}/*.tar", timeout=600.0)
    (folder / "00001.tar").unlink()
    assert len(list(islice(dataset, 300))) == 300
    assert 1000 < clock.now < 1001
    assert {key[1] for key in dataset.take_left_out()} == {f"{folder}/00001.tar"}


def test_many_files_that_are_gone_cost_little_time(tmp_path, monkeypatch, clock):
    """Less than 20 s together."""
    monkeypatch.setattr(patience, "WAIT_FOR_ONE", 10.0)
    dataset = CCSBUAlignDataset(str(write_align(tmp_path, records=60)), BaseProcessor())
    dataset.patience.timeout_s = 600.0
    for i in range(0, 60, 2):
        (tmp_path / "image" / f"{i}.jpg").unlink()
    for _ in range(2):
        assert [dataset[i]["image_id"] for i in range(60)] == [str(i | 1) for i in range(60)]
    assert 1010 < clock.now < 1025
    assert dataset.take_left_out().total() == 60


def test_a_command_that_always_fails_at_its_end_is_waited_for_once(tmp_path, clock):
    path = write_tar(tmp_path / "0.tar", good_members(0, 10))
    dataset = stream(f"pipe:cat {path}; exit 3", timeout=50)
    for _ in range(3):
        assert len(list(dataset.part(0))) == 10
    assert clock.now == pytest.approx(1050)
    assert dataset.take_left_out() == {("a shard, or a part of it, that cannot be read", f"pipe:cat {path}; exit 3"): 3}


def test_without_a_time_nothing_is_waited_for(clock):
    clock.sleep = lambda seconds: pytest.fail("waited")
    with pytest.raises(RuntimeError, match="1 of 1 shards, e.g. pipe:false"):
        next(iter(stream("pipe:false", timeout=0)))


def test_the_time_is_that_of_the_config(tmp_path):
    from minigpt4.common.registry import registry

    for name, storage in (("laion", write_shards(tmp_path / "s", 1)), ("cc_sbu_align", write_align(tmp_path / "a"))):
        cfg = {"build_info": {"storage": f"{storage}/*.tar" if name == "laion" else str(storage)}}
        builder = registry.get_builder_class(name)(cfg)
        assert builder.build_datasets()["train"].patience.timeout_s == 300
        builder.data_timeout_s = 7
        assert builder.build_datasets()["train"].patience.timeout_s == 7
