"""The estimate at full size against measurements; parameter counts; the length of a run."""

import re
from types import SimpleNamespace

import pytest
from helpers import ROOT

from minigpt4.common.config import Config
from minigpt4.doctor.check_memory import (
    GRAPHS,
    advice,
    check_gpu_memory,
    estimate,
    longest_sequence,
    trainable_parameters,
    vision_parameters,
)
from minigpt4.doctor.checks import examine
from minigpt4.doctor.diagnostic import ERROR, WARNING, as_text
from minigpt4.doctor.machine import MIB, imagined_gpu
from minigpt4.doctor.run_context import RunContext
from minigpt4.runners.schedule import TrainingSchedule


@pytest.fixture
def full_context(full_size, small_files, tmp_path, monkeypatch):
    """Builder of a context of a shipped file with files of the published sizes."""
    monkeypatch.chdir(ROOT)
    # Only shapes count here, and timm takes half a second to initialize those of the encoder.
    monkeypatch.setattr("timm.models.eva.Eva.init_weights", lambda *args, **kwargs: None)

    def build(config, *options, size="7b", gpu=80):
        given = [f"model.vit_weights={full_size}/eva.safetensors", f"model.llama_model={full_size}/{size}"]
        given += [f"model.q_former_model={full_size}/blip2.safetensors"]
        if "stage1" in config:
            given += [f"datasets.{n}.build_info.storage={small_files}/{n}/*.tar" for n in ("laion", "cc_sbu")]
        else:
            given += [f"model.ckpt={full_size}/ckpt-{size}.safetensors"]
        if "stage2" in config:
            given += [f"datasets.cc_sbu_align.build_info.storage={small_files}/align"]
        if "train" in config:
            given += [f"run.output_dir={tmp_path}"]
        args = SimpleNamespace(cfg_path=ROOT / config, options=[*given, *options])
        return RunContext(Config(args), "train" in config, [imagined_gpu(gpu)] if gpu else [])

    return build


STAGE1, STAGE2 = "train_configs/minigpt4_stage1_pretrain.yaml", "train_configs/minigpt4_stage2_finetune.yaml"
CHAT = "eval_configs/minigpt4_eval.yaml"


@pytest.mark.parametrize("config", [STAGE1, STAGE2, CHAT])
@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_published_files_pass(full_context, config, size):
    assert [f for f in examine(full_context(config, size=size)) if f.status in (ERROR, WARNING)] == []


# Peaks on one H100, in MiB, as in doctor/check_memory.py and docs/performance.md: eager (padded batches), and memory
# reserved with CUDA graphs (micro-batches of 768, 1,536 and 1,024 tokens; the estimate assumes the largest, 1,920). The
# text of the longest sample has 24 tokens in stage 1; in stage 2, 160, with a prompt of 22.
MEASURED = [
    (16, 24, 0, False, 19168),
    (64, 24, 0, False, 30631),
    (12, 160, 22, False, 26380),
    (16, 24, 0, True, 19321),
    (64, 24, 0, True, 21302),
    (12, 160, 22, True, 20475),
]


@pytest.mark.parametrize(("batch", "text", "prompt", "compiled", "mebibytes"), MEASURED)
def test_close_to_what_was_measured(full_context, monkeypatch, batch, text, prompt, compiled, mebibytes):
    options = [f"run.batch_size_train={batch}", f"model.max_txt_len={text}"]
    options += [f"run.compile={compiled}", f"run.packed={compiled}"]
    context = full_context(STAGE1, *options)
    assert longest_sequence(context) == 1 + 32 + text
    monkeypatch.setattr("minigpt4.doctor.check_memory.longest_sequence", lambda context: 1 + 32 + text + prompt)
    estimated = estimate(context).total / MIB
    assert 0.97 * mebibytes < estimated < (1.12 if compiled else 1.03) * mebibytes


def test_long_batches_take_no_more_than_their_largest_micro_batch(full_context):
    def activations(*options):
        return estimate(full_context(STAGE1, *options)).activations

    assert activations("run.batch_size_train=64") == activations("run.batch_size_train=256")
    for plain in ("run.packed=False", "run.amp_dtype=fp16"):
        large, larger = (activations(f"run.batch_size_train={batch}", plain) for batch in (64, 256))
        assert larger == pytest.approx(4 * large)
    long = [activations("run.batch_size_train=2", f"model.max_txt_len={n}") for n in (3000, 6000)]
    assert long[1] > 1.9 * long[0]  # one sequence is never divided


def test_a_smaller_batch_is_advised_only_where_it_would_help(full_context):
    for batch, helps in ((64, False), (16, True)):
        context = full_context(STAGE1, f"run.batch_size_train={batch}")
        assert ("accum_grad_iters" in advice(context, estimate(context))) == helps


