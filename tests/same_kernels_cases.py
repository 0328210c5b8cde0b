"""The bits of each batch's loss and gradient, for `tests/fast/test_same_kernels_gpu.py`: argv KIND BATCH…

KIND: "16bit", "4bit" or "fp8". The model is wide, since torch.compile adds up short rows in one way only.
"""

import sys

import torch

WIDE = {"hidden_size": 4096, "intermediate_size": 1024, "vocab_size": 32000, "num_attention_heads": 32}
# {name: captions of so many words}
BATCHES = {"few labels": [20, 40], "long": [150, 90], "many": [120, 60, 90, 150] * 3}


def main(kind: str, order: list[str]) -> None:
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


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
