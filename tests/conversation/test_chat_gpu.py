"""Chat on a GPU: in 16 bit, in a thread of its own. Skipped, and said so, without one."""

import pytest
import torch
from helpers import QFORMER, VIT

from minigpt4.conversation import CONV_VISION, Chat
from minigpt4.models import MiniGPT4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_answers(golden_llm_folder, golden, device, dtype):
    _, tensors = golden("conversation")
    cfg = {
        "image_size": 28,
        "vit_model": VIT,
        "vit_weights": None,
        "q_former_model": None,
        "qformer": QFORMER,
        "num_query_token": 8,
        "llama_model": str(golden_llm_folder),
    }
    chat = Chat(MiniGPT4.from_config(cfg, device, dtype), None, device)
    conv, img_list = CONV_VISION.copy(), []
    chat.upload_img(tensors["images"][0], conv, img_list)
    chat.ask("What is it?", conv)
    answers = []
    for settings in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"do_sample": False}, {"num_beams": 3, "seed": 1}):
        text, ids = chat.answer(conv.copy(), img_list, max_new_tokens=20, **settings)
        assert 1 <= len(ids) <= 20
        answers.append(text)
    assert answers[0] == answers[1] != answers[2]
    assert list(chat.stream_answer(conv.copy(), img_list, max_new_tokens=20, seed=1))[-1] == answers[0]
