"""The dataset of a plug-in as records: its samples, as training gets them."""

import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from minigpt4.common.errors import ConfigError
from minigpt4.common.rgb import from_array
from minigpt4.data_tools.sources import PART, Fault
from minigpt4.datasets.captions import Unusable
from minigpt4.datasets.conversations.record import Message, Picture, Record
from minigpt4.datasets.conversations.text_files import shown

# Samples that are looked at of a stream that has no parts.
STREAMED = 1000


class PluginSource:
    """A split of a plug-in's dataset, as far as `common.contracts` describes samples: "image" and "text_input".

    Pictures are those that its processor has made. Of a stream without parts, STREAMED samples are read.
    """

    shards: list[str] = []
    folders: list[str] = []
    text_processor = None

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self.where, self.dataset = name, type(dataset).__name__, dataset
        self.has_length = not isinstance(dataset, IterableDataset)
        self.has_parts = hasattr(dataset, "part")
        if self.has_length:
            self.num_parts = -(-len(dataset) // PART)
        else:
            self.num_parts = dataset.num_parts if self.has_parts else 1

    def read(self, part: int) -> Iterator[Record | Fault]:
        for where, load in self._samples(part):
            try:
                sample = load()
            except StopIteration:
                return
            except Exception as error:  # of any kind: the code is the plug-in's
                yield Fault(where, f"raises {type(error).__name__}: {error}")
            else:
                yield sample_record(sample, where)

    def fingerprint(self) -> str:
        raise ConfigError(f"{self.name}: {self.where} gives samples, not records of files. It cannot be converted.")

    def _samples(self, part: int) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The place of each sample, and the function that loads it."""
        if self.has_length:
            for index in range(len(self.dataset))[part * PART :][:PART]:
                yield f"{self.name}[{index}]", partial(self.dataset.__getitem__, index)
        elif self.has_parts:
            for raw in self.dataset.part(part):
                yield f"{self.name} {raw.image_id}", partial(self._load, raw)
        else:
            samples = iter(self.dataset)
            for number in range(STREAMED):
                yield f"{self.name} sample {number}", partial(next, samples)

    def _load(self, raw: Any) -> dict[str, Any]:
        fields = self.dataset.load(raw)
        if fields is None:
            raise Unusable("its picture cannot be read")
        return fields | {"text_input": raw.caption, "image_id": raw.image_id}


def sample_record(sample: Any, where: str) -> Record | Fault:
    """A sample as training gets it, as a record with its processed picture."""
    text = sample.get("text_input") if isinstance(sample, Mapping) else None
    image = sample.get("image") if isinstance(sample, Mapping) else None
    picture = to_png(image) if getattr(image, "ndim", 0) == 3 else None
    if not isinstance(text, str):
        return Fault(where, f"has {shown(text)} for 'text_input', not a text.", "text")
    asked = () if picture is None else (Picture(picture),)
    messages = Message("user", asked), Message("assistant", (text,))
    return Record(messages, str(sample.get("image_id", where)), where)


def to_png(image: Any) -> bytes:
    """A processed picture [3,H,W] as a file. Floats are scaled from their own range to 0 … 255."""
    array = image.numpy().transpose(1, 2, 0)
    if array.dtype.kind == "f":
        array = (array - array.min()) / max(float(np.ptp(array)), 1e-6)
    buffer = io.BytesIO()
    from_array(array).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
