"""The visitors' pictures, in memory: what the model sees of each, and a preview. The files themselves are not kept.

Only a video is written to disk, for as long as it is decoded.
"""

import io
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import torch
from PIL import Image

from minigpt4.conversation import open_picture, open_video
from minigpt4.conversation.pictures import FORMATS
from minigpt4.conversation.videos import is_video

MAX_PICTURES = 16  # in a conversation, and so in a video
OWN_BYTES, ALL_BYTES = 128 * 2**20, 512 * 2**20  # of one client, and of all
IDLE_SECONDS = 3600  # pictures that were not used for so long are dropped
PREVIEW_PIXELS = 1024  # longest side
FOLDER = "minigpt4-videos-"
YOUNG_SECONDS = 60  # a folder of this age may not be locked yet


@dataclass(eq=False)
class Upload:
    """A picture, or the frames of a video.

    Attributes:
        pixels: what the model sees, [3,H,W] each.
        previews: the same for people, as JPEG files.
        owner: the client who sent it (`guard.client_network`).
        used: when it was used last (`time.monotonic()`).
    """

    pixels: list[torch.Tensor]
    previews: list[bytes]
    owner: str
    used: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(each.nbytes for each in self.pixels) + sum(map(len, self.previews))


def read_upload(content: bytes, name: str, frames: int, owner: str, processor: Callable, folder: Path) -> Upload:
    """The upload in the content of a file. Raises PictureError.

    Args:
        name: the file's name; its suffix tells a video.
        frames: number of pictures to take from a video.
        processor: from a PIL image to a tensor [3,H,W].
        folder: for the file of a video, meanwhile.
    """
    if is_video(name):
        with tempfile.NamedTemporaryFile(dir=folder, suffix=Path(name).suffix) as file:
            file.write(content)
            file.flush()
            pictures = open_video(file.name, min(frames, MAX_PICTURES))
    else:
        pictures = [open_picture(content, name, formats=FORMATS)]
    return Upload([processor(picture) for picture in pictures], [_preview(picture) for picture in pictures], owner)


def _preview(picture: Image.Image) -> bytes:
    picture = picture.copy()
    picture.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


class Uploads:
    """The uploads of all visitors, by a name that nobody can guess, the longest unused first.

    Nobody can push out another's: above OWN_BYTES a client loses its own oldest, and above ALL_BYTES the client with
    most. A browser sends a picture again if it is gone.
    """

    def __init__(self) -> None:
        self.by_id: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, upload: Upload) -> str:
        """Keep an upload. Returns its name."""
        upload_id = secrets.token_urlsafe(16)
        with self._lock:
            self._drop_idle()
            self.by_id[upload_id] = upload
            while self._held(upload.owner) > OWN_BYTES and self._drop_oldest(upload.owner) != upload_id:
                pass
            while sum(each.size for each in self.by_id.values()) > ALL_BYTES:
                self._drop_oldest(max({each.owner for each in self.by_id.values()}, key=self._held))
        return upload_id

    def get(self, upload_id: str) -> Upload | None:
        """The upload, which counts as used."""
        with self._lock:
            self._drop_idle()
            if upload := self.by_id.get(upload_id):
                upload.used = time.monotonic()
                self.by_id.move_to_end(upload_id)
            return upload

    def forget(self, upload_ids: Iterable[str]) -> None:
        """Drop uploads."""
        with self._lock:
            for upload_id in upload_ids:
                self.by_id.pop(upload_id, None)

    def _held(self, owner: str) -> int:
        return sum(each.size for each in self.by_id.values() if each.owner == owner)

    def _drop_oldest(self, owner: str) -> str:
        oldest = next(upload_id for upload_id, each in self.by_id.items() if each.owner == owner)
        del self.by_id[oldest]
        return oldest

    def _drop_idle(self) -> None:
        while self.by_id and time.monotonic() - next(iter(self.by_id.values())).used > IDLE_SECONDS:
            self.by_id.popitem(last=False)


@contextmanager
def video_folder() -> Iterator[Path]:
    """A folder for videos until the context ends. Folders of processes that were killed are deleted.

    A living process holds a lock in its folder.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with suppress(OSError, filelock.Timeout):
            if time.time() - left.stat().st_mtime > YOUNG_SECONDS:
                with filelock.FileLock(left / "lock", blocking=False):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True) as folder:
        with filelock.FileLock(Path(folder) / "lock"):
            yield Path(folder)
