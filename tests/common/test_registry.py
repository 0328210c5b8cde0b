"""Registration, look-up, and what importing the registry costs."""

import subprocess
import sys

import pytest

from minigpt4.common.registry import RegistrationError, Registry, registry

KNOWN = {
    "builder": ["cc_sbu", "cc_sbu_align", "conversation", "laion"],
    "task": ["image_text_pretrain"],
    "model": ["mini_gpt4", "minigpt4"],
    "processor": ["blip2_image_eval", "blip2_image_train", "blip_caption"],
    "lr_scheduler": ["linear_warmup_cosine_lr", "linear_warmup_step_lr"],
    "runner": ["runner_base"],
}


@pytest.mark.parametrize("kind", KNOWN)
def test_everything_is_registered(kind):
    assert getattr(registry, f"list_{kind}s")() == KNOWN[kind]
    for name in KNOWN[kind]:
        assert getattr(registry, f"get_{kind}_class")(name).__name__


def test_evaluation_tasks_are_registered():
    # Other tests may have registered more.
    assert {"caption", "choice", "match", "vqa", "yes_no"} <= {*registry.names("eval_task")}


@pytest.mark.parametrize("kind", KNOWN)
def test_unknown_names_list_the_known_ones(kind):
    name = KNOWN[kind][0] + "x"
    with pytest.raises(KeyError, match=f"Did you mean '{KNOWN[kind][0]}'.*Known:"):
        getattr(registry, f"get_{kind}_class")(name)


def test_duplicates_name_the_owner():
    table = Registry()

    @table.register_model("one")
    class First: ...

    with pytest.raises(KeyError, match="already registered by .*First"):

        @table.register_model("one")
        class Second: ...

    table.register_model("one")(First)  # the same class again is no duplicate


def test_paths():
    table = Registry()
    table.register_path("root", "/a")
    table.register_path("root", "/a")
    assert table.get_path("root") == "/a"
    with pytest.raises(KeyError, match="already registered as '/a'"):
        table.register_path("root", "/b")
    with pytest.raises(KeyError, match="Did you mean 'root'"):
        table.get_path("roots")


@pytest.mark.parametrize("module", ["minigpt4.common.registry", "minigpt4.common.config", "minigpt4.common.contracts"])
def test_importing_it_is_cheap(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'timm') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize("thing", [5, "text", len, lambda: None])
def test_only_classes_are_registered(thing):
    with pytest.raises(RegistrationError, match="'mine': .* is no class"):
        Registry().register_model("mine")(thing)


def test_a_decorator_without_parentheses():
    with pytest.raises(RegistrationError, match=r"Mine: @registry\.register_task needs a name"):

        @Registry().register_task
        class Mine: ...
