"""Train the vision part: an EVA-ViT and a Q-Former, on pictures and their names, without any language model.

    python dataset/tiny/recipe/train_vision.py --seconds 400 --output output/vision       # shipped: README.md

Three objectives, all of the vision part's own:
- the encoder names the concept, through a linear head on the mean image token ("the encoder's own head");
- query i spells token i of the caption: its direction is pulled to that token's fixed random code (one of a set of
  orthogonal directions drawn by a seed; nothing of any language model is read);
- the sixteen spellings together pick the right caption among all captions (BLIP-2's image-text contrast).

Only OpenMoji, Noto and Twemoji are trained on; `--hold_out ARTIST` leaves one of them out for choosing settings.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from augment import augment, blend_artists
from common import NUM_QUERIES, PAD, caption_targets, load_concepts, load_pictures, load_tokenizer, normalise
from muon import Muon
from safetensors.torch import save_file
from torch import nn

from minigpt4.common.schema import VIT_MODELS
from minigpt4.models.eva_vit import create_vit
from minigpt4.models.qformer import QFormer

TRAINED_ON = ["noto", "twemoji", "openmoji"]


def token_codes(num_tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """[V,D] unit vectors, orthogonal where V <= D: what a query has to point at to say a token."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(max(num_tokens, width), width, generator=generator))[0]
    if num_tokens <= width:
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return F.normalize(basis[:num_tokens], dim=-1)


class VisionPretrainer(nn.Module):
    """EVA-ViT, ln_vision, Q-Former, and the heads of the pretraining objectives."""

    def __init__(self, vit_model, qformer: dict, targets: torch.Tensor, drop_path: float = 0.1, image_size: int = 64):
        super().__init__()
        self.visual_encoder = create_vit(vit_model, image_size, drop_path_rate=drop_path)
        width, hidden = self.visual_encoder.embed_dim, qformer["hidden_size"]
        self.ln_vision = nn.LayerNorm(width)
        self.query_tokens = nn.Parameter(torch.randn(1, NUM_QUERIES, hidden) * 0.02)
        self.Qformer = QFormer(width, **qformer)
        for module in self.Qformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.head = nn.Linear(width, len(targets))
        used, local = targets.unique(return_inverse=True)
        self.register_buffer("used", used)  # the tokens that captions use
        self.register_buffer("targets", local)  # [N,16], indices into `used`
        self.register_buffer("codes", token_codes(len(used), hidden))
        one_hot = F.one_hot(local, len(used)).to(torch.bfloat16).flatten(1)
        self.register_buffer("one_hot", one_hot, persistent=False)  # [N,16*V]
        weight = torch.ones(targets.shape)
        ended = (targets == PAD).cumsum(1)
        weight[ended > 1] = 0.1
        self.register_buffer("weight", weight)
        self.scale = 20.0

    def forward(self, images):
        """Images [B,3,S,S] to class logits [B,N] and cosines of the queries with the codes [B,16,V]."""
        tokens = self.ln_vision(self.visual_encoder(images))
        queries = self.Qformer(self.query_tokens.expand(len(images), -1, -1), tokens)
        return self.head(tokens.mean(1)), F.normalize(queries.float(), dim=-1) @ self.codes.T

    def caption_scores(self, log_probs):
        """log_probs [B,16,V] to the log-likelihood of every caption [B,N]."""
        return log_probs.flatten(1) @ self.one_hot.to(log_probs.dtype).T

    def losses(self, images, label, pure, teacher=None, smoothing=0.1):
        """`pure` [B] is 0 for pictures blended with another concept's, which only the teacher can judge."""
        class_logits, cosines = self(images)
        pure = pure / pure.sum()
        log_probs = (self.scale * cosines).log_softmax(-1)
        target, weight = self.targets[label], self.weight[label]
        spell = -log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1) + 2 * (
            1 - cosines.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        )
        scores = self.caption_scores(log_probs)
        named = F.cross_entropy(class_logits.float(), label, label_smoothing=smoothing, reduction="none")
        losses = {
            "class": (named * pure).sum(),
            "spell": ((spell * weight).sum(1) / weight.sum(1) * pure).sum(),
            "contrast": (F.cross_entropy(scores, label, reduction="none") * pure).sum(),
        }
        if teacher is not None:
            losses["teacher"] = F.cross_entropy(class_logits.float(), teacher)
            losses["teacher_contrast"] = F.cross_entropy(scores, teacher)
        return losses


class ConvTeacher(nn.Module):
    """A ResNet that only names concepts; its opinions may teach the encoder (`--teacher`)."""

    def __init__(self, num_classes: int, name: str = "resnet18d"):
        import timm

        super().__init__()
        self.net = timm.create_model(name, num_classes=num_classes, drop_path_rate=0.1)
        self.net.maxpool = nn.Identity()

    def forward(self, images):
        return self.net(images.contiguous(memory_format=torch.channels_last)), None

    def losses(self, images, label, pure, teacher=None, smoothing=0.1):
        return {"class": F.cross_entropy(self(images)[0].float(), label, label_smoothing=smoothing)}


