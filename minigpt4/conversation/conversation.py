"""The chat: a `Conversation` holds the text, and a `Chat` generates the answers.

    chat, conv, img_list = Chat(model, vis_processor, device), CONV_VISION.copy(), []
    chat.upload_img("cat.jpg", conv, img_list)
    chat.ask("What is this?", conv)
    text, token_ids = chat.answer(conv, img_list)

Q query tokens per image, S sequence, T new tokens, D width of the language model.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from minigpt4.common.facts import SEPARATOR
from minigpt4.conversation.decoding import Decoding
from minigpt4.conversation.pictures import PictureError, to_picture
from minigpt4.conversation.videos import FRAMES, open_video
from minigpt4.fast.decoding.loop import cached_decoding
from minigpt4.models.generation import DecodingLoop, answer_text, continue_embeds, end_ids, stream, strip_leading
from minigpt4.models.prompt import BOUNDARY, IMAGE_SLOT, break_up, encode_with_images, sanitize
from minigpt4.models.template import PICTURE, Template, join_parts

IMAGE_TURN = PICTURE


class SeparatorStyle(Enum):
    """A name of the first release. `Conversation.sep2` alone tells whether there are two separators."""

    SINGLE = 1
    TWO = 2


@dataclass
class Conversation:
    """The text of a conversation.

    `messages` are [role, text]. The text None is an answer that is still to be generated. Each message is followed by
    `sep`, or by `sep2` if that is set and the role is the second one. If there is a `template`, it writes the messages
    as in training instead.

    A role is a name ("Human"), which `: ` follows, or the whole text before a message ("<s>[INST] ").
    """

    system: str
    roles: tuple[str, str] = ("Human", "Assistant")
    sep: str = SEPARATOR
    sep2: str | None = None
    messages: list[list] = field(default_factory=list)
    template: Template | None = None
    offset: int = 2
    """Of the first release, without effect; likewise `sep_style`."""
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE

    @property
    def stop(self) -> str:
        """The text that ends an answer."""
        return self.template.end if self.template else self.sep2 or self.sep

    @property
    def separators(self) -> list[str]:
        """Texts that a user's message must not have."""
        return self.template.separators if self.template else [self.sep, self.sep2 or ""]

    @property
    def label(self) -> str:
        """A text that models of the first release repeat before their answers. It is taken out of these."""
        role = "" if self.template else self.roles[1]
        return f"{role}:" if _is_name(role) else role.strip()

    def get_prompt(self) -> str:
        """The prompt for the model, with `<ImageHere>` at the place of each image."""
        if self.template:
            return open_prompt(self.template, self._alternating())
        text = self.system + self.sep
        for role, message in self.messages:
            sep = self.sep2 if self.sep2 and role == self.roles[1] else self.sep
            if message is None:
                text += f"{role}:" if _is_name(role) else role
            else:
                text += f"{role}: {message}{sep}" if _is_name(role) else f"{role}{message}{sep}"
        return text

    def _alternating(self) -> list[tuple[str, str]]:
        """The messages up to the last question as [system,] user, assistant, user, … An empty one stands for none."""
        found = [("system", self.system)] if self.system.strip() else []
        for role, text in self.messages:
            name = "assistant" if role == self.roles[1] else "user"
            if name == "user" and found and found[-1][0] == "user":
                found[-1] = (name, f"{found[-1][1]} {text}")
            elif name == "assistant" and (not found or found[-1][0] != "user"):
                found += [("user", ""), (name, text or "")]
            else:
                found.append((name, text or ""))
        if found and found[-1][0] == "assistant":
            found.pop()
        return [(role, join_parts(parts_of(text))) for role, text in found]

    def append_message(self, role: str, message: str | None) -> None:
        self.messages.append([role, message])

    def add_to_question(self, message: str) -> None:
        """Append `message` to the last turn if that is the first role's and ends with an image, else in a new turn."""
        if self.messages and self.messages[-1][0] == self.roles[0] and self.messages[-1][1].endswith(IMAGE_TURN):
            self.messages[-1][1] += f" {message}"
        else:
            self.append_message(self.roles[0], message)

    @property
    def answer_indices(self) -> list[int]:
        """The indices of the answers in `messages`."""
        return [i for i, (role, text) in enumerate(self.messages) if role == self.roles[1] and text is not None]

    def without_oldest_text(self, num_answers: int) -> "Conversation | None":
        """A copy without the messages up to the n-th answer; None if there are fewer answers.

        Images of the removed messages move to the next turn.
        """
        ends = [0, *(i + 1 for i in self.answer_indices)]
        if num_answers >= len(ends):
            return None
        removed, rest = self.messages[: ends[num_answers]], self.messages[ends[num_answers] :]
        shorter = replace(self, messages=[])
        for _ in range(sum(text.count(IMAGE_SLOT) for _, text in removed)):
            shorter.add_to_question(IMAGE_TURN)
        if rest and rest[0][0] == self.roles[0]:
            shorter.add_to_question(rest.pop(0)[1])
        shorter.messages += [list(message) for message in rest]
        return shorter

    def copy(self) -> "Conversation":
        return replace(self, messages=[list(message) for message in self.messages])


