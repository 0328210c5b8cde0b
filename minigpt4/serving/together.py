"""The answers that the model's thread computes: together where the decoding loop supports the model, else one by one.

Each round computes one token of every answer. Between two rounds answers end, and others begin: their pictures are
encoded and their prompts read a part at a time, so that the answers that are running go on meanwhile.

Q query tokens per image, D width of the language model.
"""

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch

from minigpt4.conversation import Chat
from minigpt4.fast.decoding.continuous import ContinuousBatch
from minigpt4.fast.decoding.loop import CachedDecoding
from minigpt4.models.generation import continue_embeds
from minigpt4.models.sampling import Sampling, token_texts
from minigpt4.serving.answer import Answer
from minigpt4.serving.sampling import RowChoice, choose

STALL_SECONDS = 0.05  # between two rounds, prompts are read for about this long, and at least a part of one
IMAGES_AT_ONCE = 4
ENCODED_BYTES = 64 * 2**20  # of embeddings that are kept: 250 pictures with Vicuna-7B

Take = Callable[[], Answer | None]


class AnswersTogether:
    """The answers that are computed together.

    Args:
        max_answers: most answers at a time.
    """

    def __init__(self, chat: Chat, max_answers: int):
        self._chat, self._max_answers = chat, max_answers
        self._encoded = EncodedPictures(chat)
        self._answers: list[Answer] = []  # in the order of the rows of the batch
        self._beginning: tuple[Answer, Iterator[None]] | None = None  # and what is left to be read of its prompt
        self._batch = self._new_batch()
        self._batch.warm_up(chat.window())
        token_texts(chat.model.tokenizer)  # a second, for a large vocabulary

    def _new_batch(self) -> ContinuousBatch:
        llm = self._chat.model.llama_model
        return ContinuousBatch(llm, self._chat.decoding_loop.decoder(llm), self._max_answers)

    @property
    def busy(self) -> bool:
        return bool(self._answers or self._beginning)

    def round(self, take: Take, give_way: Take) -> None:
        """Compute a token of each answer, then let others begin. An answer that fails ends with an error.

        Args:
            take: returns the next answer; None: there is none.
            give_way: returns an answer that is to be interrupted. `take` will return it again.
        """
        try:
            self._step(give_way)
        except Exception as error:
            logging.exception("%d answers failed.", len(self._answers))
            for answer in self._answers:
                answer.end("error", error)
            self._answers, self._batch = [], self._new_batch()
        self._begin(take)

    def _step(self, give_way: Take) -> None:
        batch, answers = self._batch, [*self._answers]
        if not answers:
            return
        read_ids = batch.read_ids()
        if not batch.decoder.graphs:  # an answer that has ended needs no step
            self._add_tokens(answers, read_ids(), give_way)
        while self._answers:
            try:
                batch.step()
                break
            except torch.OutOfMemoryError as error:  # the newest one gives way
                logging.warning("An answer failed: %s", error)
                self._answers[-1].end("error", error)
                self._leave(len(self._answers) - 1)
        if batch.decoder.graphs:  # while the GPU computes the step
            self._add_tokens(answers, read_ids(), give_way)
        if self._answers:
            self._choose(batch.logits, first_row=0)

    def _add_tokens(self, answers: list[Answer], ids: list[int], give_way: Take) -> None:
        for answer, token in zip(answers, ids, strict=True):
            answer.add_token(token)
        interrupted = give_way()  # here, where all tokens that were chosen for it have been added
        for row in reversed(range(len(self._answers))):
            if self._answers[row].finish or self._answers[row] is interrupted:
                self._leave(row)

    def _leave(self, row: int) -> None:
        self._batch.leave(row, self._answers[row].ids)
        last = self._answers.pop()
        if row < len(self._answers):  # as in the batch
            self._answers[row] = last

    def _choose(self, logits: torch.Tensor, first_row: int) -> None:
        """Choose the next token of the rows from `first_row` on, from logits [B,V]."""
        answers = self._answers[first_row:]
        for answer, row in zip(answers, logits.split(1), strict=True):
            if not answer.shortest.all_may_end:
                row.copy_(answer.shortest(torch.tensor([answer.ids], dtype=torch.long), row))
        choices = [RowChoice(answer.sampling, answer.ids, answer.random.random()) for answer in answers]
        self._batch.set_ids(choose(logits, choices), first_row)

    def _begin(self, take: Take) -> None:
        """Read prompts for STALL_SECONDS, and at least a part of one; without running answers, until there is one."""
        start = time.monotonic()
        while True:
            if self._beginning is None:
                answer = take() if len(self._answers) < self._max_answers else None
                if answer is None:
                    return
                self._beginning = answer, self._read(answer)
            answer, parts = self._beginning
            try:
                if answer.finish or next(parts, parts) is parts:
                    self._beginning = None
            except Exception as error:
                level = logging.WARNING if isinstance(error, torch.OutOfMemoryError) else logging.ERROR
                logging.log(level, "An answer failed: %s", error, exc_info=level == logging.ERROR)
                answer.end("error", error)
                self._beginning = None
            if self._answers and time.monotonic() - start > STALL_SECONDS:
                return

    def _read(self, answer: Answer) -> Iterator[None]:
        """Read an answer's prompt and choose its first token, in steps of bounded time."""
        images, prompt = [], answer.prompt
        for start in range(0, len(prompt.images), IMAGES_AT_ONCE):
            images += self._encoded(prompt.images[start : start + IMAGES_AT_ONCE])
            yield
        (embeds,), _ = self._chat.model.context([prompt.text], images)
        if answer.ids:  # it was interrupted
            ids = torch.tensor(answer.ids, device=embeds.device)
            embeds = torch.cat([embeds, self._chat.model.llama_model.get_input_embeddings()(ids).to(embeds.dtype)])
        for logits in self._batch.join(embeds, answer.max_tokens - len(answer.ids)):
            if logits is None:
                yield
        self._answers.append(answer)
        self._choose(logits, first_row=len(self._answers) - 1)


