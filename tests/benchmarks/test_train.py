"""python -m minigpt4 bench train, as a user calls it."""

import json
from importlib.util import find_spec

import pytest
import torch
from helpers import quantize_by_bitsandbytes

from minigpt4.__main__ import main
from minigpt4.benchmarks import train
from minigpt4.benchmarks.step_timer import PROFILED_STEPS, useful_operations
from minigpt4.benchmarks.synthetic import WORKLOADS, WordTokenizer, random_batches, random_model, round_layers
from minigpt4.quantization.bitsandbytes import LowBitLinear, replace_bitsandbytes_layers

PARTS = ["vision_s", "language_s", "backward_s", "optimizer_s"]


@pytest.fixture(autouse=True)
def _little_work(monkeypatch):
    """Batches of three, and one step that is timed in parts."""
    for name, (stage, _) in WORKLOADS.items():
        monkeypatch.setitem(WORKLOADS, name, (stage, 3))
    monkeypatch.setattr(train, "PROFILED_STEPS", 1)


def rows(capsys, *arguments) -> list[dict]:
    assert main(["bench", "train", "--steps", "2", "--warmup", "1", "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_small(capsys):
    (row,) = rows(capsys, "--small", "--work", "S2/12")
    assert row["work"] == "S2/12"
    assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
    assert 100 * row["images_per_s"] < row["tokens_per_s"] < 300 * row["images_per_s"]
    assert all(row[part] > 0 for part in PARTS)


def test_compare(capsys):
    found = rows(capsys, "--small", "--work", "S1/16", "--compare", "run.accum_grad_iters=1")
    assert [row.get("options") for row in found] == ["", "run.accum_grad_iters=1", None]
    assert found[2]["second / first, median of pairs"] > 0
    assert found[2]["loss difference, mean of pairs"] == 0  # the same batches, from the same weights
    assert found[0]["loss"] == found[1]["loss"]
    assert 9 < found[0]["loss"] < 12  # guessing gives ln 32000 = 10.4


def test_compare_gives_the_difference_of_losses(capsys):
    options = ["--work", "S1/16", "--options", "run.init_lr=0", "run.min_lr=0", "--compare", "run.init_lr=0.01"]
    found = rows(capsys, "--small", *options)
    assert found[2]["loss difference, mean of pairs"] > 0.01


def test_compare_a_config_with_itself(capsys, configs):
    options = ["--options", "run.num_workers=0", "--compare", "run.log_freq=7"]
    found = rows(capsys, "--cfg-path", str(configs["stage1"]), *options)
    assert found[2]["loss difference, mean of pairs"] == 0


def test_fp8_says_what_it_needs():
    arguments = ["--small", "--work", "S1/16", "--options", "run.device=cpu", "--compare", "run.fp8=True"]
    assert "run.fp8=True needs an NVIDIA GPU" in main(["bench", "train", *arguments])


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("arguments", [["--load-in", "4bit"], ["--options", "model.load_in=8bit_weights"]])
def test_low_bits(capsys, arguments):
    (row,) = rows(capsys, "--small", "--work", "S1/16", *arguments)
    assert row["language_s"] > 0


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_compare_with_low_bits(capsys):
    found = rows(capsys, "--small", "--work", "S1/16", "--compare", "model.load_in=8bit")
    assert 0 < found[2]["loss difference, mean of pairs"] < 0.01


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_random_weights_in_low_bit_have_the_layers_of_a_run(load_in):
    pytest.importorskip("bitsandbytes")
    llm = random_model(torch.device("cpu"), torch.bfloat16, True, load_in).llama_model
    kinds = {type(part).__name__ for part in llm.model.layers.modules()}
    assert "LowBitLinear" in kinds and not kinds & {"Linear", "Linear8bitLt", "Linear4bit"}


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_random_weights_in_low_bit_are_those_of_bitsandbytes(load_in):
    pytest.importorskip("bitsandbytes")
    ours, theirs = (random_model(torch.device("cpu"), torch.bfloat16, True).llama_model for _ in range(2))
    round_layers(ours, load_in)
    quantize_by_bitsandbytes(theirs.model, load_in, torch.bfloat16)
    assert replace_bitsandbytes_layers(theirs) == 2 * 7
    layers = [[part for part in llm.modules() if isinstance(part, LowBitLinear)] for llm in (ours, theirs)]
    for layer, other in zip(*layers, strict=True):
        torch.testing.assert_close(layer.scale, other.scale, rtol=1e-6, atol=0)
        differ = (layer.weight.int() - other.weight.int()).abs()
        # In 8 bit, numbers halfway between two steps differ by one: bitsandbytes multiplies by the reciprocal.
        assert differ.max() <= (load_in == "8bit") and differ.float().mean() < 0.01


def test_a_config_with_its_own_data(capsys, configs):
    options = ["--options", "run.num_workers=0", "model.ckpt=null"]
    (row,) = rows(capsys, "--cfg-path", str(configs["stage2"]), *options)
    assert row["work"] == str(configs["stage2"]) and row["images_per_s"] > 0


def test_beside_a_script(capsys, tmp_path):
    script = tmp_path / "baseline.py"
    script.write_text(
        "class Baseline:\n    pass\n\ndef measure(model, work):\n    return {'work': work, 'median_s': 1.0}\n"
    )
    found = rows(capsys, "--small", "--work", "S1/16", "--baseline", str(script))
    assert found[0] == {"baseline": True, "work": "S1/16", "median_s": 1.0}
    assert found[1]["work"] == "S1/16"


@pytest.mark.parametrize(("steps", "warmup"), [("0", "20"), ("-1", "0"), ("1", "-1")])
def test_no_steps(steps, warmup):
    message = main(["bench", "train", "--steps", steps, "--warmup", warmup])
    assert message == f"Error: --steps {steps} must be at least 1, --warmup {warmup} at least 0."


def test_useful_operations(build_golden_model):
    model = build_golden_model()
    language = sum(p.numel() for p in model.llama_model.model.layers.parameters())
    encoder = sum(p.numel() for p in model.visual_encoder.parameters())
    assert useful_operations(model, 10, 3) == 4 * language * 10 + 2 * encoder * 5 * 3  # 4 patches and the class token
    model.drop_vision()
    assert useful_operations(model, 10, 0) == 4 * language * 10
    assert useful_operations(model.llama_proj, 10, 0) == 0


def test_batches_are_repeatable():
    first, second = (list(random_batches(2, 3, 1 + PROFILED_STEPS)) for _ in range(2))
    assert [b["text_input"] for b in first] == [b["text_input"] for b in second]
    assert all(map(torch.equal, (b["image"] for b in first), (b["image"] for b in second)))
    lengths = [len(WordTokenizer().encode(text + " .")) for batch in first for text in batch["text_input"]]
    assert 80 <= min(lengths) and max(lengths) <= 160
    assert WordTokenizer().encode("w") == [9601]  # in every process


def test_full_size_needs_a_gpu():
    """Otherwise the machine would run out of memory in half a minute."""
    assert "there is no GPU. Add --small" in main(["bench", "train", "--work", "S1/16"])
