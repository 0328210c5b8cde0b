"""Example pictures for the web page, drawn by this code."""

import tarfile
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 256


def _house(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIZE, 170), fill="#9fd3f5")
    draw.ellipse((160, 25, 225, 90), fill="#ffd23f")
    draw.rectangle((0, 170, SIZE, SIZE), fill="#7cb65b")
    draw.rectangle((60, 120, 150, 200), fill="#d9653b")
    draw.polygon(((50, 120), (105, 70), (160, 120)), fill="#7b2d26")
    draw.rectangle((95, 155, 117, 200), fill="#4a2c17")


def _boat(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIZE, 165), fill="#fce2c4")
    draw.rectangle((0, 165, SIZE, SIZE), fill="#2f7fb5")
    draw.polygon(((55, 165), (205, 165), (175, 205), (85, 205)), fill="#8a4b2a")
    draw.rectangle((126, 50, 132, 165), fill="#4a2c17")
    draw.polygon(((136, 55), (136, 150), (195, 150)), fill="#ffffff")
    draw.polygon(((122, 70), (122, 150), (80, 150)), fill="#e8483f")


def _tree(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIZE, 200), fill="#dff1fb")
    draw.rectangle((0, 200, SIZE, SIZE), fill="#8fc46b")
    draw.rectangle((116, 130, 140, 215), fill="#6b4226")
    for box in ((70, 60, 150, 140), (110, 60, 190, 140), (90, 25, 170, 105)):
        draw.ellipse(box, fill="#3f8f4f")
    for x, y in ((100, 95), (150, 70), (160, 110), (125, 50)):
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill="#e23b3b")


def _shapes(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIZE, SIZE), fill="#ffffff")
    draw.ellipse((25, 30, 115, 120), fill="#e23b3b")
    draw.rectangle((140, 35, 225, 120), fill="#2f6fde")
    draw.polygon(((128, 145), (60, 230), (196, 230)), fill="#f2b01e")


DRAWINGS = {"house": _house, "boat": _boat, "tree": _tree, "shapes": _shapes}


# Emoji by Microsoft's artists (Fluent, MIT), whom the tiny model has never seen; in a checkout of the repository.
EMOJI_TAR = Path(__file__).resolve().parents[2] / "dataset" / "tiny" / "fluent.tar.gz"
EMOJI = ("1f431", "1f34e", "26f5", "1f697")


def save_examples(folder: Path, emoji: bool = False) -> list[Path]:
    """Put example pictures into `folder`, our drawings or, in a checkout that has them, emoji. Returns their paths."""
    if emoji and EMOJI_TAR.is_file():
        with tarfile.open(EMOJI_TAR) as tar:
            names = [f"{code}.webp" for code in EMOJI]
            for name in names:
                (folder / name).write_bytes(tar.extractfile(name).read())
        return [folder / name for name in names]
    paths = []
    for name, draw in DRAWINGS.items():
        image = Image.new("RGB", (SIZE, SIZE))
        draw(ImageDraw.Draw(image))
        paths.append(folder / f"{name}.png")
        image.save(paths[-1])
    return paths
