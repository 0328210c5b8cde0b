"""Chat on a GPU, in 16 bit and in float32."""

import pytest
import torch

from minigpt4.conversation import CONV_VISION, Chat
from minigpt4.fast.decoding.loop import cached_decoding
from minigpt4.models.prompt import IMAGE_SLOT

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = [["upload", 0], ["upload", 1], ["ask", "Compare them."], ["answer", "No."], ["upload", 2], ["ask", "And this?"]]


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def chat(request, build_golden_model):
    """Replaces the fixture of the same name that `play` uses."""
    return Chat(build_golden_model(DEVICE, request.param, end_sym="###"), None, DEVICE)


def test_seeds_and_beams(chat, play):
    conv, img_list = play([["upload", 0], ["ask", "What is it?"]])
    answers = []
    for settings in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"do_sample": False}, {"num_beams": 3, "seed": 1}):
        text, ids = chat.answer(conv.copy(), img_list, max_new_tokens=20, **settings)
        assert 1 <= len(ids) <= 20
        answers.append(text)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"seed": 7}, {"do_sample": False, "num_beams": 3}])
def test_streaming_ends_with_the_answer_about_several_images(chat, play, settings):
    conv, img_list = play(STEPS)
    assert all(image.device.type == DEVICE for image in img_list)
    streamed = conv.copy()
    text, _ = chat.answer(conv, img_list, max_new_tokens=20, **settings)
    assert list(chat.stream_answer(streamed, img_list, max_new_tokens=20, **settings))[-1] == text
    assert streamed.messages == conv.messages


def test_images_stand_where_they_were_shown(chat, play):
    conv, img_list = play(STEPS)
    embeds = chat.get_context_emb(conv, img_list)
    assert embeds.dtype == chat.model.llama_model.dtype
    places = [
        next(n for n in range(embeds.shape[1]) if torch.equal(embeds[0, n : n + 8], image[0].to(embeds.dtype)))
        for image in img_list
    ]
    assert places == sorted(places)


def test_batches_of_mixed_lengths(chat, golden):
    """In float32, left-padded batches equal single runs; in 16 bit they can differ where two tokens are nearly tied."""
    _, tensors = golden("conversation")
    images = tensors["images"].to(DEVICE)
    prompts = [f"{IMAGE_SLOT} What?", "Hello", f"###Human: {IMAGE_SLOT} and {IMAGE_SLOT} are? ###Assistant:"]
    together = chat.model.generate(images, prompts, max_new_tokens=20, decoding_loop=cached_decoding)
    assert all(together)
    if chat.model.llama_model.dtype == torch.float32:
        options = {"max_new_tokens": 20}
        single = [chat.model.generate(images[:1], prompts[:1], decoding_loop=cached_decoding, **options)]
        single.append(chat.model.generate(None, prompts[1:2], decoding_loop=cached_decoding, **options))
        single.append(chat.model.generate(images[1:], prompts[2:], decoding_loop=cached_decoding, **options))
        assert together == [text for (text,) in single]


def test_a_device_with_its_number(build_golden_model, golden):
    device = torch.device(DEVICE, 0)
    chat, conv, img_list = Chat(build_golden_model(str(device)), None, device), CONV_VISION.copy(), []
    chat.upload_img(golden("conversation")[1]["images"][0], conv, img_list)
    chat.ask("What is it?", conv)
    assert chat.answer(conv, img_list, do_sample=False, max_new_tokens=5)[0]