def _is_name(role: str) -> bool:
    return role[-1:].isalnum()


def open_prompt(template: Template, messages: Sequence[tuple[str, str]]) -> str:
    """The text of messages that end with a question, up to the answer, with a BOUNDARY at the ends of each answer.

    The roles are [system,] user, assistant, user, …; each segment has the tokens that it had in training.
    """
    segments = [text for exchange in template.exchanges([*messages, ("assistant", "")]) for text in exchange]
    return BOUNDARY.join(segments[:-1])


def parts_of(text: str) -> list[str | None]:
    """The parts of a message's text: the opposite of `join_parts`."""
    texts = text.split(PICTURE)
    return [part for number, text in enumerate(texts) for part in ((None, text) if number else (text,))]


CONV_VISION = Conversation(
    system="Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)
# The conversations of upstream's later code, for its callers: the prompts differ by blanks and separators.
CONV_VISION_Vicuna0 = replace(CONV_VISION, roles=("Human: ", "Assistant: "))
CONV_VISION_LLama2 = replace(CONV_VISION, roles=("<s>[INST] ", " [/INST] "), sep="")
CONV_VISION_minigptv2 = Conversation(system="", roles=("<s>[INST] ", " [/INST]"), sep="")


class StoppingCriteriaSub:
    """Stopping criterion of the first release: a row ends when its last ids are one of `stops`, [L] each."""

    def __init__(self, stops: Sequence[torch.Tensor] = (), encounters: int = 1):
        self.stops = stops

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Whether each row of input_ids [B,T] ends, [B] bool."""
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for stop in self.stops:
            if len(stop) <= input_ids.shape[1]:
                done |= (input_ids[:, -len(stop) :] == stop.to(input_ids.device)).all(dim=1)
        return done


class SharedDecoding(Protocol):
    """Computes answers of any number of threads together, such as `serving.batching.Batcher`."""

    def stream(
        self, prompt: str, images: list, decoding: Decoding, stop: str, should_stop: Callable, in_line: Callable
    ) -> Iterator[tuple[list[int], bool]]:
        """Yield (the new ids so far, False) whenever there are more, then (all of them, True)."""


class Chat:
    """Generates a model's answers in conversations about images.

    Attributes:
        batcher: computes the answers, together with those of others; None: each is computed alone. Beams and answers
            with `stopping_criteria` always are.

    Args:
        model: a `MiniGPT4`.
        vis_processor: turns a PIL image into a tensor [3,H,W].
        device: the device of the model.
        decoding_loop: see `continue_embeds`; None: transformers' `generate` decodes.
        template: the template of conversations; None: that of the first release, `CONV_VISION`.
        video_backend: decoder of `upload_video`: "av", or "decord" for files of one's own.
        stopping_criteria: further stopping criteria in the form of transformers' `generate`.
    """

    def __init__(
        self,
        model,
        vis_processor: Callable,
        device: str | torch.device = "cpu",
        decoding_loop: DecodingLoop | None = cached_decoding,
        template: Template | None = None,
        video_backend: str = "av",
        stopping_criteria: Iterable[Callable] | None = None,
    ):
        self.model = model.eval()
        self.decoding_loop = decoding_loop
        self.video_backend = video_backend
        self.vis_processor = vis_processor
        self.device = torch.device(device)
        self.template = template
        self.stopping_criteria = [*(stopping_criteria or [])]
        self.batcher: SharedDecoding | None = None

    def new_conversation(self) -> Conversation:
        """An empty conversation in the model's template."""
        return Conversation(system="", template=self.template) if self.template else CONV_VISION.copy()

    @torch.inference_mode()
    def upload_img(
        self,
        image: str | Path | bytes | Image.Image | np.ndarray | torch.Tensor,
        conv: Conversation,
        img_list: list,
    ) -> str:
        """Add an image to the conversation: a file, its content, a PIL image, an array [H,W], [H,W,3] (RGB) or [H,W,4]
        (RGBA), or a processed float tensor [3,H,W].

        Its embeddings [1,Q,D] are appended to `img_list`. Raises PictureError for anything that is not a usable
        picture.
        """
        img_list.append(self._embed(image))
        conv.add_to_question(IMAGE_TURN)
        return "Received."

    @torch.inference_mode()
    def encode_img(self, img_list: list) -> None:
        """Encode the images of `img_list`, in any form that `upload_img` takes, in their places.

        Upstream's later code calls this after `upload_img`, which here has encoded the image.
        """
        img_list[:] = [image if self._is_embedded(image) else self._embed(image) for image in img_list]

    def _is_embedded(self, image) -> bool:
        """Whether this is the embeddings [1,Q,D] of an image."""
        return isinstance(image, torch.Tensor) and image.ndim == 3 and len(image) == 1

    def _embed(self, image) -> torch.Tensor:
        """The embeddings [1,Q,D] of an image in any form that `upload_img` takes."""
        if not isinstance(image, torch.Tensor):
            image = self.vis_processor(to_picture(image))
        elif not image.is_floating_point() or image.ndim not in (3, 4) or image.shape[-3] != 3:
            raise PictureError(
                f"A tensor of shape {list(image.shape)} and type {image.dtype} is no processed picture: floats [3,H,W] "
                "are expected. Give the picture itself, or call `vis_processor` on it first."
            )
        pixels = image if image.ndim == 4 else image.unsqueeze(0)
        return self.model.encode_img(pixels.to(self.device))[0]

    def upload_video(self, video: str | Path, conv: Conversation, img_list: list, frames: int = FRAMES) -> str:
        """Add a video file to the conversation: `frames` evenly spaced frames, in one turn. Raises PictureError."""
        for frame in open_video(video, frames, self.video_backend):
            self.upload_img(frame, conv, img_list)
        return "Received."

    def ask(self, text: str, conv: Conversation) -> None:
        """Add a question to the conversation, sanitized."""
        conv.add_to_question(self.sanitize(text, conv))

    def sanitize(self, text: str, conv: Conversation) -> str:
        """`text` in which separators, image placeholders and special tokens are broken up by a space."""
        return sanitize([text], self.model.tokenizer.special_tokens, conv.separators)[0]

    @torch.inference_mode()
    def get_context_emb(self, conv: Conversation, img_list: list[torch.Tensor]) -> torch.Tensor:
        """The embeddings of the whole prompt, [1,S,D].

        Raises ValueError if the number of images differs from the number of placeholders.
        """
        return self.model.context([conv.get_prompt()], img_list)[0]

    def answer(self, conv: Conversation, img_list: list[torch.Tensor], **settings) -> tuple[str, np.ndarray]:
        """Answer the last question of `conv`, and append the answer to `conv`.

        `settings` are the keyword arguments of `stream_answer`. Returns the answer and its token ids [T] int64, which
        include the separator or token that ended it.
        """
        answering, text = self.stream_answer(conv, img_list, **settings), ""
        while True:
            try:
                text = next(answering)
            except StopIteration as end:
                return text, end.value

    def stream_answer(
        self,
        conv: Conversation,
        img_list: list[torch.Tensor],
        should_stop: Callable[[], bool] = lambda: False,
        notify: Callable[[str], None] = logging.warning,
        in_line: Callable[[int], None] = lambda place: None,
        **settings,
    ) -> Generator[str, None, np.ndarray]:
        """Like `answer`, but yields the whole answer so far, each time longer; returns the token ids.

        No part of the separator is ever yielded. With beam search, only the final text is yielded. The answer ends at
        once when this generator is closed or `should_stop()` returns True.

        Args:
            should_stop: called after each token.
            notify: called with a sentence for the user if the conversation or the answer exceeds the context window.
            in_line: with a `batcher`, called with the place in its queue whenever that changes; 0: being computed.
            settings: the fields of `Decoding`.

        Raises:
            ValueError: a setting is out of bounds, or the question alone is longer than the context window.
        """
        decoding = Decoding(**settings)
        stop = conv.stop
        read = partial(answer_text, self.model.tokenizer, stop=stop, label=conv.label)
        with self._pending_answer(conv) as pending:
            context, fitting = self.fit(conv, decoding, notify)
            with closing(self._stream(context.get_prompt(), img_list, stop, fitting, should_stop, in_line)) as running:
                for ids, complete in running:
                    text, shown = read(ids, complete=complete), pending[1]
                    if complete or len(text) > len(shown or ""):
                        pending[1] = text
                        if text != shown:
                            yield text
        if len(ids) == fitting.max_new_tokens < decoding.max_new_tokens:
            notify("The answer stops here: the model can hold no more text. Restart to make room.")
        return np.array(strip_leading(self.model.tokenizer, ids), dtype=np.int64)

    def fit(self, conv: Conversation, decoding: Decoding, notify: Callable) -> tuple[Conversation, Decoding]:
        """The conversation and the settings, cut to the context window.

        The oldest text is removed first, images never.
        """
        window = self.window(decoding.max_length)
        room_for_text = window - min(decoding.max_new_tokens, window // 4)

        def fits(num_removed: int) -> bool:
            return self.num_tokens(conv.without_oldest_text(num_removed).get_prompt()) <= room_for_text

        # A binary search, because a conversation can have thousands of turns.
        num_removed = bisect_left(range(len(conv.answer_indices)), True, key=fits)
        shorter = conv.without_oldest_text(num_removed)
        length = self.num_tokens(shorter.get_prompt())
        room = window - length
        if room < 1:
            raise ValueError(
                f"The question and the images take {length} tokens; the model holds {window}, answer included. Ask a "
                "shorter question, or restart with fewer images."
            )
        if num_removed:
            notify(
                f"The conversation has outgrown the model's {window} tokens: the text up to answer {num_removed} is no "
                "longer seen. The images still are."
            )
        new = min(decoding.max_new_tokens, room)
        return shorter, replace(decoding, max_new_tokens=new, min_length=min(decoding.min_length, new))

    def window(self, max_length: int = Decoding.max_length) -> int:
        """The limit of conversation and answer together, in tokens: `max_length`, or less if the model holds less."""
        config = self.model.llama_model.config.get_text_config()
        return min(max_length, getattr(config, "max_position_embeddings", max_length))

    def num_tokens(self, prompt: str) -> int:
        """The length of a prompt in tokens, images included."""
        bos = self.template is None or self.template.bos
        return len(encode_with_images(self.model.tokenizer, prompt, self.model.query_tokens.shape[1], bos))

    def _stream(
        self, prompt: str, img_list: list, stop: str, decoding: Decoding, should_stop: Callable, in_line: Callable
    ) -> Iterator[tuple[list[int], bool]]:
        """See `models.generation.stream`."""
        if self.batcher and decoding.num_beams == 1 and not self.stopping_criteria:
            return self.batcher.stream(prompt, [*img_list], decoding, stop, should_stop, in_line)
        run = partial(self._generate, prompt, img_list, stop, decoding)
        return stream(run, should_stop, show=decoding.num_beams == 1)

    @torch.inference_mode()
    def _generate(self, prompt: str, img_list: list, stop: str, decoding: Decoding, tap) -> torch.Tensor:
        """The token ids [1,T] of an answer. This runs in a thread, which must select its GPU itself."""
        kind = self.device.type
        devices = [] if kind == "cpu" else [self.device]
        generator = torch.random.fork_rng(devices, enabled=decoding.seed is not None, device_type=kind)
        with torch.cuda.device(self.device) if kind == "cuda" else nullcontext(), generator:
            if decoding.seed is not None:
                torch.manual_seed(decoding.seed)
            llm, tokenizer = self.model.llama_model, self.model.tokenizer
            context, mask = self.model.context([prompt], img_list)
            options = decoding.options()
            loop = self.decoding_loop
            criteria = [tap, *self.stopping_criteria]
            return continue_embeds(llm, tokenizer, context, mask, stop, criteria, decoding_loop=loop, **options)

    @contextmanager
    def _pending_answer(self, conv: Conversation):
        """The message of `conv` that the answer is written into.

        An error removes the message. After an interruption it holds the answer so far.
        """
        if not conv.messages or conv.messages[-1][1] is not None:
            conv.append_message(conv.roles[1], None)
        pending = conv.messages[-1]
        try:
            yield pending
        except Exception:
            conv.messages.pop()
            raise
        finally:
            tokenizer, ends = self.model.tokenizer, end_ids(self.model.tokenizer)
            special = [text for text, i in tokenizer.special_tokens.items() if i in ends]
            pending[1] = break_up(pending[1] or "", [IMAGE_SLOT, *special])
