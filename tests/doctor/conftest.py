"""Healthy runs to plant faults in: small files in the published formats, shards, a folder of descriptions."""

import json
import os
import shutil
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
from dataset_files import write_align, write_shards
from helpers import ROOT

from minigpt4.benchmarks import published, random_weights
from minigpt4.common.config import Config
from minigpt4.doctor.checks import examine
from minigpt4.doctor.machine import imagined_gpu
from minigpt4.doctor.run_context import RunContext

CONFIGS = {
    "stage1": "train_configs/minigpt4_stage1_pretrain.yaml",
    "stage2": "train_configs/minigpt4_stage2_finetune.yaml",
    "chat": "eval_configs/minigpt4_eval.yaml",
}


@pytest.fixture(scope="session")
def small_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    random_weights.write(folder, "small")
    write_shards(folder / "laion", count=3, samples=4)
    write_shards(folder / "cc_sbu", count=3, samples=4)
    write_align(folder / "align", records=20)
    return folder


class Patient:
    """A healthy run with its own files, hard links to shared ones. A test that changes a file must replace it."""

    def __init__(self, folder: Path, source: Path):
        self.folder = folder
        shutil.copytree(source, folder, copy_function=os.link, dirs_exist_ok=True)
        names = published.PUBLISHED["files"]["small"]
        self.vision, self.qformer, self.ckpt = (folder / names[part] for part in ("vision", "qformer", "ckpt"))
        self.llm = next(folder.glob("vicuna-*"))
        (weights,) = self.llm.glob("*.safetensors")
        weights.rename(self.llm / "model.safetensors")
        (self.llm / "model.safetensors.index.json").unlink()
        self.shards, self.align = folder / "laion", folder / "align"
        self.stage = "stage2"
        self.options: list[str] = []
        self.gpus = [imagined_gpu(80)]
        self.world_size = 1

    def write(self, path: Path, content: bytes | str) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def cut(self, path: Path, share: float) -> None:
        """Leave the first part of a file."""
        content = path.read_bytes()
        self.write(path, content[: int(len(content) * share)])

    def edit(self, path: Path, **keys) -> None:
        """Change keys of a JSON file; None takes one away."""
        content = json.loads(path.read_text()) | keys
        self.write(path, json.dumps({key: value for key, value in content.items() if value is not None}))

    def arguments(self) -> list[str]:
        """Of the command line."""
        paths = {"vision": self.vision, "qformer": self.qformer, "llm": self.llm, "ckpt": self.ckpt}
        if self.stage == "stage1":
            del paths["ckpt"]
        options = random_weights.yaml_options("small", paths)
        options += [f"datasets.{name}.build_info.storage={self.folder}/{name}/*.tar" for name in ("laion", "cc_sbu")]
        options += [f"datasets.cc_sbu_align.build_info.storage={self.align}", f"run.output_dir={self.folder}/output"]
        used = [
            o for o in options if not o.startswith("datasets.") or (".cc_sbu_align." in o) == (self.stage != "stage1")
        ]
        if self.stage == "chat":
            used = [option for option in used if not option.startswith("run.")]
        changed = {option.split("=")[0] for option in self.options}
        used = [option for option in used if option.split("=")[0] not in changed]
        return ["--cfg-path", str(ROOT / CONFIGS[self.stage]), "--options", *used, *self.options]

    def context(self) -> RunContext:
        _, path, _, *options = self.arguments()
        cfg = Config(SimpleNamespace(cfg_path=path, options=options))
        return RunContext(cfg, self.stage != "chat", self.gpus, self.world_size)

    def diagnostics(self, *statuses: str):
        """The diagnostics of these statuses; all, if none is given. The note on skipped checks is left out."""
        found = [d for d in examine(self.context()) if d.check != "deeper checks"]
        return [d for d in found if not statuses or d.status in statuses]


@pytest.fixture
def patient(small_files, tmp_path, monkeypatch) -> Patient:
    monkeypatch.chdir(ROOT)  # where the shipped files have their prompts
    return Patient(tmp_path / "run", small_files)


def write_sparse(path: Path, table: dict[str, tuple[int, ...]], dtype: str) -> None:
    """A .safetensors file whose header is right and whose tensors are a hole in the disk."""
    size, header = {"F16": 2, "F32": 4}[dtype], {}
    end = 0
    for name, shape in table.items():
        start, end = end, end + prod(shape) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="session")
def full_size(tmp_path_factory, small_files):
    """Folder of files of the published sizes, 7B and 13B, that take no room."""
    folder = tmp_path_factory.mktemp("full")
    for size in ("7b", "13b"):
        sizes = published.SIZES[size]
        write_sparse(folder / "eva.safetensors", published.eva_vit(sizes), "F16")
        write_sparse(folder / "blip2.safetensors", published.blip2(sizes), "F32")
        write_sparse(folder / f"ckpt-{size}.safetensors", published.projection(sizes), "F32")
        llm = folder / size
        llm.mkdir()
        table = published.llama(sizes)
        halves = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
        for number, (name, shape) in enumerate(table.items()):
            list(halves.values())[2 * number // len(table)][name] = shape
        for name, half in halves.items():
            write_sparse(llm / name, half, "F16")
        weight_map = {tensor: name for name, half in halves.items() for tensor in half}
        (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (llm / "config.json").write_text(json.dumps(published.llama_config(sizes, "v1.1")))
        shutil.copy(next(small_files.glob("vicuna-*")) / "tokenizer.model", llm)
        (llm / "added_tokens.json").write_text(json.dumps({"[PAD]": 32000}))  # which Vicuna v0 alone has
    return folder
