"""Reading .gguf files. The header (settings, tokenizer, the place of each tensor) needs neither torch nor gguf.

transformers reads a file of 135 M parameters in half a minute: gguf's own reader takes seconds for a vocabulary and is
called several times, and the table of names is made anew for each module of the model.
"""

import functools
import logging
import mmap
import struct
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.common import compat
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.weights.sentencepiece import bpe_model

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

MAGIC = b"GGUF"
# Numbers of types in a file, and struct's codes for them. 8 is a text, 9 a list.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST, UINT32, FLOAT32 = 8, 9, 4, 0  # FLOAT32: of tensors
# Lists with an entry for each token.
TOKEN_LISTS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))
EMBEDDING = "token_embd.weight"
ALIGNMENTS = [2**n for n in range(17)]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: shape as in torch, type as in ggml, and the byte where it begins."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    path: Path
    fields: dict[str, Any]
    """Settings and tokenizer: texts, numbers and lists."""
    tensors: dict[str, Tensor]
    spans: dict[str, tuple[int, int]]
    """The bytes of each field."""

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def size(self, name: str) -> int | None:
        """A size of the model, such as `embedding_length`."""
        return self.fields.get(f"{self.architecture}.{name}")


class _Cursor:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 4

    def numbers(self, codes: str) -> tuple:
        values = struct.unpack_from(f"<{codes}", self.data, self.at)
        self.at += struct.calcsize(f"<{codes}")
        return values

    def text(self) -> str:
        (length,) = self.numbers("Q")
        content = self.data[self.at : self.at + length]
        if len(content) < length:
            raise EOFError
        self.at += length
        return content.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            return self.numbers(NUMBERS[kind])[0]
        kind, count = self.numbers("IQ")
        if kind in NUMBERS:
            return list(self.numbers(f"{count}{NUMBERS[kind]}"))
        return [self.value(kind) for _ in range(count)]


def read_header(path: str | Path) -> Header:
    """The header of a .gguf file. It is read once, unless the file changes.

    Raises ConfigError for another kind of file, one that is cut off, and an unknown version.
    """
    path = Path(path).expanduser()
    stat = path.stat()
    return _read_header(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read_header(path: Path, size: int, changed: int) -> Header:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _parse(path, data)
    except ConfigError:
        raise
    except (struct.error, EOFError, KeyError, OverflowError, MemoryError, RecursionError, ValueError) as error:
        reason = f"it is cut off or damaged after its {size:,} bytes ({type(error).__name__} in its header)"
        raise ConfigError(f"{path} cannot be read as a .gguf file: {reason}. Fetch it again.") from error
    parts = header.fields.get("split.count")
    if parts not in (None, 0, 1):
        raise ConfigError(f"{path} is one of {parts} parts. Join them with llama.cpp's `llama-gguf-split --merge`.")
    return header


def _parse(path: Path, data: mmap.mmap) -> Header:
    if data[:4] != MAGIC:
        raise ConfigError(f"{path} is no .gguf file: it does not begin with {MAGIC.decode()}.")
    cursor = _Cursor(data)
    version, tensor_count, field_count = cursor.numbers("IQQ")
    if version not in (2, 3):
        raise ConfigError(f"{path} is of GGUF version {version}; versions 2 and 3 are read. Convert it again.")
    fields, spans, table = {}, {}, {}
    for _ in range(field_count):
        start, key = cursor.at, cursor.text()
        fields[key] = cursor.value(*cursor.numbers("I"))
        spans[key] = (start, cursor.at)
    for _ in range(tensor_count):
        name, (dims,) = cursor.text(), cursor.numbers("I")
        table[name] = (cursor.numbers(f"{dims}Q")[::-1], *cursor.numbers("IQ"))
    alignment = fields.get("general.alignment", 32)
    if alignment not in ALIGNMENTS:
        raise ValueError
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: Tensor(shape, kind, start + offset) for name, (shape, kind, offset) in table.items()}
    if any(tensor.start + _byte_count(tensor) > len(data) for tensor in tensors.values()):
        raise EOFError
    return Header(path, fields, tensors, spans)


def _byte_count(tensor: Tensor) -> int:
    """Bytes of a tensor in the file; 1 if that is not known, because gguf is not installed or knows no such type."""
    if find_spec("gguf") is None:
        return 1
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES.get(tensor.kind, (1, 0))
    return prod(tensor.shape) // block * size


def write_without_tokens(header: Header, path: Path) -> None:
    """Write a small .gguf file with the settings and the names of the tensors, each of one number."""
    kept = [span for key, span in header.spans.items() if key not in TOKEN_LISTS]
    content = header.path.open("rb")
    with content, open(path, "wb") as file:
        vocabulary = f"{header.architecture}.vocab_size"
        added = vocabulary not in header.fields
        file.write(MAGIC + struct.pack("<IQQ", 3, len(header.tensors), len(kept) + added))
        for start, end in kept:
            content.seek(start)
            file.write(content.read(end - start))
        if added:
            file.write(_packed(vocabulary) + struct.pack("<II", UINT32, vocabulary_size(header)))
        for name in header.tensors:
            file.write(_packed(name) + struct.pack("<IQIQ", 1, 1, FLOAT32, 0))
        file.write(bytes(header.fields.get("general.alignment", 32) * 2))


