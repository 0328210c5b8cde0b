"""A batch's loss and gradient have the same bits in each process, whichever batch it compiles first.

In a resumed run another batch comes first. The model is wide, since torch.compile adds up short rows in one way only.
"""

import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = {"hidden_size": 4096, "intermediate_size": 1024, "vocab_size": 32000, "num_attention_heads": 32}
# {name: captions of so many words}
BATCHES = {"few labels": [20, 40], "long": [150, 90], "many": [120, 60, 90, 150] * 3}


def compute(order: list[str], kind: str) -> None:
    """Print the bits of each batch's loss and gradient: computed as they come, captured, and replayed."""
    from minigpt4.benchmarks import published, synthetic

    llama_config = published.llama_config
    published.llama_config = lambda *args: llama_config(*args) | WIDE | {"num_key_value_heads": 32}
    load_in = "16bit" if kind == "fp8" else kind
    model = synthetic.random_model(torch.device("cuda"), torch.bfloat16, small=True, load_in=load_in).train()
    model.max_txt_len = 200
    model.accelerate(packed=True, compiled=True, fp8=kind == "fp8")
    for _ in range(3):
        for name in order:
            generator = torch.Generator().manual_seed(len(name))
            image = torch.randn(len(BATCHES[name]), 3, 224, 224, generator=generator).cuda()
            texts = [" ".join(f"w{i * count}" for i in range(count)) for count in BATCHES[name]]
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model({"image": image, "text_input": texts})["loss"]
            loss.backward()
            sums = [tensor.double().sum().item().hex() for tensor in (loss, model.llama_proj.weight.grad)]
            print(f"{name}: {sums}", flush=True)


@pytest.mark.parametrize("kind", ["16bit", "4bit", "fp8"])
def test_the_first_batch_and_the_cache_have_no_influence(tmp_path, kind):
    names = list(BATCHES)
    found, processes = defaultdict(set), []
    for order in (names, names[::-1], names[1:] + names[:1], names):
        folder = tmp_path / str(len(processes))
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        words = [sys.executable, __file__, kind, *order]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    for process in processes:
        out, _ = process.communicate()
        assert process.returncode == 0
        for line in out.splitlines():
            name, _, bits = line.partition(": ")
            found[name].add(bits)
    assert {name: len(bits) for name, bits in found.items()} == dict.fromkeys(names, 1)


if __name__ == "__main__":
    compute(sys.argv[2:], sys.argv[1])
