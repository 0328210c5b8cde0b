"""Make sets of conversations about emoji: what they are, which colour, which kind, and how many.

docs/own_data.md and docs/smollm2.md train on them.

    python dataset/prepare_tiny.py         # draws the pictures by OpenMoji
    python dataset/emoji_questions.py      # or: --output data/emoji_questions

The same inputs always give the same files:

    data/emoji_questions/train.jsonl       conversations about drawings by OpenMoji, Noto and Twemoji
    data/emoji_questions/heldout.jsonl     about drawings by Fluent, which nothing was trained on
    data/emoji_questions/names.jsonl       what is drawn, a question about each drawing by OpenMoji, Noto and Twemoji
    data/emoji_questions/image/            the pictures of all three

Conversations have one to three questions, and one picture or two. The colour of a drawing is measured from its pixels,
the kind of a thing is Unicode's subgroup, and a picture to count has a drawing one to four times. The folder appears
when it is complete. A folder that exists is never changed.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_pictures import SIZE, TINY_DIR, read_pictures
from tiny_text import Concept, load_concepts

from minigpt4.common.output import whole_folder

ROOT = Path(__file__).resolve().parents[1]
SEED = 18
CONVERSATIONS = {"train": 6000, "heldout": 1000}
ARTISTS = {"train": ("openmoji", "noto", "twemoji"), "heldout": ("fluent",)}
# A drawing has a colour if at least so many of its pixels, white ones left out, have it.
SHARE = 0.65
# Hue in degrees, least saturation, least and greatest value. What lies between two of them is no clear colour.
COLOURS = {
    "red": ((345, 11), 150, (170, 255)),
    "orange": ((15, 33), 170, (200, 255)),
    "yellow": ((37, 64), 120, (200, 255)),
    "brown": ((5, 40), 90, (70, 185)),
    "green": ((75, 165), 80, (70, 255)),
    "blue": ((185, 245), 80, (70, 255)),
    "purple": ((255, 305), 80, (70, 255)),
}
# The kinds of things, by Unicode's subgroup or its beginning.
KINDS = {
    "animal-": "animals", "plant-": "plants", "food-fruit": "fruit", "food-vegetable": "vegetables",
    "food-prepared": "food", "food-asian": "food", "food-sweet": "food", "drink": "drinks",
    "place-building": "buildings", "clothing": "clothing", "musical-instrument": "instruments", "face-": "faces",
    "heart": "hearts", "hand-": "hands", "arrow": "arrows", "tool": "tools",
}  # fmt: skip
NUMBERS = ("one", "two", "three", "four")
# The frozen language model knows a few questions (dataset/tiny/recipe/train_language.py). These resemble them.
QUESTIONS = {
    "colour": "Which colour goes with it?",
    "kind": "Which group does it belong to?",
    "count": "How many do you see?",
}
NAME_QUESTION = "What is this?"
ANSWERS = {"colour": "It goes with {}.", "kind": "It belongs to {}.", "count": "I see {}."}


@dataclass(frozen=True)
class Drawing:
    """A thing by one artist. `colour` and `kind` are None where they are not clear."""

    concept: Concept
    artist: str
    picture: Image.Image
    colour: str | None
    kind: str | None


def colour_of(picture: Image.Image) -> str | None:
    """The colour of a drawing on white; None if it has no clear colour or several."""
    hue, saturation, value = np.moveaxis(np.asarray(picture.convert("HSV"), dtype=int), -1, 0)
    hue = hue * 360 // 256
    enough = SHARE * max(((saturation > 20) | (value < 235)).sum(), 1)
    for name, ((low, high), vivid, (dark, light)) in COLOURS.items():
        within = (hue >= low) & (hue <= high) if low < high else (hue >= low) | (hue <= high)
        if (within & (saturation >= vivid) & (value >= dark) & (value <= light)).sum() >= enough:
            return name
    return None


def kind_of(concept: Concept) -> str | None:
    """The kind of a thing; None if Unicode's subgroup does not tell it."""
    return next((kind for start, kind in KINDS.items() if concept.subgroup.startswith(start)), None)


