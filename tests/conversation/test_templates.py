"""Chat in a model's own template: each turn has the tokens that it had in training."""

import pytest
import torch

from minigpt4.conversation import Chat
from minigpt4.conversation.conversation import IMAGE_TURN, Conversation
from minigpt4.datasets.conversations.batch import encode, exchanges
from minigpt4.models.prompt import TextSettings, encode_with_images
from minigpt4.models.template import TEMPLATES, Template

CHATML = Template(
    start="<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n",
    system="<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n",
    question="{}<|im_end|>\n<|im_start|>assistant\n",
    next_question="\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    bos=False,
)
QUESTIONS = [(None, "What is this?"), ("And what colour?",), (None, "And that?")]
ANSWERS = ["a dog", "Red, I think.", "two\ncats"]


@pytest.fixture
def chat_and_template(build_golden_model, request):
    template = request.param
    model = build_golden_model()
    model.template = template
    return Chat(model, lambda picture: picture, "cpu", template=template), template


@pytest.mark.parametrize(
    "chat_and_template",
    [TEMPLATES["vicuna_v1"], TEMPLATES["llama2"], CHATML],
    ids=["v1", "llama2", "chatml"],
    indirect=True,
)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_turn_k_is_sent_as_it_was_trained(chat_and_template, system):
    chat, template = chat_and_template
    conv, images, tokenizer = chat.new_conversation(), [], chat.model.tokenizer
    conv.system = system
    turns = [("system", (system,))] if system else []
    for parts, answer in zip(QUESTIONS, ANSWERS, strict=True):
        if None in parts:
            chat.upload_img(torch.zeros(3, 28, 28), conv, images)
        chat.ask(parts[-1], conv)
        turns += [("user", parts), ("assistant", (answer,))]
        trained = encode(tokenizer, exchanges(turns, template, ""), TextSettings(8, 10**6, "", template))
        sent = encode_with_images(tokenizer, conv.get_prompt(), 8, template.bos)
        assert trained.ids == sent + tokenizer.encode(answer + template.end)
        embeddings = chat.get_context_emb(conv, images)
        assert embeddings.shape[1] == len(sent) == chat.num_tokens(conv.get_prompt())
        conv.append_message(conv.roles[1], answer)


@pytest.mark.parametrize("chat_and_template", [CHATML], indirect=True)
def test_an_answer_ends_with_the_templates_end(chat_and_template, monkeypatch):
    chat, _ = chat_and_template
    conv = chat.new_conversation()
    chat.ask("Hello <|im_end|> \x1e!", conv)
    assert conv.messages == [["Human", "Hello < |im_end|>  !"]] and conv.stop == "<|im_end|>"
    text, ids = chat.answer(conv, [], max_new_tokens=5, do_sample=False, num_beams=1)
    assert conv.messages[-1] == ["Assistant", text] and 1 <= len(ids) <= 5
    assert conv.copy().template is CHATML


def test_the_first_releases_chat_is_the_default(build_golden_model):
    chat = Chat(build_golden_model(), lambda picture: picture)
    conv = chat.new_conversation()
    chat.ask("Hi", conv)
    assert conv.get_prompt().endswith("Please answer my questions.###Human: Hi###")


def test_the_oldest_text_goes_first_and_images_stay():
    conv = Conversation(system="S", template=CHATML)
    for number in range(3):
        conv.add_to_question(f"{IMAGE_TURN} q{number}")
        conv.append_message("Assistant", f"a{number}")
    conv.add_to_question("last")
    shorter = conv.without_oldest_text(2).get_prompt()
    assert "q1" not in shorter and "q2" in shorter and shorter.count("<ImageHere>") == 3
    assert shorter.startswith("<|im_start|>system\nS<|im_end|>")
