"""Evaluate the tiny default on the held-out artist: figures and a contact sheet.

    python dataset/tiny_report.py --stage1 output/minigpt4_tiny_stage1_pretrain/<job id> \
                                  --stage2 output/minigpt4_tiny_stage2_finetune/<job id>

`make quickstart` runs it. The evaluation uses Fluent's drawings, which nothing was trained on.
"""

import argparse
import json
import random
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from tiny_pictures import refuse_existing
from tiny_text import exact, full_sentence, named

from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.fast.decoding.loop import cached_decoding
from minigpt4.models import MiniGPT4
from minigpt4.models.generation import answer_text, continue_embeds
from minigpt4.models.prompt import IMAGE_SLOT

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "output" / "quickstart"
HELD_OUT = ROOT / "data" / "tiny" / "heldout"
HEAD_PREDICTIONS = ROOT / "dataset" / "tiny" / "head_predictions.json"
EVAL_CONFIG = ROOT / "eval_configs" / "minigpt4_tiny_eval.yaml"
SHOWCASE_SEED = 2023
BATCH_SIZE = 64


@dataclass
class Answer:
    """The model's answer about one picture. stopped: the answer ended by itself."""

    text: str
    stopped: bool


def held_out() -> list[dict]:
    """Records {"image_id", "caption": the concept's name} of the held-out pictures."""
    return json.loads((HELD_OUT / "filter_cap.json").read_text(encoding="utf-8"))["annotations"]


def showcase(records: list[dict], count: int = 12) -> list[int]:
    """Indices of the pictures on the contact sheet, drawn with a fixed seed."""
    return random.Random(SHOWCASE_SEED).sample(range(len(records)), count)


def load_model(ckpt: str | Path | None) -> MiniGPT4:
    """The tiny model with the projection of a run (None: untrained)."""
    options = [f"model.ckpt={ckpt or 'null'}"]
    cfg = Config(SimpleNamespace(cfg_path=EVAL_CONFIG, options=options))
    cfg.check_paths()
    torch.manual_seed(3)  # for the untrained projection
    return MiniGPT4.from_config(cfg.model_cfg).eval()


@torch.inference_mode()
def describe_all(model: MiniGPT4, records: list[dict], prompt: str, stop: str, max_new_tokens: int) -> list[Answer]:
    """The greedy answer to each held-out picture, in the order of the records."""
    processor = registry.get_processor_class("blip2_image_eval")(image_size=64)
    answers = []
    for first in range(0, len(records), BATCH_SIZE):
        batch = records[first : first + BATCH_SIZE]
        files = (HELD_OUT / "image" / f"{record['image_id']}.jpg" for record in batch)
        images = torch.stack([processor(Image.open(file)) for file in files])
        embeds, mask = model.context([prompt] * len(batch), model.encode_img(images)[0].unsqueeze(1))
        options = {"decoding_loop": cached_decoding, "max_new_tokens": max_new_tokens}
        rows = continue_embeds(model.llama_model, model.tokenizer, embeds, mask, stop, **options).tolist()
        answers += [
            Answer(answer_text(model.tokenizer, row, stop), stop in model.tokenizer.decode(row)) for row in rows
        ]
    return answers


def stage1_answers(model: MiniGPT4, records: list[dict]) -> list[Answer]:
    """Answers in the form of stage 1: the prompt is the image alone, and a newline ends the answer."""
    return describe_all(model, records, IMAGE_SLOT, "\n", max_new_tokens=30)


def stage2_answers(model: MiniGPT4, records: list[dict]) -> list[Answer]:
    """Answers in the form of stage 2: the first prompt in the chat template, and ### ends the answer."""
    return describe_all(model, records, model.prompt_list[0], model.end_sym, max_new_tokens=100)


def percent(hits) -> float:
    hits = list(hits)
    return round(100 * sum(hits) / len(hits), 1)


