"""A contact sheet: samples as the model reads them, with the processed pictures and the learnt text marked."""

import io
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from minigpt4.common.errors import ConfigError
from minigpt4.common.files import read_regular
from minigpt4.common.text import pluralize
from minigpt4.data_tools.examine import as_trained
from minigpt4.data_tools.lengths import Characters, ModelTokens
from minigpt4.data_tools.plugins import to_png
from minigpt4.data_tools.sources import Fault, Source
from minigpt4.datasets.captions import Unusable
from minigpt4.datasets.conversations.batch import Conversation
from minigpt4.datasets.conversations.record import Record
from minigpt4.datasets.pictures import load_picture
from minigpt4.datasets.preview import Segment
from minigpt4.models.prompt import IMAGE_SLOT

WIDTH, MARGIN, SIDE, SIZE = 1200, 24, 180, 17  # pixels: of the sheet, around a sample, of a picture, of the text
PER_ROW = 2  # pictures beside each other
LINE = SIZE + 8
INK, GREY, LEARNT, CUT, IMAGE = "#1a1a1a", "#6b6b6b", "#bfe8c5", "#ffc9c2", "#cfe0fb"
# Fonts of many systems, by the names of their files; Pillow's own, which has few letters, comes last.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
)
MAX_LINES = 200  # of a sample
# Samples of a part among which one is drawn.
DRAWN_FROM = 1000


Run = tuple[str, str | None]
"""A text and the colour behind it."""


class Sample(NamedTuple):
    """A sample as it is drawn."""

    title: str
    pictures: list[Image.Image]
    text: list[Run]


def draw_records(source: Source, count: int, seed: int) -> list[Record]:
    """Records at random, from parts at random."""
    rng = random.Random(seed)
    parts = sorted(rng.sample(range(source.num_parts), min(count, source.num_parts)))
    drawn: list[Record] = []
    for number, part in enumerate(parts):
        wanted = count // len(parts) + (number < count % len(parts))
        chosen: dict[int, Record] = {}
        records = (item for item in source.read(part) if not isinstance(item, Fault))
        for index, record in enumerate(islice(records, DRAWN_FROM)):
            # Each record is as likely to stay as any other, and only those that are chosen so far are kept.
            if len(chosen) < wanted:
                chosen[index] = record
            elif rng.randrange(index + 1) < wanted:
                del chosen[rng.choice(sorted(chosen))]
                chosen[index] = record
        drawn += [chosen[index] for index in sorted(chosen)]
    return drawn


def samples_of(
    source: Source, measure: Characters | ModelTokens, vis_processor: Callable, count: int, seed: int
) -> Iterator[Sample]:
    """Samples of a dataset. Those whose text or picture cannot be used are left out."""
    torch.manual_seed(seed)  # of random crops
    for number, record in enumerate(draw_records(source, count, seed)):
        try:
            conversation = as_trained(record, source.text_processor)
            pictures = [processed(each, vis_processor) for each in record.pictures]
        except (Unusable, OSError):
            continue
        length = measure.measure(conversation)
        if measure.reader is None:
            segments = as_written(conversation)
            size = pluralize(length.length, "character")
        else:
            read = measure.reader.read(conversation, number)
            segments, size = read.segments, f"{pluralize(read.num_tokens, 'token')}, {read.num_learnt:,} learnt"
        text = coloured(segments)
        if length.lost:
            text.append((f" {pluralize(length.lost, 'token')} cut off ", CUT))
        yield Sample(f"{record.where}   {size}", pictures, text)


def processed(source: str | bytes, vis_processor: Callable) -> Image.Image:
    """A picture as the encoder gets it, before it is normalised. Raises Unusable if it is none, and OSError."""
    content = read_regular(source) if isinstance(source, str) else source
    image = load_picture(content, vis_processor)["image"]
    if isinstance(image, Image.Image):
        return image
    if image.is_floating_point() and hasattr(vis_processor, "mean"):
        image = (image * vis_processor.std[:, None, None] + vis_processor.mean[:, None, None]).clamp(0, 1)
        image = (255 * image).round().byte()
    return Image.open(io.BytesIO(to_png(image)))


def as_written(conversation: Conversation) -> list[Segment]:
    """The messages, each on a line of its own; the answers are learnt."""
    segments = []
    for role, parts in conversation:
        segments.append(Segment(f"{role}: ", False, 0))
        segments += [Segment(IMAGE_SLOT if part is None else part, role == "assistant", 0) for part in parts]
        segments.append(Segment("\n", False, 0))
    return segments[:-1]


def coloured(segments: Sequence[Segment]) -> list[Run]:
    """What is learnt and where the images stand, by colour."""
    runs: list[Run] = []
    images = 0
    for segment in segments:
        images += segment.is_image
        text = f"[image {images}]" if segment.is_image else segment.text
        runs.append((text, IMAGE if segment.is_image else LEARNT if segment.learnt else None))
    return runs


