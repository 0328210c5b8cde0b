"""Opening video files, hostile ones included."""

import contextlib
import random
import struct
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from helpers import GOLDEN, ROOT
from PIL import Image
from video_files import CODECS, STEP, bad_videos, write_pictures, write_video

from minigpt4.conversation import CONV_VISION, Chat, PictureError, draw_frames, open_media, open_video, videos
from minigpt4.models.prompt import IMAGE_SLOT
from minigpt4.processors import Blip2ImageEvalProcessor


def places(pictures):
    """The numbers of these frames in a video of `write_video`."""
    return [round(picture.getpixel((5, 5))[1] / STEP) for picture in pictures]


@pytest.mark.parametrize("suffix", videos.SUFFIXES)
def test_frames_are_evenly_spaced(tmp_path, suffix):
    pictures = open_video(write_video(tmp_path / f"video{suffix}"), 5)
    assert places(pictures) == [3, 9, 15, 21, 27]
    assert {(picture.mode, picture.size) for picture in pictures} == {("RGB", (64, 48))}


def test_every_suffix_is_tested():
    assert set(CODECS) == set(videos.SUFFIXES)


@pytest.mark.parametrize(("frames", "expected"), [(1, [2]), (3, [0, 2, 4]), (5, [*range(5)]), (64, [*range(5)])])
def test_short_videos(tmp_path, frames, expected):
    assert places(open_video(write_video(tmp_path / "short.mp4", frames=5), frames)) == expected


ENCODERS = {
    "h264": ("x.mp4", "libx264", {"bf": "3", "g": "20"}),
    "hevc": ("x.mkv", "libx265", {"x265-params": "log-level=none"}),
    "vp8": ("x.webm", "libvpx", {}),
    "vp9": ("x.webm", "libvpx-vp9", {}),
    "av1": ("x.mp4", "libsvtav1", {"preset": "12", "svtav1-params": "lp=1"}),
    "mpeg4": ("x.avi", "mpeg4", {"bf": "2"}),
}


def film(path, codec, options, frames=60, size=(128, 96)):
    """Frames that move, over a picture of smooth colours."""
    large = Image.effect_noise((8, 6), 200).resize((size[0] + frames, size[1]), Image.BICUBIC)
    still = np.stack([np.asarray(large), np.asarray(large)[::-1], np.asarray(large)[:, ::-1]], axis=2)
    pictures = [np.ascontiguousarray(still[:, n : n + size[0]]) for n in range(frames)]
    write_pictures(path, pictures, 10, size, codec, **options)
    return pictures


def test_every_accepted_codec_is_tested():
    assert set(ENCODERS) == set(draw_frames.CODECS)


@pytest.mark.parametrize("codec", ENCODERS)
def test_codecs(tmp_path, codec):
    """The right frames, also where decoding starts at a key frame in the middle, and frames are stored out of order."""
    name, encoder, options = ENCODERS[codec]
    pictures = film(tmp_path / name, encoder, options)
    drawn = open_video(tmp_path / name, 4)
    for place, frame in zip([7, 22, 37, 52], drawn, strict=True):
        distances = [np.abs(np.asarray(frame).astype(int) - picture).mean() for picture in pictures]
        assert np.argmin(distances) == place and min(distances) < 12


@pytest.mark.parametrize("size", [(128, 96), (1280, 720)])
@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_frames_equal_decords(tmp_path, codec, size):
    if find_spec("decord") is None:  # not imported here: two FFmpegs in one process mix up their symbols
        pytest.skip("needs decord")
    name, encoder, options = ENCODERS[codec]
    film(tmp_path / name, encoder, options, frames=12, size=size)
    for ours, theirs in zip(*(open_video(tmp_path / name, 3, backend) for backend in videos.BACKENDS), strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 2


def test_other_codecs_are_refused(tmp_path):
    """Also where the file's suffix and container are those of an accepted one."""
    for name, encoder in (("x.avi", "mjpeg"), ("x.mp4", "mjpeg"), ("x.mkv", "ffv1"), ("x.mov", "prores_ks")):
        path = write_video(tmp_path / name, codec=encoder)
        with pytest.raises(PictureError, match=f"^{name} is coded as {encoder[:6]}.*; accepted are h264, hevc, "):
            open_video(path)


def test_a_phones_video_becomes_upright(tmp_path):
    """A phone writes frames as its sensor lies, and how they are to be turned."""
    path = tmp_path / "phone.mp4"
    upright = film(path, "mpeg4", {}, frames=3)[1]
    content = path.read_bytes()
    matrix = content.index(b"tkhd") + 44
    turned = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:matrix] + turned + content[matrix + len(turned) :])
    (frame,) = open_video(path, 1)
    assert frame.size == (96, 128)
    assert np.abs(np.asarray(frame).astype(int) - np.rot90(upright, -1)).mean() < 8


