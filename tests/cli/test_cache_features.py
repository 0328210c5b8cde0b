"""python -m minigpt4 cache-features, and training from its features: the same numbers as from the pictures."""

import json
import re
import shutil
import tarfile
from types import SimpleNamespace

import pytest
import torch
from dataset_files import picture_bytes, write_align, write_shards, write_tar
from torch.utils.data import default_collate

from minigpt4.__main__ import main
from minigpt4.cli import cache_features
from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.output import only_run
from minigpt4.common.registry import registry
from minigpt4.datasets.datasets.feature_dataset import FeatureSet
from minigpt4.datasets.loaders import eval_loader
from minigpt4.models import MiniGPT4
from minigpt4.models.vision import Vision
from minigpt4.processors import normalise
from minigpt4.runners.state import to_device
from minigpt4.tasks import ImageTextPretrainTask
from train import main as train

EVAL = "preprocess.vis_processor.eval.image_size=28"
# float16 keeps 11 bits: a relative error of 2 ** -11 in each feature
TOLERANCE = {"atol": 1e-3, "rtol": 1e-3}


def cache(config, out, *options) -> str | int:
    """Run the command without a language model."""
    absent = ["model.llama_model=/nowhere", "model.ckpt=null", EVAL, *options]
    return main(
        ["cache-features", "--cfg-path", str(config), "--out", str(out), "--batch-size", "8", "--options", *absent]
    )


def config_of(path, *options) -> Config:
    return Config(SimpleNamespace(cfg_path=path, options=[EVAL, "model.ckpt=null", *options]))


def from_cache(folder) -> str:
    return f"datasets.cc_sbu_align.build_info.features={folder}"


@pytest.fixture(scope="module")
def align_cache(tmp_path_factory, parts):
    """A function that caches the features of cc_sbu_align once."""
    folder = tmp_path_factory.mktemp("features")

    def make(configs):
        if not any(folder.iterdir()):
            assert cache(configs["stage2"], folder) == 0
        return folder / "cc_sbu_align"

    return make


def test_cached_features_are_the_computed_ones(configs, align_cache):
    """The losses of a batch are equal too, within the rounding of float16."""
    folder = align_cache(configs)
    cfg = config_of(configs["stage2"])
    torch.manual_seed(0)  # for the projection
    model = MiniGPT4.from_config(cfg.model_cfg).eval()
    pictures = cache_features.source_dataset(cfg, "cc_sbu_align")
    cached = FeatureSet(str(folder))
    assert len(cached) == len(pictures) == 20
    batch = normalise(default_collate([pictures[i] for i in range(20)]))
    from_cached = default_collate([cached[i] for i in range(20)])
    images, features, captions = batch["image"], from_cached["image_features"], batch["text_input"]
    assert captions == from_cached["text_input"] and batch["image_id"] == from_cached["image_id"]
    with torch.no_grad():
        torch.testing.assert_close(features.float(), model.query_outputs(images), **TOLERANCE)
        torch.testing.assert_close(model.project(features), model.encode_img(images)[0], **TOLERANCE)
        losses = [
            model({**image, "text_input": captions})["loss"]
            for image in ({"image": images}, {"image_features": features})
        ]
        shuffled = model({"image_features": features.roll(1, 0), "text_input": captions})["loss"]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=0)
    assert abs(shuffled - losses[0]) > 1e-3  # the tolerance does not hide the images


def test_training_from_the_cache_equals_training_from_pictures(configs, align_cache, tmp_path, caplog):
    """Two epochs of stage 2 have the same order, captions, prompts and losses, and no encoder is built."""
    folder = align_cache(configs)
    projection = MiniGPT4.from_config(config_of(configs["stage2"]).model_cfg).llama_proj.state_dict()
    torch.save({f"llama_proj.{name}": tensor for name, tensor in projection.items()}, tmp_path / "ckpt.pth")
    caplog.set_level("INFO")
    eval_processor = "datasets.cc_sbu_align.vis_processor.train.name=blip2_image_eval"
    logs = {}
    for name, options in {"pictures": [eval_processor], "cache": [from_cache(folder)]}.items():
        caplog.clear()
        options += [EVAL, f"model.ckpt={tmp_path}/ckpt.pth", f"run.output_dir={tmp_path}/{name}"]
        train(["--cfg-path", str(configs["stage2"]), "--options", *options])
        assert ("encoder and Q-Former are not loaded" in caplog.text) == (name == "cache")
        (run,) = (tmp_path / name).iterdir()
        logs[name] = [float(json.loads(line)["train_loss"]) for line in (run / "log.txt").read_text().splitlines()[-2:]]
        saved = torch.load(run / "checkpoint_1.pth", weights_only=True)["model"]
        assert set(saved) == {"llama_proj.weight", "llama_proj.bias"}
    assert logs["cache"] == pytest.approx(logs["pictures"], abs=0.003)
    assert logs["cache"][0] != logs["cache"][1]


