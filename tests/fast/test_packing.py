"""Packed batches give the results of padded ones, and fused layers those of separate ones."""

import sys
import weakref
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from helpers import loss_and_gradient
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from minigpt4.common.facts import MICRO_BATCH_TOKENS
from minigpt4.fast.attention import allow_packing, packed_attention
from minigpt4.fast.decoding.loop import cached_decoding
from minigpt4.fast.fused_linear import fuse_projections
from minigpt4.fast.packing import batch as packing
from minigpt4.fast.packing.batch import IMAGE_MULTIPLE, KV_LEN_MULTIPLE, LABEL_MULTIPLE, SEQUENCE_MULTIPLE, pack
from minigpt4.fast.packing.binning import TOKEN_MULTIPLE, divide, fullest, round_up
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID, pad


def pack_batches(model, packed: bool = True) -> None:
    """Let a model train on packed batches, or on padded ones, without anything compiled."""
    model.accelerate(packed=packed, compiled=False)
    assert model.step.packed == packed


def answers_of(model, images, prompts) -> list[str]:
    return model.generate(images, prompts, max_new_tokens=8, decoding_loop=cached_decoding)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_packed_equals_padded(golden, build_golden_model, name):
    cases, tensors = golden("train_forward")
    case = cases["forward_cases"][name]
    model = build_golden_model(max_txt_len=case["max_txt_len"], end_sym=case["end_sym"])
    model.prompt_list = [case["prompt"]] if case["prompt"] else []
    texts = [text * (1 + i) for i, text in enumerate(case["text_input"])]
    samples = {"image": tensors[f"{name}.image"], "text_input": texts}
    padded, gradient = loss_and_gradient(model, samples)
    pack_batches(model)
    packed, packed_gradient = loss_and_gradient(model, samples)
    assert packed["num_labels"] == padded["num_labels"]
    torch.testing.assert_close(packed["loss"], padded["loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(packed_gradient, gradient, atol=1e-6, rtol=1e-4)


def test_a_packed_batch_mixes_no_sequences(golden, build_golden_model):
    """A sequence's loss is the same whatever stands before and after it."""
    _, tensors = golden("train_forward")
    model = build_golden_model()
    pack_batches(model)
    image = tensors["stage1.image"][:1]
    alone = model({"image": image, "text_input": ["a dog"]})["loss"].item()
    others = ["a cat on a mat, and so on", "x"]
    label_counts = [model.prepare({"text_input": [text]})["tokens"].num_labels for text in (*others, "a dog")]
    images = torch.cat([image + 1, image - 1, image])
    together = model({"image": images, "text_input": [*others, "a dog"]})
    rest = model({"image": images[:2], "text_input": others})
    total = rest["loss"].item() * sum(label_counts[:2]) + alone * label_counts[2]
    assert together["loss"].item() * sum(label_counts) == pytest.approx(total, rel=1e-5)


IGN = IGNORE_INDEX


def test_layout_of_a_packed_batch():
    """Two sequences share a prefix; the last token of each is left out, since nothing is predicted from it."""
    sequences = [[1, 9, IMAGE_ID, IMAGE_ID, 5, 6], [1, 9, IMAGE_ID, IMAGE_ID, 7]]
    batch = pack(sequences, [[IGN] * 4 + [5, 6], [IGN] * 4 + [7]], MICRO_BATCH_TOKENS)
    assert (batch.num_labels, batch.num_tokens, batch.num_image_vectors) == (3, 11, 4)
    (micro_batch,) = batch.micro_batches
    assert micro_batch.sizes == (TOKEN_MULTIPLE, IMAGE_MULTIPLE, SEQUENCE_MULTIPLE, 2, LABEL_MULTIPLE, KV_LEN_MULTIPLE)
    assert micro_batch.input_ids[0, :8].tolist() == [1, 9, 0, 0, 5, 0, 0, 0]
    assert micro_batch.targets[0, :4].tolist() == [5, 6, 7, IGN]
    inputs = micro_batch.llm_inputs()
    assert inputs["position_ids"][0, :9].tolist() == [0, 1, 2, 3, 4, 2, 3, 2, 3]
    assert inputs["logits_to_keep"][:4].tolist() == [3, 4, 6, 0]
    starts, shared, longest = inputs["segments"]
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, 2, 5, *[7] * 7, 37, 67, 97, TOKEN_MULTIPLE]  # six empty sequences, then the fill
    assert (shared, longest) == (2, KV_LEN_MULTIPLE)
    vectors = torch.arange(1.0, 5).unsqueeze(1)
    assert micro_batch.insert(torch.zeros(1, TOKEN_MULTIPLE, 1), vectors)[0, :9, 0].tolist() == [
        0,
        0,
        1,
        2,
        0,
        3,
        4,
        0,
        0,
    ]


def test_a_token_of_padding_is_always_left_for_surplus_image_vectors():
    batch = pack([[1] * (TOKEN_MULTIPLE + 1)], [[IGN] * TOKEN_MULTIPLE + [1]], MICRO_BATCH_TOKENS)
    assert [micro_batch.sizes.tokens for micro_batch in batch.micro_batches] == [2 * TOKEN_MULTIPLE]


def test_the_longest_sequence_sees_the_prefix_too():
    length = KV_LEN_MULTIPLE - 28
    sequences = [[1] * length + [IMAGE_ID] + [number] * length for number in (5, 6)]
    (micro_batch,) = pack(sequences, [[IGN] * len(sequences[0])] * 2, MICRO_BATCH_TOKENS).micro_batches
    assert micro_batch.sizes.prefix_len == length
    assert micro_batch.sizes.max_kv_len == 2 * KV_LEN_MULTIPLE


def test_the_padding_sees_the_prefix_too():
    """Its attention is computed, although it is never used."""
    sequences = [[1] * 50 + [IMAGE_ID, number] for number in (5, 6)]
    (micro_batch,) = pack(sequences, [[IGN] * 52] * 2, MICRO_BATCH_TOKENS).micro_batches
    assert max(micro_batch.llm_inputs()["segments"].starts.diff()[1:]) + 50 > 64
    assert micro_batch.sizes.max_kv_len == 2 * KV_LEN_MULTIPLE


def test_micro_batches_are_alike_and_waste_as_little_as_one():
    torch.manual_seed(0)
    for count, low, high in ((64, 40, 57), (12, 115, 195), (16, 40, 57), (1, 5000, 5001), (3, 900, 1200), (200, 1, 9)):
        lengths = torch.randint(low, high, (count,)).tolist()
        groups = divide(lengths, 3, MICRO_BATCH_TOKENS)
        assert sorted(i for group in groups for i in group) == list(range(count))
        assert all(group == sorted(group) for group in groups)
        rows = [sum(lengths[i] for i in group) + 4 for group in groups]
        assert len(groups) == min(count, -(-sum(lengths) // (MICRO_BATCH_TOKENS - 4)))
        assert max(rows) - min(rows) <= 2 * TOKEN_MULTIPLE + max(lengths)
        if max(lengths) < 200:  # as few as all rows together would take
            assert max(rows) <= MICRO_BATCH_TOKENS
            assert sum(round_up(each, TOKEN_MULTIPLE) for each in rows) == round_up(sum(rows), TOKEN_MULTIPLE)


@pytest.mark.parametrize(
    "lengths", [[800] * 10, [900] * 10, [700] * 9, [5000] + [100] * 20, [0] * 5, [0, 3000, 0, 9], [1000] * 10]
)
def test_sequences_that_fill_no_micro_batch_well(lengths):
    """No micro-batch exceeds the bound, unless it is a single sequence."""
    groups = divide(lengths, 3, MICRO_BATCH_TOKENS)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)
    rows = [sum(lengths[i] for i in group) for group in groups]
    assert all(own + 4 <= MICRO_BATCH_TOKENS or len(group) == 1 for own, group in zip(rows, groups, strict=True))


@pytest.mark.parametrize(
    ("lengths", "room", "chosen"),
    [
        ([5, 4, 3], 8, [0, 2]),  # not 5 + 4
        ([5, 4, 3], 100, [0, 1, 2]),
        ([5, 4, 3], 2, []),
        ([5, 4, 3], 0, []),
        ([7, 7, 7], 20, [0, 1]),
        ([], 5, []),
    ],
)
def test_the_fullest_choice(lengths, room, chosen):
    assert sorted(fullest(lengths, room)) == chosen


def test_no_other_choice_is_fuller():
    torch.manual_seed(0)
    for _ in range(50):
        lengths, room = torch.randint(1, 40, (9,)).tolist(), int(torch.randint(1, 200, ()))
        sums = [sum(some) for n in range(10) for some in combinations(lengths, n)]
        assert sum(lengths[i] for i in fullest(lengths, room)) == max(s for s in sums if s <= room)


@pytest.mark.parametrize("prompt", [None, "###Human: <Img><ImageHere></Img> Say what it is. ###Assistant: "])
@pytest.mark.parametrize("at_once", [False, True])
def test_micro_batches_equal_a_single_one(build_golden_model, monkeypatch, at_once, prompt):
    """Loss and gradient, also where the gradient of each micro-batch is computed with its loss."""
    model = build_golden_model()
    model.prompt_list = [prompt] if prompt else []
    model.max_txt_len = 200
    torch.manual_seed(0)
    samples = {"image": torch.randn(9, 3, 28, 28), "text_input": ["a b c " * (1 + i * i) for i in range(9)]}
    pack_batches(model)
    model.step.loss_and_gradient = model.step.loss_and_gradient if at_once else None
    assert len(model.prepare(samples)["tokens"].micro_batches) == 1
    expected, gradient = loss_and_gradient(model, samples)
    if at_once:
        held = []
        monkeypatch.setattr(packing.MicroBatch, "llm_inputs", _held(packing.MicroBatch.llm_inputs, held))
    model.step.max_tokens = 128
    assert len(model.prepare(samples)["tokens"].micro_batches) > 3
    output, micro_batches_gradient = loss_and_gradient(model, samples)
    assert output["num_labels"] == expected["num_labels"]
    torch.testing.assert_close(output["loss"], expected["loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(micro_batches_gradient, gradient, atol=1e-6, rtol=1e-4)
    if at_once:
        assert len(held) > 3 and all(alive() is None for alive in held)
        with torch.no_grad():
            assert torch.equal(model(samples)["loss"], output["loss"])


def _held(llm_inputs, held):
    """`llm_inputs`, with a check that no earlier micro-batch keeps tensors for a backward pass."""

    def checked(micro_batch):
        assert all(alive() is None for alive in held)
        inputs = llm_inputs(micro_batch)
        held.append(weakref.ref(inputs["position_ids"]))
        return inputs

    return checked


@pytest.mark.parametrize("sequences", [[[], [1, 2]], [[]], [[1]], [[1], [1]]])
def test_sequences_of_no_or_one_token(build_golden_model, sequences):
    model = build_golden_model()
    assert allow_packing(model.llama_model)
    batch = pack(sequences, [[IGN] * len(ids) for ids in sequences], MICRO_BATCH_TOKENS)
    assert [micro_batch.sizes.tokens for micro_batch in batch.micro_batches] == [TOKEN_MULTIPLE]
    pack_batches(model)
    assert model.step.loss(model, torch.zeros(0, 8, model.llama_proj.out_features), batch).item() == 0


def test_attention_with_fewer_heads_of_keys_and_another_scaling():
    """Compared with attention over the whole row, with a mask."""
    torch.manual_seed(0)
    (micro_batch,) = pack(
        [[1, 1, IMAGE_ID, 5, 6, 7], [1, 1, IMAGE_ID, 5, 6]], [[IGN] * 6, [IGN] * 5], MICRO_BATCH_TOKENS
    ).micro_batches
    segments = micro_batch.llm_inputs()["segments"]
    rows = int(segments.starts[-1])
    query, key, value = (torch.randn(1, heads, rows, 8, dtype=torch.float64) for heads in (6, 2, 2))
    output = packed_attention(query, key, value, 0.7, segments)
    sequence = torch.bucketize(torch.arange(rows), segments.starts[1:], right=True)
    seen = (sequence[:, None] == sequence) | (sequence == 0)
    seen &= torch.ones(rows, rows, dtype=torch.bool).tril()
    key, value = (x.repeat_interleave(3, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * 0.7).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(output, (scores.softmax(-1) @ value).transpose(1, 2))


@pytest.mark.parametrize(
    ("sequences", "labels", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4]], [[IGN] * 3] * 2, 2),
        ([[1, 2, 3], [1, 2]], [[IGN] * 3, [IGN] * 2], 1),  # the last token is left out
        ([[1, 2, 3], [1, 2, 4]], [[IGN, IGN, 3], [IGN, IGN, 4]], 1),  # 3 and 4 are predicted from the second
        ([[1, 2, 3], [1, 2, 4]], [[1, 2, 3], [1, 2, 4]], 0),
        ([[1, 2, 3], [5, 2, 3]], [[IGN] * 3] * 2, 0),
        ([[IMAGE_ID, 2, 3], [IMAGE_ID, 2, 3]], [[IGN] * 3] * 2, 0),
        ([[1, IMAGE_ID, 2, 3], [1, IMAGE_ID, 2, 3]], [[IGN] * 4] * 2, 1),
        ([[1], [1]], [[IGN]] * 2, 0),
    ],
)
def test_the_shared_prefix(sequences, labels, shared):
    assert pack(sequences, labels, MICRO_BATCH_TOKENS).micro_batches[0].sizes.prefix_len == shared


def test_a_first_token_is_no_label():
    """Nothing stands before it but another sequence. Padded batches leave it out too."""
    sequences = [[5, 6], [7, 8, 9]]
    packed, padded = pack(sequences, sequences, MICRO_BATCH_TOKENS), pad(sequences, sequences, 0)
    assert packed.num_labels == padded.num_labels == 3
    assert packed.micro_batches[0].targets[0, :4].tolist() == [6, 8, 9, IGNORE_INDEX]


def test_image_vectors_at_the_end_are_not_left_out():
    (micro_batch,) = pack([[1, IMAGE_ID], [1, IMAGE_ID]], [[IGN] * 2] * 2, MICRO_BATCH_TOKENS).micro_batches
    assert micro_batch.insert(torch.zeros(1, TOKEN_MULTIPLE, 1), torch.ones(2, 1))[0, :4, 0].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("texts", [["a dog", "two cats on a mat", "x"], ["a dog"], ["same", "same"]])
def test_packed_equals_padded_where_the_language_model_trains(build_golden_model, texts):
    """Then the shared beginning gets gradients too: those of all sequences together."""
    model = build_golden_model()
    model.prompt_list = ["###Human: <Img><ImageHere></Img> Say what it is. ###Assistant: "]
    model.llama_model.requires_grad_(True)
    torch.manual_seed(0)
    samples = {"image": torch.randn(len(texts), 3, 28, 28), "text_input": texts}
    gradients = []
    for packed in (False, True):
        pack_batches(model, packed)
        loss_and_gradient(model, samples)
        gradients.append({name: p.grad for name, p in model.llama_model.named_parameters()})
    assert model.prepare(samples)["tokens"].micro_batches[0].sizes.prefix_len > 5
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_models_and_gpus_that_cannot_take_packed_batches(build_golden_model, monkeypatch):
    llm = build_golden_model().llama_model
    windows = MistralForCausalLM(
        MistralConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, sliding_window=4,
        )
    )  # fmt: skip
    assert not allow_packing(windows)
    assert windows.config._attn_implementation == "sdpa"
    weight = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(llm, "get_input_embeddings", lambda: SimpleNamespace(weight=weight))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not allow_packing(llm)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("minigpt4.fast.attention.LARGEST_HEAD", llm.config.head_dim - 1)
    assert not allow_packing(llm)
    monkeypatch.setattr("minigpt4.fast.attention.LARGEST_HEAD", llm.config.head_dim)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not allow_packing(llm)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__spec__="found"))
    assert allow_packing(llm)


