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

from minigpt4.common.registry import registry
from minigpt4.common.schema import MiniGPT4Config
from minigpt4.common.text import pluralize, printable
from minigpt4.datasets.conversations.batch import Conversation, Conversations
from minigpt4.datasets.seeding import seeded
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID, IMAGE_SLOT, TextSettings, encode_batch, sanitize_batch
from minigpt4.models.template import Template, from_prompt, read_prompts, resolve
from minigpt4.processors import BaseProcessor

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
    ends_early: bool
    """Whether an answer holds its end sign, which is too short to be broken up: a generated answer would stop there."""

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def text_len(self) -> int:
        """Tokens that count for `model.max_txt_len`: those from the first learnt one on."""
        return sum(s.num_tokens for s in itertools.dropwhile(lambda segment: not segment.learnt, self.segments))

    @property
    def num_learnt(self) -> int:
        return sum(segment.num_tokens for segment in self.segments if segment.learnt)

    def __str__(self) -> str:
        """All of it on one line, the learnt parts between LEARNT's marks."""
        facts = [pluralize(self.num_tokens, "token"), f"{self.num_learnt} learnt"]
        facts += ["cut at model.max_txt_len"] * self.cut + ["markers broken up"] * self.broken_up
        facts += ["an answer holds its end sign"] * self.ends_early
        texts = [(_shown(segment.text), segment.learnt) for segment in self.segments]
        return f"{', '.join(facts)}: " + "".join(LEARNT.format(text) if learnt else text for text, learnt in texts)


def _shown(text: str) -> str:
    if len(text) > MAX_SHOWN:
        text = f"{text[: MAX_SHOWN * 2 // 3]} … {text[-MAX_SHOWN // 3 :]}"
    return printable(text)


@dataclass(frozen=True, kw_only=True)
class TextReader(TextSettings):
    """Reads texts as a `MiniGPT4` with these settings does in training."""

    template: Template
    tokenizer: "Tokenizer"
    prompts: Sequence[str]
    """As `MiniGPT4.prompt_list`."""

    @classmethod
    def from_config(cls, cfg: MiniGPT4Config, tokenizer: "Tokenizer") -> "TextReader":
        """Raises ConfigError for a template or a file of prompts that cannot be used."""
        template = resolve(cfg)
        prompts = read_prompts(cfg.prompt_path, template.prompt) if cfg.prompt_path else []
        settings = cfg.num_query_token, cfg.max_txt_len, template.end
        return cls(*settings, learn_on=cfg.learn_on, template=template, tokenizer=tokenizer, prompts=prompts)

    @classmethod
    def of_model(cls, model: Any) -> "TextReader | None":
        """None: the model reads texts in a way of its own."""
        methods = ("sanitize", "prepare")
        if any(getattr(type(model), name, None) is not getattr(MiniGPT4, name) for name in methods):
            return None
        template = model.template or from_prompt("{}", model.end_sym)
        settings = vars(model.text_settings) | {"end_sym": template.end, "template": template}
        return cls(**settings, tokenizer=model.tokenizer, prompts=model.prompt_list)

    def read(self, text: str | Conversation, number: int = 0) -> Preview:
        """The "text_input" of a sample as the model reads it.

        number: of the prompt in `prompts`, for a text and for a conversation that begins with an image alone. Training
        draws one.
        """
        texts = [text] if isinstance(text, str) else Conversations([text])
        texts, broken_up = sanitize_batch(texts, self.tokenizer, self.template.separators)
        prompt = self.prompts[number % len(self.prompts)] if self.prompts else IMAGE_SLOT
        found = encode_batch(self.tokenizer, texts, prompt, self)
        turns = [("assistant", texts)] if isinstance(text, str) else texts[0]
        answers = [part for role, parts in turns if role == "assistant" for part in parts]
        ends_early = bool(self.template.end) and any(self.template.end in answer for answer in answers)
        segments = [*self._segments(found.ids[0], found.labels[0])]
        return Preview(segments, bool(found.num_cut), bool(broken_up), ends_early)

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


def describe(name: str, dataset: Any, reader: TextReader, seconds: float) -> str:
    """The first two texts of a dataset as the model reads them, a line each. Nothing of the dataset changes.

    seconds: the time after which those found so far are described.
    """
    processor = text_processor(dataset)
    kind = f"text processor {processor}" if processor else "texts as they are"
    lines = [
        f"\n  {_shown(id)}: {reader.read(text, number)}"
        for number, (id, text) in enumerate(first_texts(dataset, 2, seconds))
    ]
    return f"{name} as the model reads it, learnt parts in {LEARNT.format('…')}; {kind}:" + (
        "".join(lines) or f" no sample within {seconds:.0f} s"
    )


def text_processor(dataset: Any) -> str | None:
    """The registered name of a dataset's text processor, or its class; None: texts are used as they are."""
    processor = getattr(dataset, "text_processor", None)
    if processor is None or type(processor) is BaseProcessor:
        return None
    names = (name for name in registry.list_processors() if registry.get_processor_class(name) is type(processor))
    return next(names, type(processor).__name__)


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
