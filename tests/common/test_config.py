"""Merge order, types, and the message for every kind of mistake."""

import json
from types import SimpleNamespace

import pytest
from helpers import ROOT

from minigpt4.common.config import CONFIGS, Config, ConfigError, load_yaml, parse_options
from minigpt4.common.schema import MiniGPT4Config

STAGE1 = ROOT / "train_configs/minigpt4_stage1_pretrain.yaml"
STAGE2 = ROOT / "train_configs/minigpt4_stage2_finetune.yaml"
AT_LEAST_ONE = ("batch_size_train", "log_freq", "accum_grad_iters", "max_epoch")
SHIPPED = sorted([*ROOT.glob("train_configs/*.yaml"), *ROOT.glob("eval_configs/*.yaml")])


def load(path=STAGE1, *options):
    return Config(SimpleNamespace(cfg_path=str(path), options=list(options)))


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_files_load(path):
    cfg = load(path)
    assert cfg.model_cfg.arch == "mini_gpt4"
    assert cfg.datasets_cfg
    assert cfg.to_dict()["run"]["task"] == "image_text_pretrain"


def test_every_original_file_is_there():
    names = {p.name for p in SHIPPED}
    assert {"minigpt4_stage1_pretrain.yaml", "minigpt4_stage2_finetune.yaml", "minigpt4_eval.yaml"} <= names


def test_stage1_values():
    cfg = load()
    run = cfg.run_cfg
    assert (run.init_lr, run.min_lr, run.warmup_lr, run.weight_decay) == (1e-4, 8e-5, 1e-6, 0.05)
    assert (run.max_epoch, run.batch_size_train, run.iters_per_epoch, run.warmup_steps) == (3, 16, 500, 500)
    assert (cfg.datasets_cfg.laion.sample_ratio, cfg.datasets_cfg.cc_sbu.sample_ratio) == (115, 14)
    assert cfg.datasets_cfg.laion.build_info.storage.endswith("{00000..10488}.tar")
    assert cfg.model_cfg.num_query_token == 32
    assert (cfg.model_cfg.max_txt_len, cfg.model_cfg.end_sym) == (32, "\n")


def test_stage2_and_eval_values():
    model = load(STAGE2).model_cfg
    assert (model.max_txt_len, model.end_sym, model.prompt_template) == (160, "###", "###Human: {} ###Assistant: ")
    assert load(ROOT / "eval_configs/minigpt4_eval.yaml").model_cfg.low_resource is True


def test_merge_order(tmp_path):
    path = write(tmp_path, "model: {arch: mini_gpt4, image_size: 448}\ndatasets: {cc_sbu: {sample_ratio: 3}}\n")
    cfg = load(path, "model.image_size=112")
    assert cfg.model_cfg.image_size == 112  # --options over the file
    assert load(path).model_cfg.image_size == 448  # the file over the model's default
    assert cfg.model_cfg.vit_precision == "fp16"  # the model's default
    assert cfg.datasets_cfg.cc_sbu.sample_ratio == 3
    assert cfg.datasets_cfg.cc_sbu.build_info.storage.endswith(".tar")  # the dataset's default
    assert cfg.run_cfg.seed == 42  # the schema's default


def test_origin_names_the_file(tmp_path):
    path = write(tmp_path, "model: {arch: mini_gpt4, llama_model: /nowhere/at/all}\n")
    cfg = load(path, "model.ckpt=/nowhere/either.pth")
    assert cfg.origin("model.llama_model") == str(path)
    assert cfg.origin("model.ckpt") == "--options"
    assert cfg.origin("model.num_query_token").endswith("minigpt4.yaml")


