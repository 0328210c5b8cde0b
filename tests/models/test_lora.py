"""LoRA adapters against a plain computation, in every way in which a model is loaded, trained and saved.

tests/models/test_lora_gpu.py has the GPU's part.
"""

import pytest
import torch
from helpers import loss_and_gradient, uncompiled
from lora_models import LORA, SAMPLES, adapters, save, trained

from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import LoraSettings
from minigpt4.fast.decoding.loop import cached_decoding
from minigpt4.fast.fused_linear import fused_layers
from minigpt4.models import MiniGPT4
from minigpt4.models.lora import LoraAdapters, adapted_layers, merged_weight
from minigpt4.weights import checkpoint

pytest.importorskip("peft")

LOAD_IN = ("16bit", "8bit", "8bit_weights", "4bit")


def gradients(model) -> dict[str, torch.Tensor]:
    loss_and_gradient(model, SAMPLES)
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def logits(model) -> torch.Tensor:
    batch = model.prepare(SAMPLES)["tokens"]
    with torch.no_grad():
        return model.predict(model.embed(batch, model.encode_img(SAMPLES["image"])[0]), batch)


@pytest.mark.parametrize("load_in", LOAD_IN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_adds_the_plain_product(build_golden_model, load_in, dtype):
    """W x + B A x · alpha / r, to the rounding of the result."""
    model = trained(build_golden_model(dtype=dtype, lora=LORA, load_in=load_in))
    layers = list(adapted_layers(model.llama_model))
    assert len(layers) == 3 * model.llama_model.config.num_hidden_layers
    for layer in layers:
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.dtype == b.dtype == torch.float32 and a.shape[0] == b.shape[1] == 2
        expected = layer.base_layer(x).double() + x.double() @ a.double().t() @ b.double().t() * 3
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(layer(x).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("load_in", LOAD_IN)
def test_adapters_start_as_nothing(build_golden_model, load_in):
    """Bit by bit, in training too, whatever is dropped: B is zero."""
    plain = build_golden_model(load_in=load_in).train()
    model = build_golden_model(load_in=load_in, lora=LORA | {"dropout": 0.5}).train()
    assert torch.equal(logits(model), logits(plain))
    output, gradient = loss_and_gradient(model, SAMPLES)
    expected, plain_gradient = loss_and_gradient(plain, SAMPLES)
    assert torch.equal(output["loss"], expected["loss"]) and torch.equal(gradient, plain_gradient)


@pytest.mark.parametrize("load_in", LOAD_IN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(build_golden_model, load_in, dtype):
    """The gradients are those of a sum over a change of the adapters, and nothing else gets one."""
    model = trained(build_golden_model(dtype=dtype, lora=LORA, load_in=load_in))
    found = gradients(model)
    assert found.keys() == {*adapters(model), "llama_proj.weight", "llama_proj.bias"}
    assert all(value.isfinite().all() and value.any() for value in found.values())
    if dtype == torch.float32 and load_in != "8bit":  # whose own layers, where they stay, round the activations
        before, step = model(SAMPLES)["loss"].double(), 3e-3
        squares = sum(value.double().square().sum() for value in found.values())
        for name, parameter in model.named_parameters():
            if name in found:
                parameter.data -= step * found[name] / squares.sqrt()
        torch.testing.assert_close(before - model(SAMPLES)["loss"].double(), step * squares.sqrt(), rtol=0.1, atol=0)


def test_only_adapters_follow_the_mode(build_golden_model):
    model = trained(build_golden_model(lora=LORA | {"dropout": 0.5})).train()
    assert not model.llama_model.training
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_recomputed_layers_drop_the_same(build_golden_model):
    results = []
    for count in (0, 2):
        model = trained(build_golden_model(lora=LORA | {"dropout": 0.5}, llm_grad_checkpoint=count)).train()
        torch.manual_seed(3)
        results.append(gradients(model))
    names = [name.replace("_checkpoint_wrapped_module.", "") for name in results[1]]
    assert names == list(results[0])
    for value, other in zip(results[0].values(), results[1].values(), strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_merged_equals_unmerged(build_golden_model, dtype, tolerance):
    model = trained(build_golden_model(dtype=dtype, lora=LORA))
    expected = logits(model)
    for layer in adapted_layers(model.llama_model):
        layer.base_layer.weight.data = merged_weight(layer)
        layer.lora_B["default"].weight.data.zero_()
    difference = (logits(model) - expected).float().norm() / expected.float().norm()
    assert 0 <= difference <= tolerance


def test_layers_and_modules(build_golden_model):
    model = build_golden_model(lora=LORA | {"target_modules": ["o_proj"], "layers": [1]})
    (a, b) = adapters(model)
    assert "layers.1.self_attn.o_proj" in a and "layers.1.self_attn.o_proj" in b


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"target_modules": ["query"]}, r"target_modules lists 'query'.*q_proj"),
        ({"layers": [0, 9]}, "layers lists 9"),
        ({"layers": []}, "no target_modules or layers"),
        ({"r": 1_000_000}, r"lora\.r=1000000 must be at most \d+,"),
    ],
)
def test_layers_that_are_not_there(build_golden_model, wrong, words):
    with pytest.raises(ConfigError, match=words):
        build_golden_model(lora=LORA | wrong)


