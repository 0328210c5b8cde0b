"""The choice of device and type, and joining a process group."""

import pickle
from datetime import timedelta

import pytest
import torch

from minigpt4.common import dist_utils
from minigpt4.common.errors import ConfigError


def test_a_rank_does_not_wait_for_hours(monkeypatch):
    joined = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **given: joined.update(given))
    monkeypatch.setattr(dist_utils, "rendezvous", lambda url, timeout: iter([(torch.distributed.HashStore(), 0, 2)]))
    dist_utils.init_process_group(torch.device("cpu"))
    assert 60 < joined["timeout"].total_seconds() < 3600


def test_each_attempt_of_torchrun_has_a_store_of_its_own(monkeypatch):
    """torch 2.14 keeps one for all, with addresses of processes that are gone."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(dist_utils, "rendezvous", lambda url, timeout: iter([(store, 0, 2)]))
    for attempt in "012":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        own, *world = dist_utils._rendezvous(timedelta(seconds=1))
        assert not own.check(["address"]) and world == [0, 2]
        own.set("address", attempt)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # agents of several machines count for themselves
    assert dist_utils._rendezvous(timedelta(seconds=1))[0] is store


def test_several_processes_need_run_distributed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="run.distributed=False.* 2 processes"):
        dist_utils.init_process_group(torch.device("cpu"), distributed=False)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes on this machine.* 2 of its GPUs.*--nproc_per_node 2"):
        dist_utils.select_device("cuda")


def test_unknown_devices():
    with pytest.raises(ConfigError, match="run.device='tpu'"):
        dist_utils.select_device("tpu")


@pytest.mark.parametrize(
    ("device", "amp", "amp_dtype", "expected"),
    [
        ("cpu", True, "bf16", torch.float32),
        ("cuda", False, "bf16", torch.float32),
        ("cuda", True, "bf16", torch.bfloat16),
        ("cuda", True, "fp16", torch.float16),
        ("cuda", True, "auto", torch.float16),
    ],
)
def test_the_computing_type(monkeypatch, device, amp, amp_dtype, expected):
    """`auto` on a GPU without bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert dist_utils.select_dtype(torch.device(device), amp, amp_dtype) == expected


class OfAPlugIn(Exception):
    def __init__(self, wanted, given):
        super().__init__(f"{wanted} wanted, {given} given")
        self.tell = lambda: wanted


@pytest.mark.parametrize("error", [OfAPlugIn(1, 2), UnicodeDecodeError("utf-8", b"a", 0, 1, "bad")])
def test_an_error_of_rank_0_is_raised_on_all(monkeypatch, error):
    """Also one that cannot be pickled: rank 0 raises the error itself."""
    sent = []

    def broadcast(value):
        sent.append(pickle.dumps(value))
        return pickle.loads(sent[0])

    def fail():
        raise error

    monkeypatch.setattr(dist_utils, "broadcast_object", broadcast)
    with pytest.raises(type(error)) as caught:
        dist_utils.from_main(fail)
    assert caught.value is error
    monkeypatch.setattr(dist_utils, "is_main_process", lambda: False)
    with pytest.raises(Exception, match=r"wanted|decode"):
        dist_utils.from_main(fail)
