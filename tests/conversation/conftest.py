"""A `Chat` with the golden model, and fixtures that play golden conversations."""

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
    """play(steps) applies golden steps to a new conversation and returns it with its image embeddings."""
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
    """scripted(ids) replaces the language model by one that always writes these ids."""

    def script(ids):
        def continue_embeds(llm, tokenizer, embeds, mask, stop, criteria, max_new_tokens=300, **options):
            for n in range(1, min(len(ids), max_new_tokens) + 1):
                rows = torch.tensor([ids[:n]])
                if any([bool(criterion(rows, None)[0]) for criterion in [StopOnText(tokenizer, stop), *criteria]]):
                    break
            return rows

        monkeypatch.setattr(conversation, "continue_embeds", continue_embeds)

    return script
