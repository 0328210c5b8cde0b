"""Opening untrusted video files: a few evenly spaced frames become pictures.

They are decoded in a separate process with limited time and memory, and without environment variables or network
(`draw_frames.py`). PyAV decodes by default. decord may decode files of one's own: its FFmpeg is of 2020 and has known
holes.
"""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from minigpt4.common.files import open_regular
from minigpt4.conversation.pictures import OWN_FORMATS, PictureError, name_of, open_picture

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
FRAMES = 8
MAX_FRAMES = 64
BACKENDS = ("av", "decord")
SECONDS = 60  # limit of the decoding time
WORKER = Path(__file__).with_name("draw_frames.py")


def is_video(path: str | Path) -> bool:
    """True if the file's suffix is that of a video."""
    return Path(path).suffix.lower() in SUFFIXES


def open_media(
    path: str | Path, frames: int = FRAMES, backend: str = "av", formats: tuple[str, ...] = OWN_FORMATS
) -> list[Image.Image]:
    """The frames of a video file, or the one picture in any other file (`open_picture`). Raises PictureError."""
    return open_video(path, frames, backend) if is_video(path) else [open_picture(path, formats=formats)]


def open_video(path: str | Path, frames: int = FRAMES, backend: str = "av") -> list[Image.Image]:
    """Evenly spaced frames of a video file in RGB, at most 512 pixels wide and high.

    There are `frames` of them, or fewer if the video has fewer frames.

    Args:
        backend: "av", or "decord", which is for files of one's own only.

    Raises:
        ValueError: `frames` is not from 1 to 64, or there is no such backend.
        PictureError: the file is not a video, has another codec, is damaged, lasts more than an hour, or takes more
            than 2 GiB or a minute to decode; or the backend is not installed.
    """
    if not 1 <= frames <= MAX_FRAMES:
        raise ValueError(f"frames={frames} must be from 1 to {MAX_FRAMES}.")
    if backend not in BACKENDS:
        raise ValueError(f"The video backend {backend!r} must be one of {', '.join(BACKENDS)}.")
    if not isinstance(path, str | Path):
        raise PictureError(f"A {type(path).__name__} is no video. Give the path of a file.")
    name = name_of(path)
    if importlib.util.find_spec(backend) is None:
        raise PictureError(f"{name} is a video: it takes `pip install {backend}`.", "no_videos")
    _check_container(path, name)
    folders = [os.path.abspath(folder) for folder in sys.path]  # PYTHONPATH is one of the variables that it lacks
    command = [sys.executable, "-P", str(WORKER), os.path.abspath(path), str(frames), backend, *folders]
    # Keys and passwords are in the environment. Windows starts no program without this variable.
    environment = {key: os.environ[key] for key in ("SYSTEMROOT",) if key in os.environ}
    try:
        result = subprocess.run(
            # stderr is dropped, because decoders can write any amount to it.
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=SECONDS,
            env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        message = f"{name} takes more than {SECONDS} s to decode. Cut or shrink it first."
        raise PictureError(message, "slow_video", seconds=SECONDS) from None
    if result.returncode == 2:
        reason, kind, values = json.loads(result.stdout)
        raise PictureError(f"{name} {reason}", kind, **values)
    if result.returncode:
        raise PictureError(f"{name} cannot be decoded: it is damaged, or too large.")
    import numpy as np

    return [Image.fromarray(frame) for frame in np.load(io.BytesIO(result.stdout), allow_pickle=False)]


def _check_container(path: str | Path, name: str) -> None:
    """Raise PictureError for a file that is not a video container.

    FFmpeg reads some text files as playlists, which can name other files and addresses.
    """
    try:
        with open_regular(path) as file:
            head = file.read(12)
    except OSError as error:
        raise PictureError(f"{name} cannot be read: {error.strerror}.") from None
    mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    matroska = head.startswith(b"\x1a\x45\xdf\xa3")
    avi = head.startswith(b"RIFF") and head[8:] == b"AVI "
    if not (mp4 or matroska or avi):
        kinds = ", ".join(suffix[1:].upper() for suffix in SUFFIXES)
        raise PictureError(f"{name} is not a video that can be read. Accepted: {kinds}.", "not_video", formats=kinds)
