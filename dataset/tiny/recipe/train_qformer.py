"""Teach the Q-Former more spelling, on top of the finished, frozen encoder (BLIP-2's first stage, in small).

    python dataset/tiny/recipe/train_qformer.py --start output/vision --seconds 900 --output output/qformer

The encoder's tokens of augmented pictures are computed once into a bank; then only the Q-Former and its queries learn,
with the spelling and contrast objectives of train_vision.py. On a CPU with bf16 matrix units this is quick.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from augment import augment
from common import caption_targets, load_concepts, load_pictures, load_tokenizer, normalise
from muon import Muon
from safetensors.torch import load_file, save_file
from torch import nn
from train_vision import TRAINED_ON, VisionPretrainer, measure, shares

from minigpt4.common.schema import VIT_MODELS


class Given(nn.Module):
    """Stands in for the encoder where its tokens are already there."""

    def forward(self, tokens):
        return tokens


def load_model(folder: Path, q_heads: int, targets) -> VisionPretrainer:
    """The model of train_vision.py from its exported files."""
    vit, rest = load_file(folder / "vision.safetensors"), load_file(folder / "qformer.safetensors")
    layer = "Qformer.bert.encoder.layer."
    qformer = {
        "hidden_size": rest["query_tokens"].shape[-1],
        "num_hidden_layers": 1 + max(int(k[len(layer) :].split(".")[0]) for k in rest if k.startswith(layer)),
        "num_attention_heads": q_heads,
        "intermediate_size": rest[layer + "0.intermediate_query.dense.weight"].shape[0],
        "cross_attention_freq": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    model = VisionPretrainer(VIT_MODELS["eva_tiny"], qformer, targets, drop_path=0.0)
    state = {f"visual_encoder.{k}": v.float() for k, v in vit.items()} | {k: v.float() for k, v in rest.items()}
    state |= {k: v.float() for k, v in load_file(folder / "vision_head.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"used", "targets", "codes", "weight"}, (missing, unexpected)
    return model.eval()


@torch.no_grad()
def fill_bank(model, pictures, rounds: int, light: float, device):
    """Encoder tokens [M,65,D] in bf16 and labels [M]: every picture `rounds` times augmented, and once as it is."""
    tokens, labels = [], []
    artists, count = pictures.shape[:2]
    for turn in range(rounds + 1):
        for artist in range(artists):
            for start in range(0, count, 256):
                label = torch.arange(start, min(start + 256, count), device=device)
                other = pictures[(artist + 1 + turn % 2) % artists, label]
                images = pictures[artist, label]
                images = augment(images, other, 0.4, light) if turn else images.float() / 255
                with torch.autocast(device.type, torch.bfloat16):
                    tokens.append(model.visual_encoder(normalise(images)).bfloat16())
                labels.append(label)
    return torch.cat(tokens), torch.cat(labels)


def train(model, bank, args, log):
    tokens, labels = bank
    device = tokens.device
    names = [n for n, _ in model.named_parameters() if n.startswith("Qformer.") or n == "query_tokens"]
    learned = dict(model.named_parameters())
    for name, p in learned.items():
        p.requires_grad_(name in names)
    matrices = [learned[n] for n in names if learned[n].ndim == 2]
    rest = [learned[n] for n in names if learned[n].ndim != 2]
    optimisers = [(Muon(matrices, lr=args.muon, weight_decay=0.02), args.muon),
                  (torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0), args.lr)]  # fmt: skip
    start, step, progress = time.time(), 0, 0.0
    while progress < 1:
        rate = min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * min(1, progress)))
        for optimiser, peak in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * rate
        index = torch.randint(len(labels), (args.batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            seen = tokens[index].float()
            seen = seen + torch.randn_like(seen) * seen.std((0, 1)) * args.noise
            losses = model.losses(seen, labels[index], torch.ones(args.batch, device=device))
        loss = losses["spell"] + args.w_contrast * losses["contrast"]
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser, _ in optimisers:
            optimiser.step()
        step += 1
        progress = step / args.steps if args.steps else (time.time() - start) / args.seconds
        if step % args.log_every == 0:
            log({"step": step, "progress": round(progress, 3), **{k: round(v.item(), 4) for k, v in losses.items()}})
    return step


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--start", type=Path, required=True, help="output folder of train_vision.py")
    add("--output", type=Path, required=True)
    add("--seconds", type=float, default=900)
    add("--steps", type=int, default=0)
    add("--rounds", type=int, default=8, help="augmentations of each picture in the bank")
    add("--bank", type=Path, help="keep the bank in this file, or take it from there")
    add("--light", type=float, default=0.5)
    add("--noise", type=float, default=0.2, help="noise on the encoder's tokens, in standard deviations")
    add("--scale", type=float, default=8.0, help="of the cosines; a small one asks the queries for purer codes")
    add("--batch", type=int, default=64)
    add("--muon", type=float, default=0.01)
    add("--lr", type=float, default=5e-4)
    add("--w_contrast", type=float, default=0.5)
    add("--q_heads", type=int, default=6)
    add("--seed", type=int, default=0)
    add("--log_every", type=int, default=100)
    return parser.parse_args()


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    concepts = load_concepts()
    ids = [c["id"] for c in concepts]
    targets = caption_targets(load_tokenizer(), [c["caption"] for c in concepts])
    model = load_model(args.start, args.q_heads, targets).to(device)
    model.scale = args.scale
    pictures = torch.stack([load_pictures(a, ids) for a in TRAINED_ON]).to(device)
    truth = torch.arange(len(ids), device=device)
    lines = []

    def log(line):
        lines.append(line)
        print(json.dumps(line), flush=True)

    log({"noto before": shares(measure(model, pictures[0], device), truth)})
    encoder, started = model.visual_encoder, time.time()
    if args.bank and args.bank.exists():
        bank = torch.load(args.bank, weights_only=True)
    else:
        bank = fill_bank(model.eval(), pictures, args.rounds, args.light, device)
        if args.bank:
            torch.save(bank, args.bank)
    log({"bank": len(bank[1]), "seconds": round(time.time() - started)})
    model.visual_encoder = Given()
    step = train(model, bank, args, log)
    model.visual_encoder = encoder
    found = measure(model, load_pictures("fluent", ids).to(device), device)
    log({"steps": step, "fluent": shares(found, truth), "noto": shares(measure(model, pictures[0], device), truth)})
    state = {k: v.half().contiguous().cpu() for k, v in model.state_dict().items()
             if k.startswith(("query_tokens", "ln_vision.", "Qformer."))}  # fmt: skip
    save_file(state, args.output / "qformer.safetensors")
    for name in ("vision.safetensors", "vision_head.safetensors"):
        shutil.copy(args.start / name, args.output / name)
    (args.output / "predictions.json").write_text(json.dumps({k: v.tolist() for k, v in found.items()}))
    (args.output / "log.json").write_text("\n".join(map(json.dumps, lines)) + "\n")


if __name__ == "__main__":
    main()