def test_streams_become_streams(configs, tmp_path, parts):
    """Stage 1 has a cache for each dataset, shard by shard. Training can mix it with pictures."""
    out = tmp_path / "features"
    assert cache(configs["stage1"], out) == 0
    for name in ("laion", "cc_sbu"):
        assert [p.name for p in sorted(out.joinpath(name).glob("*.tar"))] == [f"{i:05d}.tar" for i in range(4)]
        with tarfile.open(out / name / "00001.tar") as tar:
            names = tar.getnames()
            assert names[:2] == ["000000040.json", "000000040.npy"] and len(names) == 80
            text = json.load(tar.extractfile(names[0]))
        assert text.pop("identity") and text == {"caption": "Sample 40.", "image_id": "00001.tar/000000040"}
    laion, cc_sbu = (f"datasets.{name}.build_info.features={out}/{name}" for name in ("laion", "cc_sbu"))
    for i, options in enumerate(([laion, cc_sbu], [laion])):
        run = [f"run.output_dir={tmp_path}/{i}", "run.max_epoch=1", EVAL]
        train(["--cfg-path", str(configs["stage1"]), "--options", *options, *run])


@pytest.mark.parametrize("stage", [pytest.param("stage1", marks=pytest.mark.slow), "stage2"])
def test_a_cache_knows_which_pictures_are_in_val(configs, tmp_path, parts, stage):
    """It holds all of them, whatever the share; training from it has the splits of training from pictures."""
    out = tmp_path / "features"
    names = {"stage1": ("laion", "cc_sbu"), "stage2": ("cc_sbu_align",)}[stage]
    share = [f"datasets.{name}.build_info.val=0.2" for name in names]
    assert cache(configs[stage], out, *share) == 0
    features = [f"datasets.{name}.build_info.features={out}/{name}" for name in names]
    ids = []
    for options in (share, [*share, *features]):
        cfg = config_of(configs[stage], *options)
        splits = ImageTextPretrainTask.setup_task(cfg).build_datasets(cfg)[names[0]]
        batches = {split: [*eval_loader(dataset, 8, 0)] for split, dataset in splits.items()}
        ids.append({split: [i for batch in each for i in batch["image_id"]] for split, each in batches.items()})
    assert ids[0] == ids[1] and ids[0]["val"] and not {*ids[0]["val"]} & {*ids[0]["train"]}
    run = [f"run.output_dir={tmp_path}/run", "run.max_epoch=1", "run.valid_splits=[val]", EVAL, "model.ckpt=null"]
    train(["--cfg-path", str(configs[stage]), "--options", *share, *features, *run])
    (folder,) = (tmp_path / "run").iterdir()
    assert "val_loss" in (folder / "log.txt").read_text()
    with pytest.raises(ConfigError, match=r"build_info\.val='/a/b' does not go with features"):
        cfg = config_of(configs[stage], *features, f"datasets.{names[0]}.build_info.val=/a/b")
        ImageTextPretrainTask.setup_task(cfg).build_datasets(cfg)


def test_it_continues_where_it_stopped(configs, tmp_path, monkeypatch, caplog):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cache(configs["stage1"], whole) == 0
    assert cache(configs["stage1"], out) == 0
    shard, kept = out / "laion" / "00002.tar", out / "laion" / "00001.tar"
    shard.unlink()
    kept.write_bytes(b"not touched")
    (out / "laion" / ".00002.tar.part").write_bytes(b"half a shard")
    caplog.set_level("INFO")
    assert cache(configs["stage1"], out) == 0
    assert shard.read_bytes() == (whole / "laion" / "00002.tar").read_bytes()
    assert kept.read_bytes() == b"not touched"
    assert "laion: 40 features in 1 shard, 0 pictures left out; already there: 3 shards (rank 0)." in caplog.text


