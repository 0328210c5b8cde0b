"""YAML and options as web pages and input methods leave them."""

import pytest
from helpers import ROOT

from minigpt4.common.commands import check_dashes
from minigpt4.common.config import load_yaml, parse_options
from minigpt4.common.errors import ConfigError

STAGE2 = (ROOT / "train_configs/minigpt4_stage2_finetune.yaml").read_text(encoding="utf-8")

# (what stands in the file, what the page made of it, what the message shows of both)
MANGLED = [
    ("arch: mini_gpt4", "arch:mini_gpt4", "'arch:mini_gpt4'", "'arch: mini_gpt4'"),
    ("num_workers: 4", "num_workers:4", "'num_workers:4'", "'num_workers: 4'"),
    ("num_workers: 4", "num_workers=4", "'num_workers=4'", "'num_workers: 4'"),
    ("distributed: True", "distributed:True", "'distributed:True'", "'distributed: True'"),
    ('name: "blip_caption"', 'name:"blip_caption"', "'name:\"blip_caption\"'", "'name: \"blip_caption\"'"),
    ("  arch: mini", "\tarch: mini", "'\\tarch: mini_gpt4'", "a tab"),
    ("arch: mini", "arch：mini", "'arch：mini_gpt4'", "'arch: mini_gpt4'"),
    ("arch: mini", "arch ： mini", "'arch ： mini_gpt4'", "'arch : mini_gpt4'"),
    ("model:", "model：", "'model：'", "'model:'"),
    ("run:", "run：", "'run：'", "'run:'"),
    ('end_sym: "###"', "end_sym: “###”", "'“###”'", "'\"###\"'"),
    ('end_sym: "###"', 'end_sym: “###"', "'“###\"'", "'\"###\"'"),
    ('end_sym: "###"', "end_sym: &quot;###&quot;", "'end_sym: &quot;###&quot;'", "'end_sym: \"###\"'"),
    ("'###Human: {} ###Assistant: '", "‘###Human: {} ###Assistant: ’", "‘###Human", "\"prompt_template: '###Human"),
    ("'###Human: {} ###Assistant: '", "'###Human: {} ###Assistant: ’", 'Assistant: ’"', "Assistant: '\""),
    ('["train"]', "[“train”]", "'“train”'", "'\"train\"'"),
    ('["train"]', '["train"，"val"]', '["train"，"val"]', '["train","val"]'),
    ('["train"]', "[train，val]", "'train，val'", "'train,val'"),
    ('["train"]', "【train】", "'【train】'", "'[train]'"),
    ("  arch: mini", "\u00a0\u00a0arch: mini", "'\\xa0\\xa0arch: mini_gpt4'", "no-break space"),
    ("arch: mini", "arch:\u00a0mini", "'arch:\\xa0mini_gpt4'", "'arch: mini_gpt4'"),
    ("arch: mini", "arch:&nbsp;mini", "'arch:&nbsp;mini_gpt4'", "'arch: mini_gpt4'"),
    ("num_workers: 4", "num_workers: 4\u00a0", "'4\\xa0'", "'4'"),
    ("arch: mini_gpt4", "arch: mini_gpt4\u3000", "'mini_gpt4\\u3000'", "'mini_gpt4'"),
    ("seed: 42", "seed\u200b: 42", "'seed\\u200b'", "'seed'"),
    ("init_lr: 3e-5", "init_lr: 3e–5", "'3e–5'", "'3e-5'"),
    ("num_workers: 4", "num_workers: ４", "'４'", "'4'"),
    ("num_workers: 4", "num_workers: 4 ＃ four", "'4 ＃ four'", "'4 # four'"),
    ("arch: mini", "arch﹕mini", "'arch﹕mini_gpt4'", "'arch: mini_gpt4'"),
    ("model:", "model", "'model'", "'model:' (the cause: no colon)"),
    ('end_sym: "###"', "end_sym: «###»", "'«###»'", "'\"###\"'"),
    ('end_sym: "###"', "end_sym: ″###″", "'″###″'", "'\"###\"'"),
    ('end_sym: "###"', "end_sym: ´###´", "'´###´'", "\"'###'\""),
    ('end_sym: "###"', "end_sym: `###`", "'end_sym: `###`'", "\"end_sym: '###'\""),
    ('end_sym: "###"', "end_sym: ''###''", "\"''###''\"", "'\"###\"'"),
    ('end_sym: "###"', 'end_sym: ""###""', '\'""###""\'', "'\"###\"'"),
    ('end_sym: "###"', 'end_sym: \\"###\\"', "###", "a backslash"),
    ('["train"]', "（train）", "'（train）'", "'[train]'"),
    ('["train"]', '["train"；"val"]', '["train"；"val"]', '["train","val"]'),
    ("seed: 42", "seed: 42；", "'42；'", "'42'"),
    ("seed: 42", "seed: 42,", "'42,'", "'42' (the cause: ',' at the end)"),
    ("seed: 42", "seed: \u200e42", "'\\u200e42'", "left-to-right mark"),
    ("seed: 42", "seed: 42\x0c", "U+000C", "Delete it"),
    ("seed: 42", "• seed: 42", "'• seed'", "'- seed'"),
    ("model:", "```yaml\nmodel:", "'```yaml'", "''"),
    ("  seed: 42", "    seed: 42", "mapping values", "Compare the spaces"),
    ("# optimizer", "＃ optimizer", "'＃ optimizer'", "'# optimizer'"),
]


