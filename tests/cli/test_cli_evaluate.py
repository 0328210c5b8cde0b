"""python -m minigpt4 evaluate, with a model."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from dataset_files import picture_bytes, write_align, write_shards, write_tar
from helpers import GOLDEN, PYTHONPATH, ROOT, free_port
from PIL import Image
from torch import nn

from minigpt4.__main__ import main
from minigpt4.models.template import from_prompt

IMAGES = sorted((GOLDEN / "images").glob("*.png"))
EXAMPLES = sorted((ROOT / "minigpt4" / "assets" / "examples").glob("*/*.*"))
TINY = ROOT / "eval_configs" / "minigpt4_tiny_eval.yaml"


def small(dataset: str) -> list[str]:
    """Options for pictures of the small model's size."""
    processor = {"name": "blip2_image_eval", "image_size": 28}
    return [f"datasets.{dataset}.vis_processor.train.{key}={value}" for key, value in processor.items()]


@pytest.fixture
def data(tmp_path):
    """Captions and questions about pictures, one question without any, and a conversation."""
    records = [{"image": str(path), "caption": f"a picture number {n}"} for n, path in enumerate(IMAGES)]
    records += [{"image": str(path), "prompt": "What is it?", "answer": f"number {n}"} for n, path in enumerate(IMAGES)]
    records.append({"id": "text", "prompt": "Who?", "answer": "Nobody."})
    turns = [("user", "<image><image> Differ?"), ("assistant", "Yes."), ("user", "How?"), ("assistant", "Color.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    records.append({"id": "two", "images": [str(path) for path in IMAGES[:2]], "messages": messages})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def run(golden_config, tmp_path):
    """run(*arguments) evaluates the small model. Returns the status and the scores."""

    def command(*arguments, out="out"):
        torch.manual_seed(0)  # the model's vision side is random
        fixed = ["--cfg-path", golden_config, "--out", tmp_path / out, "--max-new-tokens", 8, "--task", "caption"]
        status = main(["evaluate", *map(str, [*fixed, *arguments])])
        scores = tmp_path / out / "scores.json"
        return status, scores.read_text() if scores.exists() else ""

    return command


def test_the_same_scores_whatever_the_batches_and_after_a_kill(run, data, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    status, scores = run("--data", data)
    assert status == 0
    count = 2 * len(IMAGES) + 2
    assert json.loads(scores)["n"] == count
    assert run("--data", data, "--batch-size", 1, out="ones") == (0, scores)
    (tmp_path / "cut").mkdir()
    for name in ("answers.jsonl", "answers.jsonl.settings.json"):
        shutil.copy(tmp_path / "out" / name, tmp_path / "cut" / name)
    answers = (tmp_path / "out" / "answers.jsonl").read_text()
    (tmp_path / "cut" / "answers.jsonl").write_text(answers[: answers.index("\n") + 20])
    caplog.clear()
    assert run("--data", data, out="cut") == (0, scores)
    assert f"{count - 1} answers written; 1 were there already." in caplog.text
    page = (tmp_path / "out" / "answers.html").read_text()
    assert page.count("<article>") == count and page.count("data:image/jpeg") == count
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n") == (tmp_path / "out" / "table.tex").read_text().count("\\\\\n") + 1 == 3


def test_answers_of_other_settings_are_not_mixed(run, data, tmp_path):
    run("--data", data)
    message, _ = run("--data", data, "--min-length", 2)
    assert "min_length: 1 there, 2 here" in message
    data.write_text(data.read_text().replace("Who?", "Where?"))
    message, _ = run("--data", data)
    assert "questions:" in message
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "scores.json").write_text("mine")
    message, scores = run("--data", data, out="own")
    assert "did not write" in message and scores == "mine"


def test_the_prompt(run, data, tmp_path):
    message, _ = run("--data", data, "--prompt", "What is this?")
    assert "--prompt 'What is this?' must have {}" in message
    status, _ = run("--data", data, "--prompt", "Be brief. {}")
    assert status == 0


def test_a_picture_that_cannot_be_read_is_left_out(run, tmp_path, caplog):
    (tmp_path / "1.jpg").write_bytes(picture_bytes(0))
    (tmp_path / "2.jpg").write_bytes(b"no picture")
    lines = [json.dumps({"image": f"{n}.jpg", "caption": f"number {n}"}) + "\n" for n in (1, 2)]
    (tmp_path / "d.jsonl").write_text("".join(lines))
    status, scores = run("--data", tmp_path / "d.jsonl")
    assert status == 1
    assert json.loads(scores)["n"] == json.loads(scores)["unanswered"] == 1
    assert "2.jpg" in caplog.text


def test_the_val_share_of_a_dataset(run, data):
    options = ["datasets.mine.builder=conversation", f"datasets.mine.build_info.storage={data}"]
    message, _ = run("--options", *options)
    assert "--split val" in message and "build_info.val" in message
    status, scores = run("--options", *options, "datasets.mine.build_info.val=0.5", out="half")
    assert status == 0 and 1 <= json.loads(scores)["n"] < len(IMAGES) * 2 + 2


def test_a_split_of_another_dataset(run, tmp_path):
    write_align(tmp_path / "align", records=5)
    options = [f"datasets.cc_sbu_align.build_info.storage={tmp_path / 'align'}"]
    status, scores = run("--split", "train", "--options", *options, *small("cc_sbu_align"))
    assert status == 0 and json.loads(scores)["n"] == 5
    assert (tmp_path / "out" / "answers.html").read_text().count("data:image/jpeg") == 5


def test_a_share_of_shards(run, data, tmp_path):
    write_shards(tmp_path / "laion", samples=4)
    options = [f"datasets.laion.build_info.storage={tmp_path}/laion/{{00000..00003}}.tar", *small("laion")]
    status, scores = run("--options", *options, "datasets.laion.build_info.val=0.5")
    assert status == 0 and 1 <= json.loads(scores)["n"] < 16
    (tmp_path / "own").mkdir()
    members = {"1.png": picture_bytes(0), "2.0.png": picture_bytes(1), "2.1.png": picture_bytes(2)}
    turns = [["user", "Is it?"], ["assistant", "Yes."], ["user", "<image><image> And?"], ["assistant", "No."]]
    messages = [{"role": role, "content": content} for role, content in turns]
    members |= {"1.json": b'{"caption": "one"}', "2.json": json.dumps({"messages": messages}).encode()}
    write_tar(tmp_path / "own" / "0.tar", sorted(members.items()))
    options = ["datasets.own.builder=conversation", f"datasets.own.build_info.storage={tmp_path}/own/0.tar"]
    status, scores = run("--split", "train", "--options", *options, *small("own"), out="own_out")
    lines = [json.loads(line) for line in (tmp_path / "own_out" / "answers.jsonl").read_text().splitlines()]
    assert status == 0 and [line.get("question") for line in lines] == [None, "And?"]


def test_wrong_arguments(run, data, tmp_path, capsys):
    for arguments, word in (
        (["--out", tmp_path], "--cfg-path"),
        (["--out", tmp_path, "--answers", data], "--data"),
        (["--out", tmp_path, "--cfg-path", TINY, "--batch-size", 0], "batch-size"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", *map(str, arguments)])
        assert word in capsys.readouterr().err
    files = ["--answers", data, "--data", data, "--out", tmp_path / "o"]
    message = main(["evaluate", "--task", "vqaa", *map(str, files)])
    assert "'vqaa'" in message and "Did you mean 'vqa'?" in message


def test_train_py_evaluates_the_test_splits(golden_config, data, tmp_path):
    from train import main as train

    options = ["run.evaluate=True", "run.test_splits=[val]", "run.eval_task=auto", "run.device=cpu"]
    options += ["datasets.mine.builder=conversation", f"datasets.mine.build_info.storage={data}"]
    options += ["datasets.mine.build_info.val=0.3", f"run.output_dir={tmp_path}/runs", "run.num_workers=0"]
    options.append("preprocess.vis_processor.train.image_size=28")
    train(["--cfg-path", str(golden_config), "--options", *options])
    (scores,) = tmp_path.glob("runs/*/val/scores.json")
    assert json.loads(scores.read_text())["n"] >= 1
    with pytest.raises(KeyError, match="Did you mean 'caption'"):
        train(["--cfg-path", str(golden_config), "--options", *options, "run.eval_task=captions"])


class Known(nn.Module):
    """Says that a concept is in a picture if the picture shows one of the concept's group."""

    prompt_list, template = [], from_prompt("{}", "###")

    def __init__(self, tokenizer, shown: dict[int, dict], by_name: dict[str, dict]):
        super().__init__()
        self.tokenizer, self.shown, self.by_name = tokenizer, shown, by_name
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, 1))
        self.config = type("Config", (), {"get_text_config": lambda self: self, "max_position_embeddings": 512})()

    @property
    def llama_model(self):
        return self

    def encode_img(self, images):
        return images.mean(dim=(1, 2, 3))[:, None, None], None  # [B,1,1]: the shade, which is the concept's number

    def context(self, prompts, embeds):
        self.asked = [re.search("Is there a (.*) in the image", prompt)[1] for prompt in prompts]
        return torch.cat([*embeds])[:, :, None], torch.ones(len(prompts), 1)

    def generate(self, inputs_embeds, **options):
        rows = []
        for name, shade in zip(self.asked, inputs_embeds.flatten().tolist(), strict=True):
            same = self.shown[round(shade)]["group"] == self.by_name[name]["group"]
            rows.append(self.tokenizer.encode("Yes, there is.###" if same else "No, there is not.###"))
        longest = max(map(len, rows))
        return torch.tensor([row + [self.tokenizer.eos_token_id] * (longest - len(row)) for row in rows])


def test_popes_settings_and_a_model_of_known_answers(golden_config, tmp_path, monkeypatch):
    """Negatives are concepts of tiny: random ones, popular ones of the largest group, adversarial ones of the same."""
    from minigpt4.conversation import Chat
    from minigpt4.models.tokenizer import load_tokenizer

    rng = random.Random(0)
    concepts = json.loads((ROOT / "dataset" / "tiny" / "concepts.json").read_text(encoding="utf-8"))
    by_group: dict[str, list] = {}
    for concept in concepts:
        by_group.setdefault(concept["group"], []).append(concept)
    largest = max(by_group, key=lambda group: len(by_group[group]))
    shown = dict(enumerate(rng.sample(concepts, 60)))
    for shade in shown:
        Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / f"{shade}.png")
    pools = {"random": lambda own: concepts, "popular": lambda own: by_group[largest], "adversarial": by_group.get}
    expected, files = {}, []
    for setting, pool in pools.items():
        lines, yes, right = [], 0, 0
        for shade, concept in shown.items():
            other = rng.choice([each for each in pool(concept["group"]) if each["name"] != concept["name"]])
            for each, label in ((concept, "yes"), (other, "no")):
                question = f"Is there a {each['name']} in the image?"
                lines.append({"question_id": len(lines), "image": f"{shade}.png", "text": question, "label": label})
            yes += 1 + (other["group"] == concept["group"])
            right += 1
        files.append(tmp_path / f"pope_{setting}.json")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
        expected[setting] = 2 * right / (yes + right)  # 2 TP / (predicted + actual)
    tokenizer = load_tokenizer(str(ROOT / "minigpt4" / "assets" / "tiny" / "llama"))
    model = Known(tokenizer, shown, {concept["name"]: concept for concept in concepts})
    shade_of = lambda picture: torch.full((3, 2, 2), float(picture.getpixel((0, 0))[0]))  # noqa: E731
    chat = Chat(model, shade_of, decoding_loop=None)
    monkeypatch.setattr("minigpt4.conversation.loading.load_chat", lambda *_: chat)
    arguments = ["--cfg-path", golden_config, "--out", tmp_path / "out", "--batch-size", 7, "--max-new-tokens", 20]
    assert main(["evaluate", *map(str, [*arguments, "--data", *files])]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["task"] == "yes_no" and scores["figures"]["no end sign"]["value"] == 0
    for setting, f1 in expected.items():
        figures = scores["groups"][f"pope_{setting}"]["figures"]
        assert figures["F1"]["value"] == pytest.approx(f1)
        assert figures["recall"]["value"] == 1
    assert expected["adversarial"] == pytest.approx(2 / 3) and expected["random"] > 0.8


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_give_the_same_scores(tmp_path):
    records = [{"image": str(path), "caption": path.stem} for path in EXAMPLES[:5]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fixed = ["--cfg-path", str(TINY), "--data", str(tmp_path / "data.jsonl"), "--max-new-tokens", "12"]
    assert main(["evaluate", *fixed, "--out", str(tmp_path / "one")]) == 0
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m", "minigpt4"]
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "evaluate", *fixed, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / name / "scores.json").read_text() for name in ("one", "two"))
    assert one == two and json.loads(one)["n"] == 5