@pytest.mark.parametrize("number", ["1e-4", '"1e-4"', "0.0001", "1.0e-4"])
def test_numbers_in_any_spelling(tmp_path, number):
    assert load(write(tmp_path, f"run: {{init_lr: {number}}}\n")).run_cfg.init_lr == 1e-4


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.end_sym=###", "###"),
        ("model.end_sym=#", "#"),
        ("model.prompt_template=###Human: {} ###Assistant: ", "###Human: {} ###Assistant: "),
        ("model.prompt_template=Human: {} Assistant: ", "Human: {} Assistant: "),
        ("model.prompt_template=a {} #b ", "a {} #b "),
        ('model.end_sym="\\n"', "\n"),
        ("model.end_sym=' '", " "),
        ("model.ckpt=null", None),
        ("model.low_resource=True", True),
        ("run.init_lr=1e-4", 1e-4),
        ("run.train_splits=[train,val]", ["train", "val"]),
        ("model.vit_model={depth: 2}", {"depth": 2}),
        ("model.ckpt=s3://bucket/a=b.pth", "s3://bucket/a=b.pth"),
        ("model.end_sym= ", " "),
        ("model.ckpt={00000..00003}.tar", "{00000..00003}.tar"),
    ],
)
def test_option_values(option, expected):
    section, name = option.split("=")[0].split(".")
    assert parse_options([option])[section][name] == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.int_lr=1", r"Unknown key run\.int_lr in --options\. Did you mean 'init_lr'\?"),
        ("rnu.init_lr=1", r"Unknown key rnu in --options\. Did you mean 'run'\?"),
        ("model.lama_model=x", r"Did you mean 'llama_model'\?"),
        ("datasets.laion.sample_rate=2", r"Did you mean 'sample_ratio'\?"),
        ("run.init_lr=fast", r"run\.init_lr = 'fast' \(set in --options\) is not of type float"),
        ("run.max_epoch=2.5", r"run\.max_epoch = 2\.5 .* is not of type int"),
        ("run.train_splits=train", r"is not of type list\[str\]"),
        ("model.ckpt=", r"has no value.*model\.ckpt=null"),
        ("model.ckpt=", r"without a space"),  # what a shell makes of "model.ckpt= x"
        ("run.max_epoch", r"without spaces around ="),  # of "run.max_epoch = 2"
        ("model.ckpt", r"not of the form section\.key=value"),
        ("nonsense", r"not of the form"),
        ("model.vit_model={depth: 2", r"not valid YAML"),
        ("model.arch=mini_gpt5", r"Did you mean 'mini_gpt4'\?"),
        ("model.model_type=tyny", r"model_type='tyny' is not known"),
        ("datasets.cc_sbu_alig.sample_ratio=1", r"Did you mean 'cc_sbu_align'\?"),
        ("run.task=image_text_pretraining", r"Did you mean 'image_text_pretrain'\?"),
        ("run.imports=[no.such.module]", r"Cannot import 'no\.such\.module'"),
        ("run=3", r"not of the form"),
        ("run.imports=my.module", r"run\.imports = 'my\.module' must be a list"),
        ("run.imports=3", r"run\.imports = 3 must be a list"),
        ("run.imports={a: b}", r"run\.imports = \{'a': 'b'\} must be a list"),
        ("run.output_dir=''", r"run\.output_dir = '' .* is an empty path"),
        ("run.imports=[3]", r"Cannot import '3' \(--import, run\.imports\)"),
        ("run.imports=[[a]]", r"run\.imports = .* must be a list of modules"),
        ("run.imports=['']", r"^'' \(--import, run\.imports\) is not the name of a module"),
        ("run.imports=[./my_plugin.py]", r"^'\./my_plugin\.py' \(--import, run\.imports\) is not the name of a module"),
        ("run.imports=[mine.py]", r"^'mine\.py' \(--import, run\.imports\) is not the name of a module"),
        ("run.imports=[plugins/mine]", r"^'plugins/mine' \(--import, run\.imports\) is not the name of a module"),
        ("run.imports=[.mine]", r"^'\.mine' \(--import, run\.imports\) is not the name of a module"),
        ("datasets.cc_sbu=3", r"datasets\.cc_sbu in --options must be a mapping, not 3"),
        ("run.output_dir=${nope}", r"run .*Interpolation key 'nope' not found"),
        (r"run.name=\${nope}", r"run\.name .*'nope' not found.*oc\.env:NAME"),
        ("run.name=a${b", r"'run\.name=a\$\{b'.*oc\.env:NAME"),
        ("model.vit_precision=fp61", r"is not one of fp16, fp32\. Did you mean 'fp16'\?"),
        *((f"run.{key}=0", rf"run\.{key} = 0 .* must be at least 1") for key in AT_LEAST_ONE),
        ("run.amp_dtype=fp8", r"run\.amp_dtype = 'fp8' .* is not one of auto, bf16, fp16"),
        ("model.load_in=3bit", r"model\.load_in = '3bit' .* is not one of"),
        ("run.seed=null", r"run\.seed = None \(set in --options\) is not of type int"),
        ("model.max_txt_len=null", r"model\.max_txt_len = None \(set in --options\) is not of type int"),
        ("model.qformer={hiden_size: 3}", r"Unknown key model\.qformer\.hiden_size.*Did you mean 'hidden_size'\?"),
        ("model.vit_model={dept: 3}", r"Unknown key model\.vit_model\.dept.*Did you mean 'depth'\?"),
    ],
)
def test_mistakes_on_the_command_line(option, message):
    with pytest.raises(ConfigError, match=message):
        load(STAGE1, option)


