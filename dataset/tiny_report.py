"""The figures of the quick start, and a contact sheet, from three evaluations of the held-out artist.

    python dataset/tiny_report.py --untrained FOLDER --stage1 FOLDER --stage2 FOLDER

`make quickstart` runs it. Each folder is an `--out` of `minigpt4 evaluate` with the task of tiny_names.py. The pictures
are Fluent's drawings, which nothing was trained on.
"""

import argparse
import json
import random
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from tiny_pictures import refuse_existing

QUICKSTART = Path(__file__).resolve().parents[1] / "output" / "quickstart"
SHOWCASE_SEED = 2023
TITLES = {"untrained": "before training", "stage1": "after stage 1", "stage2": "after stage 2"}
# Name in figures.json -> the evaluation, its figure.
FIGURES = {
    "exact name, untrained": ("untrained", "exact name"),
    "exact name, stage 1": ("stage1", "exact name"),
    "exact name, stage 1, of those that the encoder's own head knows": (
        "stage1",
        "exact name, of those that the head knows",
    ),
    "known to the encoder's own head": ("stage1", "known to the head"),
    "exact name, stage 1, names shuffled": ("stage1", "exact name, names shuffled"),
    "named, stage 2": ("stage2", "named"),
    "full sentences that stop at ### by themselves, stage 2": ("stage2", "full sentences that end by themselves"),
}


def figures_of(folders: dict[str, Path]) -> dict[str, float]:
    """The figures of the quick start, in per cent of the held-out pictures."""
    scores = {
        name: json.loads((folder / "scores.json").read_text(encoding="utf-8")) for name, folder in folders.items()
    }
    found = {name: scores[stage]["figures"][figure] for name, (stage, figure) in FIGURES.items()}
    per_cent = {name: round(figure["value"] * figure["scale"], 1) for name, figure in found.items()}
    return {"pictures": scores["stage1"]["n"], **per_cent}


def draw_sheet(path: Path, folders: dict[str, Path]) -> None:
    """Draw a contact sheet: twelve pictures, their names, and the answers of each evaluation."""
    answers = {
        TITLES[name]: {line["id"]: line for line in map(json.loads, (folder / "answers.jsonl").open(encoding="utf-8"))}
        for name, folder in folders.items()
    }
    first = next(iter(answers.values()))
    pictures = Path(first["0"]["image"]).parents[1]
    names = {
        record["image_id"]: record["caption"]
        for record in json.loads((pictures / "filter_cap.json").read_text(encoding="utf-8"))["annotations"]
    }
    chosen = random.Random(SHOWCASE_SEED).sample(list(names), 12)
    figure, axes = plt.subplots(4, 3, figsize=(15, 11))
    for axis, number in zip(axes.flat, chosen, strict=True):
        axis.imshow(Image.open(first[number]["image"]), extent=(0, 1, 0, 1))
        axis.set(xlim=(0, 3.6), ylim=(-0.4, 1.05))
        axis.set_axis_off()
        lines = [("truth", names[number])] + [(title, each[number]["answer"]) for title, each in answers.items()]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, title in TITLES.items():
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FOLDER", help=f"the evaluation {title}")
    parser.add_argument("--output", type=Path, default=QUICKSTART, help="where the files go")
    args = parser.parse_args()
    refuse_existing(args.output, ("contact_sheet.png", "figures.json"), own=QUICKSTART)
    folders = {name: getattr(args, name) for name in TITLES}
    figures = figures_of(folders)
    args.output.mkdir(parents=True, exist_ok=True)
    draw_sheet(args.output / "contact_sheet.png", folders)
    (args.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
