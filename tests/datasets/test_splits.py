"""The split val of every builtin builder: never trained on, never moved, and seen once in an evaluation."""

import json
import shutil
from itertools import islice

import pytest
from dataset_files import good_members, picture_bytes, write_align, write_tar

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.datasets.loaders import TrainLoader, eval_loader
from minigpt4.datasets.splits import Share

PROCESSORS = {split: {"name": "blip2_image_eval", "image_size": 16} for split in ("train", "eval")}
KINDS = ("laion", "cc_sbu_align", "conversation files", "conversation shards")


def build(kind: str, storage, **build_info):
    name = kind.split()[0]
    cfg = {"build_info": {"storage": str(storage), **build_info}, "vis_processor": PROCESSORS}
    return registry.get_builder_class(name)(cfg).build_datasets()


def write_shard(path, numbers, kind: str):
    members = [m for i in numbers for m in good_members(i, 1)]
    if kind == "conversation shards":  # several pictures, and own names
        members = []
        for i in numbers:
            answer = json.dumps({"prompt": "<image> or <image>?", "answer": f"Sample {i}."}).encode()
            members += [(f"{i}.0.png", picture_bytes(i)), (f"{i}.1.png", picture_bytes(0)), (f"{i}.json", answer)]
    write_tar(path, members)


def write(kind: str, folder, count: int):
    """`count` records with the answers or captions "… <i>…"."""
    if kind == "cc_sbu_align":
        return write_align(folder, count)
    folder.mkdir(exist_ok=True)
    if kind == "conversation files":
        (folder / "0.png").write_bytes(picture_bytes(0))
        records = [{"id": f"r{i}", "image": "0.png", "caption": f"Sample {i}."} for i in range(count)]
        (folder / "my.jsonl").write_text("\n".join(map(json.dumps, records)))
        return folder / "my.jsonl"
    for shard in range(0, count, 20):
        write_shard(folder / f"{shard // 20:05d}.tar", range(shard, min(shard + 20, count)), kind)
    return folder / "*.tar"


def texts(batches) -> list[str]:
    """The captions, or the last answers, of all batches."""
    found = [text for batch in batches for text in batch["text_input"]]
    return [text.lower() if isinstance(text, str) else text[-1][1][0].lower() for text in found]


def seen_in_val(dataset, world_size: int = 1, num_workers: int = 0) -> list[str]:
    return texts(b for rank in range(world_size) for b in eval_loader(dataset, 4, num_workers, rank, world_size))


@pytest.mark.parametrize("kind", KINDS)
def test_training_never_sees_val_and_an_evaluation_sees_it_once(kind, tmp_path):
    storage = write(kind, tmp_path / "data", 60)
    whole = {*seen_in_val(build(kind, storage)["train"])}
    splits = build(kind, storage, val=0.2)
    val = seen_in_val(splits["val"])
    assert len(whole) == 60 and 4 < len(val) < 22 and len(val) == len({*val}) and {*val} < whole
    assert seen_in_val(splits["val"]) == val  # the same in every epoch
    splits["train"].shuffle_buffer = 20  # of a stream: it is filled before the first sample
    loader = TrainLoader({"d": splits["train"]}, None, 10, 0, seed=1)
    assert {*texts(loader.epoch(0, 40))} == whole - {*val}
    (tmp_path / "other").mkdir()
    if kind == "cc_sbu_align":
        files = write_align(tmp_path / "other", 3)
    elif kind == "conversation files":
        files = shutil.copy(tmp_path / "data/my.jsonl", tmp_path / "data/val.jsonl")
    else:
        write_shard(files := tmp_path / "other" / "val.tar", range(100, 107), kind)
    with_files = build(kind, storage, val=str(files))
    assert {*seen_in_val(with_files["train"])} == whole
    assert len(seen_in_val(with_files["val"])) == {"cc_sbu_align": 3, "conversation files": 60}.get(kind, 7)


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (3, 2), (7, 0)])
@pytest.mark.parametrize("kind", ["laion", "conversation shards"])
def test_ranks_and_workers_share_val(kind, tmp_path, world_size, num_workers):
    """Whole shards if there are enough; otherwise samples."""
    val = build(kind, write(kind, tmp_path / "data", 60), val=0.3)["val"]
    assert sorted(seen_in_val(val, world_size, num_workers)) == sorted(seen_in_val(val))


@pytest.mark.parametrize("kind", ["laion", "conversation shards"])
def test_val_does_not_move_when_shards_are_added_renamed_or_cut_anew(kind, tmp_path):
    before = {*seen_in_val(build(kind, write(kind, tmp_path / "data", 40), val=0.2)["val"])}
    (tmp_path / "anew").mkdir()
    for name, numbers in (("b", range(30, 60)), ("a", range(30))):  # other names, other shards, and 20 more samples
        write_shard(tmp_path / "anew" / f"{name}.tar", numbers, kind)
    after = {*seen_in_val(build(kind, tmp_path / "anew/*.tar", val=0.2)["val"])}
    assert before == {text for text in after if int(text.strip(".").split()[1]) < 40} and before < after


def test_records_with_an_id_are_in_val_in_shards_as_in_files(tmp_path):
    files = build("conversation", write("conversation files", tmp_path / "files", 60), val=0.2)["val"]
    members = [("x.0.png", picture_bytes(0))]
    for i in range(60):
        record = {"id": f"r{i}", "caption": f"Sample {i}."}
        members += [(f"{i}.png", picture_bytes(0)), (f"{i}.json", json.dumps(record).encode())]
    shard = write_tar(tmp_path / "0.tar", members[1:])
    assert {*seen_in_val(build("conversation", shard, val=0.2)["val"])} == {*seen_in_val(files)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("val", [1, 0, -0.5, 1.5, float("nan"), True, {"a": 1}, [1]])
def test_what_is_no_share_and_no_file(kind, val, tmp_path):
    with pytest.raises(ConfigError, match=r"datasets\..*\.build_info\.val="):
        build(kind, write(kind, tmp_path / "data", 4), val=val)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_val_that_are_not_there_are_named_by_their_key(kind, tmp_path):
    with pytest.raises((ConfigError, OSError), match=r"build_info\.val=/nowhere/x"):
        build(kind, write(kind, tmp_path / "data", 4), val="/nowhere/x.tar")


def test_a_share_that_takes_all_ends_the_run(tmp_path):
    train = build("laion", write("laion", tmp_path / "data", 6), val=0.9999)["train"]
    with pytest.raises(RuntimeError, match=r"laion: .*build_info\.val=0\.9999"):
        next(iter(train))


def test_shares_are_about_their_size():
    shares = [Share(0.1, is_val) for is_val in (True, False)]
    counts = [sum(share.has(str(i)) for i in range(5000)) for share in shares]
    assert sum(counts) == 5000 and 400 < counts[0] < 600


def test_the_stream_of_a_share_is_repeatable(tmp_path):
    storage = write("laion", tmp_path / "data", 40)
    first, second = (build("laion", storage, val=0.2)["train"] for _ in range(2))
    ids = [[sample["image_id"] for sample in islice(stream, 50)] for stream in (first, second)]
    assert ids[0] == ids[1]
