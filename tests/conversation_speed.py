"""Training steps of conversations with several turns and pictures: packed and compiled beside padded and eager.

    python tests/conversation_speed.py              # full size, random weights, 16 and 4 bit; on a GPU
    python tests/conversation_speed.py --small      # a small model, on a CPU too

Prints seconds a step (medians), the peak of the GPU's memory, and how far loss and gradient of the two ways differ.
"""

import argparse
import random
import time

import torch

from minigpt4.benchmarks.synthetic import random_model
from minigpt4.datasets.conversations.batch import Conversations
from minigpt4.models.template import TEMPLATES

BATCHES, PLAIN_STEPS, FAST_STEPS = 4, 12, 20


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(30000)}" for _ in range(count))


def random_batch(rng: random.Random, size: int) -> dict:
    """Conversations of 1 to 6 turns, each turn with up to 3 pictures, and their pictures [N,3,224,224]."""
    conversations, pictures = [], 0
    for _ in range(size):
        messages = [("system", (words(rng, 12),))] if rng.random() < 0.3 else []
        for turn in range(rng.randint(1, 6)):
            count = rng.choice([0, 0, 1, 1, 2, 3] if turn else [0, 1, 1, 2])
            pictures += count
            parts = [part for _ in range(count) for part in (None, words(rng, 3))] + [words(rng, rng.randint(2, 10))]
            messages += [("user", tuple(parts)), ("assistant", (words(rng, rng.randint(2, 30)),))]
        conversations.append(tuple(messages))
    seeded = torch.Generator().manual_seed(rng.randrange(9999))
    return {"image": torch.randn(pictures, 3, 224, 224, generator=seeded), "text_input": Conversations(conversations)}


def step(model, batch: dict) -> tuple[float, torch.Tensor]:
    """Forward and backward pass. Returns the loss and the gradient of the projection."""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
        loss = model({**batch, "image": batch["image"].to(model.device)})["loss"]
    loss.backward()
    return loss.item(), model.llama_proj.weight.grad.float().flatten().clone()


def seconds_and_memory(model, batches: list[dict], steps: int) -> tuple[float, int]:
    """The median of steps over the batches in turn, and the peak of the memory in MiB (0 on a CPU)."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    passed = []
    for number in range(steps):
        start = time.perf_counter()
        step(model, batches[number % BATCHES])
        passed.append(time.perf_counter() - start)
    return sorted(passed)[steps // 2], torch.cuda.max_memory_allocated() >> 20 if on_gpu else 0


def compare(load_in: str, batches: list[dict], small: bool) -> None:
    device, dtype = ("cpu", torch.float32) if small else ("cuda", torch.bfloat16)
    model = random_model(torch.device(device), dtype, small, load_in).train()
    model.max_txt_len, model.template, model.end_sym, model.prompt_list = 400, TEMPLATES["vicuna_v1"], "</s>", []
    expected = [step(model, batch) for batch in batches]
    plain, plain_memory = seconds_and_memory(model, batches, PLAIN_STEPS)
    model.accelerate(packed=True, compiled=not small)
    for _ in range(3):  # compiled, captured, replayed
        found = [step(model, batch) for batch in batches]
    fast, fast_memory = seconds_and_memory(model, batches, FAST_STEPS)
    pairs = [*zip(found, expected, strict=True)]
    difference = max(abs(own[0] / other[0] - 1) for own, other in pairs)
    cosine = min(torch.cosine_similarity(own[1], other[1], dim=0).item() for own, other in pairs)
    print(f"{load_in}: padded, eager {plain:.4f} s, {plain_memory:,} MiB; packed {fast:.4f} s, {fast_memory:,} MiB")
    print(f"{load_in}: the losses differ by {difference:.1e} at most; cosine of the gradients {cosine:.5f} at least")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model in float32, on a CPU")
    small = parser.parse_args().small
    rng = random.Random(0)
    batches = [random_batch(rng, 3 if small else 12) for _ in range(BATCHES)]
    for load_in in ["16bit"] if small else ["16bit", "4bit"]:
        compare(load_in, batches, small)


if __name__ == "__main__":
    main()
