"""The process that decodes a video: python draw_frames.py FILE FRAMES DECODER [FOLDER WITH MODULES …]

`videos.open_video` runs this script, which imports nothing of this package. Video decoders are large and written in C:
a malicious file can crash them or take over their process. So this process has little memory, no environment variables,
no other task and, where Linux lets it go, no network. It writes the frames to stdout as an .npy array [N,H,W,3] uint8.
If it refuses a file, it writes [reason, kind, values] (see `PictureError`) to stdout as JSON and exits with status 2.
"""

import ctypes
import io
import json
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress

SIDE = 512  # maximum width and height of a frame; image processors shrink it further
MAX_SECONDS = 3600
MEMORY = 2 * 2**30  # limit of the address space in bytes
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4")
# FFmpeg's own checks, which it makes before a decoder sees any byte. Some codecs have decoders of other names.
OPTIONS = {
    "codec_whitelist": ",".join([*CODECS, "libdav1d", "libvpx", "libvpx-vp9"]),
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "none",  # the file is open; it may lead to no other
}
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET


class Refusal(Exception):
    """A video is not accepted. The message is the reason, and follows the name of the file; see `PictureError`."""

    def __init__(self, message: str, kind: str = "damaged", **values: str | float):
        super().__init__(message)
        self.kind, self.values = kind, values


def limit_memory() -> None:
    """Limit the memory of this process, on systems that support it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def leave_network() -> None:
    """Move this process to a network of its own, without any connection, on a Linux that permits it.

    Python has `os.unshare` only from 3.12 on. A user who may not make a network may in a user namespace of their own.
    """
    with suppress(AttributeError, OSError, TypeError):  # no such call, or no such library
        unshare = ctypes.CDLL(None).unshare
        if unshare(NEW_NETWORK):
            unshare(NEW_USER | NEW_NETWORK)


def middles(frames: int, count: int, seconds: float) -> list[int]:
    """The numbers of the middle frames of `frames` equal parts of a video with `count` frames; all if it has fewer.

    Raises Refusal if the video has no frames or is too long.
    """
    if count < 1:
        raise Refusal("cannot be decoded: it has no frames.")
    if seconds > MAX_SECONDS:
        minutes, most = round(seconds / 60), MAX_SECONDS // 60
        message = f"is {minutes} minutes long; at most {most} are accepted. Cut it first."
        raise Refusal(message, "long_video", minutes=minutes, most=most)
    frames = min(frames, count)
    return [(2 * n + 1) * count // (2 * frames) for n in range(frames)]


def fitting_size(width: int, height: int) -> tuple[int, int]:
    """The size of a frame, shrunk to at most SIDE × SIDE."""
    shrink = max(1, max(width, height) / SIDE)
    return max(1, round(width / shrink)), max(1, round(height / shrink))


def draw_with_av(file, frames: int):
    """The middle frames of an open video file, with PyAV: an array [N,H,W,3] uint8. Raises Refusal."""
    import av
    import numpy as np

    with av.open(file, options=OPTIONS, metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if stream is None:
            raise Refusal("cannot be decoded: it has no video.")
        codec = stream.codec_context and stream.codec_context.codec.canonical_name
        if codec not in CODECS:
            accepted = ", ".join(CODECS)
            message = f"is coded as {codec or 'something unknown'}; accepted are {accepted}. Convert it first."
            raise Refusal(message, "bad_codec", codec=codec or "?", accepted=accepted)
        stream.codec_context.thread_count, stream.codec_context.thread_type = 2, "AUTO"
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
        places = middles(frames, len(packets), len(packets) / float(stream.average_rate or 1))
        drawn = [to_array(frame, stream) for frame in find_frames(container, stream, packets, places)]
        # All have the size of the first, as in a film in which the size changes.
        return np.stack([array for array in drawn if array.shape == drawn[0].shape])


def find_frames(container, stream, packets: list[tuple[int | None, bool]], places: list[int]) -> Iterator:
    """Yield the frames at these places in the order in which they are shown; where the rest is broken, the last one.

    packets: time and whether it is a key frame, of each packet.
    """
    times = sorted(time for time, _ in packets if time is not None)
    known = len(set(times)) == len(packets)  # old AVIs have no times
    keys = sorted(time for time, is_key in packets if is_key and time is not None) if known else []
    wanted = [times[place] if known else place for place in places]
    decoded, frame, at = None, None, None
    for target in wanted:
        key = keys[bisect_right(keys, target) - 1] if keys and keys[0] <= target else None
        if decoded is None or key is not None and at is not None and key > at:
            decoded = decode_from(container, stream, times[0] if known and key is None else key)
        while at is None or at < target:
            new = next(decoded, None)
            if new is None:
                break
            frame, at = new, new.pts if known else (0 if at is None else at + 1)
        if frame is None:
            raise Refusal("cannot be decoded: it is damaged.")
        yield frame


def decode_from(container, stream, time: int | None) -> Iterator:
    """Yield the frames from the key frame at `time` on (None: from the start), without those that are broken."""
    import av

    container.seek(0 if time is None else time, stream=stream)
    for packet in container.demux(stream):
        with suppress(av.InvalidDataError):
            yield from packet.decode()


def to_array(frame, stream):
    """A frame in RGB, shrunk and turned upright: [H,W,3] uint8.

    A filter graph knows where the chroma of a pixel lies; `frame.reformat` takes it for half a pixel off.
    """
    import av
    import numpy as np

    graph = av.filter.Graph()
    width, height = fitting_size(frame.width, frame.height)
    steps = [
        graph.add_buffer(template=stream, width=frame.width, height=frame.height, format=frame.format),
        graph.add("scale", f"{width}:{height}:flags=bilinear"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*steps).configure()
    graph.push(frame)
    return np.rot90(graph.pull().to_ndarray(), frame.rotation // 90)


def draw_with_decord(path: str, frames: int):
    """As `draw_with_av`, of a file at `path`, with decord."""
    os.environ["PATH"] = ""  # decord adds to it
    import decord

    video = decord.VideoReader(path, num_threads=2)
    count = len(video)
    places = middles(frames, count, count / (video.get_avg_fps() or 1))
    height, width = video[0].shape[:2]
    width, height = fitting_size(width, height)
    return decord.VideoReader(path, num_threads=2, width=width, height=height).get_batch(places).asnumpy()


def main() -> int:
    path, frames, decoder, *folders = sys.argv[1:]
    sys.path += [folder for folder in folders if folder not in sys.path]
    limit_memory()
    try:
        with open(path, "rb") as file:
            leave_network()  # after the file is open: a user namespace may take root's right to read it
            # Each thread of a numerical library takes address space, which is limited.
            os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
            import numpy as np

            array = draw_with_av(file, int(frames)) if decoder == "av" else draw_with_decord(path, int(frames))
    except Refusal as error:
        sys.stdout.write(json.dumps([str(error), error.kind, error.values]))
        return 2
    content = io.BytesIO()
    np.save(content, array)
    sys.stdout.buffer.write(content.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