def several(picture: Image.Image, number: int, rng: random.Random) -> Image.Image:
    """A white picture with a drawing `number` times, at random quarters."""
    canvas, half = Image.new("RGB", (SIZE, SIZE), "white"), SIZE // 2
    small = picture.resize((half, half), Image.Resampling.LANCZOS)
    for place in rng.sample(range(4), number):
        canvas.paste(small, (place % 2 * half, place // 2 * half))
    return canvas


class Writer:
    """Writes conversations about some drawings. Every colour, kind and number is asked for equally often."""

    def __init__(self, drawings: list[Drawing], rng: random.Random) -> None:
        self.rng, self.by_answer = rng, {"colour": {}, "kind": {}}
        for drawing in drawings:
            for topic, groups in self.by_answer.items():
                if answer := getattr(drawing, topic):
                    groups.setdefault(answer, []).append(drawing)

    def draw(self, topic: str) -> Drawing:
        """A drawing of which one can ask about a topic."""
        groups = self.by_answer[topic]
        return self.rng.choice(groups[self.rng.choice(sorted(groups))])

    def conversation(self) -> tuple[list[Image.Image], list[dict]]:
        """The pictures and the messages of a conversation: one picture, one to count, or one after another."""
        rng, topic = self.rng, self.rng.choice(["colour", "kind"])
        form = rng.choice(["one", "count", "two"])
        first = self.draw(topic)
        if form == "count":
            number = rng.randint(1, len(NUMBERS))
            picture = several(first.picture, number, rng)
            asked = [("count", NUMBERS[number - 1]), (topic, getattr(first, topic))]
            rng.shuffle(asked)
            return [picture], messages([asked[: rng.choice([1, 2, 2])]])
        pictures, asked = [first.picture], [self.about(first, topic)]
        if form == "two":
            second = self.draw(topic)
            pictures.append(second.picture)
            asked.append([(topic, getattr(second, topic))])
        return pictures, messages(asked)

    def about(self, drawing: Drawing, topic: str) -> list[tuple[str, str]]:
        """(topic, answer) of one or two questions about a drawing."""
        asked = [
            (name, getattr(drawing, name)) for name in ("colour", "kind") if name == topic or self.rng.random() < 0.5
        ]
        self.rng.shuffle(asked)
        return [(name, answer) for name, answer in asked if answer]


def messages(per_picture: list[list[tuple[str, str]]]) -> list[dict]:
    """The messages of a conversation from (topic, answer) of the questions about each picture in turn."""
    found = []
    for asked in per_picture:
        for number, (topic, answer) in enumerate(asked):
            question = QUESTIONS[topic] if number else f"<image> {QUESTIONS[topic]}"
            found.append({"role": "user", "content": question})
            found.append({"role": "assistant", "content": ANSWERS[topic].format(answer)})
    return found


def topic_of(question: str) -> str:
    """What a question is about: a key of QUESTIONS."""
    return next(topic for topic, text in QUESTIONS.items() if question.endswith(text))


def load_drawings(openmoji: Path) -> dict[str, list[Drawing]]:
    """The drawings of each split. Exits if OpenMoji's are missing."""
    if not openmoji.is_file():
        sys.exit(
            f"Error: there is no {openmoji}. Run python dataset/prepare_tiny.py first, or name it with --openmoji."
        )
    found = {}
    for split, artists in ARTISTS.items():
        found[split] = []
        for artist in artists:
            pictures = read_pictures(openmoji if artist == "openmoji" else TINY_DIR / f"{artist}.tar.gz")
            for concept in load_concepts():
                picture = pictures[concept.id]
                found[split].append(Drawing(concept, artist, picture, colour_of(picture), kind_of(concept)))
    return found


def write(folder: Path, drawings: dict[str, list[Drawing]]) -> dict[str, int]:
    """Write the conversations of each split, and their pictures. Returns the number of questions of each split."""
    (folder / "image").mkdir()
    counts = {}
    for split, number in CONVERSATIONS.items():
        writer, questions = Writer(drawings[split], random.Random(f"{SEED} {split}")), 0
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for index in range(number):
                pictures, texts = writer.conversation()
                names = [f"image/{split}-{index:05d}-{place}.png" for place in range(len(pictures))]
                for name, picture in zip(names, pictures, strict=True):
                    picture.save(folder / name)
                record = {"id": f"{split}-{index:05d}", "images": names, "messages": texts}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                questions += len(texts) // 2
        counts[split] = questions
    return counts


def write_names(folder: Path, drawings: list[Drawing]) -> None:
    """Write a question about each drawing, what it is, and the pictures."""
    with open(folder / "names.jsonl", "w", encoding="utf-8") as file:
        for drawing in drawings:
            name = f"image/{drawing.artist}-{drawing.concept.id}.png"
            drawing.picture.save(folder / name)
            record = {"image": name, "prompt": NAME_QUESTION, "answer": drawing.concept.name}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = ROOT / "data"
    parser.add_argument("--output", type=Path, default=data / "emoji_questions", help="folder (data/emoji_questions)")
    parser.add_argument("--openmoji", type=Path, default=data / "tiny" / "openmoji.tar", help="by prepare_tiny.py")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists, and is not changed. Remove it, or name another folder with --output.")
    drawings = load_drawings(args.openmoji)
    with whole_folder(args.output) as folder:
        counts = write(folder, drawings)
        write_names(folder, drawings["train"])
    for split, number in counts.items():
        print(f"{args.output / split}.jsonl: {CONVERSATIONS[split]} conversations, {number} questions.")
    print(f"{args.output}/names.jsonl: {len(drawings['train'])} questions.")


if __name__ == "__main__":
    main()
