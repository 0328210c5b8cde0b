"""Train the projection between given parts, as stages 1 and 2 do it, and measure it on the held-out artist.

    python dataset/tiny/recipe/evaluate.py                                     # the shipped parts, three seeds
    python dataset/tiny/recipe/evaluate.py --language output/language_1 --lr 3e-3 1e-2 --artist twemoji

A compact stand-in for `train.py` (same optimiser, schedule, crops, batches, sequences, fp32) for choosing sizes and
learning rates: seconds on a GPU, some minutes on a CPU. The figures that count are those of the real commands.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    ASSETS,
    BOS,
    DESCRIBE_PROMPTS,
    PAD,
    describe,
    encode,
    load_concepts,
    load_pictures,
    load_tokenizer,
    normalise,
)
from safetensors.torch import load_file
from tiny_text import full_sentence, named
from torch import nn
from transformers import LlamaForCausalLM

from minigpt4.common.schema import VIT_MODELS
from minigpt4.models.eva_vit import create_vit
from minigpt4.models.qformer import QFormer


class Vision(nn.Module):
    """The frozen vision part, its sizes read off its weights."""

    def __init__(self, folder: Path, q_heads: int):
        super().__init__()
        vit, rest = load_file(folder / "vision.safetensors"), load_file(folder / "qformer.safetensors")
        depth = 1 + max(int(k.split(".")[1]) for k in vit if k.startswith("blocks."))
        width = vit["pos_embed"].shape[-1]
        sizes = dict(VIT_MODELS["eva_tiny"], embed_dim=width, depth=depth)
        sizes["mlp_ratio"] = vit["blocks.0.mlp.fc1.weight"].shape[0] / width
        self.vit = create_vit(sizes, 64)
        self.vit.load_state_dict(vit)
        layer = "Qformer.bert.encoder.layer."
        self.query_tokens = nn.Parameter(rest["query_tokens"].float())
        self.ln_vision = nn.LayerNorm(width)
        self.qformer = QFormer(
            width,
            hidden_size=self.query_tokens.shape[-1],
            num_hidden_layers=1 + max(int(k[len(layer) :].split(".")[0]) for k in rest if k.startswith(layer)),
            num_attention_heads=q_heads,
            intermediate_size=rest[layer + "0.intermediate_query.dense.weight"].shape[0],
        )
        self.qformer.load_state_dict({k[8:]: v for k, v in rest.items() if k.startswith("Qformer.")})
        self.ln_vision.load_state_dict({k[10:]: v for k, v in rest.items() if k.startswith("ln_vision.")})
        self.eval().requires_grad_(False)

    def forward(self, images):
        return self.qformer(self.query_tokens.expand(len(images), -1, -1), self.ln_vision(self.vit(images)))


def random_crops(x: torch.Tensor) -> torch.Tensor:
    """RandomResizedCrop(scale (0.5, 1), bicubic) of uint8 [B,3,S,S], each picture its own crop; in [0,1]."""
    rows = len(x)
    area = torch.empty(rows).uniform_(0.5, 1)
    ratio = torch.empty(rows).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    tx, ty = (torch.empty(rows).uniform_(-1, 1) * (1 - w)), (torch.empty(rows).uniform_(-1, 1) * (1 - h))
    zero = torch.zeros(rows)
    theta = torch.stack([w, zero, tx, zero, h, ty], -1).view(rows, 2, 3).to(x.device)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    image = F.grid_sample(x.float() / 255, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return image.clamp(0, 1)


@torch.no_grad()
def query_bank(vision, pictures: torch.Tensor, crops: int) -> torch.Tensor:
    """The Q-Former's outputs for random crops of every picture, [crops,N,Q,D]; crops=0: for whole pictures, [N,Q,D]."""
    rounds = []
    for _ in range(max(1, crops)):
        chunks = [random_crops(c) if crops else c.float() / 255 for c in pictures.split(256)]
        rounds.append(torch.cat([vision(normalise(c)) for c in chunks]))
    return torch.stack(rounds) if crops else rounds[0]


