"""Names, types and shapes of the tensors in .safetensors and .pth files, and single rows, without torch.

A .pth file is a zip with a pickle in it. The pickle is read by an unpickler that knows tensors and plain containers and
takes everything else for a blank; it calls nothing that the file names.
"""

import json
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

# As safetensors calls them: (numpy's type, bytes).
DTYPES = {
    "F64": ("<f8", 8),
    "F32": ("<f4", 4),
    "F16": ("<f2", 2),
    "BF16": ("<u2", 2),
    "I64": ("<i8", 8),
    "I32": ("<i4", 4),
    "I16": ("<i2", 2),
    "I8": ("<i1", 1),
    "U8": ("<u1", 1),
    "BOOL": ("?", 1),
}
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# How torch.save began files before it wrote zips.
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"


class HeaderError(ValueError):
    """A file that cannot be looked into; the message says why. needs_torch: only torch can tell whether it is whole."""

    def __init__(self, message: str, needs_torch: bool = False):
        super().__init__(message)
        self.needs_torch = needs_torch


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    def rows(self, ids: list[int]) -> np.ndarray:
        """Some rows [len(ids),D] of a matrix [N,D], as float32."""
        kind, size = DTYPES[self.dtype]
        width = self.shape[1]
        rows = np.empty((len(ids), width), np.float32)
        with open(self.path, "rb") as file:
            for number, row in enumerate(ids):
                file.seek(self.offset + row * width * size)
                values = np.frombuffer(file.read(width * size), kind)
                # bfloat16 is the upper half of a float32
                rows[number] = (values.astype("<u4") << 16).view("<f4") if self.dtype == "BF16" else values
        return rows


def read_header(path: Path) -> dict[str, Any]:
    """What a weights file holds, its tensors as `Tensor`: {name: Tensor}, or what torch.save was given.

    Raises HeaderError for a file that is cut off or none of these.
    """
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except HeaderError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise HeaderError(str(error) or type(error).__name__) from error


def tensors_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in the content of a weights file, those under "model" or "state_dict" where it has such a key."""
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def numel(tensors: dict[str, Tensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors.values())


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("it is not a safetensors file, or it is cut off")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end > size:
        raise ValueError(f"it is cut off: {size:,} of {end:,} bytes are there")
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), path, start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _read_torch(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        if file.read(len(OLD_FORMAT)) == OLD_FORMAT:
            raise HeaderError("it is in torch's format from before 2020, which only torch can read", needs_torch=True)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entries = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
        with archive.open(entries["data.pkl"]) as pickled:
            content = _Unpickler(pickled, path, lambda key: _data_start(file, entries[f"data/{key}"])).load()
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
    return content


def _data_start(file, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, whose two last fields are the lengths of what follows."""
    file.seek(info.header_offset + 26)
    lengths = file.read(4)
    return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


class _Blank:
    """Stands for any object that is not looked at."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, path: Path, data_start):
        super().__init__(file)
        self._path, self._data_start = path, data_start

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *rest: data
        return STORAGES.get(name, "U8") if name.endswith("Storage") else _Blank

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid
        return dtype, key

    def _tensor(self, storage, offset: int, shape, *rest) -> Tensor:
        dtype, key = storage
        return Tensor(dtype, tuple(shape), self._path, self._data_start(key) + offset * DTYPES[dtype][1])
