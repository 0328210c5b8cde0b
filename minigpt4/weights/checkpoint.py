"""Reading and writing weights: the only place that calls torch.load and torch.save.

A checkpoint holds only the trainable tensors, under the keys of the first release
(``{"model", "optimizer", "config", "scaler", "epoch"}``), and the state that an exact resume needs.
"""

import contextlib
import functools
import logging
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minigpt4.common import compat
from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import checkpoints_in
from minigpt4.common.text import listed, pluralize
from minigpt4.weights.locate import fetch, shards, why_unreadable

# Buffers in checkpoints of the first release that hold no learnt value.
TOLERATED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")


class CheckpointError(ConfigError):
    """A file without weights, or with weights that do not fit the model."""


class NoCheckpointError(CheckpointError, FileNotFoundError):
    """A folder without a checkpoint."""


def read_file(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict:
    """The content of a .pth, .bin or .safetensors file. Tensors are mapped from disk and take memory only when used.

    prefixes: of a .safetensors file, only tensors whose names begin with one of these are read.

    Raises CheckpointError for any other content, and for bytes that differ from the checksums in the file.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file of weights. {_files_in(path)}")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file of weights: it is a pipe or a device, or is gone.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}
        check_archive(path)
        mmap = zipfile.is_zipfile(path)  # only the current format of torch.save can be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = _reason(error)
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as weights: {why_unreadable(path) or reason}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {_kind(content)}, not a dict of tensors.")
    return content


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in words."""
    first_line = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, SafetensorError):
        return f"it is cut off, or no safetensors file ({first_line})"
    foreign = re.search(r"(?:GLOBAL|global|class) ([\w.]+\.\w+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and foreign:  # torch would advise to allow any code in the file
        return (
            f"it holds an object of type {foreign[1]}, and only tensors and plain values are read: other objects can "
            "run code. Save the model's state_dict() instead"
        )
    if isinstance(error, (pickle.UnpicklingError, LookupError)):
        return "it is no weights file, or holds more than tensors, such as code, and is not opened"
    return first_line


def _kind(value: object) -> str:
    """The type of a value, for messages: `a list`, `an int`."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _files_in(folder: Path) -> str:
    """Advice that names a file of weights in a folder."""
    names = sorted(f.name for f in folder.iterdir() if f.suffix in (".pth", ".safetensors", ".bin", ".pt"))
    if names:
        return f"Give a file, such as {folder / names[-1]}."
    runs = sorted(folder.glob("*/checkpoint_*.pth"), key=os.path.getmtime)
    return f"Give a run's folder, such as {runs[-1].parent}." if runs else "Give the file itself."


def check_archive(path: Path) -> None:
    """Compare a file of torch.save with the checksums that it holds, once in a process.

    Files of other formats have none, as have files that were saved without (`torch.serialization.set_crc32_options`).
    Raises CheckpointError.
    """
    if path.is_file() and zipfile.is_zipfile(path):
        stat = path.stat()
        _check_records(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def _check_records(path: Path, size: int, changed: int) -> None:
    """size, changed: those of the file, so that it is read again once it has changed."""
    num_threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool:
        shares = pool.map(functools.partial(_damaged_records, path, step=num_threads), range(num_threads))
        damaged = sorted(name for share in shares for name in share)
    if damaged:
        raise CheckpointError(
            f"{path} is damaged: {len(damaged)} of its parts differ from their checksums, the first is {damaged[0]}. "
            "Copy or fetch the file again."
        )


def _damaged_records(path: Path, first: int, step: int) -> list[str]:
    """The names of those records that differ from their checksums, among each `step`-th one from `first` on.

    Each thread opens the file for itself. Threads that share a `ZipFile` find sound files damaged (Python 3.12.3).
    """
    damaged = []
    with zipfile.ZipFile(path) as archive:
        for record in [record for record in archive.infolist() if record.CRC][first::step]:
            try:
                with archive.open(record) as file:
                    while file.read(1 << 22):
                        pass
            except (zipfile.BadZipFile, EOFError, zlib.error):
                damaged.append(record.filename)
    return damaged


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite. It costs one pass over them, and no memory."""
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # types of 8 bit have no sums
        tensor = tensor.float()
    # NaN and infinity reach the sum. A sum of finite numbers can overflow; that is rare, and looked at again.
    return bool(tensor.sum().isfinite()) or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Raise CheckpointError that names those of the pairs (name, tensor) whose numbers are not all finite."""
    broken = [name for name, tensor in tensors if not is_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"{source}: NaN or infinity among the numbers of {listed(broken, 5)}. The file is damaged, "
            "the training that wrote it diverged, or float16 cannot hold its numbers (run.amp_dtype=bf16). Use another "
            "file."
        )


def read_weights(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, or of a folder in Hugging Face format, mapped from disk.

    If a file has a key "model" or "state_dict", the tensors under it are read. Of a folder, only tensors whose names
    begin with one of `prefixes` are read; shards without any of them may be missing.

    Raises CheckpointError for other content, a folder without weights, and missing shards.
    """
    if path.is_dir():
        return _read_folder(path, prefixes)
    return weights_of(read_file(path), str(path))


def _read_folder(folder: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    files = shards(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no weights: no .safetensors or .bin file of a Hugging Face folder.")
    weights = {}
    for file, names in files.items():
        if names and not any(name.startswith(prefixes) for name in names):
            continue
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks {file}, a shard that its index lists. Fetch it into the folder.")
        weights |= read_file(folder / file, prefixes)
    return {name: value for name, value in weights.items() if name.startswith(prefixes)}


def weights_of(content: dict, source: str = "the file", own: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors in the content of a weights file, without the prefixes of wrappers that all their names have.

    Args:
        source: path of the file, for messages.
        own: names in the model. Prefixes that they have are kept.

    Raises CheckpointError for a file without tensors, and for other objects among the weights.
    """
    weights = content
    for key in ("model", "state_dict"):
        if isinstance(weights.get(key), dict):
            weights = weights[key]
    tensors = {name: t for name, t in weights.items() if isinstance(t, torch.Tensor) and isinstance(name, str)}
    # Beside tensors that are not under a key of their own, a file may hold settings.
    others = {name: value for name, value in weights.items() if name not in tensors}
    if others and (weights is not content or not tensors):
        kinds = listed([f"{name} is {_kind(value)}" for name, value in others.items()], 5)
        raise CheckpointError(f"{source} holds other objects than tensors in place of weights: {kinds}.")
    return _unwrapped(tensors, source, own)


def _unwrapped(tensors: dict[str, torch.Tensor], source: str, own: Collection[str]) -> dict[str, torch.Tensor]:
    """Take off the prefixes that DistributedDataParallel and torch.compile put before all names."""
    names, wrapper = list(tensors), re.compile(r"(module|_orig_mod)\.")
    taken_off = ""
    while names and not set(own).issuperset(names):
        first = wrapper.match(names[0])
        if first is None or not all(name.startswith(first[0]) for name in names):
            break
        taken_off += first[0]
        names = [name.removeprefix(first[0]) for name in names]
    if taken_off:
        logging.warning("%s: all names begin with %r, which is taken off.", source, taken_off)
    return dict(zip(names, tensors.values(), strict=True))


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by their names in `state_dict`.

    `named_parameters` also names the wrapper around a layer that recomputes its activations.
    """
    named = module.named_parameters()
    return {compat.name_in_state_dict(name): parameter for name, parameter in named if parameter.requires_grad}


def saved_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint holds, by their names in `state_dict`.

    They are the trainable ones, and those that were loaded from another checkpoint (`from_checkpoint` of the module)
    and are frozen now: no published file has them.
    """
    loaded = getattr(module, "from_checkpoint", ())
    named = ((compat.name_in_state_dict(name), parameter) for name, parameter in module.named_parameters())
    return {name: parameter for name, parameter in named if parameter.requires_grad or name in loaded}


def below(problems: list[str]) -> str:
    """The first ten problems, a line each, and how many more there are."""
    return listed(problems, 10, "\n  ", "\n  … and {} more")


def load_weights(
    module: nn.Module,
    weights: dict[str, torch.Tensor],
    source: str,
    required: set[str],
    device: str | torch.device | None = None,
) -> None:
    """Load `weights` into `module`, and log their number and source.

    Tensors that have memory are overwritten in place. Tensors on the meta device are replaced by `weights`, moved to
    `device` and converted to the dtype of the module.

    Args:
        weights: tensors by name, as in `module.state_dict()`; dtypes may differ.
        source: path or URL of the weights, for messages.
        required: names that must be among the weights.
        device: target of tensors on the meta device; required if there are any.

    Raises:
        CheckpointError: a required tensor is missing, has another shape, or is unknown to the module; a number is not
            finite.
    """
    weights = {name: value for name, value in weights.items() if not TOLERATED.search(name)}
    own = module.state_dict()
    missing = sorted(required - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    reshaped = sorted(n for n in weights.keys() & own.keys() if weights[n].shape != own[n].shape)
    problems = [
        *(f"{name} is missing" for name in missing),
        *(f"{name} is not part of the model" for name in unexpected),
        *(f"{name} has shape {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}" for name in reshaped),
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model:\n  {below(problems)}")
    empty = {name for name in weights if own[name].is_meta}

    def converted(name: str) -> torch.Tensor:
        """Move first, convert second: a GPU converts faster, and the host needs no memory for it."""
        return weights[name].to(device if name in empty else own[name].device).to(own[name].dtype)

    filled = {name: converted(name) for name in empty}
    # All are looked at before any is overwritten.
    check_finite(((name, filled[name] if name in empty else converted(name)) for name in weights), source)
    module.load_state_dict(filled, strict=False, assign=True)
    module.load_state_dict({name: value for name, value in weights.items() if name not in empty}, strict=False)
    numbers = pluralize(sum(value.numel() for value in weights.values()), "parameter")
    logging.info("Loaded %s, %s from %s", pluralize(len(weights), "tensor"), numbers, source)


def resolve(path: str) -> Path:
    """The checkpoint file of a path or URL; of a run's folder, the newest checkpoint_N.pth.

    Raises NoCheckpointError for a folder without one, and the errors of `locate.fetch`.
    """
    resolved = fetch(path)
    if not resolved.is_dir():
        return resolved
    newest = checkpoints_in(resolved)
    if not newest:
        raise NoCheckpointError(
            f"{path} is a folder without a checkpoint_N.pth, which each epoch of a run writes. {_files_in(resolved)}"
        )
    return newest[0]


def save(content: dict, path: Path) -> None:
    """Write a checkpoint atomically: if the run is killed meanwhile, the old file or the whole new one remains.

    Raises CheckpointError if it cannot be written, for example on a full disk.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        with contextlib.suppress(OSError):  # the new name outlives a power cut, too, if the file system can do that
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter, after the OSError of the file
        reason = next((each.strerror for each in (error, error.__context__) if isinstance(each, OSError)), error)
        raise CheckpointError(f"{path} cannot be written: {reason}. What was saved before is untouched.") from error
    finally:
        with contextlib.suppress(OSError):  # the folder may have vanished, or be read-only now
            part.unlink(missing_ok=True)
