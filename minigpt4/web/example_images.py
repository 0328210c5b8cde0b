"""Example pictures for the web page."""

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
    draw.rectangle((0, 0, SIZE, SIZE), fill="#ffffff")
    draw.polygon(((30, 170), (226, 170), (190, 220), (66, 220)), fill="#8a4b2a")
    draw.rectangle((124, 30, 132, 170), fill="#4a2c17")
    draw.polygon(((138, 35), (138, 155), (215, 155)), fill="#ffd23f")
    draw.polygon(((118, 60), (118, 155), (55, 155)), fill="#e8483f")
    draw.rectangle((0, 215, SIZE, SIZE), fill="#2f7fb5")


def _tree(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIZE, SIZE), fill="#ffffff")
    draw.polygon(((128, 20), (60, 110), (196, 110)), fill="#3f9f4f")
    draw.polygon(((128, 70), (40, 170), (216, 170)), fill="#3f9f4f")
    draw.polygon(((128, 120), (30, 220), (226, 220)), fill="#2f8f3f")
    draw.rectangle((112, 220, 144, 250), fill="#7b4a2b")


def _shapes(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIZE, SIZE), fill="#ffffff")
    draw.ellipse((25, 30, 115, 120), fill="#e23b3b")
    draw.rectangle((140, 35, 225, 120), fill="#2f6fde")
    draw.polygon(((128, 145), (60, 230), (196, 230)), fill="#f2b01e")


DRAWINGS = {"house": _house, "boat": _boat, "tree": _tree, "shapes": _shapes}


# Microsoft's Fluent emoji (MIT license), a style that is not in the tiny model's training data.
EMOJI_TAR = Path(__file__).resolve().parents[2] / "dataset" / "tiny" / "fluent.tar.gz"
EMOJI = ("1f431", "1f34e", "26f5", "1f697")


def save_examples(folder: Path, emoji: bool = False) -> list[Path]:
    """Save example pictures in `folder` and return their paths.

    They are emoji if `emoji` is set and this is a checkout of the repository, which has them, else our drawings.
    """
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
