"""The language model in 8 and 4 bit, trained through on the CPU, against full precision."""

import pytest
import torch

from minigpt4.models.llm import load_llm


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    """A Llama of sizes that quantisation in blocks of 64 likes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
    return str(folder)


def run(llm, embeds):
    """Logits, and the gradient that reaches the inputs."""
    embeds = embeds.clone().requires_grad_()
    logits = llm(inputs_embeds=embeds, use_cache=False).logits.float()
    logits.square().mean().backward()
    return logits.detach(), embeds.grad


@pytest.mark.parametrize(("load_in", "least_cosine"), [("8bit", 0.999), ("4bit", 0.98)])
def test_low_bit_is_close_to_full_precision(llm_folder, load_in, least_cosine):
    pytest.importorskip("bitsandbytes")
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    embeds = torch.randn(2, 7, 128) * 0.02
    full = run(load_llm(llm_folder, cpu, torch.float32), embeds)
    low_model = load_llm(llm_folder, cpu, torch.float32, load_in)
    low = run(low_model, embeds)
    kinds = {type(m).__name__ for m in low_model.model.layers.modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    assert not any(p.requires_grad for p in low_model.parameters())
    for expected, value in zip(full, low, strict=True):
        cosine = torch.nn.functional.cosine_similarity(expected.flatten(), value.flatten(), dim=0)
        assert cosine > least_cosine


def test_loaded_models_are_frozen(llm_folder):
    llm = load_llm(llm_folder, torch.device("cpu"), torch.bfloat16)
    assert llm.dtype == torch.bfloat16
    assert not llm.training
    assert not any(p.requires_grad for p in llm.parameters())


def test_low_resource_means_8_bit(golden_llm_folder, monkeypatch):
    """`load_in` says it more precisely and wins."""
    from helpers import QFORMER, VIT

    from minigpt4.models import MiniGPT4, llm

    asked, load = [], llm.load_llm

    def recording(folder, device, dtype, load_in, device_map):
        asked.append(load_in)
        return load(folder, device, dtype)

    monkeypatch.setattr(llm, "load_llm", recording)
    cfg = {"image_size": 28, "vit_model": VIT, "qformer": QFORMER, "vit_weights": None, "q_former_model": None}
    for extra in ({}, {"low_resource": True}, {"low_resource": True, "load_in": "4bit"}):
        MiniGPT4.from_config({**cfg, "llama_model": str(golden_llm_folder), **extra})
    assert asked == ["16bit", "8bit", "4bit"]
