"""Packed batches compute what padded ones do, and fused layers what separate ones do."""

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
from minigpt4.fast import training_step
from minigpt4.fast.attention import allow_packing, packed_attention
from minigpt4.fast.fused_linear import fuse_projections
from minigpt4.fast.packing import batch as packing
from minigpt4.fast.packing.batch import IMAGE_MULTIPLE, LABEL_MULTIPLE, LONGEST_MULTIPLE, SEQUENCE_MULTIPLE, pack
from minigpt4.fast.packing.binning import ROW_MULTIPLE, divide, fullest, round_up
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID, pad


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_packed_equals_padded(golden, build_golden_model, name):
    cases, tensors = golden("train_forward")
    case = cases["forward_cases"][name]
    model = build_golden_model(max_txt_len=case["max_txt_len"], end_sym=case["end_sym"])
    model.prompt_list = [case["prompt"]] if case["prompt"] else []
    texts = [text * (1 + i) for i, text in enumerate(case["text_input"])]
    samples = {"image": tensors[f"{name}.image"], "text_input": texts}
    padded, gradient = loss_and_gradient(model, samples)
    model.packed = allow_packing(model.llama_model)
    packed, packed_gradient = loss_and_gradient(model, samples)
    assert packed["num_labels"] == padded["num_labels"]
    torch.testing.assert_close(packed["loss"], padded["loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(packed_gradient, gradient, atol=1e-6, rtol=1e-4)


def test_a_packed_batch_mixes_no_sequences(golden, build_golden_model):
    """A sequence's loss is the same whatever stands before and after it."""
    _, tensors = golden("train_forward")
    model = build_golden_model()
    model.packed = allow_packing(model.llama_model)
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
    """Two sequences begin alike; the last token of each stands for nothing but itself."""
    sequences = [[1, 9, IMAGE_ID, IMAGE_ID, 5, 6], [1, 9, IMAGE_ID, IMAGE_ID, 7]]
    batch = pack(sequences, [[IGN] * 4 + [5, 6], [IGN] * 4 + [7]], MICRO_BATCH_TOKENS)
    assert (batch.num_labels, batch.num_tokens, batch.num_image_vectors) == (3, 11, 4)
    (piece,) = batch.pieces
    assert piece.sizes == (ROW_MULTIPLE, IMAGE_MULTIPLE, SEQUENCE_MULTIPLE, 2, LABEL_MULTIPLE, LONGEST_MULTIPLE)
    assert piece.input_ids[0, :8].tolist() == [1, 9, 0, 0, 5, 0, 0, 0]
    assert piece.targets[0, :4].tolist() == [5, 6, 7, IGN]
    inputs = piece.llm_inputs()
    assert inputs["position_ids"][0, :9].tolist() == [0, 1, 2, 3, 4, 2, 3, 2, 3]
    assert inputs["logits_to_keep"][:4].tolist() == [3, 4, 6, 0]
    starts, shared, longest = inputs["segments"]
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, 2, 5, *[7] * 7, 37, 67, 97, ROW_MULTIPLE]  # six empty sequences, then the fill
    assert (shared, longest) == (2, LONGEST_MULTIPLE)
    vectors = torch.arange(1.0, 5).unsqueeze(1)
    assert piece.insert(torch.zeros(1, ROW_MULTIPLE, 1), vectors)[0, :9, 0].tolist() == [0, 0, 1, 2, 0, 3, 4, 0, 0]


def test_a_row_is_always_left_for_vectors_that_fill_up_the_places():
    batch = pack([[1] * (ROW_MULTIPLE + 1)], [[IGN] * ROW_MULTIPLE + [1]], MICRO_BATCH_TOKENS)
    assert [piece.sizes.rows for piece in batch.pieces] == [2 * ROW_MULTIPLE]


def test_the_longest_has_the_shared_beginning_too():
    length = LONGEST_MULTIPLE - 28
    sequences = [[1] * length + [IMAGE_ID] + [number] * length for number in (5, 6)]
    (piece,) = pack(sequences, [[IGN] * len(sequences[0])] * 2, MICRO_BATCH_TOKENS).pieces
    assert piece.sizes.shared == length
    assert piece.sizes.longest == 2 * LONGEST_MULTIPLE


def test_the_fill_has_the_shared_beginning_too():
    """Its attention is computed, though nobody looks at it."""
    sequences = [[1] * 50 + [IMAGE_ID, number] for number in (5, 6)]
    (piece,) = pack(sequences, [[IGN] * 52] * 2, MICRO_BATCH_TOKENS).pieces
    assert max(piece.llm_inputs()["segments"].starts.diff()[1:]) + 50 > 64
    assert piece.sizes.longest == 2 * LONGEST_MULTIPLE


def test_pieces_are_alike_and_leave_as_little_room_as_one():
    torch.manual_seed(0)
    for count, low, high in ((64, 40, 57), (12, 115, 195), (16, 40, 57), (1, 5000, 5001), (3, 900, 1200), (200, 1, 9)):
        lengths = torch.randint(low, high, (count,)).tolist()
        groups = divide(lengths, 3, MICRO_BATCH_TOKENS)
        assert sorted(i for group in groups for i in group) == list(range(count))
        assert all(group == sorted(group) for group in groups)
        rows = [sum(lengths[i] for i in group) + 4 for group in groups]
        assert len(groups) == min(count, -(-sum(lengths) // (MICRO_BATCH_TOKENS - 4)))
        assert max(rows) - min(rows) <= 2 * ROW_MULTIPLE + max(lengths)
        if max(lengths) < 200:  # as few as all rows together would take
            assert max(rows) <= MICRO_BATCH_TOKENS
            assert sum(round_up(each, ROW_MULTIPLE) for each in rows) == round_up(sum(rows), ROW_MULTIPLE)


@pytest.mark.parametrize(
    "lengths", [[800] * 10, [900] * 10, [700] * 9, [5000] + [100] * 20, [0] * 5, [0, 3000, 0, 9], [1000] * 10]
)
def test_sequences_that_fill_no_piece_well(lengths):
    """None is above the bound for it, but for a sequence alone."""
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
def test_pieces_equal_one_row(build_golden_model, monkeypatch, at_once, prompt):
    """Loss and gradient, also where the gradient of each piece is taken before the next one's turn."""
    model = build_golden_model()
    model.prompt_list = [prompt] if prompt else []
    model.max_txt_len = 200
    torch.manual_seed(0)
    samples = {"image": torch.randn(9, 3, 28, 28), "text_input": ["a b c " * (1 + i * i) for i in range(9)]}
    model.packed = allow_packing(model.llama_model)
    assert len(model.prepare(samples)["tokens"].pieces) == 1
    expected, gradient = loss_and_gradient(model, samples)
    if at_once:
        training_step.accelerate(model, packed=True, compiled=False)
        held = []
        monkeypatch.setattr(packing.MicroBatch, "llm_inputs", _held(packing.MicroBatch.llm_inputs, held))
    model.tokens_per_micro_batch = 128
    assert len(model.prepare(samples)["tokens"].pieces) > 3
    output, pieces_gradient = loss_and_gradient(model, samples)
    assert output["num_labels"] == expected["num_labels"]
    torch.testing.assert_close(output["loss"], expected["loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(pieces_gradient, gradient, atol=1e-6, rtol=1e-4)
    if at_once:
        assert len(held) > 3 and all(alive() is None for alive in held)
        with torch.no_grad():
            assert torch.equal(model(samples)["loss"], output["loss"])


def _held(llm_inputs, held):
    """`llm_inputs`, which checks that what earlier pieces computed with is no longer kept for a backward pass."""

    def checked(piece):
        assert all(alive() is None for alive in held)
        inputs = llm_inputs(piece)
        held.append(weakref.ref(inputs["position_ids"]))
        return inputs

    return checked


@pytest.mark.parametrize("sequences", [[[], [1, 2]], [[]], [[1]], [[1], [1]]])
def test_sequences_of_next_to_nothing(build_golden_model, sequences):
    model = build_golden_model()
    assert allow_packing(model.llama_model)
    batch = pack(sequences, [[IGN] * len(ids) for ids in sequences], MICRO_BATCH_TOKENS)
    assert [piece.sizes.rows for piece in batch.pieces] == [ROW_MULTIPLE]
    assert model.language_loss(torch.zeros(0, 8, model.llama_proj.out_features), batch).item() == 0


def test_attention_with_fewer_heads_of_keys_and_another_scaling():
    """Against attention in one piece, under a mask."""
    torch.manual_seed(0)
    (piece,) = pack([[1, 1, IMAGE_ID, 5, 6, 7], [1, 1, IMAGE_ID, 5, 6]], [[IGN] * 6, [IGN] * 5], MICRO_BATCH_TOKENS).pieces
    segments = piece.llm_inputs()["segments"]
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
def test_what_sequences_share(sequences, labels, shared):
    assert pack(sequences, labels, MICRO_BATCH_TOKENS).pieces[0].sizes.shared == shared


def test_a_first_token_is_no_label():
    """Nothing stands before it but another sequence. Padded batches leave it out too."""
    sequences = [[5, 6], [7, 8, 9]]
    packed, padded = pack(sequences, sequences, MICRO_BATCH_TOKENS), pad(sequences, sequences, 0)
    assert packed.num_labels == padded.num_labels == 3
    assert packed.pieces[0].targets[0, :4].tolist() == [6, 8, 9, IGNORE_INDEX]


def test_image_vectors_at_the_end_are_not_left_out():
    (piece,) = pack([[1, IMAGE_ID], [1, IMAGE_ID]], [[IGN] * 2] * 2, MICRO_BATCH_TOKENS).pieces
    assert piece.insert(torch.zeros(1, ROW_MULTIPLE, 1), torch.ones(2, 1))[0, :4, 0].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("texts", [["a dog", "two cats on a mat", "x"], ["a dog"], ["same", "same"]])
def test_packed_equals_padded_where_the_language_model_trains(build_golden_model, texts):
    """Then the shared beginning gets gradients too: those of all sequences together."""
    model = build_golden_model()
    model.prompt_list = ["###Human: <Img><ImageHere></Img> Say what it is. ###Assistant: "]
    model.llama_model.requires_grad_(True)
    torch.manual_seed(0)
    samples = {"image": torch.randn(len(texts), 3, 28, 28), "text_input": texts}
    gradients = []
    for packed in (False, allow_packing(model.llama_model)):
        model.packed = packed
        loss_and_gradient(model, samples)
        gradients.append({name: p.grad for name, p in model.llama_model.named_parameters()})
    assert model.prepare(samples)["tokens"].pieces[0].sizes.shared > 5
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
    monkeypatch.setattr("minigpt4.fast.packing.batch.LARGEST_HEAD", llm.config.head_dim - 1)
    assert not allow_packing(llm)
    monkeypatch.setattr("minigpt4.fast.packing.batch.LARGEST_HEAD", llm.config.head_dim)
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
    for packed in (False, allow_packing(model.llama_model)):
        model.packed = packed
        output = model({"image": torch.zeros(2, 3, 28, 28), "text_input": ["", ""]})
        assert output["num_labels"] == 0
        assert output["loss"].item() == 0


def test_generation_after_packed_training(golden, build_golden_model):
    model = build_golden_model()
    before = model.generate(torch.zeros(2, 3, 28, 28), ["<ImageHere> a", "b <ImageHere> c d"], max_new_tokens=8)
    model.packed = allow_packing(model.llama_model)
    loss_and_gradient(model, {"image": torch.zeros(2, 3, 28, 28), "text_input": ["a", "b c d"]})
    assert model.generate(torch.zeros(2, 3, 28, 28), ["<ImageHere> a", "b <ImageHere> c d"], max_new_tokens=8) == before


def test_fused_projections(build_golden_model, golden):
    _, tensors = golden("train_forward")
    model = build_golden_model()
    samples = {"image": tensors["stage1.image"][:3], "text_input": ["a b c", "d", "e f"]}
    names = list(model.state_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    output, gradient = loss_and_gradient(model, samples)
    answers = model.generate(samples["image"], ["<ImageHere> a"] * 3, max_new_tokens=8)
    layers = len(model.llama_model.get_decoder().layers)
    assert fuse_projections(model.llama_model) == 2 * layers
    fused, fused_gradient = loss_and_gradient(model, samples)
    torch.testing.assert_close(fused["loss"], output["loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fused_gradient, gradient, atol=1e-6, rtol=1e-4)
    assert model.generate(samples["image"], ["<ImageHere> a"] * 3, max_new_tokens=8) == answers
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
        model.packed = packed and allow_packing(model.llama_model)
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
    assert recomputed.generate(samples["image"], ["<ImageHere> a"] * 3, max_new_tokens=8) == kept.generate(
        samples["image"], ["<ImageHere> a"] * 3, max_new_tokens=8
    )
