"""The process that decodes a video: python draw_frames.py FILE FRAMES

Run by `videos.open_video`, as a script of its own that imports nothing of this package. Decoders of videos are large,
old and written in C: what a broken file does to them, it does to this process, which has little memory and no other
task. The frames go to stdout as an .npy array [N,H,W,3] uint8. A file that is refused: exit status 2, and the reason
on stdout.
"""

import io
import sys
from contextlib import suppress

SIDE = 512  # longest side of a frame that is handed on; image processors make it smaller still
MAX_SECONDS = 3600
MEMORY = 2 * 2**30  # bytes of address space


def limit_memory() -> None:
    """Bound this process's memory, where the system can and has not done so."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def draw(path: str, frames: int):
    """`frames` frames, from the middles of as many equal parts of the video, as an array [N,H,W,3] uint8.

    Fewer, where the video has fewer. Raises ValueError for a video that is too long.
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