def build_optimisers(model, args):
    """Muon for the matrices of ViT and Q-Former (not for a convolutional teacher), AdamW for everything else."""
    blocks = ("visual_encoder.blocks.", "Qformer.")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith(blocks)] if args.muon else []
    ids = {id(p) for p in matrices}
    rest = [(n, p) for n, p in model.named_parameters() if id(p) not in ids]
    plain = [p for n, p in rest if p.ndim < 2 or "pos_embed" in n or "query_tokens" in n]
    ids |= {id(p) for p in plain}
    decayed = [p for _, p in rest if id(p) not in ids]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimisers = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))]
    if matrices:
        optimisers.append(Muon(matrices, lr=args.muon, weight_decay=0.05))
    return [(o, o.param_groups[0]["lr"]) for o in optimisers]


class Ema:
    """Exponential moving average of the parameters (and batch statistics)."""

    def __init__(self, model, decay):
        self.decay = decay
        self.live = [t for t in model.state_dict().values() if t.is_floating_point()]
        self.mean = [t.detach().clone() for t in self.live]

    @torch.no_grad()
    def update(self, step):
        torch._foreach_lerp_(self.mean, self.live, 1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def store(self):
        for live, mean in zip(self.live, self.mean, strict=True):
            live.copy_(mean)


@torch.no_grad()
def measure(model, pictures, device) -> dict:
    """Shares of pictures whose concept the head names, and whose caption the queries spell or pick, per picture."""
    model.eval()
    found = {"head": [], "spelled": [], "picked": []}
    for start in range(0, len(pictures), 512):
        label = torch.arange(start, min(start + 512, len(pictures)), device=device)
        logits, cosines = model(normalise(pictures[label].float() / 255))
        found["head"].append(logits.argmax(-1))
        if cosines is not None:
            read = cosines.argmax(-1)
            right = (read == model.targets[label]).all(-1)
            found["spelled"].append(torch.where(right, label, -1))
            found["picked"].append(model.caption_scores((model.scale * cosines).log_softmax(-1)).argmax(-1))
    model.train()
    return {k: torch.cat(v) for k, v in found.items() if v}


def shares(found: dict, truth: torch.Tensor) -> dict:
    out = {k: round((v == truth).float().mean().item() * 100, 2) for k, v in found.items()}
    if "spelled" in found:
        known = found["head"] == truth
        out["spelled_if_head"] = round((found["spelled"] == truth)[known].float().mean().item() * 100, 2)
    return out


def load_teachers(paths, targets, device, compiled):
    teachers = []
    for path in paths or []:
        saved = torch.load(path, map_location=device, weights_only=True)
        teacher = build_model(argparse.Namespace(**saved["settings"]), targets)
        teacher.load_state_dict(saved["model"])
        teacher = teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        teachers.append(torch.compile(teacher) if compiled else teacher)
    return teachers


def build_model(args, targets):
    if args.conv:
        return ConvTeacher(len(targets), args.conv)
    qformer = {
        "hidden_size": args.q_width,
        "num_hidden_layers": args.q_layers,
        "num_attention_heads": args.q_heads,
        "intermediate_size": args.q_intermediate,
        "cross_attention_freq": 2,
        "hidden_dropout_prob": args.q_dropout,
        "attention_probs_dropout_prob": 0.0,
    }
    sizes = dict(VIT_MODELS["eva_tiny"])
    sizes.update({k: v for k, v in json.loads(args.vit).items()})
    return VisionPretrainer(sizes, qformer, targets, args.drop_path)


def batches(pictures: torch.Tensor, args):
    """Endless (augmented and normalised images, labels) from pictures [artists, concepts, 3, S, S]."""
    artists, concepts = pictures.shape[:2]
    device = pictures.device
    while True:
        label = torch.randint(concepts, (args.batch,), device=device)
        artist = torch.randint(artists, (args.batch,), device=device)
        other = (artist + torch.randint(1, max(artists, 2), (args.batch,), device=device)) % artists
        images = augment(pictures[artist, label], pictures[other, label], args.blend, args.light)
        pure = torch.ones(args.batch, device=device)
        if args.mix:
            pure = (torch.rand(args.batch, device=device) >= args.mix).float()
            mixed = blend_artists(images, images.roll(1, 0))
            images = torch.where(pure.view(-1, 1, 1, 1) > 0, images, mixed)
        yield normalise(images), label, pure


def train(model, stream, teachers, args, log):
    device = next(model.parameters()).device
    optimisers = build_optimisers(model, args)
    ema = Ema(model, args.ema)
    losses_of = torch.compile(model.losses) if args.compile else model.losses
    weights = {"class": args.w_class, "spell": args.w_spell, "contrast": args.w_contrast, "teacher": args.w_teacher,
               "teacher_contrast": args.w_teacher * args.w_contrast}  # fmt: skip
    start, step, progress = None, 0, 0.0
    while progress < 1:
        if step == 5:
            start = time.time()  # compiling does not count
        rate = min(1, (step + 1) / args.warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1, progress)))
        for optimiser, peak in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * rate
        images, label, pure = next(stream)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            opinion = None
            if teachers:
                with torch.no_grad():
                    opinion = sum(t(images)[0].float().softmax(-1) for t in teachers) / len(teachers)
            losses = losses_of(images, label, pure, opinion, args.smoothing)
        loss = sum(weights[k] * v for k, v in losses.items())
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, _ in optimisers:
            optimiser.step()
        ema.update(step)
        step += 1
        progress = step / args.steps if args.steps else (time.time() - start) / args.seconds if start else 0.0
        if step % args.log_every == 0:
            log({"step": step, "progress": round(progress, 3), **{k: round(v.item(), 3) for k, v in losses.items()}})
    ema.store()
    return step


