"""The chat: a `Conversation` is the text, and a `Chat` lets a model answer in it.

    chat, conv, img_list = Chat(model, vis_processor, device), CONV_VISION.copy(), []
    chat.upload_img("cat.jpg", conv, img_list)
    chat.ask("What is this?", conv)
    text, token_ids = chat.answer(conv, img_list)

Q query tokens per image, S sequence, T new tokens, D width of the language model.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minigpt4.conversation.decoding import Decoding
from minigpt4.conversation.pictures import open_picture
from minigpt4.conversation.videos import FRAMES, open_video
from minigpt4.fast.decoding.loop import cached_decoding
from minigpt4.models.generation import DecodingLoop, answer_text, continue_embeds, stream, strip_leading
from minigpt4.models.prompt import IMAGE_SLOT, encode_with_images

IMAGE_TURN = f"<Img>{IMAGE_SLOT}</Img>"


@dataclass
class Conversation:
    """What was said: `messages` are [role, text], where the text None is an answer still to come.

    Each message is followed by `sep`; those of the second role by `sep2`, where that is given.
    """

    system: str
    roles: tuple[str, str] = ("Human", "Assistant")
    sep: str = "###"
    sep2: str | None = None
    messages: list[list] = field(default_factory=list)

    def get_prompt(self) -> str:
        """The text that the model reads, with `<ImageHere>` where an image goes."""
        text = self.system + self.sep
        for role, message in self.messages:
            sep = self.sep2 if self.sep2 and role == self.roles[1] else self.sep
            text += f"{role}:" if message is None else f"{role}: {message}{sep}"
        return text

    def append_message(self, role: str, message: str | None) -> None:
        self.messages.append([role, message])

    def add_to_question(self, message: str) -> None:
        """Say `message` as the first role: in the same turn as an image right before it, else in a new turn."""
        if self.messages and self.messages[-1][0] == self.roles[0] and self.messages[-1][1].endswith(IMAGE_TURN):
            self.messages[-1][1] += f" {message}"
        else:
            self.append_message(self.roles[0], message)

    @property
    def answers(self) -> list[int]:
        """The places of the answers among the messages."""
        return [i for i, (role, text) in enumerate(self.messages) if role == self.roles[1] and text is not None]

    def without_oldest_text(self, answers: int = 1) -> "Conversation | None":
        """A copy that forgot all up to its n-th answer, whose images moved to the next turn; None: it has no n-th."""
        ends = [0, *(i + 1 for i in self.answers)]
        if answers >= len(ends):
            return None
        forgotten, rest = self.messages[: ends[answers]], self.messages[ends[answers] :]
        shorter = replace(self, messages=[])
        for _ in range(sum(text.count(IMAGE_SLOT) for _, text in forgotten)):
            shorter.add_to_question(IMAGE_TURN)
        if rest and rest[0][0] == self.roles[0]:
            shorter.add_to_question(rest.pop(0)[1])
        shorter.messages += [list(message) for message in rest]
        return shorter

    def copy(self) -> "Conversation":
        return replace(self, messages=[list(message) for message in self.messages])


CONV_VISION = Conversation(
    system="Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)


class Chat:
    """Lets a model talk about images.

    Args:
        model: a `MiniGPT4`.
        vis_processor: from a PIL image to a tensor [3,H,W].
        device: where the model lies.
        decoding_loop: see `continue_embeds`; None: transformers' `generate` decodes.
    """

    def __init__(
        self,
        model,
        vis_processor: Callable,
        device: str | torch.device = "cpu",
        decoding_loop: DecodingLoop | None = cached_decoding,
    ):
        self.model = model.eval()
        self.decoding_loop = decoding_loop
        self.vis_processor = vis_processor
        self.device = torch.device(device)

    @torch.inference_mode()
    def upload_img(self, image: str | Path | Image.Image | torch.Tensor, conv: Conversation, img_list: list) -> str:
        """Show an image: a file, a PIL image, or a processed tensor [3,H,W]. Its vectors [1,Q,D] join `img_list`.

        Raises PictureError for a file that is no usable picture.
        """
        if isinstance(image, (str, Path)):
            image = open_picture(image)
        if not isinstance(image, torch.Tensor):
            image = self.vis_processor(image)
        pixels = image if image.ndim == 4 else image.unsqueeze(0)
        img_list.append(self.model.encode_img(pixels.to(self.device))[0])
        conv.add_to_question(IMAGE_TURN)
        return "Received."

    def upload_video(self, video: str | Path, conv: Conversation, img_list: list, frames: int = FRAMES) -> str:
        """Show a video file: `frames` frames, drawn evenly, are images of one turn. Raises PictureError."""
        for frame in open_video(video, frames):
            self.upload_img(frame, conv, img_list)
        return "Received."

    def ask(self, text: str, conv: Conversation) -> None:
        """Ask a question. What would be a separator, an image slot or a special token in it is broken up."""
        conv.add_to_question(self.harmless(text, conv))

    def harmless(self, text: str, conv: Conversation) -> str:
        """`text` with what would be a separator, an image slot or a special token broken up."""
        special = self.model.tokenizer.special_tokens
        return break_up(text, [conv.sep, conv.sep2 or "", IMAGE_SLOT, *special])

    @torch.inference_mode()
    def get_context_emb(self, conv: Conversation, img_list: list[torch.Tensor]) -> torch.Tensor:
        """The conversation as the model reads it, [1,S,D]. Raises ValueError if images and image slots differ."""
        return self.model.context([conv.get_prompt()], img_list)[0]

    def answer(self, conv: Conversation, img_list: list[torch.Tensor], **settings) -> tuple[str, np.ndarray]:
        """Answer the question that `conv` ends with, and add the answer to `conv`.

        Takes what `stream_answer` takes. Returns the answer, and its token ids [T] int64 (what ends it included).
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
        **settings,
    ) -> Generator[str, None, np.ndarray]:
        """Like `answer`, but yields the whole answer so far, each time longer; returns the token ids.

        The separator is never shown, not even half of it. With beams there is only the final text. When this generator
        is closed, or `should_stop()` turns true, the answer ends there and then.

        Args:
            should_stop: asked after each token.
            notify: receives a sentence for the user when a part of the conversation had to be left out.
            settings: see `Decoding`.

        Raises:
            ValueError: a setting out of bounds; or the question alone is longer than the context.
        """
        decoding = Decoding(**settings)
        stop, label = conv.sep2 or conv.sep, f"{conv.roles[1]}:"
        read = partial(answer_text, self.model.tokenizer, stop=stop, label=label)
        with self._pending_answer(conv) as pending:
            context, fitting = self._fit(conv, decoding, notify)
            run = partial(self._generate, context.get_prompt(), img_list, stop, fitting)
            with closing(stream(run, should_stop, show=decoding.num_beams == 1)) as running:
                for ids, complete in running:
                    text, shown = read(ids, complete=complete), pending[1]
                    if complete or len(text) > len(shown or ""):
                        pending[1] = text
                        if text != shown:
                            yield text
        if len(ids) == fitting.max_new_tokens < decoding.max_new_tokens:
            notify("The answer stops here: the model can hold no more text. Restart to make room.")
        return np.array(strip_leading(self.model.tokenizer, ids), dtype=np.int64)

    def _fit(self, conv: Conversation, decoding: Decoding, notify: Callable) -> tuple[Conversation, Decoding]:
        """What fits into the model's window: the oldest text is left out first, images never."""
        window = self.window(decoding.max_length)
        reserve = min(decoding.max_new_tokens, window // 4)
        # Halving: a text of a thousand turns is not measured a thousand times.
        forgotten = bisect_left(
            range(len(conv.answers)), True, key=lambda n: self._length(conv.without_oldest_text(n)) <= window - reserve
        )
        conv = conv.without_oldest_text(forgotten)
        room = window - self._length(conv)
        if room < 1:
            raise ValueError(
                f"The question and the images take {self._length(conv)} tokens; the model holds {window}, answer "
                "included. Ask a shorter question, or restart with fewer images."
            )
        if forgotten:
            notify(
                f"The conversation has outgrown the model's {window} tokens: the text up to answer {forgotten} is no "
                "longer seen. The images still are."
            )
        new = min(decoding.max_new_tokens, room)
        return conv, replace(decoding, max_new_tokens=new, min_length=min(decoding.min_length, new))

    def window(self, max_length: int = Decoding.max_length) -> int:
        """Most tokens of conversation and answer together: `max_length`, or fewer where the model holds fewer."""
        config = self.model.llama_model.config.get_text_config()
        return min(max_length, getattr(config, "max_position_embeddings", max_length))

    def _length(self, conv: Conversation) -> int:
        return len(encode_with_images(self.model.tokenizer, conv.get_prompt(), self.model.query_tokens.shape[1]))

    @torch.inference_mode()
    def _generate(self, prompt: str, img_list: list, stop: str, decoding: Decoding, tap) -> torch.Tensor:
        """The ids [1,T] of an answer. Runs in a thread, which has a current GPU of its own."""
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
            return continue_embeds(llm, tokenizer, context, mask, stop, [tap], decoding_loop=loop, **options)

    @contextmanager
    def _pending_answer(self, conv: Conversation):
        """The open message of `conv`; after an error it is gone, after an interruption it holds what there was."""
        if not conv.messages or conv.messages[-1][1] is not None:
            conv.append_message(conv.roles[1], None)
        pending = conv.messages[-1]
        try:
            yield pending
        except Exception:
            conv.messages.pop()
            raise
        finally:
            tokenizer = self.model.tokenizer
            kept = {tokenizer.unk_token_id, tokenizer.bos_token_id}
            special = [text for text, i in tokenizer.special_tokens.items() if i not in kept]
            pending[1] = break_up(pending[1] or "", [IMAGE_SLOT, *special])


def break_up(text: str, markers: Iterable[str]) -> str:
    """`text` with a space after the first character of each marker in it: "###" becomes "# ##", "</s>" "< /s>"."""
    for marker in dict.fromkeys(marker.strip() for marker in markers):
        while len(marker) > 1 and marker in text:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text
