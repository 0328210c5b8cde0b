"""Weights rounded to 8 bit without bitsandbytes."""

import pytest
import torch
from torch import nn

from minigpt4.models.llm import load_llm
from minigpt4.quantization.bitsandbytes import LowBitLinear
from minigpt4.quantization.int8 import quantize_linear, quantize_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_within_half_a_step_of_each_weight(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).to(dtype)
    linear.weight.data[3] *= 100
    linear.weight.data[5] = 0
    layer = quantize_linear(linear, CPU)
    assert layer.weight.dtype == torch.int8
    weight = layer.weight.float() * layer.scale.float().unsqueeze(1)
    assert ((weight - linear.weight.float()).abs() <= 0.501 * layer.scale.float().unsqueeze(1)).all()
    x = torch.randn(2, 5, 64).to(dtype)
    y, expected = layer(x), linear(x)
    assert y.dtype == dtype
    assert (y.float() - expected.float()).norm() < 0.02 * expected.float().norm()
    if bias:
        assert torch.equal(layer(x * 0), linear.bias.expand(2, 5, -1))


def random_llm(**sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes))


def test_a_loaded_model_is_close_to_full_precision_and_half_its_size(tmp_path):
    random_llm().save_pretrained(tmp_path)
    full, small = (load_llm(str(tmp_path), CPU, torch.bfloat16, load_in) for load_in in ("16bit", "8bit_weights"))
    kinds = {type(part) for part in small.modules()}
    assert LowBitLinear in kinds
    assert nn.Linear not in kinds
    assert not small.training
    assert not any(p.requires_grad for p in small.parameters())
    ids = torch.randint(256, (2, 20))
    a, b = full(ids).logits.float(), small(ids).logits.float()
    assert nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999

    def size(llm):
        return sum(t.numel() * t.element_size() for t in (*llm.parameters(), *llm.buffers()))

    embeddings = full.get_input_embeddings().weight.numel() * 2
    assert size(small) - embeddings < 0.52 * (size(full) - embeddings)


def test_a_file_of_another_type_computes_in_the_one_asked_for(tmp_path):
    random_llm().to(torch.float16).save_pretrained(tmp_path)
    llm = load_llm(str(tmp_path), CPU, torch.bfloat16, "8bit_weights")
    assert {p.dtype for p in llm.parameters()} == {torch.int8, torch.bfloat16}
    assert llm.lm_head.scale.dtype == torch.float32
    assert llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert llm(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


def test_the_weights_are_those_of_bitsandbytes(tmp_path):
    """But for halves that it rounds the other way, in float16."""
    pytest.importorskip("bitsandbytes")
    random_llm().save_pretrained(tmp_path)
    ours, theirs = (load_llm(str(tmp_path), CPU, torch.float32, load_in) for load_in in ("8bit_weights", "8bit"))
    for layer, other in zip(ours.model.layers.modules(), theirs.model.layers.modules(), strict=True):
        assert type(layer) is type(other)
        if isinstance(layer, LowBitLinear):
            torch.testing.assert_close(layer.scale, other.scale, rtol=1e-3, atol=0)
            steps = (layer.weight.int() - other.weight.int()).abs()
            assert steps.max() <= 1 and steps.float().mean() < 0.02


def test_an_output_layer_that_is_the_embeddings_stays():
    llm = quantize_model(random_llm(tie_word_embeddings=True), CPU)
    assert type(llm.lm_head) is nn.Linear
    assert llm.lm_head.weight is llm.get_input_embeddings().weight
    assert type(llm.model.layers[0].mlp.up_proj) is LowBitLinear


def test_answers_are_those_of_transformers():
    from minigpt4.fast.decoding.loop import cached_decoding
    from minigpt4.models.generation import continue_embeds

    llm = quantize_model(random_llm().requires_grad_(False), CPU).eval()
    llm.generation_config.eos_token_id = None
    embeds, mask = torch.randn(2, 9, 128), torch.ones(2, 9, dtype=torch.long)

    class Words:
        eos_token_id = 2

    ours, theirs = (
        continue_embeds(llm, Words(), embeds, mask, "", max_new_tokens=20, decoding_loop=loop)
        for loop in (cached_decoding, None)
    )
    assert torch.equal(ours, theirs)
