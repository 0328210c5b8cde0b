"""Reading and writing weights: the only place that calls torch.load and torch.save.

A checkpoint holds the trainable tensors alone, under the names of the first release:
``{"model", "optimizer", "config", "scaler", "epoch"}``, and beside them what an exact resume needs.
"""

import logging
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import newest_checkpoint
from minigpt4.common.text import pluralize
from minigpt4.weights.locate import fetch, shards, why_unreadable

# Buffers that first-release checkpoints hold and that carry no learnt value.
TOLERATED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")


class CheckpointError(ConfigError):
    """A file that holds no weights, or weights that do not fit the model."""


def read_file(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict:
    """Everything in a .pth, .bin or .safetensors file. Tensors are mapped from the disk: they take memory when used.

    prefixes: of a .safetensors file, only the tensors whose names begin with one of these.

    Raises CheckpointError for any other content.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}
        mmap = zipfile.is_zipfile(path)  # only the current format of torch.save can be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's advice, to allow any code in it, is none
            reason = "it is no weights file, or holds more than tensors, such as code, and is not opened"
        reason = why_unreadable(path) or reason
        raise CheckpointError(f"{path} ({path.stat().st_size:,} bytes) cannot be read as weights: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors.")
    return content


def read_weights(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, or of a folder in Hugging Face format, mapped from the disk.

    Of a file, those under "model" or "state_dict" where it has such a key. Of a folder, those whose names begin with
    one of `prefixes`; shards that hold none of them need not be there.

    Raises CheckpointError for other content, a folder without weights, and shards that are not there.
    """
    if path.is_dir():
        return _read_folder(path, prefixes)
    return weights_of(read_file(path))


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


def weights_of(content: dict) -> dict[str, torch.Tensor]:
    """The tensors in the content of a weights file."""
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def load_weights(
    module: nn.Module,
    weights: dict[str, torch.Tensor],
    source: str,
    required: set[str],
    device: str | torch.device | None = None,
) -> None:
    """Load `weights` into `module`, and say what was loaded.

    Tensors that have memory are overwritten in place. Those on the meta device get it on `device`, in their own type,
    straight from `weights`.

    Args:
        weights: tensors by name, as in `module.state_dict()`; dtypes may differ.
        source: where they come from, for messages.
        required: the names that must be among them.
        device: where tensors on the meta device come to lie; needed when there are any.

    Raises:
        CheckpointError: a required tensor is missing, one has another shape, or one is unknown to the module.
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
        more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{source} does not fit the model:\n  " + "\n  ".join(problems[:10]) + more)
    empty = {name for name in weights if own[name].is_meta}
    # To the device first, then to the type: a GPU converts faster, and the host needs no room for it.
    filled = {name: weights[name].to(device).to(own[name].dtype) for name in empty}
    module.load_state_dict(filled, strict=False, assign=True)
    module.load_state_dict({name: value for name, value in weights.items() if name not in empty}, strict=False)
    numbers = pluralize(_numel(weights.values()), "parameter")
    logging.info("Loaded %s, %s from %s", pluralize(len(weights), "tensor"), numbers, source)


def resolve(path: str) -> Path:
    """The checkpoint file that `path` means: itself, a URL's, or the newest checkpoint_N.pth of a run's folder.

    Raises FileNotFoundError when there is none.
    """
    resolved = fetch(path)
    if resolved.is_file():
        return resolved
    newest = newest_checkpoint(resolved)
    if newest is None:
        raise FileNotFoundError(f"{path} is a folder without a checkpoint_N.pth. Give a file, or a run's own folder.")
    return newest


def save(content: dict, path: Path) -> None:
    """Write a checkpoint atomically: a run that is killed meanwhile leaves the file before or the whole new one."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _numel(tensors) -> int:
    return sum(t.numel() for t in tensors)