def test_changed_data_are_not_already_done(configs, parts, tmp_path):
    folder = tmp_path / "align"
    shutil.copytree(parts["folder"] / "align", folder)
    storage = f"datasets.cc_sbu_align.build_info.storage={folder}"
    assert cache(configs["stage2"], tmp_path / "cache", storage) == 0
    captions = folder / "filter_cap.json"
    captions.write_text(captions.read_text().replace('"caption": "', '"caption": "Now ', 1))
    assert "differs from the one asked for" in cache(configs["stage2"], tmp_path / "cache", storage)


def test_ranks_share_the_shards(configs, tmp_path, monkeypatch):
    monkeypatch.setattr(dist_utils, "get_world_size", lambda: 3)
    for rank, own in enumerate([["00000.tar", "00003.tar"], ["00001.tar"], ["00002.tar"]]):
        monkeypatch.setattr(dist_utils, "get_rank", lambda rank=rank: rank)
        before = set(tmp_path.glob("f/laion/*.tar"))
        assert cache(configs["stage1"], tmp_path / "f") == 0
        assert sorted(p.name for p in set(tmp_path.glob("f/laion/*.tar")) - before) == own


def test_broken_pictures_are_left_out_and_counted(configs, tmp_path, caplog):
    caplog.set_level("INFO")
    storage = write_align(tmp_path / "align", records=4)
    (storage / "image" / "1.jpg").write_bytes(picture_bytes(0, format="JPEG")[:300])
    assert cache(configs["stage2"], tmp_path / "f", f"datasets.cc_sbu_align.build_info.storage={storage}") == 0
    assert "cc_sbu_align: 3 features in 1 shard, 1 picture left out" in caplog.text
    assert "1.jpg" in caplog.text
    cached = FeatureSet(str(tmp_path / "f" / "cc_sbu_align"))
    assert [cached[i]["image_id"] for i in range(3)] == ["0", "2", "3"]


@pytest.mark.parametrize(("stage", "name", "lost"), [("stage1", "laion", "*.tar"), ("stage2", "cc_sbu_align", "1.jpg")])
def test_files_out_of_reach_are_not_left_out_of_a_cache(configs, tmp_path, monkeypatch, stage, name, lost):
    """It would pass for complete."""
    storage = {"laion": write_shards(tmp_path / "data", 1), "cc_sbu_align": write_align(tmp_path / "data", 4)}[name]
    option = f"datasets.{name}.build_info.storage={storage}{'/*.tar' if name == 'laion' else ''}"
    opened, build = [], cache_features.source_dataset

    def then_away(cfg, built):
        dataset = build(cfg, built)
        opened.extend(path.rename(tmp_path / path.name) for path in storage.rglob(lost) if built == name)
        return dataset

    monkeypatch.setattr(cache_features, "source_dataset", then_away)
    message = cache(configs[stage], tmp_path / "f", option, "run.data_timeout_s=0")
    assert "is out of reach, so this shard is not written" in message
    assert opened and not list(tmp_path.glob(f"f/{name}/*.tar"))


def test_a_stream_with_hardly_any_pictures_is_an_error(configs, tmp_path):
    for shard in range(4):
        members = [(f"{i}.{suffix}", b"x") for i in range(60) for suffix in ("jpg", "txt")]
        write_tar(tmp_path / f"{shard}.tar", members)
    options = [f"datasets.{name}.build_info.storage={tmp_path}/*.tar" for name in ("laion", "cc_sbu")]
    assert "an image that is not one, or is broken" in cache(configs["stage1"], tmp_path / "f", *options)


# --- what is refused


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.num_query_token=4", "model.num_query_token: 8 in the cache, 4 here"),
        ("preprocess.vis_processor.eval.image_size=42", "vis_processor.image_size: 28 in the cache, 42 here"),
        ("preprocess.vis_processor.eval.mean=[0,0,0]", r"vis_processor.mean: None in the cache, \[0, 0, 0\] here"),
        (
            "model.vit_weights={other}",
            "model.vit_weights: vit.pth in the cache, other.pth here, which differ in sha256",
        ),
        ("model.vit_weights=null", "model.vit_weights is null: random weights"),
        ("model.freeze_qformer=False", "model.freeze_qformer=False does not go with"),
        ("model.ckpt={ckpt}", "model.ckpt: None in the cache, '[0-9a-f]{64}' here"),
    ],
)
def test_a_cache_of_something_else_is_refused(configs, align_cache, tmp_path, parts, option, message):
    folder = align_cache(configs)
    other = torch.load(parts["folder"] / "vit.pth", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in other.items()}, tmp_path / "other.pth")
    projection = MiniGPT4.from_config(config_of(configs["stage2"]).model_cfg).llama_proj.state_dict()
    trained = {f"llama_proj.{name}": tensor for name, tensor in projection.items()}
    torch.save({"model": trained | {"query_tokens": torch.zeros(1, 8, 24)}}, tmp_path / "ckpt.pth")
    option = option.replace("{other}", f"{tmp_path}/other.pth").replace("{ckpt}", f"{tmp_path}/ckpt.pth")
    options = [EVAL, "model.ckpt=null", from_cache(folder), f"run.output_dir={tmp_path}/out", option]
    with pytest.raises(ValueError, match=message):
        train(["--cfg-path", str(configs["stage2"]), "--options", *options])
    assert not (tmp_path / "out").exists()