class Fonts:
    """Draws each character in the first font that has it, and keeps those that none has."""

    def __init__(self, path: Path | None) -> None:
        """path: a font file that comes first. Raises ConfigError for a file that is no font."""
        self.missing: set[str] = set()
        self.fonts = [font for name in FONTS if (font := _system_font(name))]
        self.fonts.append(ImageFont.load_default(SIZE))
        if path:
            try:
                self.fonts.insert(0, ImageFont.truetype(str(path), SIZE))
            except OSError as error:
                raise ConfigError(f"--font {path} cannot be read: {error}. Name a .ttf, .otf or .ttc file.") from None
        self._no_glyphs = [bytes(font.getmask("\U0010ffff")) for font in self.fonts]
        self.font_of, self.width = cache(self._font_of), cache(self._width)

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: str = INK) -> None:
        """Draw a text whose first line begins at a place."""
        x, y = place
        for font, run in groupby(text, self.font_of):
            part = "".join(run)
            draw.text((x, y + SIZE), part, colour, font, anchor="ls")
            x += font.getlength(part)

    def _width(self, text: str) -> float:
        return sum(font.getlength("".join(run)) for font, run in groupby(text, self.font_of))

    def _font_of(self, char: str) -> ImageFont.FreeTypeFont:
        for font, no_glyph in zip(self.fonts, self._no_glyphs, strict=True):
            if char.isspace() or bytes(font.getmask(char)) != no_glyph:
                return font
        self.missing.add(char)
        return self.fonts[-1]


def _system_font(name: str) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, SIZE)
    except OSError:
        return None


def draw_sheet(datasets: Sequence[tuple[str, list[Sample]]], fonts: Fonts) -> Image.Image:
    """The sheet of the samples of each dataset, under its name."""
    blocks = []
    for name, samples in datasets:
        blocks.append(draw_title(name, fonts))
        blocks += [draw_sample(sample, fonts) for sample in samples]
    sheet = Image.new("RGB", (WIDTH, sum(block.height for block in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def draw_title(name: str, fonts: Fonts) -> Image.Image:
    block = Image.new("RGB", (WIDTH, LINE + MARGIN), "#e9e9e9")
    draw = ImageDraw.Draw(block)
    fonts.draw(draw, (MARGIN, MARGIN // 2), name)
    key = [("learnt", LEARNT), ("image", IMAGE), ("cut", CUT)]
    right = WIDTH - MARGIN
    for word, colour in reversed(key):
        width = fonts.width(word)
        draw.rectangle((right - width - 8, MARGIN // 2 - 2, right, MARGIN // 2 + LINE - 4), colour)
        fonts.draw(draw, (right - width - 4, MARGIN // 2), word)
        right -= width + 20
    return block


def draw_sample(sample: Sample, fonts: Fonts) -> Image.Image:
    """The pictures on the left, the text on the right."""
    columns = min(PER_ROW, max(1, len(sample.pictures)))
    left = MARGIN + columns * (SIDE + 8) + 12
    lines = list(islice(wrap(sample.text, fonts, WIDTH - MARGIN - left), MAX_LINES + 1))
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [[("… and more", None)]]
    rows = -(-len(sample.pictures) // columns)
    height = max(rows * (SIDE + 8), (len(lines) + 1) * LINE) + MARGIN
    block = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(block)
    for number, picture in enumerate(sample.pictures):
        place = MARGIN + number % columns * (SIDE + 8), MARGIN // 2 + number // columns * (SIDE + 8)
        size = [max(1, round(side * SIDE / max(picture.size))) for side in picture.size]
        block.paste(picture.resize(size, Image.Resampling.LANCZOS), place)
    fonts.draw(draw, (left, MARGIN // 2), sample.title, GREY)
    for number, line in enumerate(lines, 1):
        top = MARGIN // 2 + number * LINE
        x = left
        for text, colour in line:
            width = fonts.width(text)
            if colour:
                draw.rectangle((x, top - 2, x + width, top + LINE - 5), colour)
            fonts.draw(draw, (x, top), text)
            x += width
    draw.line((MARGIN, height - 1, WIDTH - MARGIN, height - 1), "#dddddd")
    return block


def wrap(runs: Sequence[Run], fonts: Fonts, width: float) -> Iterator[list[Run]]:
    """The lines of a text. A line ends at a line break, or where the next word does not fit."""
    line: list[Run] = []
    used = 0.0
    for text, colour in runs:
        for word in re.findall(r"\n|[^\S\n]+|\S+", text):
            if word == "\n":
                yield line
                line, used = [], 0.0
                continue
            for piece in pieces(word, fonts, width):
                if used + fonts.width(piece) > width:
                    yield line
                    line, used = [], 0.0
                    if piece.isspace():
                        continue
                line.append((piece, colour))
                used += fonts.width(piece)
    yield line


def pieces(word: str, fonts: Fonts, width: float) -> Iterator[str]:
    """A word, or the characters of one that is long, such as a sentence in Chinese."""
    word = "".join(char if char.isprintable() else repr(char)[1:-1] for char in word)
    if fonts.width(word) <= width / 3:
        yield word
    else:
        yield from word
