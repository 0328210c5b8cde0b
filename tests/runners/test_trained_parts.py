"""Runs in which other parts than the projector train: adapters, the Q-Former, each at rates of its own."""

import pytest
import torch
from lora_models import LORA, adapters, save, trained

from minigpt4.common.errors import ConfigError
from minigpt4.common.trained_parts import part_of

pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (None, r"has LoRA adapters, and model\.lora is not set.*--options 'model\.lora=.*\"r\": 2.*\"layers\": null"),
        ({"r": 4}, "r=2, not 4"),
        ({"alpha": 3}, "alpha=6, not 3"),
        ({"target_modules": ["q_proj"]}, "target_modules="),
        ({"layers": [0]}, "layers=null, not"),
    ],
)
def test_other_adapters_are_refused(build_golden_model, make_runner, tmp_path, changed, words):
    """Where a model is built, and where a run is resumed or evaluated."""
    path = save(trained(build_golden_model(lora=LORA)), tmp_path / "a.pth")
    lora = None if changed is None else LORA | changed
    with pytest.raises(ConfigError, match=words):
        build_golden_model(lora=lora, ckpt=path)
    with pytest.raises(ConfigError, match=words):
        make_runner(build_golden_model(lora=lora), evaluate=True, resume_ckpt_path=path, test_splits="[train]")


@pytest.mark.parametrize(("theirs", "mine"), [("mlp", "linear"), ("linear", "mlp")])
def test_another_projector_is_refused(build_golden_model, make_runner, tmp_path, theirs, mine):
    """Where a model is built and where a run is evaluated; also a file that does not name its projector."""
    model = build_golden_model(projector=theirs)
    path, fix = save(model, tmp_path / "a.pth"), rf"Set model\.projector={theirs}"
    with pytest.raises(ConfigError, match=fix):
        build_golden_model(projector=mine, ckpt=path)
    with pytest.raises(ConfigError, match=fix):
        make_runner(build_golden_model(projector=mine), evaluate=True, resume_ckpt_path=path, test_splits="[train]")
    torch.save(torch.load(path)["model"], tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match=r"model\.projector"):
        build_golden_model(projector=mine, ckpt=str(tmp_path / "bare.pth"))


def test_frozen_parts_of_a_checkpoint_are_saved_again(build_golden_model, make_runner, tmp_path):
    """Adapters, and a projector, that are loaded and do not train."""
    first = save(trained(build_golden_model(lora=LORA)), tmp_path / "a.pth")
    for train in (["projector"], ["lora"]):
        model = build_golden_model(lora=LORA, ckpt=first, train=train)
        runner = make_runner(model, job_id=train[0], iters_per_epoch=1)
        assert {"lora" if ".lora_" in name else "projector" for name in runner._trainable()} == set(train)
        runner.save_checkpoint(0)
        saved = torch.load(runner.last_checkpoint)["model"]
        assert saved.keys() == {*adapters(model), "llama_proj.weight", "llama_proj.bias"}


RUN = {"init_lr": 0.01, "lr_groups": "{lora: {init_lr: 0.05, min_lr: 0.001, warmup_steps: 1, weight_decay: 0.2}}"}


def weights(runner) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in runner._trainable().items()}


def test_resumed_equals_uninterrupted(build_golden_model, make_runner):
    settings = {**RUN, "iters_per_epoch": 2, "max_epoch": 2}

    def model():
        torch.manual_seed(0)
        return build_golden_model(lora=LORA | {"dropout": 0.3})

    whole = make_runner(model(), job_id="whole", **settings)
    whole.train()
    path = whole.output_dir / "checkpoint_0.pth"
    resumed = make_runner(model(), job_id="resumed", resume_ckpt_path=str(path), **settings)
    resumed.train()
    first, second = weights(whole), weights(resumed)
    assert any(".lora_B." in name and value.any() for name, value in first.items())
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert whole.optimizer.state_dict()["param_groups"] == resumed.optimizer.state_dict()["param_groups"]