OUT_OF_BOUNDS = {
    "run.seed": (-1, 2**32),
    "run.init_lr": (-1, ".nan", "nan", "inf", "-inf", ".inf"),
    "run.min_lr": (-1, 1, ".nan"),  # above init_lr
    "run.warmup_lr": (".nan", ".inf"),
    "run.warmup_steps": (-1,),
    "run.lr_decay_rate": (0, -1, ".inf"),
    "run.beta2": (-0.1, 1, 2, ".nan"),
    "run.weight_decay": (-1, ".nan"),
    "run.num_workers": (-1,),
    "model.drop_path_rate": (-0.1, 1, ".nan"),
    "model.qformer.num_attention_heads": (0, "abc", 1.5),
    "model.qformer.cross_attention_freq": (0,),
    "model.qformer.hidden_dropout_prob": (-0.1, 1, ".nan"),
    "model.qformer": (3, "[1]", "null"),
    "model.vit_model.depth": (0, -1),
    "model.vit_model.mlp_ratio": (0, ".nan", "abc"),
    "model.vit_model": ("null",),
    "datasets.laion.sample_ratio": ("abc", -1, ".nan", ".inf"),
    "datasets.laion.vis_processor.train": ("blip2_image_train", "[a]", 3),
    "datasets.laion.vis_processor.trian": ("{name: blip2_image_train}",),
    "datasets.laion.vis_processor": ("blip2_image_train", 3),
    "preprocess.vis_processor.train": ("blip2_image_train", 3),
    "datasets.laion.build_info": (3, "[a]"),
    "datasets.laion": ("[1]",),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUT_OF_BOUNDS.items() for value in values])
def test_values_out_of_bounds(key, value):
    with pytest.raises(ConfigError, match=rf"{key}\b.*--options"):
        load(STAGE1, f"{key}={value}")


def test_bounds_that_are_settings():
    assert load(STAGE1, "run.init_lr=2", "run.min_lr=2").run_cfg.min_lr == 2
    with pytest.raises(ConfigError, match=r"run\.min_lr = 8e-05 \(set in .*must be at most init_lr=1e-05"):
        load(STAGE1, "run.init_lr=1e-5")


def test_a_null_processor_is_the_default_one():
    train = load(STAGE1, "datasets.laion.vis_processor.train=null").datasets_cfg.laion.vis_processor.train
    assert train.name == "blip2_image_train"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{3: {a: 1}}", "3"),
        ("run: {3: 1}", r"run\.3"),
        ("run: {no: 1}", r"run\.False"),
        ("datasets: {7: {build_info: {}}}", r"datasets\.7"),
        ("datasets: {laion: {7: a}}", r"datasets\.laion\.7"),
        ("datasets: {laion: {build_info: {7: a}}}", r"datasets\.laion\.build_info\.7"),
        ("datasets: {laion: {vis_processor: {7: a}}}", r"datasets\.laion\.vis_processor\.7"),
        ("datasets: {laion: {vis_processor: {train: {7: a}}}}", r"datasets\.laion\.vis_processor.* 7 "),
        ("model: {qformer: {7: 1}}", r"model\.qformer\.7"),
        ("model: {null: 1}", "model"),
        ("datasets: {laion: {build_info: {storage: {a: 1}}}}", r"datasets\.laion\.build_info\.storage"),
        ("datasets: {laion: {build_info: {features: 3}}}", r"datasets\.laion\.build_info\.features"),
        ("run: {imports: 7}", r"run\.imports"),
        ("run: {imports: [7]}", r"run\.imports"),
        ("run: {task: {a: b}}", r"run\.task"),
        ("model: {arch: [a]}", r"model\.arch"),
        ("model: {model_type: [a]}", r"model\.model_type"),
        ("datasets: {laion: {type: 3}}", r"datasets\.laion\.type"),
    ],
)
def test_keys_and_values_of_other_types_in_files(tmp_path, text, key):
    with pytest.raises(ConfigError, match=key):
        load(write(tmp_path, text))


