"""The project's decoding loop gives what transformers' `generate` gives, and what was read before is not read again."""

import sys
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from continuous_cases import answer_together, likeliest
from helpers import ROOT
from torch import nn

from minigpt4.common import compat
from minigpt4.fast import cuda_graphs
from minigpt4.fast.decoding import continuous, loop
from minigpt4.fast.decoding.compiled_layers import compiled_copy
from minigpt4.fast.decoding.continuous import ContinuousBatch, NewRow
from minigpt4.fast.decoding.kv_cache import KVCache, LayerKVCache
from minigpt4.fast.decoding.loop import MAX_IDLE_CACHES, Decoder, cache_length, cached_decoding
from minigpt4.models.generation import continue_embeds
from minigpt4.models.llm import load_llm
from minigpt4.models.sampling import Sampling
from minigpt4.quantization import bitsandbytes as low_bit
from minigpt4.quantization.int8 import quantize_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WIDTH, VOCABULARY = 32, 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
}
KINDS = {
    "llama": {"model_type": "llama"},
    "grouped": {"model_type": "llama", "num_key_value_heads": 2},
    "llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi3": {"model_type": "phi3"},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gpt_neox": {"model_type": "gpt_neox"},  # its layers have another name for the cache
}
OTHERS = {
    "sliding": {"model_type": "mistral", "sliding_window": 16},
    "learnt positions": {"model_type": "gpt2"},
    "dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
}


class Words:
    """One token a word."""

    eos_token_id = 2

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def random_llm(kind="llama"):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZES | (KINDS | OTHERS)[kind])
    llm = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    llm.get_input_embeddings().weight[0] = 0  # as a padding token has in published models
    return llm


@pytest.fixture
def llm():
    return random_llm()


def prompts(*lengths, seed=1):
    """Embeddings padded on the left, and their mask."""
    torch.manual_seed(seed)
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return torch.randn(len(lengths), longest, WIDTH), mask


def run(llm, embeds, mask=None, stop="", **options):
    mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
    options = {"decoding_loop": cached_decoding, "max_new_tokens": 24} | options
    return continue_embeds(llm, Words(), embeds, mask, stop, **options).tolist()


def theirs(llm, *args, **options):
    """transformers' `generate`."""
    return run(llm, *args, decoding_loop=None, **options)


@pytest.fixture
def reads(monkeypatch):
    """How many vectors each call of the language model read: reads(llm) gives the growing list."""

    def watch(llm):
        cached_decoding.supports(llm)  # its self-check reads, too
        counts, forward = [], llm.forward

        def watched(**inputs):
            if "inputs_embeds" in inputs:  # not of transformers' own steps
                counts.append(inputs["inputs_embeds"].shape[1])
            return forward(**inputs)

        monkeypatch.setattr(llm, "forward", watched)
        return counts

    return watch


# The same ids as transformers


@pytest.mark.parametrize("lengths", [[20], [1], [7, 20, 1, 13]])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_are_those_of_transformers(kind, lengths, reads):
    llm = random_llm(kind)
    assert cached_decoding.supports(llm)
    embeds, mask = prompts(*lengths)
    expected = theirs(llm, embeds, mask)
    counts = reads(llm)
    assert run(llm, embeds, mask) == expected
    assert len(counts) == 24
    assert len({tuple(row) for row in expected}) == len(lengths)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 0, "top_p": 0.7},
        {"top_k": 3},
        {"temperature": 0.5, "top_k": 20, "top_p": 0.9},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 2.0, "do_sample": False},
        {"temperature": 3.0, "do_sample": False},
        {"min_new_tokens": 9},
        {"min_new_tokens": 9, "do_sample": False},
        {"max_new_tokens": 1},
    ],
)
def test_the_same_seed_draws_the_same_ids_as_transformers(llm, options):
    # transformers 5.23 takes padding for ids that are not to be penalised, also where only embeddings are padded
    embeds, mask = prompts(20, 20) if "repetition_penalty" in options else prompts(7, 20)
    llm.generation_config.eos_token_id = [5, 6, *range(20, 40)]

    def draw(how):
        torch.manual_seed(3)
        return how(llm, embeds, mask, **{"do_sample": True} | options)

    assert draw(run) == draw(theirs)


