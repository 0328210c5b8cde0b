"""Opening video files, hostile ones included."""

import subprocess
import sys

import pytest
from helpers import GOLDEN, ROOT
from video_files import CODECS, STEP, bad_videos, write_video

from minigpt4.conversation import CONV_VISION, Chat, PictureError, open_media, open_video, videos
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
    code = "import sys; from minigpt4.conversation import Chat, open_video; sys.exit(bool({'av', 'decord'} & {*sys.modules}))"
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
