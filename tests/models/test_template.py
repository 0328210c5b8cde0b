"""The text around the messages of a conversation, against chat templates of tokenizers."""

import shutil

import pytest
from conversation_cases import CHATML, LLAMA2, renderer

from minigpt4 import PACKAGE_ROOT
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import MiniGPT4Config
from minigpt4.models.template import PICTURE, TEMPLATES, Template, from_chat_template, from_prompt, join_parts, resolve

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
TURNS = [("user", "a {}?"), ("assistant", " b\n"), ("user", PICTURE), ("assistant", "c")]


def written(template: Template, turns) -> str:
    return "".join(question + answer for question, answer in template.exchanges(turns))


@pytest.mark.parametrize("system", [[], [("system", "Be {} brief.")]])
@pytest.mark.parametrize(("text", "eos", "end"), [(CHATML, "<|im_end|>", "<|im_end|>"), (LLAMA2, "</s>", " </s>")])
def test_auto_writes_what_the_chat_template_writes(text, eos, end, system):
    render = renderer(text)
    template = from_chat_template(render, eos)
    turns = [*system, *TURNS]
    expected = render([{"role": role, "content": content} for role, content in turns])
    assert expected.startswith(written(template, turns)) and template.end == end
    assert expected.removeprefix(written(template, turns)).strip() == ""
    assert not template.bos


def test_a_chat_template_without_a_system_text():
    template = from_chat_template(renderer(NO_SYSTEM), "<|im_end|>")
    assert template.system == "" and template.start.endswith("<|im_start|>user\n")
    (_, asked), *others = TURNS
    joined = [("user", f"Be brief.\n\n{asked}"), *others]  # one such record shall not end a run
    assert written(template, [("system", "Be brief."), *TURNS]) == written(template, joined)


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages | length }}" + CHATML,
        CHATML.replace("m.content", "m.content | upper"),
        "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",  # nothing ends an answer
    ],
)
def test_a_chat_template_with_texts_that_change(text):
    with pytest.raises(ConfigError, match="model.template=auto"):
        from_chat_template(renderer(text), "<|im_end|>")


@pytest.mark.parametrize("text", ["{{ raise_exception('never') }}", "{% for", "{{ a.b.c }}", "{{ 1 / 0 }}"])
def test_a_chat_template_that_fails(tmp_path, text):
    shutil.copytree(PACKAGE_ROOT / "assets/tiny/llama", tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(text)
    with pytest.raises(ConfigError, match=rf"model\.template=auto: the chat template of {tmp_path} fails \("):
        resolve(MiniGPT4Config(template="auto", llama_model=str(tmp_path)))


def test_the_keys_of_the_first_release_equal_vicuna_v0():
    assert from_prompt("###Human: {} ###Assistant: ", "###") == TEMPLATES["vicuna_v0"]
    given = MiniGPT4Config(prompt_template="###Human: {} ###Assistant: ", end_sym="###")
    assert resolve(given) == resolve(MiniGPT4Config(template="vicuna_v0")) == TEMPLATES["vicuna_v0"]
    assert written(TEMPLATES["vicuna_v0"], [("system", "S"), *TURNS[:2], ("user", "q"), ("assistant", "x")]) == (
        "S###Human: a {}? ###Assistant:  b\n###Human: q ###Assistant: x###"
    )


def test_a_text_does_not_run_into_the_end():
    """ "C####" would be read as "C" and its end."""
    turns = [("user", "C#"), ("assistant", "C#"), ("user", "q"), ("assistant", "x")]
    assert written(TEMPLATES["vicuna_v0"], turns) == "###Human: C# ###Assistant: C# ###Human: q ###Assistant: x###"
    assert written(Template(question="{}\n", end="#"), turns[:2]) == "C#\nC##"


def test_vicuna_v1():
    """As FastChat writes it."""
    turns = [("system", "S"), ("user", "q"), ("assistant", "x"), ("user", "r"), ("assistant", "y")]
    assert written(TEMPLATES["vicuna_v1"], turns) == "S USER: q ASSISTANT:x</s>USER: r ASSISTANT:y</s>"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("vicuna", "vicuna_v0"),
        ({"question": "Q", "end": "E"}, "question='Q'"),
        ({"question": "{}", "end": "E", "stop": "E"}, "stop"),
        ({"question": "{}"}, "lacks end"),
        ({"question": "{}", "end": ""}, "lacks end"),
        ({"end": "E"}, "lacks question"),
        ({"question": "{} {}", "end": "E"}, "one {}"),
        ({"question": 5, "end": "E"}, "question=5"),
        ({"question": "{}", "end": "E", "bos": "no"}, "bos='no'"),
        ({"question": "<ImageHere>{}", "end": "E"}, "question='<ImageHere>{}'"),
        ({"question": "{}", "end": "E", "start": "{} "}, "start='{} '"),
    ],
)
def test_a_template_that_is_none(value, words):
    with pytest.raises(ConfigError, match=f"model.template.*{words}"):
        resolve(MiniGPT4Config(template=value))


def test_pictures_in_a_message():
    assert join_parts(["  two  blanks \n"]) == "two  blanks" and join_parts(["a ", " ", "b"]) == "a b"
    assert join_parts([None, "\nWhat?"]) == join_parts(["", None, "What?"]) == f"{PICTURE} What?"
    assert join_parts([None, None, "and", None]) == f"{PICTURE} {PICTURE} and {PICTURE}"