def test_accumulation_equals_one_batch(build_golden_model, make_runner, pool):
    images, captions = pool
    runners = [make_runner(trained(build_golden_model(lora=LORA)), job_id=name, **RUN) for name in ("big", "small")]
    runners[0].train_step({"image": images[:6], "text_input": captions[:6]}, is_update=True)
    for i in range(3):
        part = slice(2 * i, 2 * i + 2)
        runners[1].train_step({"image": images[part], "text_input": captions[part]}, is_update=i == 2)
    first, second = map(weights, runners)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("train", "freeze", "expected"),
    [
        (None, {}, {"projector", "lora"}),
        (None, {"freeze_qformer": False}, {"projector", "lora", "qformer", "query_tokens"}),
        (["projector", "query_tokens"], {"freeze_qformer": False}, {"projector", "query_tokens"}),
        (["projector", "ln_vision", "lora"], {"freeze_vit": False}, {"projector", "ln_vision", "lora"}),
        (["vit", "projector"], {"freeze_vit": False}, {"projector", "vit"}),
    ],
)
def test_what_trains(build_golden_model, make_runner, pool, train, freeze, expected, caplog):
    """The rest gets no gradient and stays in eval mode. The start of a run lists the parts."""
    caplog.set_level("INFO")
    torch.manual_seed(0)
    model = trained(build_golden_model(lora=LORA, train=train, **freeze))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner = make_runner(model, init_lr=0.01, iters_per_epoch=2)
    runner.train()
    changed = {part_of(name) for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == expected
    modes = {"vit": model.visual_encoder, "ln_vision": model.ln_vision, "qformer": model.Qformer}
    assert {part: module.training for part, module in modes.items()} == {part: part in expected for part in modes}
    (table,) = [r.getMessage() for r in caplog.records if "The parts that train" in r.getMessage()]
    assert {line.split()[0] for line in table.splitlines()[1:]} == expected and "rate 0.01 to 8e-05" in table


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"train": ["qformer"]}, r"model\.train lists qformer.*model\.freeze_qformer=False"),
        ({"train": ["projector"], "freeze_vit": False}, r"model\.freeze_vit=False trains what.*add vit or ln_vision"),
        ({"train": ["projector", "lora"]}, r"model\.lora is not set"),
        ({"train": ["projektor"]}, "Did you mean 'projector'"),
        ({"train": ["lora"], "lora": LORA}, r"leaves the projector out.*model\.ckpt"),
        ({"lora": LORA, "lora_r": 4}, "mean the same"),
        ({"lora_alpha": 4}, "lora_r is not"),
        ({"lora": "all"}, "must be a mapping"),
    ],
)
def test_contradictions(build_golden_model, model, words):
    with pytest.raises(ConfigError, match=words):
        build_golden_model(**model)


def test_upstreams_spelling(build_golden_model):
    ours = {"r": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ["k_proj"]}
    models = build_golden_model(lora=ours), build_golden_model(**{f"lora_{key}": value for key, value in ours.items()})
    assert models[0].fingerprint["lora"] == models[1].fingerprint["lora"]
    assert list(adapters(models[0])) == list(adapters(models[1])) != []
    assert not adapters(build_golden_model(lora_r=-1, lora_alpha=16))


def test_each_part_has_its_schedule(build_golden_model, make_runner):
    """The rates of a run that has them for all, step by step; weight decay too."""
    groups = "{lora: {init_lr: 0.05, min_lr: 0.001, warmup_steps: 2, weight_decay: 0.2}, qformer: {weight_decay: 0}}"
    settings = {"init_lr": 0.01, "min_lr": 0.002, "warmup_lr": 0.001, "iters_per_epoch": 4, "max_epoch": 2}
    model = build_golden_model(lora=LORA, freeze_qformer=False)
    runner = make_runner(model, lr_groups=groups, **settings)
    own = settings | {"init_lr": 0.05, "min_lr": 0.001, "warmup_steps": 2}
    others = [make_runner(build_golden_model(), job_id=f"{n}", **rates) for n, rates in enumerate((settings, own))]
    for step in range(8):
        at = {"cur_epoch": step // 4, "cur_step": step % 4}
        expected = [other.lr_sched.step(**at) for other in others]
        runner.lr_sched.step(**at)
        rates = {group.get("part"): group["lr"] for group in runner.optimizer.param_groups}
        assert rates == {None: expected[0], "qformer": expected[0], "lora": expected[1]}
    decays = {(group.get("part"), group["weight_decay"]) for group in runner.optimizer.param_groups}
    assert decays == {(None, 0.05), (None, 0.0), ("lora", 0.2), ("qformer", 0.0)}
    members = [id(p) for group in runner.optimizer.param_groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(runner._trainable())


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("{lora: {init_lr: 0.1}}", r"lr_groups\.lora: no parameter of it trains.*projector"),
        ("{projector: {init_lr: 1.0e-5}}", "min_lr=8e-05 must be at most init_lr=1e-05"),
        ("{projector: 3}", "must be a mapping"),
        ("{projector: {lr: 3}}", "Unknown key run.lr_groups.projector.lr"),
        ("{projector: {warmup_steps: -1}}", "at least 0"),
    ],
)
def test_wrong_rates(build_golden_model, make_runner, groups, words):
    with pytest.raises(ConfigError, match=words):
        make_runner(build_golden_model(), lr_groups=groups)
