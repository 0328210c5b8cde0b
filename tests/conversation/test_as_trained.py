"""Chat, page and endpoint send each turn as it was trained, token for token."""

import random
from types import SimpleNamespace

import pytest
import torch
from conversation_cases import CHATML, LLAMA2, TOKENIZERS, TRIMMED, random_conversation, renderer
from endpoint import assistant, image, text, user

from minigpt4.conversation import CONV_VISION, Chat
from minigpt4.datasets.conversations.batch import Conversations, encode, exchanges
from minigpt4.models.prompt import TextSettings, encode_with_images
from minigpt4.models.template import TEMPLATES, from_chat_template
from minigpt4.processors import Blip2ImageEvalProcessor
from minigpt4.serving.prepare import conversation
from minigpt4.serving.protocol import Message
from minigpt4.web.answers import Question, prepare
from minigpt4.web.pictures import Upload, Uploads

QUERIES, LONG = 4, 10**6
OWN = {name: TEMPLATES[name] for name in ("vicuna_v1", "llama2")} | {
    "SmolLM2": from_chat_template(renderer(CHATML), "<|im_end|>"),
    "Qwen": from_chat_template(renderer(TRIMMED), "<|im_end|>"),
    "Llama by its tokenizer": from_chat_template(renderer(LLAMA2), "</s>"),
}


class Model:
    """Continues each prompt with the tokens that it was told, and keeps the prompts."""

    query_tokens = torch.zeros(1, QUERIES, 2)
    llama_model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def eval(self):
        return self

    def encode_img(self, image):
        return torch.zeros(1, QUERIES, 2), None


class ToldChat(Chat):
    def __init__(self, tokenizer, template):
        super().__init__(Model(tokenizer), Blip2ImageEvalProcessor(8), template=template)
        self.prompts, self.told = [], []

    def window(self, max_length=0):
        return LONG

    def _generate(self, prompt, img_list, stop, decoding, tap):
        self.prompts.append(encode_with_images(self.model.tokenizer, prompt, QUERIES, self.template.bos))
        return torch.tensor([self.told.pop(0)])


def trained(tokenizer, template, turns):
    """For each answer of a conversation: the ids before it, its ids, its text without the end."""
    (sound,) = Conversations([turns]).sanitize(tokenizer.special_tokens, template.separators)
    parts = [*exchanges(sound, template, "")]
    found = []
    for number, (_, answer) in enumerate(parts, 1):
        ids = encode(tokenizer, parts[:number], TextSettings(QUERIES, LONG, "", template)).ids
        learnt = tokenizer.encode(answer)
        found.append((ids[: -len(learnt)], learnt, answer.removesuffix(template.end).strip()))
    return found


def turns_of(rng, **changes):
    """A random conversation whose first question is not an image alone, which gets a prompt of the file."""
    return random_conversation(rng, **changes)


@pytest.mark.parametrize("template", OWN)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_chat_and_page(kind, template):
    """There, images precede the text of a question, and there is no system text."""
    tokenizer, rng, template = TOKENIZERS[kind](), random.Random(1), OWN[template]
    uploads = Uploads()
    picture = uploads.add(Upload([torch.zeros(3, 8, 8)], [], "somebody"))
    for number in range(12):
        turns = [
            (role, tuple(sorted(parts, key=lambda part: part is not None)))
            for role, parts in random_conversation(rng)
            if role != "system"
        ]
        expected = trained(tokenizer, template, turns)
        chat, messages, images = ToldChat(tokenizer, template), [], []
        chat.told = [[*ids] for _, ids, _ in expected]
        conv = chat.new_conversation()
        for (_, asked), (_, _, answer) in zip(turns[::2], expected, strict=True):
            given = asked.count(None)
            if number % 2:
                messages.append({"role": "user", "text": asked[-1], "pictures": [picture] * given})
                prompt = prepare(chat, uploads, Question(messages=messages)).prompt
                chat.prompts.append(encode_with_images(tokenizer, prompt, QUERIES, template.bos))
                messages.append({"role": "assistant", "text": answer})
            else:
                for _ in range(given):
                    chat.upload_img(torch.zeros(3, 8, 8), conv, images)
                chat.ask(asked[-1], conv)
                assert chat.answer(conv, images)[0] == answer
        assert chat.prompts == [ids for ids, _, _ in expected]


@pytest.mark.parametrize("template", OWN)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_endpoint(kind, template):
    """The client returns the answers as it got them; images stand where they stood."""
    tokenizer, rng, template = TOKENIZERS[kind](), random.Random(2), OWN[template]
    chat = ToldChat(tokenizer, template)
    for _ in range(25):
        turns = random_conversation(rng)
        expected = trained(tokenizer, template, turns)
        first = 1 if turns[0][0] == "system" else 0
        messages = [{"role": "system", "content": turns[0][1][0]}] if first else []
        for (_, asked), (ids, _, answer) in zip(turns[first::2], expected, strict=True):
            messages.append(user(*(image(b"") if part is None else text(part) for part in asked)))
            prompt = conversation(chat, [Message.model_validate(each) for each in messages]).get_prompt()
            assert encode_with_images(tokenizer, prompt, QUERIES, template.bos) == ids
            messages.append(assistant(answer))


def test_vicuna_v0_keeps_the_form_of_the_first_release():
    """Its chat has a system text, and no blank after "Assistant:"; training has it the other way round."""
    chat = ToldChat(TOKENIZERS["SentencePiece"](), None)
    conv, images = chat.new_conversation(), []
    chat.upload_img(torch.zeros(3, 8, 8), conv, images)
    chat.ask("What?", conv)
    conv.append_message("Assistant", "A cat.")
    chat.ask("Sure?", conv)
    conv.append_message("Assistant", None)
    first = "###Human: <Img><ImageHere></Img> What?###Assistant: A cat.###Human: Sure?###Assistant:"
    assert conv.get_prompt() == CONV_VISION.system + first
    turns = [("user", (None, "What?")), ("assistant", ("A cat.",)), ("user", ("Sure?",)), ("assistant", ("Yes.",))]
    written = "".join(a + b for a, b in exchanges(turns, TEMPLATES["vicuna_v0"], ""))
    spaced = first.replace("###Assistant:", " ###Assistant:") + " Yes.###"
    assert written == spaced
