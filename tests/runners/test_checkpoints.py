"""Checkpoints within epochs: exact resume, `auto`, what is kept, and disks that fail."""

import errno
import random

import pytest
import torch
from helpers import facts_of

from minigpt4.common import facts
from minigpt4.runners import checkpoints
from minigpt4.weights import checkpoint
from minigpt4.weights.checkpoint import CheckpointError


@pytest.mark.parametrize("accum", [1, 2])
def test_a_run_goes_on_after_any_update(run, accum):
    """Bit by bit: weights, optimizer, augmentation, prompts, averages and counts of the epoch."""
    settings = {"accum_grad_iters": accum, "save_every_steps": 1, "keep_last": 99, "valid_splits": "[val]"}
    whole = run("whole", **settings)
    expected = facts_of(whole)
    names = {path.name for path in whole.output_dir.glob("checkpoint_?_?.pth")}
    assert names == {f"checkpoint_{epoch}_{n}.pth" for epoch in (0, 1) for n in range(accum, 3, accum)}
    for name in sorted(names):
        resumed = run(name[:-4], resume_ckpt_path=str(whole.output_dir / name), **settings)
        torch.testing.assert_close(facts_of(resumed), expected, rtol=0, atol=0)


def test_checkpoints_by_the_clock(run):
    names = {path.name for path in run("timed", save_every_minutes=1e-6, max_epoch=1).output_dir.glob("*.pth")}
    assert names == {"checkpoint_0.pth", "checkpoint_0_1.pth", "checkpoint_0_2.pth"}
    assert not [*run("later", save_every_minutes=60, max_epoch=1).output_dir.glob("checkpoint_?_?.pth")]


def test_auto_goes_on_from_the_newest_that_is_whole(run, caplog):
    """Of this run: others in the same folder and broken files are passed over."""
    caplog.set_level("INFO")
    settings = {"save_every_steps": 1, "resume_ckpt_path": "auto"}
    whole = run("1", **settings)
    assert "a new run starts" in caplog.text
    expected = facts_of(whole)
    names = ["checkpoint_0.pth", "checkpoint_1.pth", "checkpoint_1_1.pth", "checkpoint_1_2.pth"]
    assert [p.name for p in sorted(whole.output_dir.glob("*.pth"))] == names
    run("2", seed=43, **settings)
    assert "1.pth is passed over, as it is of another run: run.seed: 42 in the checkpoint, 43 here" in caplog.text
    broken = [whole.output_dir / name for name in ("checkpoint_1.pth", "checkpoint_1_2.pth")]
    broken[0].write_bytes(b"PK")
    broken[1].write_bytes(broken[1].read_bytes()[:-100])
    caplog.clear()
    third = run("3", **settings)
    assert f"the run goes on from {whole.output_dir / 'checkpoint_1_1.pth'}" in caplog.text
    assert all(f"Passed over, and the one before is tried: {path}" in caplog.text for path in broken)
    torch.testing.assert_close(facts_of(third), expected, rtol=0, atol=0)
    run("4", **settings)
    assert "Nothing left to train" in caplog.text  # the third has finished


def test_auto_passes_over_a_folder_that_cannot_be_read(tmp_path, monkeypatch, caplog):
    """Such as another user's."""
    for name in ("mine", "others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint_0.pth").touch()
    listed = facts.checkpoints_in

    def denied(folder):
        if folder.name == "others":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(facts, "checkpoints_in", denied)
    assert [*checkpoints._of_all_runs(tmp_path)] == [tmp_path / "mine" / "checkpoint_0.pth"]
    assert f"{tmp_path / 'others'} is passed over: Permission denied" in caplog.text


def test_a_folder_whose_newest_is_broken(run, caplog):
    caplog.set_level("INFO")
    first = run("first", save_every_steps=2)
    for path in first.output_dir.glob("checkpoint_1*.pth"):
        path.write_bytes(path.read_bytes()[:50])
    (first.output_dir / "checkpoint_best.pth").write_bytes(b"PK")
    run("second", resume_ckpt_path=str(first.output_dir))
    assert "The best checkpoint so far is not copied" in caplog.text
    assert f"Resuming after epoch 0 from {first.output_dir / 'checkpoint_0.pth'}" in caplog.text
    for path in first.output_dir.glob("checkpoint_0*.pth"):
        path.unlink()
    with pytest.raises(CheckpointError, match="checkpoint_1.pth"):
        run("third", resume_ckpt_path=str(first.output_dir))


