"""Captions that are no lines of a file: a folder of pictures and texts, and COCO's JSON."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.conversations.pictures import SUFFIXES
from minigpt4.datasets.conversations.text_files import TextFile, decode, optional, parse_json, shown
from minigpt4.datasets.datasets.packed_strings import PackedStrings


class ListedRecords:
    """Records of which a text each is kept in memory, and the function that parses it.

    base, place: the place of a record, for messages; `place` may hold {index} and {item}, the record's text.
    """

    def __init__(self, items: Iterable[str], parse: Callable[[str], dict], base: str, place: str) -> None:
        self.items, self.parse, self.base, self.place = PackedStrings(items), parse, base, place

    def __len__(self) -> int:
        return len(self.items)

    def where(self, index: int) -> str:
        return self.base + self.place.format(index=index, item=self.items[index])

    @contextmanager
    def reader(self, check: bool = False) -> Iterator[Callable[[int], dict]]:
        yield lambda index: self.parse(self.items[index])


def open_folder(folder: str, images: str | None) -> ListedRecords:
    """The pictures of a folder, with its subfolders; `a/b.jpg` has its text in `a/b.txt`.

    images: the folder of the pictures, if it is not that of the texts. Hidden files are passed over. Raises ConfigError
    for a folder without pictures.
    """
    top = images or folder
    found: list[str] = []
    others: Counter[str] = Counter()  # patterns that name files which are neither pictures nor their texts
    seen: set[str] = set()  # a link may lead to a folder above it
    for place, folders, names in os.walk(top, onerror=_unreadable, followlinks=True):
        if (own := os.path.realpath(place)) in seen:
            folders[:] = []
            continue
        seen.add(own)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(name for name in names if not name.startswith(".")):
            if name.lower().endswith(SUFFIXES):
                found.append(os.path.relpath(os.path.join(place, name), top))
            elif not name.lower().endswith(".txt"):
                others[os.path.join(place, f"*{os.path.splitext(name)[1]}")] += 1
    if not found:
        # img2dataset writes a table beside each shard.
        pattern = max(others, key=lambda each: (".tar" in each, others[each]), default=os.path.join(top, "*.parquet"))
        raise ConfigError(
            f"{top} has no pictures ({', '.join(SUFFIXES)}). A folder is read as pictures with a .txt of the same name "
            f"each. Name other files one by one, or as {pattern}."
        )
    return ListedRecords(found, partial(_read_pair, folder), os.path.join(top, ""), "{item}")


def _unreadable(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be read: {error.strerror}. Allow it, or name other folders.") from None


def _read_pair(folder: str, picture: str) -> dict:
    path = os.path.join(folder, os.path.splitext(picture)[0] + ".txt")
    try:
        with open(path, "rb") as file:
            caption = decode(file.read())
    except FileNotFoundError:
        raise ConfigError(f"is without text: there is no {path}. Write it, or take the picture away.") from None
    # The line end that an editor puts behind the last line is no part of the text.
    return {"id": picture, "image": picture, "caption": caption.rstrip("\r\n")}


def open_coco(path: str) -> ListedRecords:
    """The captions of a COCO file, in the order of its annotations. Raises ConfigError for a file of another kind."""
    coco = optional("pycocotools.coco", "pycocotools", path).COCO()
    with TextFile(path).open() as file, redirect_stdout(None):
        try:
            coco.dataset = parse_json(decode(file.read()))
            coco.createIndex()
            lacks = next((key for key in ("images", "annotations") if not coco.dataset.get(key)), None)
        except ConfigError as error:
            raise ConfigError(f"{path} {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            lacks = error
    if lacks:
        raise ConfigError(
            f"{path} is no captions file of COCO: it lacks {lacks}. It has 'images' (id, file_name) and 'annotations' "
            "(id, image_id, caption). A filter_cap.json is read by the builder cc_sbu_align."
        )

    def items() -> Iterator[str]:
        for annotation in coco.dataset["annotations"]:
            file = coco.imgs.get(annotation["image_id"], {}).get("file_name")
            yield json.dumps([annotation["id"], annotation["image_id"], file, annotation.get("caption")])

    return ListedRecords(items(), _read_annotation, path, " annotations[{index}]")


def _read_annotation(text: str) -> dict:
    number, image, file, caption = json.loads(text)
    if file is None:
        raise ConfigError(f"names image_id {shown(image)}, which is not among 'images', or has no 'file_name' there.")
    if caption is None:
        raise ConfigError("has no 'caption'. Use the captions file (captions_*.json), not instances or keypoints.")
    return {"id": number, "image": file, "caption": caption}