def test_lower_precision_takes_less(full_context):
    weights = [estimate(full_context(STAGE1, f"model.load_in={b}")).weights for b in ("16bit", "8bit", "4bit")]
    # the language model has 6.7e9 parameters, of which 0.26e9 stay in 16 bit
    assert weights[0] - weights[1] == pytest.approx(6.48e9, rel=0.01)
    assert estimate(full_context(CHAT, "model.load_in=8bit_weights")).weights == estimate(full_context(CHAT)).weights
    assert weights[1] - weights[2] == pytest.approx(0.4375 * 6.48e9, rel=0.01)
    # measured with 4 bit and a context: 5,815 MB of weights, encoder and Q-Former included (a Q-Former in 16 bit here)
    assert weights[2] == pytest.approx(5815 * MIB, rel=0.06)


def test_what_trains(full_context):
    assert trainable_parameters(full_context(STAGE1)) == 3_149_824
    assert trainable_parameters(full_context(STAGE1, "model.freeze_qformer=False")) == 108_312_064
    assert trainable_parameters(full_context(STAGE1, "model.freeze_vit=False")) == 989_047_168
    more = estimate(full_context(STAGE1, "model.freeze_vit=False"))
    checkpointed = estimate(full_context(STAGE1, "model.freeze_vit=False", "model.use_grad_checkpoint=True"))
    assert more.training == 12 * 989_047_168
    assert more.activations > 2 * checkpointed.activations > 2 * estimate(full_context(STAGE1)).activations


def test_adapters_and_projectors(full_context):
    """Vicuna-7B: 32 layers with two matrices of 4,096 x 4,096 each."""
    usual = full_context(STAGE2)
    rank_64 = 32 * 2 * 64 * (4096 + 4096)
    with_adapters = full_context(STAGE2, "model.lora={r: 64, dropout: 0}")
    assert trainable_parameters(with_adapters) == 3_149_824 + rank_64
    assert trainable_parameters(full_context(STAGE2, "model.lora={r: 64, layers: [0, 31]}")) == 3_149_824 + rank_64 / 16
    assert trainable_parameters(full_context(STAGE2, "model.lora_r=64", "model.train=[projector]")) == 3_149_824
    assert trainable_parameters(full_context(STAGE2, "model.projector=mlp")) == 769 * 4096 + 4097 * 4096
    plain, more = estimate(usual), estimate(with_adapters)
    assert more.weights - plain.weights == 4 * rank_64 and more.training - plain.training == 12 * rank_64
    dropping = estimate(full_context(STAGE2, "model.lora={r: 64}"))
    assert dropping.activations > more.activations > plain.activations


def test_layers_that_recompute_keep_little(full_context):
    usual, half, none = (
        estimate(full_context(STAGE1, f"model.llm_grad_checkpoint={layers}")).activations for layers in (0, 16, 32)
    )
    assert usual > half > none > 0
    assert usual - half == pytest.approx(half - none)


def test_in_fp8_a_large_gpu_takes_larger_micro_batches(full_context):
    """And a small one the usual ones."""

    def activations(gpu, *options):
        return estimate(full_context(STAGE1, "run.batch_size_train=64", *options, gpu=gpu)).activations

    assert activations(80, "run.fp8=True") == pytest.approx(2 * activations(80))
    assert activations(32, "run.fp8=True") == activations(32) == activations(80)


def test_parameters_of_the_vision_side(full_context):
    assert vision_parameters(full_context(STAGE1)) == {"vit": 985_894_528 + 2 * 1408, "qformer": 105_137_664 + 32 * 768}


@pytest.mark.parametrize(
    ("config", "size", "gpu", "options", "fits"),
    [
        (STAGE1, "7b", 24, [], True),
        (STAGE1, "7b", 16, [], False),
        (STAGE1, "7b", 16, ["model.load_in=4bit"], True),
        (STAGE1, "7b", 24, ["run.batch_size_train=64"], True),
        (STAGE1, "7b", 24, ["run.batch_size_train=64", "run.packed=False"], False),
        (STAGE1, "13b", 24, [], False),
        (CHAT, "7b", 12, [], True),
        (CHAT, "7b", 12, ["model.low_resource=False"], False),
        (CHAT, "13b", 24, [], True),
    ],
)
def test_which_gpu_is_enough(full_context, config, size, gpu, options, fits):
    found = [f for f in examine(full_context(config, *options, size=size, gpu=gpu)) if f.check == "GPU memory"]
    assert [f.status != ERROR for f in found] == [fits], found
    assert fits or "--options" in found[0].fix


GRAPHED = ["run.compile=True", "run.packed=True", "run.amp=True", "model.load_in=16bit"]


