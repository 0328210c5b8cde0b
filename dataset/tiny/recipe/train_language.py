"""Train the language part: a small Llama, on text only.

    python dataset/tiny/recipe/train_language.py --seconds 150 --output output/language      # shipped: README.md

It learns what Vicuna brings along: the words, the names and keywords of the concepts, the frame of a chat, and to use
what stands in its context. Most documents hold a *note*: sixteen tokens that name a thing, padded, and often spoilt
(tokens replaced, dropped, blended with those of another name, their embeddings scaled, shifted and buried in noise).
After the note the text says the thing properly:

    <s> NOTE name \\n
    <s> ###Human: <Img> NOTE </Img> Describe this image in detail. ###Assistant: one or two sentences ###
    <s> Give the following image: … ###Human: <Img> NOTE </Img> What is it?### Assistant: … ###

Notes are made of text tokens; no picture, and nothing of the vision part, is used.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import BOS, DESCRIBE_PROMPTS, NUM_QUERIES, PAD, SYSTEM, describe, encode, load_concepts, load_tokenizer
from muon import Muon
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

SLOT = -1  # stands for a token of the note until the batch is made
SHORT, LONG = 56, 168


def article(name: str) -> str:
    return ("an " if name[0].lower() in "aeiou" else "a ") + name


def questions(concept: dict, rng: random.Random) -> tuple[str, str]:
    """A question about the picture and its answer."""
    name, keywords = concept["name"], concept["keywords"] or [concept["name"]]
    some = ", ".join(rng.sample(keywords, min(len(keywords), 3)))
    return rng.choice(
        [
            (rng.choice(["What is it?", "What is this?", "What do you see?", "What is in the picture?"]),
             rng.choice([f"It is {article(name)}.", f"This is {article(name)}.", f"I see {article(name)}."])),
            (rng.choice(["Name it.", "What is it called?", "What is its name?"]), f"It is called {name}."),
            (rng.choice(["Which words go with it?", "What does it make you think of?", "What is it about?"]),
             f"It goes with {some}."),
            (rng.choice(["What kind of thing is it?", "Which group does it belong to?"]),
             f"It belongs to {concept['group']}."),
        ]
    )  # fmt: skip


class Writer:
    """Writes documents as token ids, in which SLOT marks the note's sixteen places, and says which name it holds."""

    def __init__(self, tokenizer, concepts, seed: int, invented: int = 4000):
        self.tokenizer, self.concepts, self.rng = tokenizer, concepts, random.Random(seed)
        words = sorted({w for c in concepts for w in c["caption"].split()})
        phrases = [" ".join(self.rng.choices(words, k=self.rng.choice([1, 2, 2, 3, 3, 4]))) for _ in range(invented)]
        self.names = [c["caption"] for c in concepts] + phrases
        self.notes = torch.full((len(self.names), NUM_QUERIES), PAD)
        for row, name in zip(self.notes, self.names, strict=True):
            ids = encode(tokenizer, name)[:NUM_QUERIES]
            row[: len(ids)] = torch.tensor(ids)

    def ids(self, *segments: str | None) -> list[int]:
        """<s>, then each segment tokenised by itself; None is the note."""
        out = [BOS]
        for segment in segments:
            out += [SLOT] * NUM_QUERIES if segment is None else encode(self.tokenizer, segment)
        return out

    def short(self) -> tuple[list[int], int]:
        """The caption after the note, as stage 1 asks for it; one in four is a phrase that names nothing."""
        rng = self.rng
        which = rng.randrange(len(self.concepts)) if rng.random() < 0.85 else rng.randrange(len(self.names))
        if rng.random() < 0.93:
            return self.ids(None, self.names[which] + "\n"), which
        concept = rng.choice(self.concepts)
        plain = f"{concept['caption']}: {', '.join(concept['keywords'])}\n"
        return self.ids(plain)[:SHORT], 0

    def long(self) -> tuple[list[int], int]:
        """A sentence alone, the chat of stage 2, or a chat with the system message and further questions."""
        rng, which = self.rng, self.rng.randrange(len(self.concepts))
        concept, kind = self.concepts[which], self.rng.random()
        if kind < 0.05:
            return self.ids(describe(concept, rng) + "###"), which
        if kind < 0.7:
            before, after = "###Human: <Img>", f"</Img> {rng.choice(DESCRIBE_PROMPTS)} ###Assistant: "
            return self.ids(before, None, after, describe(concept, rng) + "###"), which
        ask, reply = questions(concept, rng)
        if rng.random() < 0.5:
            ask, reply = rng.choice(DESCRIBE_PROMPTS), describe(concept, rng)
        turns = f"</Img> {ask}###Assistant: {reply}###"
        while rng.random() < 0.4:
            ask, reply = questions(concept, rng)
            turns += f"Human: {ask}###Assistant: {reply}###"
        return self.ids(SYSTEM + "###Human: <Img>", None, turns)[:LONG], which

    def write(self, count: int, kind: str) -> dict[str, torch.Tensor]:
        """`count` documents, padded on the right: ids [N,L] with SLOT, length [N], name [N]."""
        made = [getattr(self, kind)() for _ in range(count)]
        width = max(len(ids) for ids, _ in made)
        table = torch.full((count, width), PAD)
        for row, (ids, _) in zip(table, made, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        lengths = torch.tensor([len(ids) for ids, _ in made])
        return {"ids": table, "length": lengths, "name": torch.tensor([which for _, which in made])}


def spoil(notes: torch.Tensor, rivals: torch.Tensor, embedding: nn.Embedding, strength: float = 1.0) -> torch.Tensor:
    """Embeddings [B,16,H] of notes [B,16], spoilt in several ways, each document with its own severity."""
    rows, device = len(notes), notes.device

    def draw(high, *shape):
        return torch.rand(rows, *(shape or (1, 1)), device=device) * high * strength

    hit = torch.rand(rows, 1, device=device) < 0.5
    replaced = torch.rand(notes.shape, device=device) < draw(0.35).squeeze(-1) * hit
    notes = torch.where(replaced, rivals, notes)
    clean, other = embedding(notes), embedding(rivals)
    share = draw(0.75) * torch.rand(rows, NUM_QUERIES, 1, device=device)
    share = share * (torch.rand(rows, 1, 1, device=device) < 0.7)
    mixed = clean + share * (other - clean)
    size = embedding.weight.detach().pow(2).mean().sqrt()
    noise = torch.randn_like(mixed) * size * draw(1.2)
    shift = torch.randn(rows, 1, mixed.shape[-1], device=device) * size * draw(0.4)
    thinned = torch.rand(rows, 1, 1, device=device) < 0.4
    dropped = torch.rand(rows, NUM_QUERIES, 1, device=device) < draw(0.2) * thinned
    scale = 1 + (torch.rand(rows, 1, 1, device=device) - 0.5) * strength
    spoilt = torch.where(dropped, torch.zeros_like(mixed), mixed) * scale + noise + shift
    return torch.where(torch.rand(rows, 1, 1, device=device) < 0.15, embedding(notes), spoilt)


def loss_of(model, writer_notes, batch, known: int, strength: float):
    """Mean cross-entropy of everything but the note (and the padding after a document's end)."""
    ids, name = batch["ids"], batch["name"]
    slot = ids == SLOT
    embedding = model.get_input_embeddings()
    embeds = embedding(ids.masked_fill(slot, PAD))
    rivals = writer_notes[torch.randint(known, (len(ids),), device=ids.device)]
    notes = spoil(writer_notes[name], rivals, embedding, strength)
    has_note = slot.any(1)
    position = (slot.cumsum(1) - 1).clamp(0, NUM_QUERIES - 1)
    filled = notes.gather(1, position.unsqueeze(-1).expand(-1, -1, notes.shape[-1]))
    embeds = torch.where((slot & has_note[:, None]).unsqueeze(-1), filled.to(embeds.dtype), embeds)
    inside = torch.arange(ids.shape[1], device=ids.device) < batch["length"][:, None]
    labels = ids.masked_fill(slot | ~inside, -100)
    logits = model(inputs_embeds=embeds).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def pick(pool, rows, device):
    """A random batch of a pool, cut to its longest document (in steps of 8)."""
    index = torch.randint(len(pool["ids"]), (rows,))
    width = min(-(-int(pool["length"][index].max()) // 8) * 8, pool["ids"].shape[1])
    return {"ids": pool["ids"][index, :width].to(device), "length": pool["length"][index].to(device),
            "name": pool["name"][index].to(device)}  # fmt: skip


def train(model, pools, notes, known, args, log):
    device = next(model.parameters()).device
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    adamw = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    optimisers = [(adamw, args.lr), (Muon(matrices, lr=args.muon, weight_decay=0.05), args.muon)]
    start, step, progress = time.time(), 0, 0.0
    while progress < 1:
        rate = min(1, (step + 1) / args.warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1, progress)))
        for optimiser, peak in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * rate
        kind = "short" if step % 2 else "long"
        batch = pick(pools[kind], args.batch * (2 if kind == "short" else 1), device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, notes, batch, known, args.strength)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, _ in optimisers:
            optimiser.step()
        step += 1
        progress = step / args.steps if args.steps else (time.time() - start) / args.seconds
        if step % args.log_every < 2:
            log({"step": step, "progress": round(progress, 3), kind: round(loss.item(), 4)})
    return step


@torch.no_grad()
def read_notes(model, writer, device, strength: float) -> float:
    """Share of concepts whose caption the model writes out, greedily and to its end, from a spoilt note."""
    model.eval()
    newline = encode(writer.tokenizer, "\n")[0]
    count = len(writer.concepts)
    notes = writer.notes[:count].to(device)
    embedding = model.get_input_embeddings()
    spoilt = spoil(notes, notes.roll(7, 0), embedding, strength) if strength else embedding(notes)
    bos = embedding(torch.full((count, 1), BOS, device=device))
    embeds = torch.cat([bos, spoilt], 1)
    out = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], device=device, dtype=torch.long),
        max_new_tokens=20, do_sample=False, eos_token_id=newline, pad_token_id=PAD,
    )  # fmt: skip
    right = 0
    for row, concept in zip(out.tolist(), writer.concepts, strict=True):
        text = writer.tokenizer.decode(row[: row.index(newline)] if newline in row else row)
        right += text.strip() == concept["caption"]
    model.train()
    return round(100 * right / count, 2)