def test_damaged_files_raise_nothing_else(tmp_path):
    rng, good = random.Random(0), write_video(tmp_path / "good.webm").read_bytes()
    for n in range(16):
        content = bytearray(good[: rng.randrange(40, len(good))] if n % 2 else good)
        for place in rng.sample(range(12, len(content)), 10):
            content[place] ^= 1 << rng.randrange(8)
        path = tmp_path / "bad.webm"
        path.write_bytes(content)
        with contextlib.suppress(PictureError):
            assert len(open_video(path, 2)) <= 2


def test_the_decoding_process_has_no_secrets(tmp_path, monkeypatch):
    """Its only variable is one that Python itself sets."""
    worker = tmp_path / "worker.py"
    names = "str(sorted(set(os.environ) - {'LC_CTYPE'}))"
    worker.write_text(f"import json, os, sys; print(json.dumps([{names}, 'damaged', {{}}])); sys.exit(2)")
    monkeypatch.setattr(videos, "WORKER", worker)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(PictureError, match=r"^x.mp4 \[\]$"):
        open_video(write_video(tmp_path / "x.mp4"))


def test_the_decoding_process_has_no_network(tmp_path):
    code = "import socket, sys; from minigpt4.conversation import draw_frames; draw_frames.leave_network()\n"
    code += "print(sorted(name for _, name in socket.if_nameindex()))"
    command = [sys.executable, "-c", code]
    interfaces = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    code = "import ctypes; raise SystemExit(ctypes.CDLL(None).unshare(0x50000000) != 0)"
    if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode:
        pytest.skip("this system lets no user leave the network")
    assert interfaces == "['lo']"  # and it is down


def test_large_frames_are_shrunk(tmp_path):
    (frame,) = open_video(write_video(tmp_path / "large.mp4", frames=3, size=(1600, 200)), 1)
    assert frame.size == (512, 64)


def test_bad_videos(tmp_path):
    for name, message in bad_videos(tmp_path).items():
        with pytest.raises(PictureError, match=message) as error:
            open_video(tmp_path / name)
        assert str(error.value).startswith(f"{name} ")
        assert str(tmp_path) not in str(error.value)
    for name in ("absent.mp4", ""):
        with pytest.raises(PictureError, match="cannot be read: "):
            open_video(tmp_path / name)


def test_time_and_memory_are_bounded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4")
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(videos, "WORKER", worker)
    monkeypatch.setattr(videos, "SECONDS", 1)
    worker.write_text("import time; time.sleep(30)")
    with pytest.raises(PictureError, match="video.mp4 takes more than 1 s"):
        open_video(path)
    # the real script, with less memory than any video needs
    original = (videos.Path(videos.__file__).with_name("draw_frames.py")).read_text()
    worker.write_text(original.replace("MEMORY = 2 * 2**30", "MEMORY = 2**20"))
    with pytest.raises(PictureError, match="video.mp4 cannot be decoded: it is damaged, or too large"):
        open_video(path)
    worker.write_text("import os; os.abort()")  # a decoder that crashes
    with pytest.raises(PictureError, match="video.mp4 cannot be decoded"):
        open_video(path)


@pytest.mark.parametrize("frames", [0, -1, 65])
def test_number_of_frames(tmp_path, frames):
    with pytest.raises(ValueError, match=f"frames={frames} must be from 1 to 64"):
        open_video(tmp_path / "video.mp4", frames)


def test_without_the_decoder(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4")
    monkeypatch.setattr(videos.importlib.util, "find_spec", lambda name: None)
    for backend in videos.BACKENDS:
        with pytest.raises(PictureError, match=f"pip install {backend}"):
            open_video(path, backend=backend)


def test_decoders_are_imported_only_for_a_video():
    imports = "import sys; from minigpt4.conversation import Chat, open_video"
    code = f"{imports}; sys.exit('av' in sys.modules or 'decord' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_media(tmp_path):
    assert len(open_media(write_video(tmp_path / "video.mp4"), 3)) == 3
    assert len(open_media(GOLDEN / "images" / "rgb.png", 3)) == 1
    assert videos.is_video("HOLIDAY.MOV")


def test_a_video_is_images_of_one_turn(build_golden_model, tmp_path):
    chat = Chat(build_golden_model(), Blip2ImageEvalProcessor(28))
    conv, img_list = CONV_VISION.copy(), []
    chat.upload_video(write_video(tmp_path / "video.mp4"), conv, img_list, frames=3)
    chat.ask("What happens?", conv)
    assert len(img_list) == 3
    assert conv.messages == [["Human", " ".join([f"<Img>{IMAGE_SLOT}</Img>"] * 3) + " What happens?"]]
    assert chat.answer(conv, img_list, do_sample=False, max_new_tokens=5)[0]
    assert not any((img_list[0] == image).all() for image in img_list[1:])
