"""Writes small videos for tests."""

import contextlib
import os
from pathlib import Path

import numpy as np

CODECS = {
    ".mp4": "mpeg4", ".mov": "libx264", ".m4v": "mpeg4", ".mkv": "libx264", ".avi": "mpeg4", ".webm": "libvpx",
}  # fmt: skip
STEP = 8


def write_video(
    path: Path, frames: int = 30, fps: float = 10, size: tuple[int, int] = (64, 48), codec: str = "", **options: str
) -> Path:
    """A video of that (width, height) whose frame n is an even gray of 8 n (from 256 on again from 0).

    codec: an encoder of FFmpeg's; by default that of the suffix. options: of the encoder.
    """
    pictures = [np.full((size[1], size[0], 3), n * STEP % 256, np.uint8) for n in range(frames)]
    return write_pictures(path, pictures, fps, size, codec, **options)


def write_pictures(path: Path, pictures: list, fps: float, size: tuple[int, int], codec: str = "", **options) -> Path:
    """A video of these pictures, [H,W,3] uint8 in RGB."""
    from fractions import Fraction

    import av

    with normal_priority(), av.open(str(path), "w") as container:
        codec = codec or CODECS[path.suffix]
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.width, stream.height = size
        stream.pix_fmt = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
        container.start_encoding()  # writes a file even if there are no pictures
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


@contextlib.contextmanager
def normal_priority():
    """Give back the priority of this thread.

    As root, libsvtav1 gives its caller real-time priority. Processes that are started later inherit it, and a browser
    then starved the whole machine.
    """
    has_policies = hasattr(os, "sched_setscheduler")  # Linux
    before = (os.sched_getscheduler(0), os.sched_getparam(0)) if has_policies else None
    try:
        yield
    finally:
        if has_policies:
            os.sched_setscheduler(0, *before)


def bad_videos(folder: Path) -> dict[str, str]:
    """Writes videos that cannot be used; gives their names and a piece of what is to be said about each."""
    content = write_video(folder / "good.mp4").read_bytes()
    (folder / "good.mp4").unlink()
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty.mp4").touch()
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    (folder / "concat.avi").write_text("ffconcat version 1.0\nfile '/etc/passwd'\n")
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "noise.mp4").write_bytes(content[:40] + np.random.default_rng(0).bytes(len(content)))
    write_video(folder / "frameless.mp4", frames=0)
    write_video(folder / "long.mp4", frames=400, fps=0.1, size=(32, 32))
    write_video(folder / "camera.avi", codec="mjpeg")
    return {
        "text.mp4": "is not a video that can be read",
        "empty.mp4": "is not a video that can be read",
        "playlist.mp4": "is not a video that can be read",
        "concat.avi": "is not a video that can be read",
        "cut.mp4": "cannot be decoded",
        "noise.mp4": "cannot be decoded",
        "frameless.mp4": "cannot be decoded",
        "long.mp4": "67 minutes long; at most 60",
        "camera.avi": "is coded as mjpeg; accepted are h264",
    }