def test_texts_that_changed_since_prepare_are_read_anew(golden, build_golden_model):
    """A task may change the texts of a batch in its `train_step`, after the thread has tokenised them."""
    _, tensors = golden("train_forward")
    model = build_golden_model()
    image = tensors["stage1.image"][:2]
    prepared = model.prepare({"image": image, "text_input": ["a long caption of a dog", "and of a cat"]})
    short = {**prepared, "text_input": ["a", "and"]}
    expected = model({"image": image, "text_input": ["a", "and"]})
    output = model(short)
    assert output["num_labels"] == expected["num_labels"]
    assert torch.equal(output["loss"], expected["loss"])
    model.prompt_list = [f"{i} <ImageHere>" for i in range(100)]
    prepared = model.prepare(prepared)
    assert model.prepare(prepared)["drawn_prompt"] == prepared["drawn_prompt"]


@pytest.mark.parametrize("packed", [False, True])
def test_not_as_many_images_as_texts(build_golden_model, packed):
    model = build_golden_model()
    model.packed = packed and allow_packing(model.llama_model)
    with pytest.raises(ValueError, match="images have 8 vectors, the texts have places for 16"):
        model({"image": torch.zeros(1, 3, 28, 28), "text_input": ["a", "b"]})
    model.prompt_list = ["no place"]
    with pytest.raises(ValueError, match=r"places for 0\. .*every prompt needs an <ImageHere>"):
        model({"image": torch.zeros(1, 3, 28, 28), "text_input": ["a"]})