def _packed(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def vocabulary_size(header: Header) -> int:
    """Rows of the token embeddings, else the number of tokens."""
    if EMBEDDING in header.tensors:
        return header.tensors[EMBEDDING].shape[0]
    return len(header.fields.get("tokenizer.ggml.tokens", ()))


def parameter_count(header: Header) -> int:
    return sum(prod(tensor.shape) for tensor in header.tensors.values())


def read_tensor(header: Header, name: str, rows: list[int] | None = None) -> "np.ndarray":
    """A tensor in float32; a quantised one is dequantised. rows: only these. Needs the package gguf.

    Raises ConfigError for a type that gguf does not know, and for a file that is cut off.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize
    from gguf.quants import quant_shape_to_byte_shape

    tensor = header.tensors[name]
    try:
        kind = GGMLQuantizationType(tensor.kind)
        data = np.memmap(header.path, np.uint8, "r", tensor.start, quant_shape_to_byte_shape(tensor.shape, kind))
        return dequantize(np.asarray(data if rows is None else data[rows]), kind)
    except (ValueError, OSError, NotImplementedError) as error:
        raise ConfigError(f"{header.path}: the tensor {name} cannot be read: {error}. Fetch the file again.") from error


def read_config(path: str) -> "PreTrainedConfig":
    """transformers' config of a decoder. It reads the header without the tokens."""
    from transformers import AutoConfig

    header = read_header(path)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "model.gguf"
        write_without_tokens(header, small)
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=small.name, trust_remote_code=False)
        except KeyError:  # of some architectures it needs the tokens, too
            config = AutoConfig.from_pretrained(header.path.parent, gguf_file=header.path.name, trust_remote_code=False)
    config = config.get_text_config()
    config.vocab_size = vocabulary_size(header)
    return config


def load_model(path: str, dtype: "torch.dtype", device_map: Any, **options: Any) -> "tuple[PreTrainedModel, dict]":
    """The model, unpacked on the host, and the information about its loading. bitsandbytes quantises it from there.

    options: further arguments of `from_pretrained`.
    Raises CheckpointError for numbers that are not finite and are about to be quantised.
    """
    import torch
    from transformers import AutoModelForCausalLM

    header, config = read_header(path), read_config(path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    weights = state_dict(header, empty, dtype)
    if weights is None:
        dense = {key: value for key, value in options.items() if key != "quantization_config"}
        place = device_map if dense == options else {"": "cpu"}
        source = {"gguf_file": header.path.name, "dtype": dtype, "device_map": place, "trust_remote_code": False}
        llm, info = AutoModelForCausalLM.from_pretrained(header.path.parent, **source, **dense)
        if dense == options:
            return llm, info
        weights = llm.state_dict()
    if "quantization_config" in options:  # quantised layers no longer show it
        from minigpt4.weights.checkpoint import check_finite

        check_finite(weights.items(), path)
    return type(empty).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, device_map=device_map, **options
    )


def state_dict(header: Header, model: "torch.nn.Module", dtype: "torch.dtype") -> "dict[str, torch.Tensor] | None":
    """The tensors of the file in `dtype`, under the names of `model`, which may be on the meta device.

    None: transformers reads this architecture in another way.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    processor = compat.gguf_processor(header.architecture, model.config)
    if processor is None:
        return None
    count = parameter_count(header) / 1e6
    logging.info("Unpacking %.0f M parameters of %s to %s", count, header.path, str(dtype).removeprefix("torch."))
    names = _names(header, model, processor)
    state: dict[str, torch.Tensor] = {}
    # A processor puts tensors that it joins, such as those of experts, into the state itself.
    joined = {"tensor_key_mapping": names, "parsed_parameters": {"tensors": state}}
    for name in tqdm(header.tensors, desc=header.path.name, unit="tensor", disable=None):
        result = processor.process(weights=read_tensor(header, name), name=name, **joined)
        if result.name in names:
            own = np.require(result.weights, requirements=["C", "W"])  # a copy of what is mapped from the file
            state[names[result.name]] = torch.from_numpy(own).to(dtype)
    return state


def _names(header: Header, model: "torch.nn.Module", processor: Any) -> dict[str, str]:
    """{name of a tensor in the file: its name in the model}."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    table = get_tensor_name_map(architecture, header.size("block_count") or 0)
    names: dict[str, str] = {}
    for ours in map(processor.preprocess_name, model.state_dict()):
        stem, dot, kind = ours.rpartition(".")
        if kind not in ("weight", "bias"):
            stem, dot, kind = ours, "", ""
        parts = stem.split(".")  # some files name the tensors of a model without its head
        found = (table.get_name(".".join(parts[i:])) for i in range(len(parts)))
        theirs = next((name for name in found if name), None)
        if theirs is None:
            processor.perform_fallback_tensor_mapping(names, dot + kind, "", ours)
        else:
            names.setdefault(theirs + dot + kind, ours)
    return names


def sentencepiece_model(path: str) -> bytes | None:
    """The SentencePiece model in the .gguf file of a LLaMA; None for other tokenizers."""
    fields = read_header(path).fields

    def read(key: str) -> Any:
        return fields.get(f"tokenizer.ggml.{key}")

    if read("model") != "llama":
        return None
    lists = [read(key) or [] for key in ("tokens", "scores", "token_type")]
    if len({len(entries) for entries in lists}) > 1:
        raise ConfigError(f"{path}: its lists of tokens, scores and types differ in length. Fetch it again.")
    prefix = read("add_space_prefix")
    return bpe_model(zip(*lists, strict=True), prefix is None or bool(prefix))


@registry.register("llm_file", ".gguf")
class GGUFFile:
    """The functions with which the loaders read a .gguf file; they find this class by the suffix."""

    check = staticmethod(read_header)
    read_config = staticmethod(read_config)
    load_model = staticmethod(load_model)
    sentencepiece_model = staticmethod(sentencepiece_model)
