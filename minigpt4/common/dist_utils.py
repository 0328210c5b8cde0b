"""Processes and devices: one process per GPU, started by torchrun, or a single one."""

import contextlib
import logging
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from minigpt4.common import first_release, gpus
from minigpt4.common.errors import ConfigError

__getattr__ = first_release.attributes_of(__name__)  # for names that are gone

# The ranks on their CPUs, where the default group is that of their GPUs.
_host_group: dist.ProcessGroup | None = None
# Seconds that the ranks wait for each other.
others_wait_s = math.inf


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def select_device(name: str) -> torch.device:
    """The device of this rank. `cuda` on a machine without a GPU means the CPU, with a warning at the first call.

    An Apple GPU (`mps`) is used only if it is named. Raises ConfigError for an unknown or absent device, for a GPU that
    torch cannot use, and for more processes than GPUs.
    """
    if not re.fullmatch(gpus.DEVICE, name):
        raise ConfigError(f"run.device={name!r} is not one of {', '.join(gpus.DEVICES)}, cuda:0, cuda:1 …")
    if name.startswith("cuda") and not torch.cuda.is_available():
        if problem := gpus.why_unusable():
            raise ConfigError(f"run.device={name}: {problem} {gpus.ON_THE_CPU}")
        warn_of_the_cpu(name)
        name = "cpu"
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("run.device=mps, but this machine has no Apple GPU. Use cpu or cuda.")
    if device.type == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, and run.device=mps takes one: processes cannot "
            "share an Apple GPU. Start one, or use run.device=cpu."
        )
    if device.type == "cuda" and device.index is None:
        processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > count:
            raise ConfigError(
                f"torchrun started {processes} processes on this machine, and torch sees {count} of its GPUs; each "
                f"process needs one of its own. Use --nproc_per_node {count}, or check CUDA_VISIBLE_DEVICES."
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"run.device={name}: this machine's GPUs are 0 to {torch.cuda.device_count() - 1}.")
        if problem := gpus.unsupported_architecture(device.index):
            raise ConfigError(f"run.device={name}: {problem} {gpus.ON_THE_CPU}")
        # Batches of another size can reuse this memory: CUDA graphs of several sizes share one pool.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
    return device


@cache  # task, model and runner all ask for the device
def warn_of_the_cpu(name: str) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one warning per machine
        apple = " run.device=mps takes this machine's Apple GPU." if torch.backends.mps.is_available() else ""
        logging.warning("run.device=%s, but there is no GPU for it: running on the CPU.%s", name, apple)


def select_dtype(device: torch.device, amp: bool = True, amp_dtype: str = "auto") -> torch.dtype:
    """The run's computing type: float32 off the GPU or without amp, otherwise bfloat16 or float16."""
    if device.type != "cuda" or not amp:
        return torch.float32
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp_dtype, torch.bfloat16 if bf16 else torch.float16)


def init_process_group(
    device: torch.device, backend: str | None = None, distributed: bool = True, timeout_minutes: float = 20.0
) -> None:
    """Join the process group that torchrun announces in the environment; without one, do nothing.

    timeout_minutes: a rank that waits longer for the others ends with an error instead of hanging.

    Raises ConfigError when there are several processes and `distributed` is False: each would train by itself.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return
    if not distributed:
        raise ConfigError(f"run.distributed=False, but torchrun started {world_size} processes. Set it to True.")
    logging.info("| distributed init (rank %d, world %d): env://", int(os.environ["RANK"]), world_size)
    global _host_group, others_wait_s
    others_wait_s = 60 * timeout_minutes
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    timeout = timedelta(seconds=others_wait_s)
    store, rank, world_size = _rendezvous(timeout)
    device_id = device if backend == "nccl" else None
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
    )
    _host_group = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store by which processes find each other, this one's rank, and their number.

    torchrun (torch 2.14) keeps one store for all attempts of --max-restarts. Without a prefix, a process of the second
    could read the address of one of the first, which is gone, and wait for it. On several machines, agents may count
    the attempts differently.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store, rank, world_size


def destroy_process_group() -> None:
    global others_wait_s
    others_wait_s = math.inf
    if is_distributed():
        dist.destroy_process_group()


def own_patience(seconds: float) -> float:
    """Seconds that a rank waits by itself, such as for data: at most half as long as the other ranks wait for it.

    So the rank that gives up first is the one that knows what it has waited for.
    """
    return min(seconds, others_wait_s / 2)


@contextlib.contextmanager
def process_group(run, device: torch.device | None = None) -> Iterator[torch.device]:
    """While entered, this process belongs to the group of torchrun, if there is one. Yields this rank's device.

    run: the `run:` section of a config. device: in place of `run.device`.
    """
    device = device or select_device(run.device)
    init_process_group(device, run.dist_backend, run.distributed, run.timeout_minutes)
    try:
        yield device
    finally:
        destroy_process_group()


def barrier() -> None:
    """Wait for the other ranks."""
    if is_distributed():
        dist.barrier()


def broadcast_object(value):
    """Rank 0's `value`, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, on every rank. What it raises there is raised on all, so that none waits."""
    found = error = None
    if is_main_process():
        try:
            found = function()
        except Exception as caught:
            error = caught
    found, sent = broadcast_object((found, error and _portable(error)))
    if sent:
        raise error or sent
    return found


@contextlib.contextmanager
def entered_by_main(manager: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    """While entered, rank 0 has entered `manager`. What it raises on entering is raised on all ranks."""
    with contextlib.ExitStack() as stack:
        from_main(lambda: stack.enter_context(manager))
        yield


def _portable(error: Exception) -> Exception:
    """An error as other processes can raise it. Those of plug-ins may not survive pickling."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def gather_objects(value) -> list:
    """The `value` of every rank, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    box = [None] * get_world_size()
    dist.all_gather_object(box, value)
    return box


def agree(*values: int) -> list[int]:
    """The largest of each value over the ranks. The hosts wait for each other, the GPUs do not."""
    if not is_distributed():
        return [*values]
    largest = torch.tensor(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host_group)
    return largest.tolist()


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over the ranks, on the device of `value`."""
    if not is_distributed():
        return value
    total = value.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(total)
    return total.to(value.device)


def broadcast_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Give the values of rank 0's tensors to those of the other ranks."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def data_parallel(module: torch.nn.Module) -> DistributedDataParallel:
    """A module with gradients exchanged between ranks. All ranks start from rank 0's trainable weights.

    Frozen weights are the same on all ranks already, so 7B of them are not sent.
    """
    broadcast_tensors(parameter for parameter in module.parameters() if parameter.requires_grad)
    with warnings.catch_warnings():
        # torch 2.14 deprecates the name broadcast_buffers; torch 2.11 does not have the new one
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(module, init_sync=False, broadcast_buffers=False)
