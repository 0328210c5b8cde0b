"""A `Chat` with the golden model, and the golden conversations."""

import pytest
import torch

from minigpt4.conversation import CONV_VISION, Chat, conversation
from minigpt4.models.generation import StopOnText


@pytest.fixture(scope="session")
def model(build_golden_model):
    return build_golden_model(end_sym="###")


@pytest.fixture
def chat(model):
    return Chat(model, vis_processor=None)


@pytest.fixture
def play(chat, golden):
    """Apply golden steps to a fresh conversation: play(steps) gives (conversation, image vectors)."""
    _, tensors = golden("conversation")

    def apply(steps):
        conv, img_list = CONV_VISION.copy(), []
        for kind, value in steps:
            if kind == "upload":
                assert chat.upload_img(tensors["images"][value], conv, img_list) == "Received."
            elif kind == "ask":
                chat.ask(value, conv)
            else:
                conv.append_message(conv.roles[1], value)
        return conv, img_list

    return apply


@pytest.fixture
def scripted(chat, monkeypatch):
    """Let the language model write given ids, token after token, whatever it is asked: scripted(ids)."""

    def script(ids):
        def continue_embeds(llm, tokenizer, embeds, mask, stop, criteria, max_new_tokens=300, **options):
            for n in range(1, min(len(ids), max_new_tokens) + 1):
                rows = torch.tensor([ids[:n]])
                if any([bool(criterion(rows, None)[0]) for criterion in [StopOnText(tokenizer, stop), *criteria]]):
                    break
            return rows

        monkeypatch.setattr(conversation, "continue_embeds", continue_embeds)

    return script
