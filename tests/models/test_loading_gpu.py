"""Loading straight to a GPU: devices, types and memory. Skipped without a GPU."""

from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL_SIZES as SMALL

from minigpt4.benchmarks import random_weights
from minigpt4.fast.decoding.loop import cached_decoding
from minigpt4.models import MiniGPT4
from minigpt4.models.generation import continue_embeds
from minigpt4.models.llm import load_llm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    files = random_weights.write(tmp_path_factory.mktemp("weights"), "small", vicuna="v0", as_bin=True)
    keys = {"vit_weights": "vision", "q_former_model": "qformer", "llama_model": "llm", "ckpt": "ckpt"}
    return {**SMALL, **{key: str(files[part]) for key, part in keys.items()}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("load_in", ["16bit", "8bit", "4bit"])
def test_everything_is_on_the_gpu_and_trains(cfg, load_in, dtype):
    if load_in != "16bit":
        pytest.importorskip("bitsandbytes")
    model = MiniGPT4.from_config({**cfg, "load_in": load_in}, "cuda", dtype).train()
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert model.visual_encoder.blocks[1].mlp.fc2.weight.dtype == dtype
    assert model.llama_proj.weight.dtype == torch.float32
    samples = {"image": torch.randn(2, 3, 224, 224, device="cuda"), "text_input": ["a dog", "two cats"]}
    with torch.autocast("cuda", dtype):
        loss = model(samples)["loss"]
    loss.backward()
    assert 9 < loss.item() < 13
    assert model.llama_proj.weight.grad.isfinite().all()


def test_the_gpu_holds_no_second_copy(cfg):
    """While loading, the peak is above the final size by less than two of the largest tensor."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = MiniGPT4.from_config(cfg, "cuda", torch.float16)
    stays = torch.cuda.memory_allocated() - before
    largest = max(p.nbytes for p in model.parameters())
    assert torch.cuda.max_memory_allocated() - before < stays + 2 * largest


def test_device_map_gives_the_same_answers(cfg):
    """On one GPU, and on two, where "auto" alone would put so small a model on the second."""
    prompt = ["###Human: <Img><ImageHere></Img> What is it? ###Assistant:"]
    image = torch.randn(1, 3, 224, 224, device="cuda")
    answers = []
    for device_map in (None, "auto"):
        model = MiniGPT4.from_config({**cfg, "llm_device_map": device_map}, "cuda:0", torch.float32).eval()
        answers.append(model.generate(image, prompt, stop="###", max_new_tokens=8, decoding_loop=cached_decoding))
    assert answers[0] == answers[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_gives_the_same_ids(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=500, initializer_range=0.1, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    torch.backends.cuda.matmul.allow_tf32 = False
    embeds, ids = torch.randn(1, 30, 256, device="cuda:0"), []
    for device_map in (None, "auto"):
        llm = load_llm(str(tmp_path), torch.device("cuda:0"), torch.float32, device_map=device_map)
        llm.generation_config.eos_token_id = None
        mask = torch.ones(1, 30, dtype=torch.long, device="cuda:0")
        ids.append(continue_embeds(llm, SimpleNamespace(eos_token_id=2), embeds, mask, "", max_new_tokens=20).tolist())
    assert {p.device.index for p in llm.parameters()} == {0, 1}
    assert ids[0] == ids[1]