def test_another_cache_is_not_added_to(configs, align_cache, tmp_path, parts):
    """A folder with a cache of other data, or of other weights, is refused."""
    align_cache(configs)
    out = tmp_path / "f"
    assert cache(configs["stage2"], out) == 0
    storage = write_align(tmp_path / "align", records=2)
    answer = cache(configs["stage2"], out, f"datasets.cc_sbu_align.build_info.storage={storage}")
    assert answer.startswith("Error: ") and "holds a cache that differs from the one asked for" in answer
    assert f"data.storage: {str(parts['folder'] / 'align')!r} in the cache, {str(storage)!r} here" in answer


def test_missing_cache_folder_is_found_before_anything_is_loaded(configs):
    options = [EVAL, "model.ckpt=null", from_cache("/nowhere/features")]
    with pytest.raises(ValueError, match="build_info.features = '/nowhere/features' .* does not exist"):
        train(["--cfg-path", str(configs["stage2"]), "--options", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.vit_weights=null"], "model.vit_weights is null: random weights"),
        (["model.vit_weights=/nowhere.pth"], "model.vit_weights = '/nowhere.pth'"),
        (["preprocess.vis_processor.eval=null"], "datasets.cc_sbu_align.vis_processor.eval is not set"),
        (["preprocess.vis_processor.eval.image_size=42"], "The images are 42 x 42 pixels"),
    ],
)
def test_what_cannot_be_cached(configs, tmp_path, options, message):
    answer = cache(configs["stage2"], tmp_path / "f", *options)
    assert answer.startswith("Error: ") and message in answer