class Trial:
    """One language model, one vision part, and projections between them."""

    def __init__(self, model, tokenizer, concepts, bank, device):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.concepts, self.bank = concepts, bank
        self.embed = model.get_input_embeddings()

    def tokens(self, text: str, bos: bool = False) -> torch.Tensor:
        return torch.tensor([BOS] * bos + encode(self.tokenizer, text), dtype=torch.long, device=self.device)

    def sequences(self, image_embeds, before: str, after: str, texts: list[str], max_txt_len: int):
        """inputs_embeds and labels of a batch, as REFERENCE.md section 4 lays them out."""
        ids = [self.tokens(t)[:max_txt_len] for t in texts]
        width = max(map(len, ids))
        text = torch.stack([F.pad(i, (0, width - len(i)), value=PAD) for i in ids])
        rows = len(texts)
        head, tail = self.tokens(before, bos=True), self.tokens(after)
        parts = [self.embed(head).expand(rows, -1, -1), image_embeds, self.embed(tail).expand(rows, -1, -1)]
        prefix = sum(p.shape[1] for p in parts)
        labels = F.pad(text.masked_fill(text == PAD, -100), (prefix, 0), value=-100)
        return torch.cat([*parts, self.embed(text)], 1), labels

    def train(self, projection, steps, batch, lr, min_lr, warmup, stage, seed, max_txt_len=40):
        """Steps of AdamW on the projection alone; returns the mean loss of the last 50."""
        torch.manual_seed(seed)
        rng = random.Random(seed)
        optimiser = torch.optim.AdamW(
            [{"params": projection.weight, "weight_decay": 0.05}, {"params": projection.bias, "weight_decay": 0.0}],
            lr=lr, betas=(0.9, 0.999),
        )  # fmt: skip
        losses = []
        for step in range(steps):
            rate = min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * step / steps))
            rate = min(lr, 1e-6 + (lr - 1e-6) * step / warmup) if step < warmup else rate
            for group in optimiser.param_groups:
                group["lr"] = rate
            which = torch.randint(len(self.concepts), (batch,))
            source = self.bank[rng.randrange(len(self.bank))]  # [crops,N,Q,D]
            queries = source[torch.randint(len(source), (batch,)), which].float()
            chosen = [self.concepts[i] for i in which.tolist()]
            if stage == 1:
                before, after, texts = "", "", [c["caption"] + "\n" for c in chosen]
            else:
                before, after = "###Human: <Img>", f"</Img> {rng.choice(DESCRIBE_PROMPTS)} ###Assistant: "
                texts = [describe(c, rng) + "###" for c in chosen]
            embeds, labels = self.sequences(projection(queries), before, after, texts, max_txt_len)
            logits = self.model(inputs_embeds=embeds).logits[:, :-1]
            labelled = labels[:, 1:] != -100
            loss = F.cross_entropy(logits[labelled], labels[:, 1:][labelled])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return sum(losses[-50:]) / len(losses[-50:])

    @torch.no_grad()
    def answers(self, projection, queries, before, after, stop, max_new_tokens) -> list[tuple[str, bool]]:
        """Greedy texts before `stop`, and whether they reached it."""
        stop_id, out = encode(self.tokenizer, stop)[0], []
        for chunk in queries.split(256):
            rows = len(chunk)
            head, tail = self.embed(self.tokens(before, bos=True)), self.embed(self.tokens(after))
            embeds = torch.cat([head.expand(rows, -1, -1), projection(chunk), tail.expand(rows, -1, -1)], 1)
            ids = self.model.generate(
                inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device),
                max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_id, pad_token_id=PAD,
            ).tolist()  # fmt: skip
            for row in ids:
                done = stop_id in row
                row = row[: row.index(stop_id)] if done else row
                out.append((self.tokenizer.decode(row).strip(), done))
        return out

    def captions_right(self, projection, queries) -> torch.Tensor:
        texts = self.answers(projection, queries, "", "", "\n", 24)
        return torch.tensor([t == c["caption"] for (t, _), c in zip(texts, self.concepts, strict=True)])

    def described(self, projection, queries) -> dict:
        """Stage 2: shares of answers that are sentences which stop by themselves, and which name the thing."""
        after = f"</Img> {DESCRIBE_PROMPTS[0]} ###Assistant: "
        texts = self.answers(projection, queries, "###Human: <Img>", after, "###", 120)
        whole = [done and full_sentence(text) for text, done in texts]
        naming = [named(text, c["name"]) for (text, _), c in zip(texts, self.concepts, strict=True)]
        return {"sentences": percent(whole), "named": percent(naming), "examples": [t for t, _ in texts[100::400]]}


