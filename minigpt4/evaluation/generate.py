"""A model's answers to examples, in batches, on one rank or several."""

from collections.abc import Sequence

import torch

from minigpt4.common import dist_utils
from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import SEPARATOR
from minigpt4.common.parallel import write_answers
from minigpt4.common.resumable import Output
from minigpt4.conversation import Decoding, PictureError, open_picture
from minigpt4.conversation.conversation import Chat
from minigpt4.datasets.conversations.batch import Conversations, exchanges
from minigpt4.evaluation.example import Answer, Example
from minigpt4.models.generation import answer_text, continue_embeds
from minigpt4.models.prompt import BOUNDARY, IMAGE_SLOT
from minigpt4.models.template import Template
from minigpt4.models.tokenizer import end_ids


class Answerer:
    """Answers examples, several at a time, in the template of training.

    Args:
        chat: the model and its image processor.
        template: the text around the questions.
        prompt: with `{}` in the place of the question, or without for pictures alone. None: the question as it is; for
            a picture alone, the model's first prompt.
        decoding: how the tokens are chosen.
    """

    def __init__(self, chat: Chat, template: Template, prompt: str | None, decoding: Decoding) -> None:
        self._chat, self._template, self._prompt, self._decoding = chat, template, prompt, decoding
        self._image_prompt = (getattr(chat.model, "prompt_list", None) or [IMAGE_SLOT])[0]

    def load(self, example: Example) -> tuple[Example, list[torch.Tensor] | PictureError]:
        """The processed pictures [3,H,W] of an example, or why there are none."""
        try:
            self._check_length(example)
            return example, [self._process(picture) for picture in example.pictures]
        except PictureError as error:
            return example, error

    @torch.inference_mode()
    def answer(self, batch: Sequence[tuple[Example, list[torch.Tensor]]]) -> list[dict]:
        """The lines of the answers to examples with their processed pictures."""
        if self._decoding.seed is not None:
            torch.manual_seed(self._decoding.seed)
        model, stop = self._chat.model, self._template.end
        images = [picture for _, pictures in batch for picture in pictures]
        embeds = model.encode_img(torch.stack(images).to(self._chat.device))[0].unsqueeze(1) if images else []
        context, mask = model.context([self.prompt_of(example) for example, _ in batch], embeds)
        llm, tokenizer, loop = model.llama_model, model.tokenizer, self._chat.decoding_loop
        options = self._decoding.options()
        rows = continue_embeds(llm, tokenizer, context, mask, stop, decoding_loop=loop, **options).tolist()
        answers = [Answer(answer_text(tokenizer, row, stop), self._has_ended(row)) for row in rows]
        return [entry(example, answer) for (example, _), answer in zip(batch, answers, strict=True)]

    def prompt_of(self, example: Example) -> str:
        """The text up to the answer, with an image slot at the place of each picture."""
        *before, (role, parts) = example.messages
        if self._prompt is not None:
            slots = tuple(part for part in parts if part is None)
            question = self._prompt if not example.question else self._prompt.replace("{}", example.question)
            parts = (*slots, question)
        (sound,) = Conversations([(*before, (role, parts), ("assistant", ("",)))]).sanitize(
            self._chat.model.tokenizer.special_tokens, [self._template.end, SEPARATOR]
        )
        found = exchanges(sound, self._template, self._image_prompt)
        return BOUNDARY.join([text for exchange in found for text in exchange][:-1])

    def _process(self, picture) -> torch.Tensor:
        return picture() if callable(picture) else self._chat.vis_processor(open_picture(picture))

    def _has_ended(self, ids: list[int]) -> bool:
        tokenizer, stop = self._chat.model.tokenizer, self._template.end
        by_text = bool(stop) and stop in tokenizer.decode(ids, skip_special_tokens=False)
        return by_text or not end_ids(tokenizer).isdisjoint(ids)

    def _check_length(self, example: Example) -> None:
        """Raise PictureError if the model's context cannot hold question and answer: it would write nonsense."""
        new, window = self._decoding.max_new_tokens, self._chat.window()
        length = self._chat.num_tokens(self.prompt_of(example))
        if length + new > window:
            raise PictureError(
                f"its question takes {length} tokens and its answer up to {new}; the model has room for {window}. "
                "Lower --max-new-tokens."
            )


def check_prompt(prompt: str | None, examples: Sequence[Example]) -> None:
    """Raise ConfigError if a prompt would hide the questions of the examples."""
    if prompt is not None and "{}" not in prompt and any(example.question for example in examples):
        raise ConfigError(f"--prompt {prompt!r} must have {{}} where the question of the data goes.")


def answer_all(examples: Sequence[Example], answerer: Answerer, output: Output, batch_size: int) -> list[str]:
    """Answer the examples that `output` lacks, this rank its share. Returns why all ranks skipped examples."""
    open_ones = [example for example in examples if example.id not in output.done]
    own = open_ones[dist_utils.get_rank() :: dist_utils.get_world_size()]
    return write_answers(own, answerer.load, answerer.answer, output, batch_size, "answer", len(own))


def entry(example: Example, answer: Answer) -> dict:
    """The line of an answer in answers.jsonl."""
    names = {key: value for key, value in example.names.items() if key != "id"}
    question = {"question": example.question} if example.question else {}
    return {"id": example.id, **names, **question, "answer": answer.text, "ended": answer.ended}
