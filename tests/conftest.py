"""The order of the tests, and shared fixtures: golden data, the small models, configs and data sets."""

import copy
import json
import logging
import os
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dataset_files import write_align, write_shards
from helpers import GOLDEN, QFORMER, ROOT, VIT
from omegaconf import OmegaConf
from safetensors.torch import load_file

# These variables, which a user or a launcher may have set, change the results of tests. Tests that need one set it.
# Libraries that read them when they are imported are imported later.
OURS = ("HF_HUB_OFFLINE", "MINIGPT4_API_KEY", "MINIGPT4_AUTH", "TRITON_INTERPRET")
LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
DATA_SCRIPTS = ("URL_LIST", "OUTPUT_FOLDER", "PROCESSES", "THREADS", "IMAGE_SIZE", "WANDB", "DISTRIBUTOR")
PREFIXES = ("GRADIO_", "OPENAI_", "TORCHELASTIC_", "TRACKIO_", "WANDB_")
OTHERS = ("PYTHONWARNINGS", "PYTHONOPTIMIZE", "HF_TOKEN", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
for name in list(os.environ):
    is_proxy = name.lower() in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    if name in (*OURS, *LAUNCHERS, *DATA_SCRIPTS, *OTHERS) or name.startswith(PREFIXES) or is_proxy:
        del os.environ[name]
# The processes of pytest, and those that they start, share the cores: threads of each would wait for the others.
os.environ["OMP_NUM_THREADS"] = "1"

# The driver reads CUDA_VISIBLE_DEVICES once in a process. It must see the GPUs before `_hide_gpus` changes it.
if torch.cuda.is_available():
    torch.cuda.init()
    torch.cuda.device_count()  # which torch keeps from now on

LONGEST_SECONDS = 10
# Slow as a whole (browsers, several processes, interpreted kernels) or in one test. Others have the mark themselves.
SLOW_TESTS = (
    "tests/benchmarks/test_rehearse.py",
    "tests/benchmarks/test_scaling.py",
    "tests/benchmarks/test_train.py",
    "tests/cli/test_cli_caption.py::test_several_ranks",
    "tests/cli/test_cli_chat.py::test_the_whole_command",
    "tests/cli/test_cli_serve.py",
    "tests/conversation/test_videos.py::test_decoders_are_imported_only_for_a_video",
    "tests/doctor/test_estimate.py",
    "tests/fast/test_decoding.py::test_a_cache_that_grows_captures_its_prefills_anew",
    "tests/fast/test_vit.py::test_a_compiled_step_of_a_frozen_encoder",
    "tests/kernels/test_decoding.py",
    "tests/kernels/test_fp8.py",
    "tests/kernels/test_packed_attention.py",
    "tests/kernels/test_vit.py",
    "tests/runners/test_distributed.py",
    "tests/serving/test_fuzz.py",
    "tests/web/test_demo.py::test_the_whole_command",
    "tests/web/test_http.py::test_sixteen_visitors_at_once",
    "tests/web/test_page.py",
)


LONGEST_FILES = (
    "tests/benchmarks/test_train.py",
    "tests/doctor/test_estimate.py",
    "tests/kernels/test_packed_attention.py",
    "tests/test_tutorial.py",
    "tests/web/test_page.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Rules about the code run first and slow tests last, so that most failures show early."""
    for item in items:
        if item.nodeid.startswith(SLOW_TESTS):
            item.add_marker("slow")
    items.sort(
        key=lambda item: (
            not item.nodeid.startswith("tests/test_layout.py"),
            "slow" in item.keywords,
            not item.nodeid.startswith(LONGEST_FILES),  # begun last, they would keep one process busy alone
        )
    )


def pytest_terminal_summary(terminalreporter):
    """Name the tests that should be marked as slow."""
    seconds = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and "slow" not in report.keywords:
                seconds[report.nodeid] += report.duration
    slow = {name: taken for name, taken in seconds.items() if taken > LONGEST_SECONDS}
    if slow:
        terminalreporter.section(f"more than {LONGEST_SECONDS} seconds, and not marked as slow")
        for name, taken in slow.items():
            terminalreporter.line(f"{taken:.1f} s {name}")


@pytest.fixture(scope="session")
def golden():
    """Function that reads golden files: golden("vision") returns (JSON content, tensors)."""

    def read(name: str):
        described, tensors = GOLDEN / f"{name}.json", GOLDEN / f"{name}.safetensors"
        content = json.loads(described.read_text(encoding="utf-8")) if described.exists() else None
        return content, load_file(tensors) if tensors.exists() else None

    return read


@pytest.fixture(scope="session")
def golden_weights():
    return load_file(GOLDEN / "tiny_weights.safetensors")


@pytest.fixture(scope="session")
def golden_llm_folder(tmp_path_factory, golden_weights) -> Path:
    """The language model of the golden data as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = json.loads((GOLDEN / "tiny_config.json").read_text())["llama"]
    llm = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in sizes.items() if k != "rope_theta"}))
    prefix = "llama_model."
    weights = {k.removeprefix(prefix): v for k, v in golden_weights.items() if k.startswith(prefix)}
    llm.load_state_dict({k: v for k, v in weights.items() if not k.endswith("inv_freq")})
    folder = tmp_path_factory.mktemp("llm")
    llm.save_pretrained(folder)
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def golden_model_keys(golden_llm_folder) -> dict:
    """The YAML keys of `model:` for a model of the golden sizes, with a random vision side."""
    return {
        "image_size": 28,
        "vit_model": VIT,
        "vit_weights": None,
        "q_former_model": None,
        "qformer": QFORMER,
        "num_query_token": 8,
        "llama_model": str(golden_llm_folder),
    }


@pytest.fixture(scope="session")
def build_golden_model(golden_model_keys, golden_weights):
    """Function that builds the golden model from YAML keys of `model:`, `device` and `dtype`."""
    from minigpt4.models import MiniGPT4

    def build(device: str = "cpu", dtype: torch.dtype = torch.float32, **cfg) -> MiniGPT4:
        model = MiniGPT4.from_config(golden_model_keys | cfg, device, dtype)
        weights = dict(golden_weights)
        if cfg.get("image_size") == 56:
            weights |= load_file(GOLDEN / "tiny_weights_56_vision.safetensors")
        own = model.state_dict()
        # With some keys the model has other tensors; those of its language model come from the folder anyway.
        left_out = ["llama_proj."] * bool(cfg.keys() & {"projector", "ckpt"})
        left_out += ["llama_model."] * ("load_in" in cfg or any(key.startswith("lora") for key in cfg))
        kept = [k for k in weights if k in own and not k.startswith(tuple(left_out))]
        model.load_state_dict({k: weights[k] for k in kept}, strict=not left_out)
        return model

    return build


@pytest.fixture(autouse=True)
def _isolate():
    """One thread, as for the golden numbers. Changes that train.py makes to logging are undone."""
    torch.set_num_threads(1)
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(autouse=True, scope="session")
def _find_triton():
    """torch remembers whether it has found Triton. The first to ask must not be a test that sees no GPU."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        has_triton()


@pytest.fixture(autouse=True)
def _hide_gpus(request):
    """Only tests that need a GPU see one. All others do the same on every machine, and so do the processes they start.

    A test that needs one says so in its `skipif`, or is in a file named `…_gpu.py`.
    """
    reasons = [mark.kwargs.get("reason", "") for mark in request.node.iter_markers("skipif")]
    with pytest.MonkeyPatch.context() as patch:
        if not (request.path.stem.endswith("_gpu") or any("GPU" in reason for reason in reasons)):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "is_initialized", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture
def open_registry():
    """Names that the test registers are removed from the registry afterwards."""
    from minigpt4.common.registry import HOMES, registry

    for kind in HOMES:
        registry.names(kind)  # which imports the classes of that kind
    before = copy.deepcopy(vars(registry))
    yield
    vars(registry).update(before)


@pytest.fixture
def golden_config(golden_model_keys, tmp_path) -> Path:
    """A YAML file for a model of the golden sizes, with a random vision side."""
    model = {"arch": "mini_gpt4", **golden_model_keys}
    eval_processor = {"vis_processor": {"eval": {"name": "blip2_image_eval", "image_size": 28}}}
    path = tmp_path / "golden.yaml"
    OmegaConf.save({"model": model, "preprocess": eval_processor, "run": {"task": "image_text_pretrain"}}, path)
    return path


@pytest.fixture(scope="session")
def parts(tmp_path_factory, golden_weights, golden_llm_folder):
    """Weights of the frozen parts in the published formats, shards, and a cc_sbu_align folder."""
    folder = tmp_path_factory.mktemp("parts")
    vit = {k.removeprefix("visual_encoder."): v for k, v in golden_weights.items() if k.startswith("visual_encoder.")}
    torch.save(vit, folder / "vit.pth")
    qformer = {k: v for k, v in golden_weights.items() if k.startswith(("Qformer.", "ln_vision.", "query_tokens"))}
    surplus = {"t5_proj.weight": torch.zeros(2), "Qformer.cls.predictions.bias": torch.zeros(3)}
    torch.save({"model": qformer | surplus}, folder / "blip2.pth")
    write_shards(folder / "laion", samples=40)
    write_shards(folder / "cc_sbu", samples=40)
    write_align(folder / "align", records=20)
    return {"folder": folder, "llm": golden_llm_folder}


@pytest.fixture
def configs(parts, golden_model_keys, tmp_path):
    """The shipped configs of stages 1 and 2, with the paths and sizes of the small model."""
    folder = parts["folder"]
    model = golden_model_keys | {
        "vit_weights": str(folder / "vit.pth"),
        "q_former_model": str(folder / "blip2.pth"),
        "llama_model": str(parts["llm"]),
    }
    processors = {"vis_processor": {"train": {"image_size": 28}}}
    run = {"device": "cpu", "num_workers": 2, "batch_size_train": 4, "iters_per_epoch": 4, "max_epoch": 2}
    run |= {"warmup_steps": 2, "init_lr": 0.01, "log_freq": 2}
    changes = {
        "stage1": {
            "model": model,
            "datasets": {
                name: processors | {"build_info": {"storage": f"{folder}/{name}/{{00000..00003}}.tar"}}
                for name in ("laion", "cc_sbu")
            },
            "run": run | {"output_dir": str(tmp_path / "stage1")},
        },
        "stage2": {
            "model": model
            | {"prompt_path": str(ROOT / "prompts/alignment.txt"), "ckpt": str(tmp_path / "missing.pth")},
            "datasets": {"cc_sbu_align": processors | {"build_info": {"storage": str(folder / "align")}}},
            "run": run | {"output_dir": str(tmp_path / "stage2")},
        },
    }
    files = {}
    for stage, name in (("stage1", "minigpt4_stage1_pretrain"), ("stage2", "minigpt4_stage2_finetune")):
        shipped = OmegaConf.load(ROOT / f"train_configs/{name}.yaml")
        files[stage] = tmp_path / f"{stage}.yaml"
        OmegaConf.save(OmegaConf.merge(shipped, changes[stage]), files[stage])
    return files


@pytest.fixture
def poisoned_memory():
    """New memory is filled with NaN, so that elements which a kernel does not write show."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def load_tiny():
    """Function that loads the tiny default in bfloat16, by default after stage 1."""

    def load(device="cpu", ckpt="${package:assets/tiny/stage1.safetensors}", dtype=None):
        from minigpt4.common.config import Config
        from minigpt4.models import MiniGPT4

        options = [f"model.ckpt={ckpt}", "model.prompt_path=null"]
        cfg = Config(SimpleNamespace(cfg_path=ROOT / "eval_configs/minigpt4_tiny_eval.yaml", options=options))
        torch.manual_seed(0)
        model = MiniGPT4.from_config(cfg.model_cfg, device, dtype or torch.bfloat16)
        model.end_sym = "\n"
        return model

    return load


@pytest.fixture(scope="session")
def drawings():
    """A batch of four emoji [4,3,64,64] with their names."""
    from PIL import Image

    from minigpt4.processors import Blip2ImageEvalProcessor

    processor = Blip2ImageEvalProcessor(64)
    files = sorted((ROOT / "minigpt4/assets/examples/emoji").iterdir())
    images = torch.stack([processor(Image.open(file).convert("RGB")) for file in files])
    return {"image": images, "text_input": ["cat face", "red apple", "sailboat", "automobile"]}
