"""The process that decodes a video: python draw_frames.py FILE FRAMES

`videos.open_video` runs this script, which imports nothing of this package. Video decoders are large, old and written
in C: a malicious file can crash them or take over their process. This process has little memory and no other task. It
writes the frames to stdout as an .npy array [N,H,W,3] uint8. If it refuses a file, it writes the reason to stdout and
exits with status 2.
"""

import io
import sys
from contextlib import suppress

SIDE = 512  # maximum width and height of a frame; image processors shrink it further
MAX_SECONDS = 3600
MEMORY = 2 * 2**30  # limit of the address space in bytes


def limit_memory() -> None:
    """Limit the memory of this process, on systems that support it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def draw(path: str, frames: int):
    """The middle frames of `frames` equal parts of the video, as an array [N,H,W,3] uint8.

    A shorter video gives all its frames. Raises ValueError if the video has no frames or is too long.
    """
    import decord

    video = decord.VideoReader(path, num_threads=2)
    count = len(video)
    seconds = count / (video.get_avg_fps() or 1)
    if seconds > MAX_SECONDS:
        raise ValueError(f"is {seconds / 60:.0f} minutes long; at most {MAX_SECONDS // 60} are accepted. Cut it first.")
    if count < 1:
        raise ValueError("has no frames.")
    height, width = video[0].shape[:2]
    shrink = max(1, max(height, width) / SIDE)
    frames = min(frames, count)
    places = [(2 * n + 1) * count // (2 * frames) for n in range(frames)]
    size = {"width": max(1, round(width / shrink)), "height": max(1, round(height / shrink))}
    return decord.VideoReader(path, num_threads=2, **size).get_batch(places).asnumpy()


def main() -> int:
    import numpy as np

    limit_memory()
    try:
        array = draw(sys.argv[1], int(sys.argv[2]))
    except ValueError as error:
        sys.stdout.write(str(error))
        return 2
    content = io.BytesIO()
    np.save(content, array)
    sys.stdout.buffer.write(content.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