def known_to_head(records: list[dict]) -> list[bool]:
    """For each held-out picture, whether the head that pretrained the encoder names it right (dataset/tiny/recipe)."""
    predicted = json.loads(HEAD_PREDICTIONS.read_text(encoding="utf-8"))
    return [predicted[record["concept"]] == record["concept"] for record in records]


def measure(records: list[dict], untrained: list[Answer], stage1: list[Answer], stage2: list[Answer]) -> dict:
    """The results, in per cent of the held-out pictures."""
    names = [record["caption"] for record in records]
    head = known_to_head(records)
    right = [exact(a.text, n) for a, n in zip(stage1, names, strict=True)]
    shuffled = random.Random(0).sample(names, len(names))
    return {
        "pictures": len(names),
        "exact name, untrained": percent(exact(a.text, n) for a, n in zip(untrained, names, strict=True)),
        "exact name, stage 1": percent(right),
        "exact name, stage 1, of those that the encoder's own head knows": percent(
            r for r, known in zip(right, head, strict=True) if known
        ),
        "known to the encoder's own head": percent(head),
        "exact name, stage 1, names shuffled": percent(exact(a.text, n) for a, n in zip(stage1, shuffled, strict=True)),
        "named, stage 2": percent(named(a.text, n) for a, n in zip(stage2, names, strict=True)),
        "full sentences that stop at ### by themselves, stage 2": percent(
            full_sentence(a.text) and a.stopped for a in stage2
        ),
    }


def draw_sheet(path: Path, records: list[dict], columns: dict[str, list[Answer]]) -> None:
    """Draw a contact sheet: pictures, their names, and the answers of each model."""
    figure, axes = plt.subplots(4, 3, figsize=(15, 11))
    for axis, index in zip(axes.flat, showcase(records), strict=True):
        record = records[index]
        axis.imshow(Image.open(HELD_OUT / "image" / f"{record['image_id']}.jpg"), extent=(0, 1, 0, 1))
        axis.set(xlim=(0, 3.6), ylim=(-0.4, 1.05))
        axis.set_axis_off()
        lines = [("truth", record["caption"])] + [(title, answers[index].text) for title, answers in columns.items()]
        for row, (title, text) in enumerate(lines):
            y = 1.0 - row * 0.33
            axis.text(1.08, y, title, fontsize=8, color="gray", va="top")
            # There is room for three lines of the last answer, and one of the others.
            most = 3 if row == len(lines) - 1 else 1
            wrapped = textwrap.wrap(text.replace("\n", "⏎"), 46, max_lines=most, placeholder=" …") or ["(nothing)"]
            axis.text(1.08, y - 0.1, "\n".join(wrapped), fontsize=9, va="top", wrap=False)
    figure.suptitle("Drawings of an artist the model has never seen (Fluent Emoji, Microsoft, MIT licence)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(stage1: Path, stage2: Path, output: Path) -> dict:
    """Evaluate the untrained model, stage 1 and stage 2. Writes the sheet and the figures, and returns the figures."""
    records = held_out()
    untrained = stage1_answers(load_model(None), records)
    first = stage1_answers(load_model(stage1), records)
    second = stage2_answers(load_model(stage2), records)
    figures = measure(records, untrained, first, second)
    output.mkdir(parents=True, exist_ok=True)
    columns = {"before training": untrained, "after stage 1": first, "after stage 2": second}
    draw_sheet(output / "contact_sheet.png", records, columns)
    (output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage1", type=Path, required=True, help="run folder or checkpoint of stage 1")
    parser.add_argument("--stage2", type=Path, required=True, help="run folder or checkpoint of stage 2")
    parser.add_argument("--output", type=Path, default=QUICKSTART, help="where the files go")
    args = parser.parse_args()
    refuse_existing(args.output, ("contact_sheet.png", "figures.json"), own=QUICKSTART)
    for name, value in report(args.stage1, args.stage2, args.output).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