def plain(value):
    """A value with lists in place of tensors."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def test_a_damaged_file_is_found_or_holds_the_same(build_golden_model, make_runner, tmp_path):
    """Cut anywhere, or with a bit that is another: it is refused, or the bit was between its parts."""
    runner = make_runner(build_golden_model(), iters_per_epoch=1)
    runner.save_checkpoint(0)
    content = runner.last_checkpoint.read_bytes()
    whole = torch.load(runner.last_checkpoint, weights_only=True)
    draw, path, harmless = random.Random(0), tmp_path / "copy.pth", 0
    for number in range(80):
        place = draw.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ 1 << number % 8]) + content[place + 1 :]
        path.write_bytes(content[:place] if number % 2 else flipped)
        try:
            found = checkpoint.read_file(path)
        except CheckpointError:
            continue
        harmless += 1
        assert number % 2 == 0, "a part is missing"
        assert plain(found) == plain(whole)
    assert harmless < 20


@pytest.mark.parametrize("fails", [2, 3])
def test_a_disk_that_is_full_for_a_while(run, monkeypatch, caplog, fails):
    """The run goes on and saves later; at the third time in a row it stops. What was there stays."""
    save_whole, saves = torch.save, []

    def save(content, file):
        saves.append(content["epoch"])
        if 2 <= len(saves) < 2 + fails:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_whole(content, file)

    monkeypatch.setattr(torch, "save", save)
    settings = {"save_every_steps": 1}
    if fails == 3:
        with pytest.raises(CheckpointError, match=r"(?s)No space left.*stops.*checkpoint_0_1\.pth"):
            run("full", **settings)
    else:
        runner = run("full", **settings)
        assert {p.name for p in runner.output_dir.glob("*.pth*")} >= {"checkpoint_1_2.pth", "checkpoint_1.pth"}
    assert caplog.text.count("tries again at the next save. The newest checkpoint is") == 2


def test_a_folder_that_vanishes(make_runner, build_golden_model, caplog):
    """What is named as saved is on the disk: an own checkpoint, or that from which the run goes on."""
    first = make_runner(build_golden_model(), job_id="first", iters_per_epoch=1, max_epoch=4)
    first.save_checkpoint(0)
    folder, saved = first.output_dir, str(first.last_checkpoint)
    settings = {"iters_per_epoch": 1, "max_epoch": 4, "resume_ckpt_path": saved}
    again = make_runner(build_golden_model(), job_id="again", **settings)
    again.output_dir.rename(folder.with_name("moved"))
    again.save_checkpoint(1)
    assert f"The newest checkpoint is {saved}." in caplog.text
    folder.rename(folder.with_name("also moved"))
    first.save_checkpoint(1)
    assert "There is no checkpoint of this run on the disk." in caplog.text
    folder.with_name("also moved").rename(folder)
    first.save_checkpoint(1)
    assert [p.name for p in sorted(folder.glob("*.pth"))] == ["checkpoint_0.pth", "checkpoint_1.pth"]


def test_only_own_files_are_removed(make_runner, build_golden_model):
    runner = make_runner(build_golden_model(), keep_last=2)
    folder = runner.output_dir
    for name in ("checkpoint_7.pth", "checkpoint_0_9.pth"):
        (folder / name).write_bytes(b"the user's")
    for epoch in range(4):
        runner.save_checkpoint(epoch, is_best=epoch == 0)
        if epoch == 1:  # the user has put another in its place
            (folder / "checkpoint_1.pth").write_bytes(b"the user's")
    names = ["checkpoint_0_9.pth", "checkpoint_1.pth", "checkpoint_2.pth", "checkpoint_3.pth", "checkpoint_7.pth"]
    assert [p.name for p in sorted(folder.glob("*.pth"))] == [*names, "checkpoint_best.pth"]