def test_settings_of_the_models_folder_count(llm):
    embeds, mask = prompts(9)
    llm.generation_config.update(repetition_penalty=1.9, temperature=0.4, top_k=4)
    for do_sample in (True, False):
        ids = []
        for how in (run, theirs):
            torch.manual_seed(0)
            ids.append(how(llm, embeds, mask, do_sample=do_sample))
        assert ids[0] == ids[1]
    plain = random_llm()
    assert run(plain, embeds, mask) != run(llm, embeds, mask)


def test_what_only_transformers_can_do_is_left_to_it(llm):
    assert Sampling.of(llm, {"max_new_tokens": 5, "top_p": 0.5, "do_sample": True})
    for options in ({"num_beams": 2}, {"no_repeat_ngram_size": 2}, {"length_penalty": 2.0, "num_beams": 3}):
        assert Sampling.of(llm, options) is None
        assert len(run(llm, *prompts(5, 9), **options)) == 2
    llm.generation_config.suppress_tokens = [4]
    assert Sampling.of(llm, {}) is None


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_do_not_fit_are_left_to_transformers(kind):
    llm = random_llm(kind)
    assert not cached_decoding.supports(llm)
    embeds, mask = prompts(9, 30)
    assert run(llm, embeds, mask) == theirs(llm, embeds, mask)


def test_a_model_on_several_devices_is_left_to_transformers(llm):
    llm.hf_device_map = {"": 0}
    assert cached_decoding.supports(llm)
    llm.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 1}
    assert not cached_decoding.supports(llm)


def test_rows_end_by_themselves_and_are_filled_up(llm):
    embeds, mask = prompts(7, 20, 13)
    full = run(llm, embeds, mask)
    llm.generation_config.eos_token_id = full[1][5]
    ended = run(llm, embeds, mask)
    assert ended == theirs(llm, embeds, mask)
    assert ended[1] == full[1][: full[1].index(full[1][5]) + 1] + [2] * (24 - full[1].index(full[1][5]) - 1)
    llm.generation_config.eos_token_id = 2
    stop = Words().decode(full[0][3:5])
    assert run(llm, embeds, mask, stop) == theirs(llm, embeds, mask, stop)
    assert len(run(llm, embeds[:1], mask[:1], stop)[0]) <= 5


def test_bounded_sizes():
    assert [cache_length(n) for n in (1, 128, 129, 193, 257, 512, 769, 1025)] == [
        128,
        128,
        160,
        224,
        320,
        512,
        896,
        1280,
    ]


# What was read before


@pytest.mark.parametrize("kind", ["llama", "grouped", "qwen3"])
def test_the_next_turn_is_as_from_scratch_and_costs_its_own_tokens(kind, reads):
    llm = random_llm(kind)
    conversation, _ = prompts(20)
    counts = reads(llm)
    for turn in range(4):
        before = len(counts)
        said = run(llm, conversation, max_new_tokens=90)
        if turn:
            assert counts[before] <= 7  # the question, and the answer's end, which was said but never read
        assert theirs(llm, conversation, max_new_tokens=90) == said
        said = llm.get_input_embeddings()(torch.tensor(said))
        conversation = torch.cat([conversation, said, prompts(6, seed=turn + 9)[0]], dim=1)
    assert conversation.shape[1] > cache_length(20 + 90)  # the cache has grown meanwhile


def logits_of(llm, embeds):
    """Of the first new token."""
    seen = []
    mask = torch.ones(embeds.shape[:2], device=embeds.device)
    steps = cached_decoding.decode(llm, embeds, mask, 1, lambda ids, x: seen.append(x.clone()) or x.argmax(-1))
    with torch.no_grad():
        list(steps)
    return seen[0]