@pytest.mark.parametrize(("good", "bad", "found", "needed"), MANGLED, ids=lambda text: text if text.isascii() else "")
def test_the_line_is_named_with_what_belongs_there(tmp_path, good, bad, found, needed):
    assert good in STAGE2
    path = tmp_path / "run.yaml"
    path.write_text(STAGE2.replace(good, bad, 1), encoding="utf-8")
    line = STAGE2[: STAGE2.index(good)].count("\n") + 1
    with pytest.raises(ConfigError) as error:
        load_yaml(path)
    message = str(error.value)
    assert message.startswith((f"{path}, line {line}: ", f"{path} is not valid YAML, line {line},"))
    assert found in message and needed in message


@pytest.mark.parametrize(
    ("text", "found", "needed"),
    [
        ("model:\n  arch:mini_gpt4\n", "'arch:mini_gpt4'", "'arch: mini_gpt4'"),
        ("model: {arch:mini_gpt4}", "'arch:mini_gpt4'", "'arch: mini_gpt4'"),
        ("model: {arch: x,model_type:tiny}", "'model_type:tiny'", "'model_type: tiny'"),
        ("model: {“arch”: mini_gpt4}", "'“arch”'", "'\"arch\"'"),
        ('run:\n  train_splits:\n    -"train"\n', "'-\"train\"'", "'- \"train\"'"),
        ("run:\n  train_splits:\n    – train\n", "'– train'", "'- train'"),
    ],
)
def test_short_files(tmp_path, text, found, needed):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_yaml(path)
    assert found in str(error.value) and needed in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "run: {output_dir: a\u00a0b}  # 种子：42，“注意”",
        'run: {output_dir: "“###”", seed: 3}',
        "model:\n  prompt_template: |\n    user：{}\n    arch:x\n",
        "model:\n  prompt_template: 用户：{} “好” 助手：\n",
        "model: {prompt_template: '', ckpt: /data/照片（1）/a；b`c, end_sym: ''''}",
        "model: {prompt_template: 'user：{}', end_sym: —}",
        "datasets:\n  laion:\n    build_info:\n      storage:\n        pipe:cat a.tar\n",
        "datasets: {laion: {build_info: {storage: [pipe:cat a, https://x/y, s3://a/b, C:\\data, a:b]}}}",
        "run:\n  train_splits:\n  - pipe:cat a.tar\n  - https://x/y\n  - a:b\n",
    ],
)
def test_other_texts_may_have_any_characters(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_yaml(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, line_end):
    path = tmp_path / "run.yaml"
    path.write_bytes(f"# 注释{line_end}run:{line_end}  seed: 7{line_end}".encode(encoding))
    assert load_yaml(path).run.seed == 7


def test_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("run:\n  seed: 7  # 种子\n".encode("gbk"))
    with pytest.raises(ConfigError, match="line 2: the byte 0xd6 is not UTF-8"):
        load_yaml(path)


def test_other_mistakes_name_the_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  seed: 1\n   amp: True\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML, line 3, column 7"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("option", "needed"),
    [
        ("run.seed＝8", "'run.seed=8'"),
        ("run.seed：8", "'run.seed=8'"),
        ("run.seed:8", "'run.seed=8'"),
        ("“run.seed=8”", "'run.seed=8'"),
        ("run.seed=８", "'8'"),
        ("run.init_lr=1e–4", "'1e-4'"),
        ("run.seed=8\u00a0", "'8'"),
        ("model.ckpt=“/x”", "'\"/x\"'"),
        ("run.train_splits=[“train”]", "'[\"train\"]'"),
    ],
)
def test_options(option, needed):
    with pytest.raises(ConfigError) as error:
        parse_options([option])
    assert needed in str(error.value)


def test_texts_in_options_may_have_any_characters():
    texts = {"prompt_template": "user：{} “好” 助手：", "end_sym": "—", "ckpt": "/a\u3000b"}
    assert parse_options([f"model.{key}={text}" for key, text in texts.items()]).model == texts
    assert parse_options(["model.end_sym='＃'", 'run.train_splits=["a，b"]']).run.train_splits == ["a，b"]


def test_flags_with_a_dash():
    with pytest.raises(ConfigError, match="Write --cfg-path"):
        check_dashes(["—cfg-path", "x.yaml"])
    check_dashes(["--prompt", "— what is it?", "—"])