class EncodedPictures:
    """Encodes pictures, and keeps the embeddings [1,Q,D] of those that were used last.

    The key is what the encoder sees: the processed picture. So every turn of a conversation, and every client, can send
    a picture again.
    """

    def __init__(self, chat: Chat, max_bytes: int = ENCODED_BYTES):
        self._chat, self._max_bytes = chat, max_bytes
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __call__(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        """The embeddings of processed pictures [3,H,W]. Embeddings [1,Q,D] are returned as they are."""
        keys = [None if len(image) == 1 else _digest(image) for image in images]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: image for key, image in zip(keys, images, strict=True) if key and key not in found}
        shapes = {image.shape for image in new.values()}
        for shape in shapes:
            group = {key: image for key, image in new.items() if image.shape == shape}
            encoded = self._chat.model.encode_img(torch.stack([*group.values()]).to(self._chat.device))[0]
            found |= {key: one.clone() for key, one in zip(group, encoded.split(1), strict=True)}
        for key, embeds in found.items():
            self._kept[key] = embeds
            self._kept.move_to_end(key)
        while sum(embeds.nbytes for embeds in self._kept.values()) > self._max_bytes:
            self._kept.popitem(last=False)
        return [image if key is None else found[key] for key, image in zip(keys, images, strict=True)]


def _digest(image: torch.Tensor) -> bytes:
    content = image.cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(content, usedforsecurity=False).digest() + str((image.shape, image.dtype)).encode()


class AnswersAlone:
    """Computes one answer after the other, for a model that the decoding loop does not support."""

    busy = False

    def __init__(self, chat: Chat):
        self._chat, self._encoded = chat, EncodedPictures(chat)

    def round(self, take: Take, give_way: Take) -> None:
        """Compute the next answer to its end. One that fails ends with an error."""
        answer = take()
        if answer is None:
            return
        try:
            self._generate(answer)
        except Exception as error:
            logging.exception("An answer failed.")
            answer.end("error", error)

    def _generate(self, answer: Answer) -> None:
        def add_token(input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
            answer.add_token(int(input_ids[0, -1]))
            return torch.tensor([answer.finish is not None], device=input_ids.device)

        def sample(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            token = choose(scores.float().clone(), [RowChoice(answer.sampling, answer.ids, answer.random.random())])
            return torch.full_like(scores, -torch.inf).scatter_(1, token.unsqueeze(1), 0.0)

        model = self._chat.model
        context, mask = model.context([answer.prompt.text], self._encoded(answer.prompt.images))
        continue_embeds(
            model.llama_model, model.tokenizer, context, mask, stop="", criteria=[add_token],
            processors=[answer.shortest, sample], decoding_loop=self._chat.decoding_loop,
            max_new_tokens=answer.max_tokens, min_new_tokens=answer.min_tokens,
        )  # fmt: skip


def computes_together(chat: Chat) -> bool:
    """Whether the decoding loop supports the model, so that answers can be computed together."""
    llm, loop = chat.model.llama_model, chat.decoding_loop
    return isinstance(loop, CachedDecoding) and loop.supports(llm) and Sampling.of(llm, {}) is not None


def answers_for(chat: Chat, max_answers: int) -> AnswersTogether | AnswersAlone:
    """Computes the answers of a chat, at most `max_answers` at a time."""
    if computes_together(chat):
        return AnswersTogether(chat, max_answers)
    logging.info("This language model answers one question after the other (docs/serving.md#answers-together).")
    return AnswersAlone(chat)