def percent(flags) -> float:
    flags = torch.as_tensor(flags).float()
    return round(100 * flags.mean().item(), 2)


def load_bank(args, vision, ids, device):
    """Queries of the training artists' crops (one table each) and of the held-out pictures; kept in a file if asked."""
    if args.bank and args.bank.exists():
        saved = torch.load(args.bank, weights_only=True, map_location=device)
        return saved["bank"], saved["queries"]
    torch.manual_seed(0)
    bank = [query_bank(vision, load_pictures(a, ids).to(device), args.crops) for a in args.sources]
    queries = query_bank(vision, load_pictures(args.artist, ids).to(device), 0)
    if args.bank:
        torch.save({"bank": bank, "queries": queries}, args.bank)
    return bank, queries


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--vision", type=Path, default=ASSETS)
    add("--language", type=Path, default=ASSETS / "llama")
    add("--predictions", type=Path, help="predictions.json of train_vision.py for the share among what the head knows")
    add("--q_heads", type=int, default=6)
    add("--artist", default="fluent", help="the artist to measure on")
    add("--sources", nargs="+", default=["noto", "twemoji"])
    add("--crops", type=int, default=4, help="random crops of every picture to compute beforehand and draw from")
    add("--bank", type=Path, help="keep what was computed in this file, or take it from there")
    add("--seeds", type=int, nargs="+", default=[42, 43, 44])
    add("--lr", type=float, nargs="+", default=[1e-2])
    add("--min_lr", type=float, default=1e-4)
    add("--warmup", type=int, default=50)
    add("--steps", type=int, default=600)
    add("--batch", type=int, default=32)
    add("--min_lr2", type=float, default=1e-4)
    add("--lr2", type=float, nargs="+", default=[1e-3], help="learning rates of stage 2, tried from each stage 1")
    add("--steps2", type=int, default=120)
    add("--batch2", type=int, default=12)
    add("--shuffle", action="store_true", help="control: pictures shuffled among captions while training")
    return parser.parse_args()


def main():
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    concepts, tokenizer = load_concepts(), load_tokenizer()
    ids = [c["id"] for c in concepts]
    vision = Vision(args.vision, args.q_heads).to(device)
    model = LlamaForCausalLM.from_pretrained(args.language, dtype=torch.float32).to(device).eval().requires_grad_(False)
    bank, queries = load_bank(args, vision, ids, device)
    if args.shuffle:
        bank = [b[:, torch.randperm(len(ids)).to(device)] for b in bank]
    trial = Trial(model, tokenizer, concepts, bank, device)
    known = None
    if args.predictions:
        known = torch.tensor(json.loads(args.predictions.read_text())["head"]) == torch.arange(len(ids))
        print(json.dumps({"head": percent(known)}))
    for lr in args.lr:
        for seed in args.seeds:
            torch.manual_seed(seed)
            projection = nn.Linear(queries.shape[-1], model.config.hidden_size).to(device)
            untrained = trial.captions_right(projection, queries) if seed == args.seeds[0] else None
            start = time.time()
            loss = trial.train(projection, args.steps, args.batch, lr, args.min_lr, args.warmup, 1, seed)
            right = trial.captions_right(projection, queries)
            line = {"lr": lr, "seed": seed, "loss": round(loss, 4), "seconds": round(time.time() - start, 1),
                    "exact": percent(right)}  # fmt: skip
            if untrained is not None:
                line["untrained"] = percent(untrained)
                mixed = trial.captions_right(projection, queries[torch.randperm(len(queries)).to(device)])
                line["shuffled"] = percent(mixed)
            if known is not None:
                line["exact_if_head"] = percent(right[known])
            print(json.dumps(line), flush=True)
            for lr2 in args.lr2 if args.steps2 else []:
                second = nn.Linear(queries.shape[-1], model.config.hidden_size).to(device)
                second.load_state_dict(projection.state_dict())
                warmup = args.steps2 // 10
                loss = trial.train(second, args.steps2, args.batch2, lr2, args.min_lr2, warmup, 2, seed, 120)
                out = trial.described(second, queries)
                print(json.dumps({"lr2": lr2, "loss": round(loss, 4), **out}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
