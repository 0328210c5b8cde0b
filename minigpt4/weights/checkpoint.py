"""Reading and writing weights: the only place that calls torch.load and torch.save.

A checkpoint holds only the trainable tensors, under the keys of the first release
(``{"model", "optimizer", "config", "scaler", "epoch"}``), and the state that an exact resume needs.
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

from minigpt4.common import compat
from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import newest_checkpoint
from minigpt4.common.text import pluralize
from minigpt4.weights.locate import fetch, shards, why_unreadable

# Buffers in checkpoints of the first release that hold no learnt value.
TOLERATED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")


class CheckpointError(ConfigError):
    """A file without weights, or with weights that do not fit the model."""


def read_file(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict:
    """The content of a .pth, .bin or .safetensors file. Tensors are mapped from disk and take memory only when used.

    prefixes: of a .safetensors file, only tensors whose names begin with one of these are read.

    Raises CheckpointError for any other content.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}
        mmap = zipfile.is_zipfile(path)  # only the current format of torch.save can be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, (pickle.UnpicklingError, LookupError)):  # torch would advise to allow any code in the file
            reason = "it is no weights file, or holds more than tensors, such as code, and is not opened"
        if isinstance(error, SafetensorError):
            reason = f"it is cut off, or no safetensors file ({reason})"
        reason = why_unreadable(path) or reason
        raise CheckpointError(f"{path} ({path.stat().st_size:,} bytes) cannot be read as weights: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors.")
    return content


def read_weights(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, or of a folder in Hugging Face format, mapped from disk.

    If a file has a key "model" or "state_dict", the tensors under it are read. Of a folder, only tensors whose names
    begin with one of `prefixes` are read; shards without any of them may be missing.

    Raises CheckpointError for other content, a folder without weights, and missing shards.
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


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by their names in `state_dict`.

    `named_parameters` also names the wrapper around a layer that recomputes its activations.
    """
    named = module.named_parameters()
    return {compat.name_in_state_dict(name): parameter for name, parameter in named if parameter.requires_grad}


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
        CheckpointError: a required tensor is missing, has another shape, or is unknown to the module.
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
    # Move first, convert second: a GPU converts faster, and the host needs no memory for it.
    filled = {name: weights[name].to(device).to(own[name].dtype) for name in empty}
    module.load_state_dict(filled, strict=False, assign=True)
    module.load_state_dict({name: value for name, value in weights.items() if name not in empty}, strict=False)
    numbers = pluralize(sum(value.numel() for value in weights.values()), "parameter")
    logging.info("Loaded %s, %s from %s", pluralize(len(weights), "tensor"), numbers, source)


def resolve(path: str) -> Path:
    """The checkpoint file of a path or URL; of a run's folder, the newest checkpoint_N.pth.

    Raises FileNotFoundError if there is none.
    """
    resolved = fetch(path)
    if resolved.is_file():
        return resolved
    newest = newest_checkpoint(resolved)
    if newest is None:
        raise FileNotFoundError(f"{path} is a folder without a checkpoint_N.pth. Give a file, or a run's own folder.")
    return newest


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
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter, after the OSError of the file
        reason = next((each.strerror for each in (error, error.__context__) if isinstance(each, OSError)), error)
        raise CheckpointError(f"{path} cannot be written: {reason}. What was saved before is untouched.") from error
    finally:
        part.unlink(missing_ok=True)
