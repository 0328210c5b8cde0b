"""A model's answers to examples, in batches, on one rank or several."""

from collections.abc import Callable, Sequence

import torch

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import SEPARATOR
from minigpt4.common.parallel import answer_in_batches, write_answers
from minigpt4.common.resumable import Output
from minigpt4.conversation import Decoding, PictureError, open_picture
from minigpt4.conversation.conversation import Chat
from minigpt4.conversation.loading import load_vis_processor
from minigpt4.datasets.conversations.batch import Conversations, exchanges
from minigpt4.evaluation.example import Answer, Example
from minigpt4.models.generation import answer_text, continue_embeds
from minigpt4.models.prompt import BOUNDARY, IMAGE_SLOT
from minigpt4.models.template import Template, from_prompt
from minigpt4.models.tokenizer import end_ids
from minigpt4.processors.base_processor import make_processor


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
        """The processed pictures [3,H,W] of an example, or cached features [Q,W]; or why there are none."""
        try:
            self._check_length(example)
            return example, [self._process(picture) for picture in example.pictures]
        except PictureError as error:
            return example, error

    @torch.no_grad()  # in inference mode, what the model keeps could not be trained with afterwards
    def answer(self, batch: Sequence[tuple[Example, list[torch.Tensor]]]) -> list[dict]:
        """The lines of the answers to examples with their processed pictures."""
        if self._decoding.seed is not None:
            torch.manual_seed(self._decoding.seed)
        model, stop = self._chat.model, self._template.end
        images = [picture for _, pictures in batch for picture in pictures]
        context, mask = model.context([self.prompt_of(example) for example, _ in batch], self._encode(images))
        llm, tokenizer, loop = model.llama_model, model.tokenizer, self._chat.decoding_loop
        options = self._decoding.options()
        rows = continue_embeds(llm, tokenizer, context, mask, stop, decoding_loop=loop, **options).tolist()
        answers = [Answer(answer_text(tokenizer, row, stop), self._has_ended(row)) for row in rows]
        return [entry(example, answer) for (example, _), answer in zip(batch, answers, strict=True)]

    def _encode(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        """Vectors [1,Q,D] of each picture [3,H,W], and of cached features [Q,W]."""
        kinds = {image.ndim for image in images}
        if len(kinds) > 1:
            return [embeds for image in images for embeds in self._encode([image])]
        if not images:
            return []
        stacked, model = torch.stack(images).to(self._chat.device), self._chat.model
        return [*(model.project(stacked) if kinds == {2} else model.encode_img(stacked)[0]).unsqueeze(1)]

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
            fix = "Lower --max-new-tokens." if length < window else "Shorten the question."
            raise PictureError(
                f"its question takes {length} tokens and its answer up to {new}; the model has room for {window}. {fix}"
            )


def check_prompt(prompt: str | None, examples: Sequence[Example]) -> None:
    """Raise ConfigError if a prompt would hide the questions of the examples."""
    if prompt is not None and "{}" not in prompt and any(example.question for example in examples):
        raise ConfigError(f"--prompt {prompt!r} must have {{}} where the question of the data goes.")


def answerer_of(cfg: Config, chat: Chat, dataset: str, prompt: str | None, decoding: Decoding) -> Answerer:
    """The `Answerer` of a chat.

    dataset: name of the section with the image processor for pictures that are paths; where it names none for
    evaluation, and if the name is empty, the chat's own is used, or that of a chat with this config.
    """
    section = cfg.datasets_cfg.get(dataset) if dataset else None
    if named := section and section.vis_processor.get("eval"):
        chat.vis_processor = make_processor(f"datasets.{dataset}.vis_processor.eval", named)
    chat.vis_processor = chat.vis_processor or load_vis_processor(cfg)
    texts = cfg.model_cfg.get("prompt_template") or "{}", cfg.model_cfg.get("end_sym") or ""
    template = getattr(chat.model, "template", None) or from_prompt(*texts)
    return Answerer(chat, template, prompt, decoding)


def answers_of(
    examples: Sequence[Example], answerer: Answerer, batch_size: int, until_stopped: Callable = iter
) -> tuple[dict[str, Answer], list[str]]:
    """{id: answer} of the examples, each rank's share from that rank; and why examples were skipped.

    until_stopped: yields items until the process is asked to stop.
    """
    own = until_stopped(examples[dist_utils.get_rank() :: dist_utils.get_world_size()])
    found = [*answer_in_batches(own, answerer.load, answerer.answer, batch_size)]
    lines = {line["id"]: Answer(line["answer"], line["ended"]) for batch in found for line in batch.lines}
    skipped = [f"{name}: {cause}" for batch in found for name, cause in batch.skipped.items()]
    gathered = dist_utils.gather_objects((lines, skipped))
    answers = {id: answer for each, _ in gathered for id, answer in each.items()}
    return answers, [reason for _, reasons in gathered for reason in reasons]


def answer_all(
    examples: Sequence[Example], answerer: Answerer, output: Output, batch_size: int, until_stopped: Callable = iter
) -> list[str]:
    """Answer the examples that `output` lacks, this rank its share. Returns why all ranks skipped examples."""
    open_ones = [example for example in examples if example.id not in output.done]
    own = open_ones[dist_utils.get_rank() :: dist_utils.get_world_size()]
    batches = answer_in_batches(until_stopped(own), answerer.load, answerer.answer, batch_size)
    return write_answers(batches, output, "answer", len(own))


def entry(example: Example, answer: Answer) -> dict:
    """The line of an answer in answers.jsonl."""
    names = {key: value for key, value in example.names.items() if key != "id"}
    question = {"question": example.question} if example.question else {}
    return {"id": example.id, **names, **question, "answer": answer.text, "ended": answer.ended}
