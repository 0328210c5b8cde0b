"""The pictures and videos that `caption` describes: named files, folders and shards."""

import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from minigpt4.cli.arguments import check_files
from minigpt4.common.errors import ConfigError
from minigpt4.conversation import PictureError, videos
from minigpt4.conversation.pictures import OWN_FORMATS

# A file with such a name is taken for a picture, and is an unreadable one if it is none. Others are taken by content.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
}
HEIC = (b"ftyphe", b"ftypmif", b"ftypmsf")  # how its bytes from the fourth on begin; Pillow alone does not know them
COMPANIONS = {".json", ".txt"}  # of a picture in a shard
Item = tuple[str, Path | bytes | PictureError]  # its name and its content, or why there is none


@dataclass
class Sources:
    """What the arguments name.

    passed_in_folders, passed_in_shards: the numbers of files that are no pictures or videos, by suffix; those of shards
    as far as this rank has read them.
    """

    files: list[Path] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    passed_in_folders: Counter[str] = field(default_factory=Counter)
    passed_in_shards: Counter[str] = field(default_factory=Counter)

    def share(self, done: Collection[str], rank: int, ranks: int) -> tuple[list[Path], Iterator[Item]]:
        """The files of a rank, and all of its items; without those in `done`.

        Each rank reads shards of its own. If their number is no multiple of `ranks`, all ranks read the last ones, and
        each takes its share of their pictures. The content of the others is not read.
        """
        files = [path for path in self.files if str(path) not in done][rank::ranks]
        whole = len(self.shards) // ranks * ranks
        parts = [(shard, 0, 1) for shard in self.shards[rank:whole:ranks]]
        parts += [(shard, rank, ranks) for shard in self.shards[whole:]]

        def items() -> Iterator[Item]:
            yield from ((str(path), path) for path in files)
            for part in parts:
                yield from self._read(*part, done)

        return files, items()

    def _read(self, shard: str, first: int, step: int, done: Collection[str]) -> Iterator[Item]:
        """Every `step`th picture of a shard, as bytes; or (shard, PictureError) where it is damaged."""
        from minigpt4.datasets.datasets.tar_reader import is_hidden

        number = 0
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    suffix = Path(member.name).suffix.lower()
                    name = f"{shard}/{member.name}"
                    if not member.isfile():
                        continue
                    if suffix not in SUFFIXES or is_hidden(member.name):
                        self.passed_in_shards[suffix] += first == 0 and suffix not in COMPANIONS
                        continue
                    if number % step == first and name not in done:
                        yield name, tar.extractfile(member).read()
                    number += 1
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            if first == 0:
                yield shard, PictureError(f"the rest of this tar cannot be read: {error}")


def named_sources(images: list[str], folder: Path | None, shards: list[str]) -> Sources:
    """The files and shards to describe. Raises ConfigError if there are none, and for files that do not exist."""
    from minigpt4.datasets.datasets.shards import shards_of_argument

    sources = Sources([Path(path) for path in images])
    check_files(sources.files)
    if folder:
        if not folder.is_dir():
            raise ConfigError(f"--dir {folder} is not a folder.")
        for path in walk(folder):
            if _is_taken(path):
                sources.files.append(path)
            else:
                sources.passed_in_folders[path.suffix.lower() if path.is_file() else "not a file"] += 1
    sources.files = list(dict.fromkeys(sources.files))  # a file may be named, and be in the folder too
    sources.shards = list(dict.fromkeys(shards_of_argument(shards)))
    if not sources.files and not sources.shards:
        others = f" It has other files: {listed(sources.passed_in_folders)}." if sources.passed_in_folders else ""
        raise ConfigError(f"--dir {folder} holds no pictures or videos.{others}")
    return sources


def walk(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, and the subfolders that cannot be listed, sorted.

    A linked folder is read too: after the others, once, and only if it does not contain `folder`.
    """
    found, seen, waiting, root = [], set(), [str(folder)], os.path.realpath(folder)
    while waiting:
        start = waiting.pop(0)
        if start != str(folder) and Path(root).is_relative_to(os.path.realpath(start)):
            continue
        for here, folders, names in os.walk(start, onerror=lambda error: found.append(Path(error.filename))):
            if (real := os.path.realpath(here)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()  # of two links to a folder, every run and every rank takes the same
            waiting += [path for name in folders if os.path.islink(path := os.path.join(here, name))]
            found.extend(Path(here, name) for name in names)
    return sorted(found)


def _is_taken(path: Path) -> bool:
    """Whether a file of a folder is a picture or a video, by its suffix or its content."""
    if path.name.startswith("._"):  # a Mac's companion of another file
        return False
    if path.is_dir():  # it cannot be listed, and opening it tells why
        return True
    if not path.is_file():  # a broken link is reported; a pipe or a device could not be opened without waiting
        return path.is_symlink() and not path.exists() and path.suffix.lower() in SUFFIXES
    if path.suffix.lower() in SUFFIXES or videos.is_video(path):
        return True
    try:
        with open(path, "rb") as file:
            if file.read(12)[4:].startswith(HEIC):
                return True
            file.seek(0)
            Image.open(file, formats=OWN_FORMATS)
            return True
    except OSError:
        return False
    except Exception:  # it begins like a picture, and is damaged or too large: open_picture says why
        return True


def listed(passed_over: Counter[str]) -> str:
    """`3 × .txt, 1 × without suffix`."""
    return ", ".join(f"{count} × {kind or 'without suffix'}" for kind, count in passed_over.most_common() if count)
