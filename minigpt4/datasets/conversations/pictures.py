"""From a picture as a record names it to its path or its content. Nothing is opened as a picture."""

import base64
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.conversations.record import Picture
from minigpt4.datasets.conversations.text_files import shown

SUFFIXES = tuple(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .avif .heic .heif".split())

Find = Callable[[Any], Picture]
"""From what a record gives for a picture to the picture. Raises ConfigError."""


class PictureFolder:
    """Finds pictures by paths that are relative to one folder, by `data:` and `file:` URLs, and as {"bytes", "path"}.

    folder: the absolute path of a folder. named: where it is named, for messages.
    listings: {folder: names in it} of folders listed so far, to check that files are there; None: not checked.
    """

    def __init__(self, folder: str, named: str, listings: dict[str, set[str]] | None = None) -> None:
        self.folder, self.named, self.listings = folder, named, listings

    def checked(self, listings: dict[str, set[str]]) -> "PictureFolder":
        """One that checks."""
        return PictureFolder(self.folder, self.named, listings)

    def __call__(self, value: Any) -> Picture:
        """Raises ConfigError that says where the picture was looked for."""
        if isinstance(value, dict) and {"bytes", "path"} & set(value):
            value = value["path"] if value.get("bytes") is None and "path" in value else value["bytes"]
        if isinstance(value, bytes):
            return Picture(value)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"has {shown(value)} for a picture. A picture is a path, a data: URL or a file: URL.")
        scheme = value[:8].partition(":")[0].lower()
        if scheme == "data":
            return Picture(_decode(value))
        if scheme in ("http", "https"):
            raise ConfigError(f"has the picture {shown(value)}. Download it, and write the path of the file instead.")
        path = os.path.join(self.folder, url2pathname(urlparse(value).path) if scheme == "file" else value)
        if self.listings is not None and not self._exists(path):
            raise ConfigError(
                f"has the picture {shown(value)}, but there is no file {path}. Paths are relative to {self.named}; "
                "images of build_info, or --images, names another folder."
            )
        return Picture(path)

    def _exists(self, path: str) -> bool:
        """One listing of each folder: a million single look-ups are slow on NFS."""
        folder, name = os.path.split(path)
        if folder not in self.listings:
            try:
                with os.scandir(folder) as entries:
                    self.listings[folder] = {e.name for e in entries if not e.is_dir(follow_symlinks=False)}
            except (OSError, ValueError):  # ValueError: a character that no path has
                self.listings[folder] = set()
        return name in self.listings[folder]


def _decode(url: str) -> bytes:
    head, _, body = url.partition(",")
    with suppress(ValueError):
        if head.endswith(";base64") and (content := base64.b64decode(body, validate=True)):
            return content
    raise ConfigError(f"has the picture {shown(url)}. A data: URL is data:image/png;base64,… in base64.")