def test_mistakes_in_files(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read nowhere\.yaml"):
        load("nowhere.yaml")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load(write(tmp_path, "run: [1, 2\n"))
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load(write(tmp_path, "- run\n"))
    with pytest.raises(ConfigError, match="run in .* must be a mapping"):
        load(write(tmp_path, "run: 3\n"))
    path = write(tmp_path, "run: {batch_size: 3}\n")
    with pytest.raises(ConfigError, match=f"Unknown key run.batch_size in {path}"):
        load(path)


def test_missing_paths_are_listed_together():
    cfg = load(STAGE2, "model.prompt_path=nope.txt")
    with pytest.raises(ConfigError) as error:
        cfg.check_paths()
    message = str(error.value)
    assert "model.llama_model = '/path/to/vicuna/weights/'" in message
    assert str(CONFIGS / "models/minigpt4.yaml") in message
    assert "model.ckpt = '/path/to/stage1/checkpoint/'" in message
    assert str(STAGE2) in message
    assert "--options model.prompt_path=/where/it/is" in message


def test_hub_ids_and_urls_pass_the_path_check(tmp_path):
    cfg = load(STAGE1, "model.llama_model=lmsys/vicuna-7b-v1.5", "model.q_former_model=https://x.org/a.pth")
    cfg.check_paths()


@pytest.mark.parametrize(("value", "missing"), [("3", "'3'"), ("[a, b]", None), ("true", None), ("0", None)])
def test_a_plugins_own_kind_of_checkpoint(tmp_path, open_registry, value, missing):
    """A model without `config_class` may have anything there; a number is a file's name, as for our own model."""
    from minigpt4.common.registry import registry
    from minigpt4.models import BaseModel

    registry.register_model("anything")(type("Anything", (BaseModel,), {}))
    cfg = load(write(tmp_path, f"model: {{arch: anything, ckpt: {value}, llama_model: {tmp_path}}}\n"))
    if missing:
        with pytest.raises(ConfigError, match=f"model.ckpt = {missing} .* does not exist"):
            cfg.check_paths()
    else:
        cfg.check_paths()


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "llm").mkdir()
    cfg = load(STAGE1, "model.llama_model=~/llm")
    cfg.check_paths()
    assert cfg.model_cfg.llama_model == str(tmp_path / "llm")


def test_dataset_paths_are_checked_for_training_only(tmp_path):
    cfg = load(STAGE1, f"model.llama_model={tmp_path}", f"datasets.cc_sbu.build_info.storage={tmp_path}/{{00..09}}.tar")
    cfg.check_paths()
    with pytest.raises(ConfigError, match=r"datasets\.laion\.build_info\.storage = .*/defaults\.yaml") as error:
        cfg.check_paths(datasets=True)
    assert "cc_sbu" not in str(error.value)


def test_empty_sections_are_empty(tmp_path):
    cfg = load(write(tmp_path, "run:\nmodel: {arch: mini_gpt4}\ndatasets: {cc_sbu: }\n"))
    assert cfg.run_cfg.seed == 42
    assert cfg.datasets_cfg.cc_sbu.build_info.storage.endswith(".tar")


def test_preprocess_serves_datasets_without_processors(tmp_path):
    cfg = load(write(tmp_path, "model: {arch: mini_gpt4}\ndatasets: {cc_sbu: {}}\n"))
    assert cfg.datasets_cfg.cc_sbu.vis_processor.train.name == "blip2_image_train"
    assert load(STAGE1).datasets_cfg.laion.vis_processor.eval.name == "blip2_image_eval"