def test_the_memory_of_cuda_graphs(full_context):
    """A fixed sum where the language model's steps are recorded, and nothing where they are not."""
    assert estimate(full_context(STAGE1, *GRAPHED)).graphs == GRAPHS
    for load_in in ("8bit", "4bit"):
        assert estimate(full_context(STAGE1, *GRAPHED, f"model.load_in={load_in}")).graphs == GRAPHS
    for plain in ("run.compile=False", "run.packed=False", "run.amp=False"):
        assert estimate(full_context(STAGE1, *GRAPHED, plain)).graphs == 0, plain
    assert estimate(full_context(STAGE1, *GRAPHED, gpu=None)).graphs == 0
    assert estimate(full_context(CHAT)).graphs == 0


def test_a_small_models_graphs_are_small(patient):
    memory = estimate(patient.context())
    assert 0 < memory.graphs == memory.weights < GRAPHS


@pytest.mark.parametrize("options", [[], ["run.packed=False"], ["run.compile=False"]])
def test_the_parts_told_add_up(full_context, options):
    context = full_context(STAGE1, *options)
    (found,) = check_gpu_memory(context)
    whole, parts = re.fullmatch(r"about (.*?) \((.*)\) and CUDA's own 0\.7 GB; .*", found.what).groups()
    assert ("CUDA graphs 1.7 GB" in parts) == (not options)
    assert sum(map(gigabytes, parts.split(", "))) == pytest.approx(gigabytes(whole), abs=0.05 * 6)  # all are rounded
    assert gigabytes(whole) == pytest.approx(estimate(context).total / 1e9, abs=0.05)


def test_the_sample_in_the_docs_is_what_is_told(full_context, monkeypatch):
    # The rehearsal's tokenizer learns from the package's own texts, so its counts change with them.
    monkeypatch.setattr("minigpt4.doctor.check_memory.longest_sequence", lambda context: 1 + 32 + 160 + 30)
    (found,) = check_gpu_memory(full_context(STAGE2, gpu=24))
    assert as_text([found]) in (ROOT / "docs/doctor.md").read_text(encoding="utf-8")


def gigabytes(told):
    """Of text that ends as `1.9 GB` or `40 MB`."""
    number, unit = told.split()[-2:]
    return float(number) * {"GB": 1, "MB": 1e-3}[unit]


def test_fp8_is_not_advised_to_quantise(full_context):
    """Nor is anybody advised to nothing: who has done all that the settings can do needs another model or GPU."""

    def advised(*options):
        context = full_context(STAGE1, *options)
        return advice(context, estimate(context))

    assert "model.load_in=8bit" in advised()
    fix = advised("run.fp8=True")
    assert "load_in" not in fix and "run.batch_size_train=8" in fix and "model.llm_grad_checkpoint=32" in fix
    least = ["run.batch_size_train=1", "model.llm_grad_checkpoint=32"]
    assert advised(*least) == "--options model.load_in=8bit"
    assert advised(*least, "run.fp8=True") == "Use a smaller language model or a GPU with more memory."
    chat = full_context(CHAT, "run.fp8=True", "model.low_resource=False")
    assert advice(chat, estimate(chat)) == "--options model.load_in=8bit"  # where fp8 does nothing


def test_two_gpus_for_a_model_that_does_not_fit_on_one(full_context):
    context = full_context(CHAT, "model.low_resource=False", "model.llm_device_map=auto", size="13b", gpu=24)
    context.gpus *= 2
    (found,) = [f for f in examine(context) if f.check == "GPU memory"]
    assert found.status != ERROR and "all 2 GPUs together" in found.what


def test_on_a_cpu_everything_is_float32(full_context):
    context = full_context(STAGE1, gpu=None)
    assert estimate(context).weights == pytest.approx(4 * 7.83e9, rel=0.01)  # 31 GB


def test_length():
    length = TrainingSchedule(batch_size=16, world_size=4, iters_per_epoch=500, epochs=3)
    assert (length.steps, length.samples, length.duration(0.36)) == (1500, 96000, "9 min")
    assert (length.duration(0.01), length.duration(36)) == ("15 s", "15.0 hours")
    said = "batch 16 per GPU, 64 in total (4 GPUs); 3 epochs of 500 batches = 1,500 steps, 96,000 samples"
    assert str(length) == said
    said = "batch 1 per process, 2 in total (2 processes); 1 epoch of 1 batch = 1 step, 2 samples"
    assert str(TrainingSchedule(1, 2, 1, 1, on_gpu=False)) == said
    length = TrainingSchedule(batch_size=2, world_size=1, iters_per_epoch=5, epochs=1, accum=2)
    assert (length.steps, length.samples) == (3, 10)
    assert str(length).startswith(
        "batch 2 per GPU, 4 in total (1 GPU, 2 batches a step); 1 epoch of 5 batches = 3 steps"
    )
