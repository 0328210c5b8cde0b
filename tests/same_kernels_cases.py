"""The bits of each batch's loss and gradient, for `tests/fast/test_same_kernels_gpu.py`: argv KIND BATCH…

KIND: "16bit", "4bit", "fp8", or "lora": 16 bit with adapters in all linear layers. The model is wide, since
torch.compile adds up short rows in one way only.
"""

import sys
from types import SimpleNamespace

import torch

WIDE = {"hidden_size": 4096, "intermediate_size": 1024, "vocab_size": 32000, "num_attention_heads": 32}
# {name: captions of so many words}
BATCHES = {"few labels": [20, 40], "long": [150, 90], "many": [120, 60, 90, 150] * 3}


def add_adapters(model) -> None:
    """Put LoRA adapters into all linear layers of the language model, as after some training."""
    from minigpt4.models import loading

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": names}
    cfg = SimpleNamespace(lora=lora, lora_r=None, train=None, projector="linear", freeze_vit=True, freeze_qformer=True)
    loading.add_adapters(model, cfg)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def main(kind: str, order: list[str]) -> None:
    """Print the bits of each batch's loss and gradient: computed as they come, captured, and replayed."""
    from minigpt4.benchmarks import published, synthetic

    llama_config = published.llama_config
    published.llama_config = lambda *args: llama_config(*args) | WIDE | {"num_key_value_heads": 32}
    load_in = "4bit" if kind == "4bit" else "16bit"
    model = synthetic.random_model(torch.device("cuda"), torch.bfloat16, small=True, load_in=load_in).train()
    model.max_txt_len = 200
    if kind == "lora":
        add_adapters(model)
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
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            sums = [tensor.double().sum().item().hex() for tensor in (loss, *gradients)]
            print(f"{name}: {sums}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