@pytest.mark.parametrize("known", [0, 1, 15, 29, 30])
def test_logits_after_a_common_beginning_are_those_from_scratch(llm, known):
    """A turn that was edited, retried, or cut from the conversation's start; to 1e-5 of logits of about 3."""
    first, _ = prompts(30)
    other, _ = prompts(30, seed=2)
    edited = torch.cat([first[:, :known], other[:, known:]], dim=1)
    expected = logits_of(llm, edited)
    cached_decoding.clear_cache(llm)
    logits_of(llm, first)
    torch.testing.assert_close(logits_of(llm, edited), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("load_in", ["16bit", "8bit", "4bit"])
def test_a_prompt_that_is_repeated(load_in, device, reads):
    """All repetitions are the same to the bit, and so is what is read from scratch. The two differ by rounding."""
    if load_in != "16bit":
        pytest.importorskip("bitsandbytes")
    llm = load_llm(str(ROOT / "minigpt4/assets/tiny/llama"), torch.device(device), torch.float32, load_in)
    embeds = llm.get_input_embeddings()(torch.arange(40, device=device).unsqueeze(0) * 7)
    counts = reads(llm)
    first, second, third = (logits_of(llm, embeds) for _ in range(3))
    cached_decoding.clear_cache(llm)
    again = logits_of(llm, embeds)
    # on a GPU the second prefill is padded and captured; the third is replayed
    assert counts == ([40, 1, 1, 40] if device == "cpu" else [40, 64, 64, 40])
    assert torch.equal(first, again) and torch.equal(second, third)
    if device == "cpu":
        torch.testing.assert_close(second, first, atol=1e-4, rtol=0)  # of logits of about 10


def test_an_answer_that_was_broken_off_is_gone_on_from(llm, reads):
    embeds, _ = prompts(20)
    expected = run(llm, embeds)[0]
    cached_decoding.clear_cache(llm)
    counts = reads(llm)
    steps = cached_decoding.decode(llm, embeds, torch.ones(1, 20), 24, lambda ids, logits: logits.argmax(-1))
    with torch.no_grad():
        assert [int(next(steps)) for _ in range(5)] == expected[:5]
    steps.close()
    begun = torch.cat([embeds, llm.get_input_embeddings()(torch.tensor([expected[:5]]))], dim=1)
    assert run(llm, begun, max_new_tokens=19)[0] == expected[5:]
    assert counts == [20] + [1] * 4 + [1] + [1] * 18


def test_two_conversations_keep_their_caches_and_a_third_takes_the_older(llm, reads):
    start = prompts(8)[0]
    talks = [torch.cat([start, prompts(20, seed=n)[0]], dim=1) for n in range(3)]
    counts = reads(llm)

    def read_by(embeds):
        before = len(counts)
        run(llm, embeds, max_new_tokens=2)
        return counts[before]

    assert [read_by(talk) for talk in talks[:2]] == [28, 28]
    assert [read_by(talk) for talk in talks[:2]] == [1, 1]
    assert read_by(talks[2]) == 20  # all conversations begin alike
    assert read_by(talks[1]) == 1
    assert read_by(talks[0]) == 20
    run(llm, *prompts(5, 6), max_new_tokens=2)
    assert len(cached_decoding.decoders[llm].idle) == MAX_IDLE_CACHES


def test_batches_share_one_cache(llm):
    for seed in range(3):
        embeds, mask = prompts(5, 30, seed=seed)
        assert run(llm, embeds, mask) == theirs(llm, embeds, mask)
    assert len(cached_decoding.decoders[llm].idle) == 1


def test_a_failed_step_leaves_a_cache_that_is_right(llm, monkeypatch):
    embeds, _ = prompts(20)
    expected = run(llm, embeds)
    forward = llm.forward
    monkeypatch.setattr(llm, "forward", lambda **inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(llm, embeds)
    monkeypatch.setattr(llm, "forward", forward)
    assert run(llm, embeds) == expected
    assert run(llm, *prompts(9, seed=4)) == theirs(llm, *prompts(9, seed=4))


def test_changed_weights_are_noticed(llm):
    embeds, mask = prompts(20)
    before = run(llm, embeds, mask)
    llm.model.layers[1].mlp.down_proj.weight.mul_(-3)
    after = run(llm, embeds, mask)
    assert after == theirs(llm, embeds, mask) != before
    llm.double()
    assert run(llm, embeds.double(), mask) == theirs(llm, embeds.double(), mask)


# Graphs and compiled layers, as far as a CPU can show (test_decoding_gpu.py has the rest)


class Replayed:
    """Stands for a CUDA graph: computes the step again, into the logits that it left at first."""

    def __init__(self, step):
        self.step, self.logits = step, step()

    def replay(self):
        self.logits.copy_(self.step())


def capture(run, cache):
    """Stands for `loop._capture`."""
    graph = Replayed(run)
    return graph, graph.logits


def single_row_linear(x, weight, scale=None):
    assert x.numel() == weight.shape[1]
    y = x @ weight.t().to(x.dtype)
    return y if scale is None else y * scale


def gemv_4bit(x, weight, shape, scale, code, block_size):
    assert x.numel() == x.shape[-1] == shape[1] and len(code) == 16
    assert weight.numel() * 2 == shape[0] * shape[1] == len(scale) * block_size and x.shape[-1] % block_size == 0
    return low_bit.low_bit_matmul(x, weight, scale, False)


def attend_cache(query, keys, values, visible, scaling):
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[2], dim=2) for x in (keys, values))
    scores = torch.einsum("bhd,blhd->bhl", query, keys) * scaling
    unseen = torch.arange(keys.shape[1]) >= visible[:, None, None]
    return torch.einsum("bhl,blhd->bhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), values)


@pytest.fixture
def compiles(monkeypatch):
    """The decoder as on a GPU, with plain functions for its kernels; counts what is compiled, and runs it as it is."""
    from torch._dynamo.testing import CompileCounter

    kernels = ModuleType("minigpt4.kernels.decoding")
    kernels.single_row_linear, kernels.attend_cache = single_row_linear, attend_cache
    monkeypatch.setattr(compat, "gemv_4bit", gemv_4bit)
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr("minigpt4.kernels.decoding", kernels, raising=False)
    monkeypatch.setattr(loop, "_run_on_side_stream", lambda run, device: run())
    monkeypatch.setattr(loop, "_capture", capture)
    monkeypatch.setattr(loop, "_start_copy", lambda ids: ids.clone)
    monkeypatch.setattr(loop, "Decoder", lambda llm, graphs=None: Decoder(llm, graphs=True))
    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiler(call, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("by_graphs", [False, True])
def test_models_are_not_kept_alive(by_graphs, request):
    import gc
    import weakref

    if by_graphs:
        request.getfixturevalue("compiles")
    llm = random_llm()
    run(llm, *prompts(5))
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None


def wrong_linear(x, weight, scale=None):
    return 1.5 * single_row_linear(x, weight, scale)


def test_a_compiled_step_that_differs_is_not_used(compiles, monkeypatch, caplog):
    """The answer is the model's own, and one line says why it takes longer."""
    llm = random_llm()
    embeds, mask = prompts(20)
    expected = theirs(llm, embeds, mask)
    monkeypatch.setattr("minigpt4.kernels.decoding.single_row_linear", wrong_linear)
    assert run(llm, embeds, mask) == expected
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "could not be compiled" in warning and "differs" in warning


@pytest.mark.parametrize("lengths", [[20], [7, 20, 13]])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_give_the_ids_of_transformers(kind, lengths, compiles):
    llm = random_llm(kind)
    embeds, mask = prompts(*lengths)
    expected = theirs(llm, embeds, mask)
    for _ in range(2):
        assert run(llm, embeds, mask) == expected
    assert cached_decoding.decoders[llm].compiled  # the compiler did not fail
    assert compiles.frame_count == 1
    assert {type(part) for part in llm.modules() if isinstance(part, nn.Linear)} == {nn.Linear}


@pytest.mark.parametrize("lengths", [[20], [7, 20, 13]])
def test_compiled_steps_with_8_bit_weights(lengths, compiles):
    llm = quantize_model(random_llm(), torch.device("cpu"))
    embeds, mask = prompts(*lengths)
    expected = theirs(llm, embeds, mask)
    assert run(llm, embeds, mask) == expected
    assert cached_decoding.decoders[llm].compiled
    assert compiles.frame_count == 1


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_compiled_steps_with_what_bitsandbytes_quantised(load_in, compiles):
    """A single row's products read the weights as they lie: in 8 bit by our kernel, in 4 bit by bitsandbytes'."""
    pytest.importorskip("bitsandbytes")
    llm = load_llm(str(ROOT / "minigpt4/assets/tiny/llama"), torch.device("cpu"), torch.float32, load_in)
    llm.generation_config.eos_token_id = None
    embeds = llm.get_input_embeddings()(torch.arange(20).unsqueeze(0) * 7)
    assert run(llm, embeds) == theirs(llm, embeds)
    assert cached_decoding.decoders[llm].compiled and compiles.frame_count == 1


def test_layers_with_a_bias_and_those_of_other_kinds(compiles):
    from minigpt4.fast.fused_linear import fuse_projections

    llm = random_llm()
    for layer in llm.model.layers:
        layer.self_attn.o_proj.bias = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
    assert fuse_projections(llm) == 6
    embeds, mask = prompts(20)
    expected = theirs(llm, embeds, mask)
    assert run(llm, embeds, mask) == expected
    assert cached_decoding.decoders[llm].compiled


def test_caches_of_any_length_and_batches_of_any_size_share_a_compilation(llm, compiles):
    for longest, count in ((100, 1), (300, 1), (600, 1), (20, 2), (20, 2), (300, 2)):
        embeds, mask = prompts(longest, seed=longest)
        assert run(llm, embeds, mask) == theirs(llm, embeds, mask)
        embeds, mask = prompts(longest, 7, 9)
        if count > 1:
            assert run(llm, embeds, mask) == theirs(llm, embeds, mask)
        assert compiles.frame_count == count


def test_the_compiled_copy_leaves_the_model_alone(llm, compiles):
    """Other threads and training go on with the same modules, and no weight is held twice."""
    before = [(type(part), *vars(part)) for part in llm.modules()]
    copied = compiled_copy(llm)
    assert [(type(part), *vars(part)) for part in llm.modules()] == before
    assert llm.config._attn_implementation == "sdpa"
    assert {p.data_ptr() for p in copied.parameters()} == {p.data_ptr() for p in llm.parameters()}
    vectors = torch.randn(1, 1, WIDTH, requires_grad=True)
    llm(inputs_embeds=vectors).logits.square().sum().backward()
    assert vectors.grad.abs().sum() > 0 and compiles.frame_count == 0


@pytest.mark.parametrize("lengths", [[20], [7, 20, 13], [240, 200, 9, 250, 30]])
def test_replayed_steps_give_the_same_ids(llm, lengths, compiles):
    """As they stand. One token is looked at while the next is computed; batches are filled up."""
    embeds, mask = prompts(*lengths)
    expected = theirs(llm, embeds, mask)
    cached_decoding.decoders[llm] = Decoder(llm, graphs=True, compiled=False)
    for _ in range(2):
        assert run(llm, embeds, mask) == expected
    (cache,) = cached_decoding.decoders[llm].idle
    assert cache.batch == {1: 1, 3: 4, 5: 8}[len(lengths)]
    assert compiles.frame_count == 0


def test_prompts_are_read_by_the_graph_of_their_length(llm, compiles, monkeypatch):
    """Prompts are padded to 64, 128, 256 or 512 vectors after the prefix in the cache; longer ones run eagerly."""
    captured = []
    monkeypatch.setattr(loop, "_capture", lambda run, cache: captured.append(cache) or capture(run, cache))
    known, found = prompts(520, seed=1)[0], {}
    for length in (120, 20, 50, 64, 70, 100, 65, 9):
        prompt = torch.cat([known, prompts(length, seed=length)[0]], dim=1)
        found[length] = prompt, logits_of(llm, prompt)
    (cache,) = cached_decoding.decoders[llm].idle
    assert captured == [cache, cache]
    assert {padded for padded, graph in cache.prefill_graphs.items() if graph} == {64, 128}
    for prompt, logits in found.values():
        cached_decoding.decoders[llm] = Decoder(llm, graphs=False)
        torch.testing.assert_close(logits, logits_of(llm, prompt), atol=1e-5, rtol=0)


def test_without_memory_for_a_graph_prompts_are_read_as_before(llm, compiles, monkeypatch, caplog):
    def fail_for_prefills(run, cache):
        if cache.step_graph is None:
            return capture(run, cache)
        raise torch.OutOfMemoryError("out of memory")

    expected = [theirs(llm, *prompts(length)) for length in (30, 31, 32, 33, 34)]
    monkeypatch.setattr(loop, "_capture", fail_for_prefills)
    assert [run(llm, *prompts(length)) for length in (30, 31, 32, 33, 34)] == expected
    assert caplog.text.count("No memory for a CUDA graph of a prompt's reading") == 1


def test_no_memory_pool_is_freed_while_a_graph_is_captured(monkeypatch):
    """torch 2.11 would abort the process; test_cuda_graphs.py has more."""
    for name in ("graph_pool_handle", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, object)
    for name in ("device", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **how: nullcontext())
    _, entered = loop._capture(lambda: cuda_graphs._keepers, KVCache(1, 128, torch.device("cpu")))
    assert entered == 1 and cuda_graphs._keepers == 0


def test_an_answer_does_not_wait_for_another_thread_that_captures(llm, compiles):
    embeds, mask = prompts(30)
    expected = run(llm, embeds, mask)
    with loop._capturing:
        assert run(llm, embeds, mask) == expected
    (cache,) = cached_decoding.decoders[llm].idle
    assert cache.prefill_graphs == {64: None}
    assert run(llm, embeds, mask) == expected
    assert cache.prefill_graphs[64]


def test_a_cache_that_grows_captures_its_prefills_anew(llm, compiles):
    embeds = prompts(100)[0]
    expected = theirs(llm, embeds, max_new_tokens=100)
    for steps in (20, 20, 20, 100, 100, 100):
        assert run(llm, embeds, max_new_tokens=steps)[0] == expected[0][:steps]


def test_warming_up_prepares_a_cache_that_anyone_takes(llm, compiles, monkeypatch):
    monkeypatch.setattr(loop, "Decoder", Decoder)
    cached_decoding.warm_up(llm)
    assert llm not in cached_decoding.decoders  # on a CPU there is nothing to prepare
    monkeypatch.setattr(loop, "Decoder", lambda llm, graphs=None: Decoder(llm, graphs=True))
    cached_decoding.warm_up(llm, prompt_len=20, answer_len=200)
    monkeypatch.setattr(loop, "_capture", None)
    assert run(llm, *prompts(30), max_new_tokens=180) == theirs(llm, *prompts(30), max_new_tokens=180)
    assert compiles.frame_count == 1


def test_without_a_compiler_decoding_goes_on(llm, compiles, monkeypatch, caplog):
    def fail(call, **options):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", fail)
    assert run(llm, *prompts(9)) == theirs(llm, *prompts(9))
    assert "no C compiler" in caplog.text


def test_a_model_that_would_not_call_our_attention_is_not_compiled(llm, compiles):
    llm._supports_attention_backend = False
    assert run(llm, *prompts(7, 9)) == theirs(llm, *prompts(7, 9))
    assert compiles.frame_count == 0


def test_a_model_that_takes_packed_batches_too(llm):
    from minigpt4.fast.attention import allow_packing

    embeds, mask = prompts(7, 20)
    expected = run(llm, embeds, mask)
    assert allow_packing(llm)
    assert cached_decoding.supports(llm)
    assert run(llm, embeds, mask) == expected


def test_what_the_check_of_a_compiled_step_takes_for_rounding():
    expected = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    rounded, other = expected + 0.03 * expected.roll(1), expected.roll(1)
    loop._check_step(rounded, expected, exact=False)
    for logits, exact in ((rounded, True), (other, False), (expected * float("nan"), False)):
        with pytest.raises(RuntimeError, match="differs"):
            loop._check_step(logits, expected, exact)


# Continuous batching


def conversations():
    """(prompt [S,D], number of new tokens): of many lengths, alike, and one that goes on."""
    long, short = prompts(90, seed=5)[0][0], prompts(9, seed=6)[0][0]
    alike = torch.cat([short, prompts(2, seed=7)[0][0]])
    sizes = ((20, 9), (3, 1), (70, 24), (1, 12), (33, 5))
    others = [(prompts(length, seed=length)[0][0], steps) for length, steps in sizes]
    return [*others, (long, 7), (short, 20), (short, 3), (alike, 11), (torch.cat([long, alike]), 8)]


@pytest.mark.parametrize("by_graphs", [False, True])
@pytest.mark.parametrize("kind", ["grouped", "gpt_neox"])
def test_prompts_that_join_and_leave_get_the_ids_of_transformers(kind, by_graphs, request, reads, monkeypatch):
    """In any order, whatever is computed beside them. Graphs are captured for 1, 2 and 3 rows, not for each prompt."""
    llm, captured = random_llm(kind), []
    work = conversations()
    expected = [theirs(llm, embeds[None], max_new_tokens=steps)[0] for embeds, steps in work]
    if by_graphs:
        compiles = request.getfixturevalue("compiles")
        monkeypatch.setattr(loop, "_capture", lambda run, cache: captured.append(cache.batch) or capture(run, cache))
    monkeypatch.setattr(continuous, "PART", 32)
    batch = ContinuousBatch(llm, Decoder(llm, graphs=by_graphs), max_rows=3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    with torch.no_grad():
        batch.warm_up(200)
    counts, warm = reads(llm), len(captured)
    for seed in range(2):
        assert answer_together(batch, work, 3, seed) == expected
    if by_graphs:
        assert len(captured) == warm and batch.decoder.compiled and compiles.frame_count == 2
        assert {1, 2, 3} <= set(captured[:warm])
    else:
        assert max(counts) == 32


def test_a_prompt_that_begins_as_another_is_read_from_there_on(llm, reads):
    counts = reads(llm)
    batch = ContinuousBatch(llm, Decoder(llm), max_rows=2)
    first, other = prompts(40)[0][0], prompts(40, seed=2)[0][0]
    (ids,) = answer_together(batch, [(first, 10)], 2, 0)
    answer_together(batch, [(other, 10)], 2, 0)
    goes_on = torch.cat([first, llm.get_input_embeddings()(torch.tensor(ids)), prompts(5, seed=3)[0][0]])
    counts.clear()
    (found,) = answer_together(batch, [(goes_on, 10)], 2, 0)
    assert counts[0] <= 6
    assert found == theirs(llm, goes_on[None], max_new_tokens=10)[0]


@pytest.mark.parametrize("cache", ["of the rows", "of a prompt that goes on"])
def test_a_cache_that_cannot_grow_keeps_its_rows(llm, monkeypatch, cache):
    """Where memory is short in the middle, an active row goes on, and any prompt can be tried again."""
    (first, _), *_, (long, _) = conversations()
    if cache != "of the rows":
        long = torch.cat([first, long, long])
    other = prompts(60, seed=9)[0][0]
    expected = [theirs(llm, embeds[None], max_new_tokens=24)[0] for embeds in (first, other, long)]
    batch, grow, calls = ContinuousBatch(llm, Decoder(llm), max_rows=2), LayerKVCache.grow, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        grow(*args)

    with torch.no_grad():
        assert [*batch.join([NewRow("first", first, 24)], likeliest)] == [["first"]]
        monkeypatch.setattr(LayerKVCache, "grow", failing)
        with pytest.raises(torch.OutOfMemoryError):
            list(batch.join([NewRow("long", long, 150)], likeliest))
        found = []
        while len(found) < 24:
            found.append(batch.read_ids()()[0])
            batch.step()
            batch.set_ids(batch.logits.argmax(dim=-1))
        batch.leave("first", found)
    assert found == expected[0]
    assert [answer_together(batch, [(embeds, 24)], 2, 0)[0] for embeds in (other, long)] == expected[1:]