def test_images_with_other_vectors_than_the_prompt_has_places(build_golden_model):
    model = build_golden_model()
    images = [torch.zeros(1, 5, model.llama_proj.out_features)]
    with pytest.raises(ValueError, match="images have 5 vectors, the texts have places for 8"):
        model.context(["<ImageHere> a"], images)


def test_texts_without_any_label_give_loss_zero(build_golden_model):
    model = build_golden_model(end_sym="")
    for packed in (False, True):
        pack_batches(model, packed)
        output = model({"image": torch.zeros(2, 3, 28, 28), "text_input": ["", ""]})
        assert output["num_labels"] == 0
        assert output["loss"].item() == 0


def test_generation_after_packed_training(golden, build_golden_model):
    model = build_golden_model()
    images, prompts = torch.zeros(2, 3, 28, 28), ["<ImageHere> a", "b <ImageHere> c d"]
    before = answers_of(model, images, prompts)
    pack_batches(model)
    loss_and_gradient(model, {"image": torch.zeros(2, 3, 28, 28), "text_input": ["a", "b c d"]})
    assert answers_of(model, images, prompts) == before


def test_fused_projections(build_golden_model, golden):
    _, tensors = golden("train_forward")
    model = build_golden_model()
    samples = {"image": tensors["stage1.image"][:3], "text_input": ["a b c", "d", "e f"]}
    names = list(model.state_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    output, gradient = loss_and_gradient(model, samples)
    answers = answers_of(model, samples["image"], ["<ImageHere> a"] * 3)
    layers = len(model.llama_model.get_decoder().layers)
    assert fuse_projections(model.llama_model) == 2 * layers
    fused, fused_gradient = loss_and_gradient(model, samples)
    torch.testing.assert_close(fused["loss"], output["loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fused_gradient, gradient, atol=1e-6, rtol=1e-4)
    assert answers_of(model, samples["image"], ["<ImageHere> a"] * 3) == answers
    assert list(model.state_dict()) == names
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert fuse_projections(model.llama_model) == 0


def test_layers_with_a_bias_or_in_training_are_not_fused():
    block = nn.Module()
    block.gate_proj, block.up_proj = nn.Linear(4, 4), nn.Linear(4, 4)
    block.requires_grad_(False)
    assert fuse_projections(block) == 0
    block.gate_proj, block.up_proj = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    assert fuse_projections(block) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_layers(golden, build_golden_model, packed):
    _, tensors = golden("train_forward")
    samples = {"image": tensors["stage1.image"][:3], "text_input": ["a b c", "d", "e f"]}
    kept, recomputed = build_golden_model(), build_golden_model(llm_grad_checkpoint=2)
    for model in (kept, recomputed):
        pack_batches(model, packed)
    held = {}
    for name, model in (("kept", kept), ("recomputed", recomputed)):
        held[name] = 0

        def count(tensor, name=name):
            held[name] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(samples)
    assert held["recomputed"] < held["kept"] / 2
    (output, gradient), (again, gradient_again) = (loss_and_gradient(model, samples) for model in (kept, recomputed))
    assert torch.equal(output["loss"], again["loss"])
    torch.testing.assert_close(gradient_again, gradient, atol=1e-7, rtol=1e-5)
    assert answers_of(recomputed, samples["image"], ["<ImageHere> a"] * 3) == answers_of(
        kept, samples["image"], ["<ImageHere> a"] * 3
    )