def test_a_config_without_datasets(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run: {device: cpu}\n")
    assert "has no dataset to cache" in main(["cache-features", "--cfg-path", str(path), "--out", str(tmp_path / "f")])


@pytest.mark.parametrize("flag", ["--batch-size", "--threads"])
def test_bad_arguments(flag, capsys):
    with pytest.raises(SystemExit):
        cache_features.parse_args(["--cfg-path", "x.yaml", "--out", "y", flag, "0"])
    assert f"{flag} 0 must be more than 0" in capsys.readouterr().err


def test_features_that_float16_cannot_hold(configs, tmp_path, monkeypatch):
    monkeypatch.setattr(Vision, "query_outputs", lambda self, image: torch.full((len(image), 8, 24), 1e6))
    assert "not finite in float16" in cache(configs["stage2"], tmp_path / "f")
    assert not list(tmp_path.glob("f/*/*.tar"))


class OwnFeatures(MiniGPT4):
    def query_outputs(self, image):
        return super().query_outputs(image) * 2


def test_a_model_with_features_of_its_own(configs, tmp_path, open_registry):
    registry.register_model("own_features")(OwnFeatures)
    answer = cache(configs["stage2"], tmp_path / "f", "model.arch=own_features")
    assert "model.arch=own_features computes its image features in its own way" in answer


def test_vision_parts_in_a_checkpoint_count(configs, tmp_path):
    """A trained Q-Former is in model.ckpt. The cache is computed with it; a model without vision ignores it."""
    model = MiniGPT4.from_config(config_of(configs["stage2"]).model_cfg)
    trained = {f"llama_proj.{name}": tensor for name, tensor in model.llama_proj.state_dict().items()}
    torch.save({"model": trained | {"query_tokens": model.query_tokens.flip(1)}}, tmp_path / "ckpt.pth")
    ckpt = f"model.ckpt={tmp_path}/ckpt.pth"
    assert cache(configs["stage2"], tmp_path / "f", ckpt) == 0
    cfg = config_of(configs["stage2"], ckpt, from_cache(tmp_path / "f" / "cc_sbu_align"))
    cached = ImageTextPretrainTask().build_datasets(cfg)["cc_sbu_align"]["train"][0]["image_features"]
    blind = ImageTextPretrainTask().build_model(cfg)
    assert blind.visual_encoder is None and blind.Qformer is None
    assert not any(part.training for part in blind.train().llama_model.modules())
    assert torch.equal(blind.llama_proj.weight, model.llama_proj.weight)
    with pytest.raises(ValueError, match="built for cached features"):
        blind.encode_img(torch.rand(1, 3, 28, 28))
    pictures = cache_features.source_dataset(cfg, "cc_sbu_align")
    image = normalise(default_collate([pictures.load(next(pictures.part(0)))]))["image"]
    seeing = MiniGPT4.from_config(config_of(configs["stage2"], ckpt).model_cfg)
    torch.testing.assert_close(cached.float(), seeing.query_outputs(image)[0], **TOLERANCE)
    assert not torch.allclose(cached.float(), model.query_outputs(image)[0], atol=0.01)


# --- on a GPU, in 16 bit

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_computed_cached_and_trained_from_in_16_bit(configs, tmp_path):
    out = tmp_path / "features"
    assert cache(configs["stage2"], out, "run.device=cuda") == 0
    cfg = config_of(configs["stage2"])
    pictures = cache_features.source_dataset(cfg, "cc_sbu_align")
    cached = FeatureSet(str(out / "cc_sbu_align"))
    model = MiniGPT4.from_config(cfg.model_cfg, "cuda", torch.bfloat16).eval()
    batches = (default_collate([dataset[i] for i in range(8)]) for dataset in (pictures, cached))
    seen, read = (to_device(batch, torch.device("cuda")) for batch in batches)
    with torch.no_grad():
        computed = model.query_outputs(seen["image"]).float()
        torch.testing.assert_close(read["image_features"].float(), computed, atol=0.05, rtol=0.02)
        assert float(model(read)["loss"]) == pytest.approx(float(model(seen)["loss"]), rel=0.005)
    run = [
        EVAL,
        "run.device=cuda",
        "model.ckpt=null",
        from_cache(out / "cc_sbu_align"),
        f"run.output_dir={tmp_path}/out",
    ]
    train(["--cfg-path", str(configs["stage2"]), "--options", *run])
    assert len(list(tmp_path.glob("out/*/checkpoint_1.pth"))) == 1


@needs_gpu
def test_uint8_is_normalised_on_the_gpu_as_on_the_cpu(configs):
    pictures = cache_features.source_dataset(config_of(configs["stage2"]), "cc_sbu_align")
    batch = default_collate([pictures[i] for i in range(4)])
    on_cpu, on_gpu = (to_device(batch, torch.device(kind))["image"] for kind in ("cpu", "cuda"))
    assert on_gpu.is_cuda and on_gpu.dtype == torch.float32
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-6, rtol=0)


def test_a_folder_with_other_shards_is_refused(configs, tmp_path, monkeypatch):
    """The shards of the pictures have the same names as those of their features."""
    monkeypatch.setattr(cache_features, "load_vision", lambda *_: pytest.fail("loaded the encoder"))
    storage = tmp_path / "laion" / "00000.tar"
    storage.parent.mkdir()
    write_tar(storage, [("0.jpg", picture_bytes(0, format="JPEG")), ("0.txt", b"A caption.")])
    before = storage.read_bytes()
    message = cache(configs["stage1"], tmp_path, f"datasets.laion.build_info.storage={storage}")
    assert f"--out {tmp_path}/laion has files that this command did not write, e.g. 00000.tar" in message
    assert storage.read_bytes() == before and [path.name for path in storage.parent.iterdir()] == ["00000.tar"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_out_that_can_be_no_folder(configs, tmp_path, monkeypatch, name):
    monkeypatch.setattr(cache_features, "load_vision", lambda *_: pytest.fail("loaded the encoder"))
    (tmp_path / "file").write_text("of the user")
    message = cache(configs["stage1"], tmp_path / name)
    assert re.search(f"^Error: --out {tmp_path / name}(/laion)? cannot be a folder: ", message)
    assert (tmp_path / "file").read_text() == "of the user"


def test_a_second_run_on_the_same_folder_is_refused(configs, tmp_path):
    with only_run(tmp_path):
        assert "another run is writing there" in cache(configs["stage1"], tmp_path)
