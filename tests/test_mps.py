"""Apple's GPUs (`run.device: mps`), with the stand-in of `pretended_mps.py`."""

import threading
from types import SimpleNamespace

import pytest
import torch
from pretended_mps import MPS, PretendedMps

from minigpt4.cli import cache_features
from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.conversation import CONV_VISION, Decoding
from minigpt4.conversation.loading import load_chat, select_gpu
from minigpt4.doctor import check_environment as environment
from minigpt4.models import llm
from minigpt4.runners.state import restore_rng_states, rng_states
from minigpt4.serving.offline import OfflineAnswers
from train import main as train

CUDA_ONLY = (
    "current_stream", "device", "empty_cache", "get_device_capability", "get_device_properties", "get_rng_state",
    "is_bf16_supported", "max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats", "set_device",
    "set_rng_state", "stream", "synchronize", "CUDAGraph", "MemPool", "Stream",
)  # fmt: skip


@pytest.fixture
def mac(monkeypatch):
    """A machine with an Apple GPU, on which every call of torch.cuda is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("there is no CUDA on a Mac")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a Mac has no nvidia-smi, which this machine may have
    for name in CUDA_ONLY:
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    state = torch.zeros(4, dtype=torch.uint8)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: state.fill_(seed % 256))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device="mps": state.clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new, device="mps": state.copy_(new))
    versions = {"version": environment.sys.version, "version_info": environment.sys.version_info}
    monkeypatch.setattr(environment, "sys", SimpleNamespace(platform="darwin", **versions))
    dist_utils.warn_of_the_cpu.cache_clear()


@pytest.fixture
def pretended(mac, monkeypatch):
    """The stand-in, in this thread and in those that it starts. Weights are read to the host and then moved."""
    from transformers import AutoModelForCausalLM

    read, run = AutoModelForCausalLM.from_pretrained, threading.Thread.run

    def read_and_move(*args, device_map, **options):
        llm, info = read(*args, device_map={"": "cpu"}, **options)
        return llm.to(device_map[""]), info

    def run_there(thread):
        with PretendedMps():
            run(thread)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read_and_move)
    monkeypatch.setattr(threading.Thread, "run", run_there)
    with PretendedMps():
        yield


def config(path, *options) -> Config:
    return Config(SimpleNamespace(cfg_path=str(path), options=list(options)))


# The choice of the device


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_an_apple_gpu_is_used_when_asked_for(mac, golden_config, name):
    device = dist_utils.select_device(name)
    assert device.type == select_gpu(config(golden_config, f"run.device={name}"), 0).type == "mps"
    for amp_dtype in ("auto", "bf16", "fp16"):
        assert dist_utils.select_dtype(device, True, amp_dtype) == torch.float32


def test_cuda_on_a_mac_is_the_cpu_with_a_hint_at_mps(mac, caplog):
    assert dist_utils.select_device("cuda").type == "cpu"
    assert "run.device=cuda" in caplog.text and "run.device=mps" in caplog.text


def test_no_apple_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="run.device=mps.*no Apple GPU.*cpu or cuda"):
        dist_utils.select_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    dist_utils.warn_of_the_cpu.cache_clear()
    dist_utils.select_device("cuda")
    assert "run.device=cuda" in caplog.text and "mps" not in caplog.text


def test_several_processes(mac, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes.*run.device=mps"):
        dist_utils.select_device("mps")
    assert dist_utils.select_device("cuda").type == dist_utils.select_device("cpu").type == "cpu"


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_bitsandbytes_is_refused(pretended, golden_llm_folder, load_in):
    with pytest.raises(ConfigError, match=rf"model\.load_in={load_in} .*8bit_weights.*run\.device=cpu"):
        llm.load_llm(str(golden_llm_folder), torch.device("mps"), torch.float32, load_in)


# Results, compared with the CPU


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_training_and_resuming(pretended, configs, tmp_path, frozen):
    """Both stages, resumed after an epoch: the checkpoints equal those of a run on the CPU."""
    checkpoints = {}
    for device in ("cpu", "mps"):
        for stage in ("stage1", "stage2"):
            out = tmp_path / device / stage
            options = [f"run.device={device}", "run.num_workers=0", "run.iters_per_epoch=2"]
            options += [f"model.freeze_qformer={frozen}"]
            if stage == "stage2":
                options += [f"model.ckpt={checkpoints[device, 'stage1']}"]
            command = ["--cfg-path", str(configs[stage]), "--options", *options]
            train([*command, f"run.output_dir={out}/first", "run.max_epoch=1"])
            (saved,) = out.glob("first/*/checkpoint_0.pth")
            train([*command, f"run.output_dir={out}/second", f"run.resume_ckpt_path={saved}"])
            (checkpoints[device, stage],) = out.glob("second/*/checkpoint_1.pth")
    for stage in ("stage1", "stage2"):
        on_mps, on_cpu = (torch.load(checkpoints[device, stage], weights_only=True) for device in ("mps", "cpu"))
        assert on_mps["model"].keys() == on_cpu["model"].keys()
        assert all(torch.equal(weight, on_cpu["model"][name]) for name, weight in on_mps["model"].items())
        assert on_mps["rng"][0]["mps"] is not None


@pytest.mark.parametrize("load_in", ["16bit", "8bit_weights"])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 5}, {"num_beams": 3}])
def test_chat(pretended, golden, golden_config, load_in, settings):
    """The second answer uses the KV cache; a seed leaves the random states unchanged."""
    images = golden("conversation")[1]["images"]
    answers = {}
    for device in ("cpu", "mps"):
        cfg = config(golden_config, f"run.device={device}", f"model.load_in={load_in}")
        torch.manual_seed(0)  # for the random vision side
        chat = load_chat(cfg, select_gpu(cfg, 0))
        assert chat.model.device.type == device
        conv, img_list = CONV_VISION.copy(), []
        chat.upload_img(images[0], conv, img_list)
        for question in ("What is it?", "And then?"):
            chat.ask(question, conv)
            text, ids = chat.answer(conv, img_list, max_new_tokens=12, **{"do_sample": False, **settings})
            answers.setdefault(device, []).append((text, ids.tolist()))
        states = torch.get_rng_state(), torch.mps.get_rng_state()
        chat.answer(conv, img_list, max_new_tokens=3, seed=8)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert device == "cpu" or torch.equal(torch.mps.get_rng_state(), states[1])
    assert answers["mps"] == answers["cpu"]


def test_batches_of_answers(pretended, golden, golden_config):
    """Answers computed together, greedy ones and with a seed."""
    pictures, found = golden("conversation")[1]["images"], {}
    for device in ("cpu", "mps"):
        cfg = config(golden_config, f"run.device={device}")
        torch.manual_seed(0)  # for the random vision side
        chat = load_chat(cfg, select_gpu(cfg, 0))
        for decoding in (Decoding(do_sample=False, max_new_tokens=8), Decoding(max_new_tokens=8, seed=3)):
            answers = OfflineAnswers(chat, lambda number: "<ImageHere> a", decoding, places=2, threads=1)
            batches = answers.batches(range(3), lambda n: (str(n), [pictures[n % 2]]), lambda *entry: {"entry": entry})
            found.setdefault(device, []).append([line["entry"] for batch in batches for line in batch.lines])
    assert found["mps"] == found["cpu"] and [len(lines) for lines in found["cpu"]] == [3, 3]


def test_features_are_cached(pretended, configs, tmp_path):
    absent = ["model.llama_model=/nowhere", "model.ckpt=null", "preprocess.vis_processor.eval.image_size=28"]
    written = {}
    for device in ("cpu", "mps"):
        out = tmp_path / device
        options = [*absent, f"run.device={device}"]
        arguments = ["--cfg-path", str(configs["stage2"]), "--out", str(out), "--options", *options]
        assert cache_features.main(arguments) == 0
        written[device] = {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.tar"))}
    assert written["mps"] == written["cpu"] != {}


def test_random_states_are_restored(mac):
    """From a checkpoint that was written on a Mac, and from one that was not."""
    torch.manual_seed(3)
    states = rng_states()
    torch.mps.manual_seed(4)
    restore_rng_states(states)
    assert torch.mps.get_rng_state().tolist() == [3] * 4
    del states[0]["mps"]
    restore_rng_states(states)
    assert torch.mps.get_rng_state().tolist() == [3] * 4


# The stand-in


@pytest.mark.parametrize(
    ("work", "error"),
    [
        (lambda x: x.to("mps").double(), TypeError),
        (lambda x: torch.zeros(2, dtype=torch.float64, device="mps"), TypeError),
        (lambda x: x.to("mps") + x, RuntimeError),
        (lambda x: x.to("mps").pin_memory(), AssertionError),
        (lambda x: x.to("mps", non_blocking=True), AssertionError),
        (lambda x: torch.cuda.synchronize(), AssertionError),
    ],
)
def test_the_stand_in_raises_the_errors_of_torch(pretended, work, error):
    with pytest.raises(error):
        work(torch.ones(2))


def test_the_stand_in_keeps_devices_apart(pretended):
    layer, x = torch.nn.Linear(2, 2), torch.ones(2)
    layer.to("mps")
    y = layer(x.to("mps"))
    y.sum().backward()
    assert {t.device for t in (y, y + 1, layer.weight.grad, layer.bias.data)} == {MPS}
    assert {t.device.type for t in (x, y.cpu(), y.to("cpu"), torch.zeros(1))} == {"cpu"}
