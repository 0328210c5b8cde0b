"""The pictures of the `tiny` default: draws SVGs at 64 px, and writes and reads reproducible tars of pictures.

Used by render_emoji.py (for maintainers), prepare_tiny.py (for users), and to read the pictures of one artist:

    from tiny_pictures import read_pictures
    pictures = read_pictures("dataset/tiny/noto.tar.gz")      # {"1f34e": <PIL.Image 64x64 RGB>, ...}
"""

import contextlib
import gzip
import io
import os
import re
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

TINY_DIR = Path(__file__).resolve().parent / "tiny"
SIZE = 64
SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})


def concept_id(code_points: str) -> str:
    """The key of a concept: hex code points joined by "-", lower-case, without the invisible U+FE0F."""
    return "-".join(part for part in re.split(r"[-\s]+", code_points.lower().strip()) if part != "fe0f")


def render_svg(svg: str, size: int = SIZE) -> Image.Image:
    """Draw an SVG as a `size` x `size` RGB picture on white, with resvg and without the machine's fonts."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if drawn.size == (size, size):
        return drawn
    drawn.thumbnail((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return canvas


def encode_webp(picture: Image.Image) -> bytes:
    """The picture as lossless WebP, which takes half the space of an optimised PNG here."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=75, method=4)
    return buffer.getvalue()


def refuse_existing(folder: Path, names: Iterable[str], own: Path) -> None:
    """Exit if one of the files that a script is about to write exists, unless the folder is the script's own."""
    for path in (folder / name for name in names):
        if folder.resolve() != own and path.exists():
            sys.exit(f"Error: {path} exists already. Move it away, or name another folder with --output.")


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, content) pairs in the given order, without times and owners. The tar appears only when complete.

    If the path ends in .gz, the tar is compressed: half of a tar of small files is headers and padding.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as raw, contextlib.ExitStack() as stack:
            stream = raw
            if path.suffix == ".gz":
                stream = stack.enter_context(gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0))
            tar = stack.enter_context(tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT))
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                info.mode = 0o644
                tar.addfile(info, io.BytesIO(content))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_pictures(path: str | Path) -> dict[str, Image.Image]:
    """The pictures in one artist's tar: concept id -> 64x64 RGB picture, sorted by id."""
    with tarfile.open(path) as tar:
        files = {member.name.rsplit(".", 1)[0]: tar.extractfile(member).read() for member in tar}
    return {key: Image.open(io.BytesIO(files[key])).convert("RGB") for key in sorted(files)}
