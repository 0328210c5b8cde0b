"""Calls of VLMEvalKit's adapter, and of scripts for upstream's later code, on the tiny model."""

import io
import tarfile

import pytest
import torch
from helpers import ROOT
from omegaconf import OmegaConf
from PIL import Image

from minigpt4.common.registry import registry
from minigpt4.conversation import conversation
from minigpt4.conversation.conversation import (
    CONV_VISION,
    Chat,
    CONV_VISION_LLama2,
    CONV_VISION_minigptv2,
    CONV_VISION_Vicuna0,
    Conversation,
    SeparatorStyle,
    StoppingCriteriaSub,
)
from minigpt4.models.later_release import LaterMiniGPT4

PROCESSOR = {"name": "blip2_image_eval", "image_size": 64}


@pytest.fixture(scope="module")
def model():
    """As the adapter builds it: from the model's section of its file, with the number of a GPU, and then `to`."""
    settings = OmegaConf.load(ROOT / "eval_configs/minigpt4_tiny_eval.yaml").model
    settings.update({"arch": "minigpt4", "low_resource": False, "device_8bit": 0, "prompt_path": ""})
    return registry.get_model_class(settings.arch).from_config(settings).to("cpu").eval()


@pytest.fixture(scope="module")
def processor():
    settings = OmegaConf.create(PROCESSOR)
    return registry.get_processor_class(settings.name).from_config(settings)


@pytest.fixture(scope="module")
def cat(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "cat.png"
    with tarfile.open(ROOT / "dataset/tiny/fluent.tar.gz") as tar:
        Image.open(io.BytesIO(tar.extractfile("1f431.webp").read())).save(path)
    return str(path)


def test_the_adapter_of_vlmevalkit(model, processor, cat):
    stops = [torch.tensor(ids) for ids in ([835], [2277, 29937])]
    chat = Chat(model, processor, device="cpu", stopping_criteria=[StoppingCriteriaSub(stops=stops)])
    state, img_list = CONV_VISION_Vicuna0.copy(), []
    chat.upload_img(cat, state, img_list)
    chat.encode_img(img_list)
    chat.ask("What is this?", state)
    with torch.inference_mode():
        answer = chat.answer(conv=state, img_list=img_list, do_sample=False)[0]
    assert "cat" in answer and "###" not in answer and "Assistant" not in answer
    assert state.messages[-1] == ["Assistant: ", answer] and not CONV_VISION_Vicuna0.messages


def test_pictures_may_wait_for_encode_img(model, processor, cat):
    chat = Chat(model, processor)
    waiting, encoded = [cat, Image.open(cat), processor(Image.open(cat))], []
    chat.encode_img(waiting)
    chat.upload_img(cat, CONV_VISION.copy(), encoded)
    assert [tuple(vectors.shape) for vectors in waiting] == [(1, 16, 256)] * 3
    assert all(torch.equal(vectors, encoded[0]) for vectors in waiting)
    before = list(waiting)
    chat.encode_img(waiting)
    assert all(now is then for now, then in zip(waiting, before, strict=True))


@pytest.mark.parametrize(
    ("conv", "text"),
    [
        (CONV_VISION_Vicuna0, f"{CONV_VISION.system}###Human: q###Assistant: a###Human: r###Assistant: "),
        (CONV_VISION_LLama2, f"{CONV_VISION.system}<s>[INST] q [/INST] a<s>[INST] r [/INST] "),
        (CONV_VISION_minigptv2, "<s>[INST] q [/INST]a<s>[INST] r [/INST]"),
        (CONV_VISION, f"{CONV_VISION.system}###Human: q###Assistant: a###Human: r###Assistant:"),
    ],
)
def test_prompts_of_both_releases(conv, text):
    conv = conv.copy()
    for role, message in zip(conv.roles * 2, ("q", "a", "r", None), strict=True):
        conv.append_message(role, message)
    assert conv.get_prompt() == text


def test_conversations_are_made_as_upstream_makes_them():
    whole = {"roles": ("Human", "Assistant"), "messages": [], "offset": 2, "sep_style": SeparatorStyle.SINGLE}
    assert Conversation(system=CONV_VISION.system, sep="###", **whole) == CONV_VISION


@pytest.mark.parametrize("conv", [CONV_VISION_LLama2, CONV_VISION_minigptv2])
def test_answers_without_a_separator_end_at_the_end_token(model, processor, cat, conv, monkeypatch):
    monkeypatch.setattr(conversation, "continue_embeds", lambda *args, **options: model.tokenizer_ids)
    model.tokenizer_ids = torch.tensor([[*model.tokenizer.encode("[/INST] A cat."), model.tokenizer.eos_token_id]])
    chat, state, img_list = Chat(model, processor), conv.copy(), []
    chat.upload_img(cat, state, img_list)
    chat.ask("What is it?", state)
    assert chat.answer(state, img_list)[0] == "A cat."


def test_stopping_criteria_end_an_answer(model, processor, cat):
    def answer(**options) -> list[int]:
        chat, state, img_list = Chat(model, processor, **options), CONV_VISION_Vicuna0.copy(), []
        chat.upload_img(cat, state, img_list)
        chat.ask("What is this?", state)
        return chat.answer(state, img_list, do_sample=False)[1].tolist()

    whole = answer()
    ended = answer(stopping_criteria=[StoppingCriteriaSub(stops=[torch.tensor(whole[1:3])])])
    assert ended == whole[:3] and len(whole) > 3


def test_a_stop_is_compared_with_each_row():
    ids, stop = torch.tensor([[1, 2, 3], [3, 1, 2], [2, 1, 1]]), torch.tensor([1, 2])
    assert StoppingCriteriaSub([stop])(ids, None).tolist() == [False, True, False]
    assert StoppingCriteriaSub([torch.tensor([0] * 4)])(ids, None).tolist() == [False] * 3


def test_without_a_device_the_model_is_built_on_the_gpu_that_the_settings_name(monkeypatch):
    seen = []
    parent = LaterMiniGPT4.__mro__[1]
    monkeypatch.setattr(
        parent, "from_config", classmethod(lambda cls, cfg, device, dtype: seen.append((device, dtype)))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    LaterMiniGPT4.from_config({"device_8bit": 1})
    LaterMiniGPT4.from_config({})
    LaterMiniGPT4.from_config({"device_8bit": 1, "model_type": "pretrain_vicuna_7b"}, "cpu", torch.float32)
    gpu, cpu = (torch.device("cuda:1"), torch.bfloat16), (torch.device("cpu"), torch.float32)
    assert seen == [gpu, cpu, cpu]
    with pytest.raises(KeyError, match="pretrain_vicuna0"):
        LaterMiniGPT4.from_config({"model_type": "pretrain_llama2"})
