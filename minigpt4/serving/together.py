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
from minigpt4.fast.decoding.continuous import ContinuousBatch, NewRow
from minigpt4.fast.decoding.loop import CachedDecoding
from minigpt4.models.generation import continue_embeds
from minigpt4.models.sampling import Sampling, token_texts
from minigpt4.serving.answer import Answer
from minigpt4.serving.sampling import RowChoice, choose

STALL_SECONDS = 0.05  # between two rounds, prompts are read for about this long, and at least a part of one
IMAGES_AT_ONCE = 4
READ_AT_ONCE = 8  # prompts, of which the short ones take hardly longer together than one
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
        self._beginning: tuple[list[Answer], Iterator[None]] | None = None  # those to be read still, and the reading
        self._alone: list[Answer] = []  # that begin again, one by one
        self._batch = self._new_batch()
        self._batch.warm_up(chat.window())
        token_texts(chat.model.tokenizer)  # a second, for a large vocabulary

    def _new_batch(self) -> ContinuousBatch:
        llm = self._chat.model.llama_model
        return ContinuousBatch(llm, self._chat.decoding_loop.decoder(llm), self._max_answers)

    @property
    def running(self) -> int:
        """How many answers are computed together now."""
        return len(self._batch.owners)

    @property
    def busy(self) -> bool:
        return bool(self.running or self._beginning or self._alone)

    def round(self, take: Take, give_way: Take) -> None:
        """Compute a token of each answer, then let others begin. An answer that fails ends with an error.

        Args:
            take: returns the next answer; None: there is none.
            give_way: returns an answer that is to be interrupted. `take` will return it again.
        """
        try:
            self._step(give_way)
        except Exception as error:
            logging.exception("%d answers failed.", self.running)
            for answer in self._batch.owners:
                answer.end("error", error)
            self._batch = self._new_batch()
            if self._beginning:  # in the batch that is gone
                self._alone += self._beginning[0]
                self._beginning = None
        self._begin(take)

    def _step(self, give_way: Take) -> None:
        batch, answers = self._batch, self._batch.owners
        if not answers:
            return
        read_ids = batch.read_ids()
        if not batch.decoder.graphs:  # an answer that has ended needs no step
            self._add_tokens(answers, read_ids(), give_way)
        while batch.owners:
            try:
                batch.step()
                break
            except torch.OutOfMemoryError as error:  # the newest one gives way
                logging.warning("An answer failed: %s", error)
                answer = min(reversed(batch.owners), key=lambda answer: len(answer.turn_ids))
                answer.end("error", error)
                batch.leave(answer, answer.turn_ids)
        if batch.decoder.graphs:  # while the GPU computes the step
            self._add_tokens(answers, read_ids(), give_way)
        if batch.owners:
            batch.set_ids(_choose(batch.owners, batch.logits))

    def _add_tokens(self, answers: list[Answer], ids: list[int], give_way: Take) -> None:
        for answer, token in zip(answers, ids, strict=True):
            answer.add_token(token)
        interrupted = give_way()  # here, where all tokens that were chosen for it have been added
        for answer in self._batch.owners:
            if answer.finish or answer is interrupted:
                self._batch.leave(answer, answer.turn_ids)

    def _begin(self, take: Take) -> None:
        """Read prompts for STALL_SECONDS, and at least a part of one; without running answers, until there is one."""
        start = time.monotonic()
        while True:
            if self._beginning is None:
                answers = self._next_answers(take)
                if not answers:
                    return
                self._beginning = answers, self._read(answers)
            answers, parts = self._beginning
            try:
                if all(answer.finish for answer in answers) or next(parts, parts) is parts:
                    self._beginning = None
            except Exception as error:
                self._beginning = None
                self._begin_failed(answers, error)
            if self.running and time.monotonic() - start > STALL_SECONDS:
                return

    def _next_answers(self, take: Take) -> list[Answer]:
        """The answers that begin next. Their prompts are read together, if they are short."""
        if self._alone:
            return [self._alone.pop(0)]
        answers = []
        while len(answers) < min(READ_AT_ONCE, self._max_answers - self.running) and (answer := take()):
            answers.append(answer)
        return answers

    def _begin_failed(self, answers: list[Answer], error: Exception) -> None:
        """End an answer that could not begin. Several begin again one by one: perhaps one is the cause."""
        if len(answers) > 1:
            self._alone += answers
            return
        level = logging.WARNING if isinstance(error, torch.OutOfMemoryError) else logging.ERROR
        logging.log(level, "An answer failed: %s", error, exc_info=error if level == logging.ERROR else None)
        for answer in answers:
            answer.end("error", error)

    def _read(self, answers: list[Answer]) -> Iterator[None]:
        """Read the prompts of answers and choose their first tokens, in steps of bounded time.

        Answers are taken out of the list as soon as they run.
        """
        images, encoded = [image for answer in answers for image in answer.prompt.images], []
        for start in range(0, len(images), IMAGES_AT_ONCE):
            encoded += self._encoded(images[start : start + IMAGES_AT_ONCE])
            yield
        rest, rows = iter(encoded), []
        for answer in answers:
            own = [next(rest) for _ in answer.prompt.images]
            if not answer.finish:
                rows.append(NewRow(answer, self._context(answer, own), answer.max_tokens - len(answer.ids)))
        for joined in self._batch.join(rows, _choose):
            for answer in joined:
                answers.remove(answer)
            yield
            rows[:] = [row for row in rows if not row.owner.finish]

    def _context(self, answer: Answer, images: list[torch.Tensor]) -> torch.Tensor:
        """The vectors [S,D] of an answer's prompt, and of its tokens, if it was interrupted."""
        (embeds,), _ = self._chat.model.context([answer.prompt.text], images)
        if not answer.ids:
            return embeds
        ids = torch.tensor(answer.ids, device=embeds.device)
        return torch.cat([embeds, self._chat.model.llama_model.get_input_embeddings()(ids).to(embeds.dtype)])


def _choose(answers: list[Answer], logits: torch.Tensor) -> torch.Tensor:
    """The next tokens [n] of answers, from their logits [n,V]."""
    for answer, row in zip(answers, logits.split(1), strict=True):
        if not answer.shortest.all_may_end:
            row.copy_(answer.shortest(torch.tensor([answer.ids], dtype=torch.long), row))
    return choose(logits, [RowChoice(answer.sampling, answer.ids, answer.number) for answer in answers])


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
            token = choose(scores.float().clone(), [RowChoice(answer.sampling, answer.ids, answer.number)])
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