def test_peft_is_not_there(build_golden_model, monkeypatch):
    monkeypatch.setattr("minigpt4.models.lora.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install peft"):
        LoraAdapters(torch.nn.Linear(2, 2), LoraSettings())


# Fast steps


@pytest.mark.parametrize("load_in", LOAD_IN)
@pytest.mark.parametrize("compiled", [False, True])
def test_fast_steps(build_golden_model, monkeypatch, load_in, compiled):
    """Packed, in several micro-batches, with joint projections inside the adapters: the gradients of plain steps."""
    monkeypatch.setattr("minigpt4.fast.training_step.tokens_per_micro_batch", lambda *args: 64)
    cfg = {"lora": LORA | {"target_modules": ["q_proj", "k_proj", "up_proj", "o_proj"]}, "load_in": load_in}
    models = [trained(build_golden_model(**cfg)).train() for _ in range(2)]
    for model in models:
        model.prompt_list = ["###Human: <Img><ImageHere></Img> What is it? ###Assistant: "]
    expected, (plain, fast) = gradients(models[0]), models
    fast.accelerate(packed=True, compiled=compiled)
    uncompiled(fast)
    fast.step.loss_and_gradient = lambda *args: fast.step._loss_and_gradient(fast, *args)
    assert len(fast.prepare(SAMPLES)["tokens"].micro_batches) > 1
    layers = fast.llama_model.config.num_hidden_layers
    assert len(list(fused_layers(fast.llama_model))) == (2 * layers if compiled else 0)
    found = gradients(fast)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name
    torch.testing.assert_close(fast(SAMPLES)["loss"], plain(SAMPLES)["loss"], atol=1e-6, rtol=1e-5)


def test_frozen_adapters_are_not_bypassed(build_golden_model, tmp_path):
    """The fused Llama reads joint weights, and adds what adapters add, also where these are frozen."""
    cfg = {"lora": LORA | {"target_modules": ["up_proj", "k_proj"]}}
    ckpt = save(trained(build_golden_model(**cfg)), tmp_path / "a.pth")
    model = build_golden_model(**cfg, ckpt=ckpt, train=["projector"])
    assert not any(value.requires_grad for value in adapters(model).values())
    expected = gradients(model)
    model.accelerate(packed=True, compiled=True)
    uncompiled(model)
    assert model.step.fused_llama
    for name, value in gradients(model).items():
        assert (value - expected[name]).norm() <= 1e-4 * value.norm(), name


def test_dropout_in_fast_steps(build_golden_model):
    """The inputs of adapters are dropped in training, and not in evaluation."""
    plain, model = (trained(build_golden_model(lora=LORA | {"dropout": 0.5})).train() for _ in range(2))
    model.accelerate(packed=True, compiled=True)
    uncompiled(model)
    assert model.step.fused_llama
    losses = [model(SAMPLES)["loss"].item() for _ in range(2)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(model.eval()(SAMPLES)["loss"], plain.eval()(SAMPLES)["loss"], atol=1e-6, rtol=1e-5)


# Checkpoints


def test_saved_and_loaded_again(build_golden_model, golden_model_keys, tmp_path):
    """The same logits, bit by bit; the adapters are among the trained tensors, the language model is not."""
    torch.manual_seed(0)
    model = trained(MiniGPT4.from_config(golden_model_keys | {"lora": LORA}))
    path = save(model, tmp_path / "a.pth")
    content = torch.load(path)
    assert content["model"].keys() == {*adapters(model), "llama_proj.weight", "llama_proj.bias"}
    modules = ["down_proj", "q_proj", "v_proj"]
    assert content["llm_fingerprint"]["lora"] == {"r": 2, "alpha": 6, "target_modules": modules, "layers": None}
    torch.manual_seed(0)
    again = MiniGPT4.from_config(golden_model_keys | {"lora": LORA, "ckpt": path})
    assert torch.equal(logits(again), logits(model))


def test_adapters_that_were_never_trained_are_refused(build_golden_model, tmp_path):
    path = save(build_golden_model(lora=LORA), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="B of its LoRA adapters are all zero"):
        build_golden_model(lora=LORA, ckpt=path)


def test_a_checkpoint_without_adapters_starts_them(build_golden_model, tmp_path, caplog):
    """As stage 2 with adapters after stage 1 without. A part of them is an error."""
    path = save(build_golden_model(), tmp_path / "a.pth")
    build_golden_model(lora=LORA, ckpt=path)
    assert "has no LoRA adapters" in caplog.text
    name, value = next(iter(adapters(trained(build_golden_model(lora=LORA))).items()))
    path = save(build_golden_model(), tmp_path / "b.pth", **{name: value.detach()})
    with pytest.raises(checkpoint.CheckpointError, match=r"lora_B\.default\.weight is missing"):
        build_golden_model(lora=LORA, ckpt=path)


def test_answers(build_golden_model, golden):
    """The decoding loop gives those of transformers, and without the adapters they are others."""
    model = trained(build_golden_model(lora=LORA)).eval()
    images, prompts = golden("train_forward")[1]["stage1.image"][:2], ["What is <Img><ImageHere></Img> it?"] * 2
    options = {"max_new_tokens": 8, "stop": "\0"}
    expected = model.generate(images, prompts, **options)
    assert model.generate(images, prompts, decoding_loop=cached_decoding, **options) == expected
    for parameter in adapters(model).values():
        parameter.data.zero_()
    assert model.generate(images, prompts, **options) != expected