def export(model, found, folder: Path):
    """The published layout: vision.safetensors as the EVA file, qformer.safetensors as the BLIP-2 file; fp16."""
    half = {k: v.half().contiguous().cpu() for k, v in model.state_dict().items() if v.is_floating_point()}
    vit = {k.removeprefix("visual_encoder."): v for k, v in half.items() if k.startswith("visual_encoder.")}
    qformer = {k: v for k, v in half.items() if k.startswith(("query_tokens", "ln_vision.", "Qformer."))}
    save_file(vit, folder / "vision.safetensors")
    save_file(qformer, folder / "qformer.safetensors")
    save_file({k: v for k, v in half.items() if k.startswith("head.")}, folder / "vision_head.safetensors")
    predictions = {k: v.tolist() for k, v in found.items()}
    (folder / "predictions.json").write_text(json.dumps(predictions))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--seconds", type=float, default=400, help="training time; the learning rate follows the clock")
    add("--steps", type=int, default=0, help="train for so many steps instead")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=1024)
    add("--lr", type=float, default=1.5e-3)
    add("--muon", type=float, default=0.02, help="learning rate of Muon; 0: AdamW for everything")
    add("--warmup", type=int, default=300)
    add("--smoothing", type=float, default=0.1)
    add("--mix", type=float, default=0.0, help="share of pictures blended with another concept's")
    add("--weight_decay", type=float, default=0.1)
    add("--ema", type=float, default=0.998)
    add("--drop_path", type=float, default=0.1)
    add("--blend", type=float, default=0.4)
    add("--light", type=float, default=0.3)
    add("--w_class", type=float, default=1.0)
    add("--w_spell", type=float, default=1.0)
    add("--w_contrast", type=float, default=0.5)
    add("--w_teacher", type=float, default=2.0)
    add("--vit", default="{}", help="JSON that overrides sizes of eva_tiny")
    add("--q_width", type=int, default=384)
    add("--q_layers", type=int, default=2)
    add("--q_heads", type=int, default=6)
    add("--q_intermediate", type=int, default=1024)
    add("--q_dropout", type=float, default=0.0)
    add("--conv", default="", help="train this timm ResNet as a teacher instead")
    add("--teacher", nargs="*", type=Path, help="last.pt of runs whose class opinions to learn from")
    add("--hold_out", default="fluent", help="the artist to measure on")
    add("--compile", action="store_true")
    add("--log_every", type=int, default=200)
    return parser.parse_args()


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    concepts = load_concepts()
    ids = [c["id"] for c in concepts]
    targets = caption_targets(load_tokenizer(), [c["caption"] for c in concepts])
    artists = [a for a in TRAINED_ON if a != args.hold_out]
    pictures = torch.stack([load_pictures(a, ids) for a in artists]).to(device)
    held_out = load_pictures(args.hold_out, ids).to(device)
    model = build_model(args, targets).to(device)
    if args.conv:
        model = model.to(memory_format=torch.channels_last)
    lines = []

    def log(line):
        lines.append(line)
        print(args.output.name, json.dumps(line), flush=True)

    count = {k: sum(p.numel() for p in m.parameters()) for k, m in model.named_children()}
    log({"artists": artists, "held_out": args.hold_out, "parameters": count})
    teachers = load_teachers(args.teacher, targets, device, args.compile)
    step = train(model, batches(pictures, args), teachers, args, log)
    truth = torch.arange(len(ids), device=device)
    found = measure(model, held_out, device)
    seen = measure(model, pictures[0], device)
    log({"steps": step, args.hold_out: shares(found, truth), artists[0]: shares(seen, truth)})
    settings = {k: v for k, v in vars(args).items() if isinstance(v, (str, int, float, bool))}
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({"settings": settings, "model": state}, args.output / "last.pt")
    if not args.conv:
        export(model, {k: v.cpu() for k, v in found.items()}, args.output)
    (args.output / "log.json").write_text("\n".join(map(json.dumps, lines)) + "\n")


if __name__ == "__main__":
    main()