def test_captions_of_blip_alone_have_a_text_processor(tmp_path, open_registry):
    """The default of laion and cc_sbu, as in the first release; all other texts stay as they are."""
    from minigpt4.common.registry import registry
    from minigpt4.datasets.builders import BaseDatasetBuilder

    registry.register_builder("table")(type("Table", (BaseDatasetBuilder,), {}))
    sections = "laion: {}, more: {builder: cc_sbu}, cc_sbu_align: {}, own: {builder: conversation}, table: {}"
    blip, mine = {"name": "blip_caption"}, {"name": "blip_caption", "max_words": 3}

    def processors(**text_processors):
        preprocess = f"preprocess: {{text_processor: {json.dumps(text_processors)}}}\n"
        cfg = load(write(tmp_path, f"{preprocess}datasets: {{{sections}}}\n"))
        return {name: section.text_processor for name, section in cfg.datasets_cfg.items()}

    both = {"train": blip, "eval": blip}
    assert processors() == {"laion": both, "more": both, "cc_sbu_align": {}, "own": {}, "table": {}}
    assert {str(each["train"]) for each in processors(train=mine).values()} == {str(mine)}
    assert processors(train=None)["laion"]["train"] is None
    own = load(write(tmp_path, f"datasets: {{laion: {{text_processor: {{train: {json.dumps(mine)}}}}}}}\n"))
    assert own.datasets_cfg.laion.text_processor == {"train": mine, "eval": mine}  # val is read as train is


def test_keys_of_a_plugin_are_left_out_of_our_settings():
    assert MiniGPT4Config.from_section({"image_size": 28, "depth_of_adapter": 3}) == MiniGPT4Config(image_size=28)


def test_shipped_defaults_agree_with_the_classes():
    from minigpt4.common.registry import registry

    for path in CONFIGS.glob("models/*.yaml"):
        model = load_yaml(path).model
        cls = registry.get_model_class(model.arch)
        assert str(cls.default_config_path(model.model_type)) == str(path)
    for path in CONFIGS.glob("datasets/*/*.yaml"):
        for name in load_yaml(path).datasets:
            assert registry.get_builder_class(name).default_config_path() == str(path)


def test_pretty_print_has_the_headings_people_grep(caplog):
    caplog.set_level("INFO")
    load().pretty_print()
    for heading in (
        "=====  Running Parameters    =====",
        "======  Dataset Attributes  ======",
        "======  Model Attributes  ======",
    ):
        assert heading in caplog.text
    assert '    "init_lr": 0.0001' in caplog.text


def test_a_key_given_twice():
    """What bash makes of an unquoted brace range."""
    shards = [f"datasets.laion.build_info.storage=data/laion/{i:05}.tar" for i in range(3)]
    with pytest.raises(ConfigError, match=r"storage more than once: 'data/laion/00000.tar' and .*put quotes around"):
        parse_options(shards)
    assert parse_options(["run.seed=1", "run.seed=2"]).run.seed == 2


def test_a_plugin_whose_name_is_no_identifier(tmp_path, monkeypatch):
    (tmp_path / "my-plugin.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert load(STAGE1, "run.imports=[my-plugin]").run_cfg.imports == ["my-plugin"]


@pytest.mark.parametrize(
    ("text", "key", "instead"),
    [
        ("run: {wandb_log: True}", "run.wandb_log", "run.trackers"),
        ("run: {job_name: mine}", "run.job_name", "run.name"),
        ("datasets: {laion: {batch_size: 64}}", "datasets.laion.batch_size", "run.batch_size_train"),
        ("model: {has_qformer: True}", "model.has_qformer", "Leave it out"),
        (
            "model: {arch: minigpt4, model_type: pretrain_vicuna0, chat_template: True}",
            "model.chat_template",
            "template",
        ),
        ("model: {arch: minigpt4, model_type: pretrain_llama2}", "pretrain_llama2", "template: llama2"),
    ],
)
def test_keys_of_upstreams_later_files_say_what_to_write(tmp_path, text, key, instead):
    with pytest.raises(ConfigError) as raised:
        load(write(tmp_path, text))
    assert key in str(raised.value) and instead in str(raised.value)


def test_names_of_upstreams_later_files(tmp_path):
    cfg = load(write(tmp_path, "model: {arch: minigpt4, model_type: pretrain_vicuna0, end_sym: '###'}"))
    assert (cfg.model_cfg.arch, cfg.model_cfg.num_query_token) == ("minigpt4", 32)
