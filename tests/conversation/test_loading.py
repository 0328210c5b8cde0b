"""Building a chat from a config."""

import argparse
from contextlib import nullcontext

import pytest
import torch
from helpers import GOLDEN, ROOT
from video_files import write_video

from minigpt4.common.config import Config, ConfigError
from minigpt4.conversation import CONV_VISION, PictureError
from minigpt4.conversation.loading import load_chat, load_vis_processor, select_gpu
from minigpt4.processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor


def config(path, *options):
    return Config(argparse.Namespace(cfg_path=str(path), options=list(options)))


def test_load_chat(golden_config):
    cfg = config(golden_config)
    chat = load_chat(cfg, select_gpu(cfg, 0))
    assert not chat.model.training
    conv, img_list = CONV_VISION.copy(), []
    chat.upload_img(GOLDEN / "images" / "rgb.png", conv, img_list)
    chat.ask("What is it?", conv)
    assert isinstance(chat.answer(conv, img_list, max_new_tokens=5)[0], str)


def test_video_backend(golden_config, tmp_path):
    pytest.importorskip("decord")
    path = write_video(tmp_path / "camera.avi", codec="mjpeg")
    for options, backend in (([], "av"), (["run.video_backend=decord"], "decord")):
        cfg = config(golden_config, *options)
        chat, img_list = load_chat(cfg, select_gpu(cfg, 0)), []
        assert chat.video_backend == backend
        with nullcontext() if options else pytest.raises(PictureError, match="coded as mjpeg"):
            chat.upload_video(path, CONV_VISION.copy(), img_list, frames=2)
        assert len(img_list) == (2 if options else 0)
    with pytest.raises(ConfigError, match="run.video_backend = 'opencv' .* is not one of av, decord"):
        config(golden_config, "run.video_backend=opencv")


def test_the_processor_is_that_of_the_first_dataset_as_in_the_first_release():
    path = ROOT / "eval_configs/minigpt4_eval.yaml"
    assert isinstance(load_vis_processor(config(path)), Blip2ImageEvalProcessor)
    keys = ("name=blip2_image_train", "image_size=56")
    options = [f"datasets.cc_sbu_align.vis_processor.train.{key}" for key in keys]
    assert isinstance(load_vis_processor(config(path, *options)), Blip2ImageTrainProcessor)


def test_the_default_processor_for_training_is_not_used():
    path = ROOT / "eval_configs/minigpt4_eval.yaml"
    option = "datasets.cc_sbu_align.vis_processor.train.name=blip2_image_train"
    assert isinstance(load_vis_processor(config(path, option)), Blip2ImageEvalProcessor)


def test_a_dataset_without_a_processor_gets_the_default_for_evaluation(tmp_path, golden_config):
    (tmp_path / "eval.yaml").write_text("model:\n  arch: mini_gpt4\ndatasets:\n  cc_sbu_align: {}\n")
    processor = load_vis_processor(config(tmp_path / "eval.yaml"))
    assert isinstance(processor, Blip2ImageEvalProcessor)
    (tmp_path / "eval.yaml").write_text("model:\n  arch: mini_gpt4\n")
    assert isinstance(load_vis_processor(config(tmp_path / "eval.yaml")), Blip2ImageEvalProcessor)


def test_an_unknown_processor(golden_config):
    with pytest.raises(ConfigError, match="blip2_image_evil.*blip2_image_eval"):
        load_vis_processor(config(golden_config, "preprocess.vis_processor.eval.name=blip2_image_evil"))


def test_select_gpu(golden_config, monkeypatch, caplog):
    cfg = config(golden_config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_gpu(cfg, 3).type == "cpu"
    caplog.clear()
    numbered = config(golden_config, "run.device=cuda:7")  # one warning for each name; no other test uses this
    assert [select_gpu(numbered, 3).type for _ in range(2)] == ["cpu", "cpu"]
    assert caplog.text.count("there is no GPU") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert select_gpu(cfg, 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="--gpu-id 2.* 0 to 1"):
        select_gpu(cfg, 2)
    assert select_gpu(config(golden_config, "run.device=cpu"), 1).type == "cpu"
