"""The texts of a dataset as the model reads them: the segments of its token ids, and which of them are learnt.

No weights are needed, only the tokenizer and the `model:` section.
"""

import copy
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import IterableDataset

from minigpt4.common.schema import MiniGPT4Config
from minigpt4.datasets.conversations.batch import Conversation, Conversations
from minigpt4.datasets.seeding import seeded
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID, IMAGE_SLOT, encode_batch, sanitize_batch
from minigpt4.models.template import Template, from_prompt, read_prompts, resolve

if TYPE_CHECKING:
    from minigpt4.models.tokenizer import Tokenizer

# Marks a learnt part in a log.
LEARNT = "«{}»"
# Of a longer segment, only the beginning and the end are shown.
MAX_SHOWN = 240


class Segment(NamedTuple):
    """Tokens that follow each other, all of them learnt or none, or one image."""

    text: str
    """Decoded from the token ids; `<ImageHere>` for an image."""
    learnt: bool
    num_tokens: int

    @property
    def is_image(self) -> bool:
        return self.text == IMAGE_SLOT


class Preview(NamedTuple):
    """A text or a conversation as the model reads it in training."""

    segments: list[Segment]
    cut: bool
    """Whether it was longer than `model.max_txt_len`."""
    broken_up: bool
    """Whether it had markers of the prompt, which a space has broken up."""

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def num_learnt(self) -> int:
        return sum(segment.num_tokens for segment in self.segments if segment.learnt)

    def line(self) -> str:
        """All of it on one line, the learnt parts between LEARNT's marks."""
        texts = [_shown(segment.text) for segment in self.segments]
        marked = zip(texts, self.segments, strict=True)
        return "".join(LEARNT.format(text) if segment.learnt else text for text, segment in marked)


def _shown(text: str) -> str:
    if len(text) > MAX_SHOWN:
        text = f"{text[: MAX_SHOWN * 2 // 3]} … {text[-MAX_SHOWN // 3 :]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@dataclass(frozen=True)
class TextReader:
    """Reads texts as a `MiniGPT4` does in training."""

    tokenizer: "Tokenizer"
    template: Template
    prompts: Sequence[str]
    """As `MiniGPT4.prompt_list`."""
    num_query_tokens: int
    max_txt_len: int

    @classmethod
    def from_config(cls, cfg: MiniGPT4Config, tokenizer: "Tokenizer") -> "TextReader":
        """Raises ConfigError for a template or a file of prompts that cannot be used."""
        template = resolve(cfg)
        prompts = read_prompts(cfg.prompt_path, template.prompt) if cfg.prompt_path else []
        return cls(tokenizer, template, prompts, cfg.num_query_token, cfg.max_txt_len)

    @classmethod
    def of_model(cls, model: Any) -> "TextReader":
        template = model.template or from_prompt("{}", model.end_sym)
        return cls(model.tokenizer, template, model.prompt_list, model.query_tokens.shape[1], model.max_txt_len)

    def read(self, text: str | Conversation, number: int = 0) -> Preview:
        """The "text_input" of a sample as the model reads it.

        number: of the prompt in `prompts`, for a text and for a conversation that begins with an image alone. Training
        draws one.
        """
        texts = [text] if isinstance(text, str) else Conversations([text])
        texts, broken_up = sanitize_batch(texts, self.tokenizer.special_tokens, self.template.separators)
        prompt = self.prompts[number % len(self.prompts)] if self.prompts else IMAGE_SLOT
        limits = self.num_query_tokens, self.max_txt_len
        found = encode_batch(self.tokenizer, texts, prompt, *limits, self.template.end, self.template)
        segments = [*self._segments(found.ids[0], found.labels[0])]
        return Preview(segments, cut=bool(found.num_cut), broken_up=bool(broken_up))

    def _segments(self, ids: list[int], labels: list[int]) -> Iterator[Segment]:
        kinds = [(i == IMAGE_ID, label != IGNORE_INDEX) for i, label in zip(ids, labels, strict=True)]
        start = 0
        for (is_image, learnt), run in itertools.groupby(kinds):
            end = start + len([*run])
            if is_image:
                yield from [Segment(IMAGE_SLOT, False, self.num_query_tokens)] * (
                    (end - start) // self.num_query_tokens
                )
            else:
                text = self.tokenizer.decode(ids[start:end], skip_special_tokens=False)
                yield Segment(text, learnt, end - start)
            start = end


def first_texts(dataset: Any, count: int, seconds: float | None = None) -> list[tuple[str, Any]]:
    """(image id, "text_input") of a dataset's first usable samples.

    Ours yield their texts without opening a picture (`texts`); of others with a length, samples are taken by index. A
    stream of a plug-in without `texts` gives none: it may have no way back. Random states, and what a stream has
    counted, stay as they are.

    seconds: those found so far are returned after this time. None: there is no limit.
    Raises what the dataset raises.
    """
    found: list[tuple[str, Any]] = []
    raised: list[Exception] = []
    late = threading.Event()

    def read() -> None:
        try:
            with closing(_texts(dataset)) as texts:
                for text in itertools.islice(texts, count):
                    found.append(text)
                    if late.is_set():
                        return
        except Exception as error:  # raised again in the thread that waits
            raised.append(error)

    reading = threading.Thread(target=read, daemon=True, name="preview")
    with seeded(0):
        reading.start()
        reading.join(seconds)
    late.set()
    if raised:
        raise raised[0]
    return found[:count]


def _texts(dataset: Any) -> Iterator[tuple[str, Any]]:
    is_stream = isinstance(dataset, IterableDataset)
    if hasattr(dataset, "texts"):
        yield from (copy.deepcopy(dataset) if is_stream else dataset).texts()
    elif not is_stream:
        for index in range(len(dataset)):
            sample = dataset[index]
            yield str(sample.get("image_id", index)), sample["text_input"]