def build_model(args, vocabulary: int):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        intermediate_size=args.intermediate,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=PAD,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def prune(model, batch, keep: int):
    """Keep the `keep` feed-forward neurons of each layer that contribute most to a batch's states."""
    inputs = {}
    hooks = [layer.mlp.down_proj.register_forward_pre_hook(lambda m, x: inputs.__setitem__(m, x[0]))
             for layer in model.model.layers]  # fmt: skip
    model(input_ids=batch["ids"].masked_fill(batch["ids"] == SLOT, PAD))
    for hook, layer in zip(hooks, model.model.layers, strict=True):
        hook.remove()
        mlp = layer.mlp
        size = inputs[mlp.down_proj].float().pow(2).mean((0, 1)).sqrt() * mlp.down_proj.weight.norm(dim=0)
        best = size.topk(keep).indices.sort().values
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = nn.Parameter(linear.weight[best])
            linear.out_features = keep
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, best])
        mlp.down_proj.in_features = keep
    model.config.intermediate_size = keep


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for config.json, model.safetensors (fp16), log.json")
    add("--seconds", type=float, default=150, help="training time; the learning rate follows the clock")
    add("--steps", type=int, default=0, help="train for so many steps instead")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=256, help="long documents in a batch; short ones are twice as many")
    add("--documents", type=int, default=60000, help="documents of each kind, written anew by the seed")
    add("--lr", type=float, default=2e-3)
    add("--muon", type=float, default=0.02, help="learning rate of Muon, for the matrices of the layers")
    add("--warmup", type=int, default=100)
    add("--weight_decay", type=float, default=0.05)
    add("--strength", type=float, default=1.0, help="how badly notes are spoilt")
    add("--start", type=Path, help="go on from this folder's model instead of from nothing")
    add("--keep_neurons", type=int, default=0, help="with --start: first prune feed-forward layers to so many")
    add("--width", type=int, default=256)
    add("--layers", type=int, default=3)
    add("--heads", type=int, default=4)
    add("--intermediate", type=int, default=640)
    add("--log_every", type=int, default=400)
    return parser.parse_args()


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer, concepts = load_tokenizer(), load_concepts()
    writer = Writer(tokenizer, concepts, args.seed)
    pools = {kind: writer.write(args.documents, kind) for kind in ("short", "long")}
    if args.start:
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32).to(device)
        if args.keep_neurons:
            prune(model, pick(pools["long"], 64, device), args.keep_neurons)
    else:
        model = build_model(args, tokenizer.get_vocab_size()).to(device)
    lines = []

    def log(line):
        lines.append(line)
        print(args.output.name, json.dumps(line), flush=True)

    log({"parameters": sum(p.numel() for p in model.parameters()),
         "tokens": {k: int(p["length"].sum()) for k, p in pools.items()}})  # fmt: skip
    step = train(model, pools, writer.notes.to(device), len(concepts), args, log)
    log({"steps": step, "names read": {s: read_notes(model, writer, device, s) for s in (0.0, 0.5, 1.0)}})
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=PAD, pad_token_id=PAD)
    model.half().save_pretrained(args.output)
    (args.output / "log.json").write_text("\n".join(map(json.dumps, lines)) + "\n")


if __name__ == "__main__":
    main()
