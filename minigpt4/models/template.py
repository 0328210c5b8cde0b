"""The text around the messages of a conversation.

A conversation with the questions q1, q2, … and the answers a1, a2, … is

    start  question(q1)  a1 end  next_question(q2)  a2 end  …

after `<s>`. With a system text, `system` stands in the place of `start`. Each answer with its end is a segment of its
own for the tokenizer; so is the text between two answers, and the text on each side of an image. Training knows without
any search which tokens are learnt: those of the answers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from minigpt4.common.errors import ConfigError, check_names
from minigpt4.common.facts import IMAGE_SLOT, SEPARATOR
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.tokenizer import chat_template

# A picture in a message, in the form of the published weights.
PICTURE = f"<Img>{IMAGE_SLOT}</Img>"


@dataclass(frozen=True)
class Template:
    """The fixed texts of a conversation; in `system`, `question` and `next_question`, `{}` stands for the message.

    Raises ConfigError if one of these has not one `{}`, and for what is no text or has the place of an image.
    """

    question: str
    """The first question, up to the place where its answer begins."""
    end: str
    """The end of each answer, which is learnt with it."""
    start: str = ""
    """Before the first question of a conversation without a system text."""
    system: str = "{}"
    """The same with a system text; empty: it stands before the first question, above an empty line."""
    next_question: str = ""
    """Each later question, after the end of an answer; empty: like `question`."""
    bos: bool = True
    """Whether the tokenizer's `<s>` comes first, if it has one."""

    def __post_init__(self) -> None:
        for name, text in asdict(self).items():
            if not isinstance(text, bool if name == "bos" else str):
                raise ConfigError(f"model.template: {name}={text!r} must be a text; bos, true or false.")
            if name != "bos" and IMAGE_SLOT in text or name == "start" and "{}" in text:
                raise ConfigError(f"model.template: {name}={text!r} holds a place of messages: {{}} or {IMAGE_SLOT}.")
            if name in ("question", "system", "next_question") and text and text.count("{}") != 1:
                raise ConfigError(f"model.template: {name}={text!r} must have one {{}}, where the message goes.")

    @property
    def separators(self) -> list[str]:
        """Texts that no message may have."""
        return [self.end]

    @property
    def prompt(self) -> str:
        """The first question with all that precedes it; `{}` stands for the question."""
        return self.start + self.question

    def record(self, setting: str | Mapping | None) -> dict:
        """The entries of a checkpoint about the template. setting: `model.template`."""
        return {"prompt_template": self.prompt, "end_sym": self.end} | ({"template": asdict(self)} if setting else {})

    def exchanges(self, messages: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """(the text before an answer, the answer with its end) of messages (role, text).

        The roles are [system,] user, assistant, user, assistant, …
        """
        before = self.start
        if messages[0][0] == "system" and not self.system:
            messages = [("user", f"{messages[0][1]}\n\n{messages[1][1]}"), *messages[2:]]
        elif messages[0][0] == "system":
            before, messages = _insert(self.system, messages[0][1]), messages[1:]
        question = self.question
        for (_, asked), (_, answer) in zip(messages[::2], messages[1::2], strict=True):
            yield before + _insert(question, asked), _insert("{}" + self.end, answer)
            before, question = "", self.next_question or self.question


class FirstRelease(Template):
    """A template of the first release, whose chat writes prompts in a form of its own, with "###" between the turns."""

    @property
    def separators(self) -> list[str]:
        return [self.end, SEPARATOR]


def _insert(text: str, message: str) -> str:
    """`text` with the message in the place of `{}`; a space follows it if it would become part of a marker there."""
    before, _, after = text.partition("{}")
    joins = len(after) > 1 and not after[0].isspace() and message.endswith(after[0])
    return before + message + (" " if joins else "") + after


TEMPLATES = {
    # The published weights of 2023, and stage 2 as it is shipped.
    "vicuna_v0": FirstRelease(
        start="###Human: ",
        system="{}###Human: ",
        question="{} ###Assistant: ",
        next_question="Human: {} ###Assistant: ",
        end="###",
    ),
    # Vicuna v1.1 and v1.5.
    "vicuna_v1": Template(
        start="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: ",
        system="{} USER: ",
        question="{} ASSISTANT:",
        next_question="USER: {} ASSISTANT:",
        end="</s>",
    ),
    # Llama 2 chat, as in the first release's weights for it.
    "llama2": Template(
        start="[INST] ",
        system="[INST] <<SYS>>\n{}\n<</SYS>>\n\n",
        question="{} [/INST] ",
        next_question="<s>[INST] {} [/INST] ",
        end="</s>",
    ),
}


def from_prompt(prompt_template: str, end: str) -> Template:
    """The template of the first release's keys `prompt_template`, with `{}` for the question, and `end_sym`.

    A question that begins with `end` does so once only: the answer before it ends with it. Raises ConfigError for a
    text without one `{}`.
    """
    if prompt_template.count("{}") != 1:
        raise ConfigError(f"model.prompt_template={prompt_template!r} must have one {{}}, where the prompt goes.")
    start, _, rest = prompt_template.partition("{}")
    after = prompt_template.removeprefix(end)
    return FirstRelease(start=start, system="{}" + start, question="{}" + rest, next_question=after, end=end)


def read_prompts(path: str, template: str) -> list[str]:
    """The prompts of a text file, one per line, each put into `template`. Lines without an image slot are left out.

    template: has a `{}`, as `Template.prompt`.
    Raises ConfigError for a file that is no text, if no line has a slot, or if a prompt has several.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ConfigError(f"model.prompt_path={path}, a text file, cannot be read: {reason}.") from None
    prompts = [template.replace("{}", line, 1) for line in lines if IMAGE_SLOT in line]
    if not prompts:
        raise ConfigError(
            f"No line of model.prompt_path={path} holds {IMAGE_SLOT}, which says where the image goes "
            f"({len(lines)} lines read). Write for example: <Img>{IMAGE_SLOT}</Img> Describe this image in detail."
        )
    crowded = next((text for text in prompts if text.count(IMAGE_SLOT) > 1), None)
    if crowded:
        raise ConfigError(
            f"A prompt of model.prompt_path={path} holds {IMAGE_SLOT} {crowded.count(IMAGE_SLOT)} times, a training "
            f"picture goes into one: {crowded!r}"
        )
    return prompts


def resolve(cfg: MiniGPT4Config) -> Template:
    """The template of the `model:` section.

    `model.template` is a name in TEMPLATES, "auto" (the chat template of the language model's tokenizer), or a mapping
    with the fields of `Template`. If it is null, `prompt_template` and `end_sym` decide.

    Raises ConfigError for an unknown name or field, and for a chat template that is missing or has no fixed texts.
    """
    value = cfg.template
    if value is None:
        return from_prompt(cfg.prompt_template, cfg.end_sym)
    if isinstance(value, Mapping):
        check_names(value, [f.name for f in fields(Template)], lambda name: f"model.template has no key {name}")
        for name in ("question", "end"):
            if value.get(name) in (None, ""):
                raise ConfigError(f"model.template={dict(value)} lacks {name}. It needs question and end.")
        return Template(**value)
    if value == "auto":
        return from_chat_template(*chat_template(cfg.llama_model, cfg.trust_remote_code))
    check_names([value], [*TEMPLATES, "auto"], lambda name: f"model.template={name!r} is not known")
    return TEMPLATES[value]


def from_chat_template(render: Callable[[list[dict]], str], eos: str) -> Template:
    """The template whose texts a tokenizer's own chat template writes around messages.

    Args:
        render: writes messages {"role", "content"}, and the beginning of an answer unless the last one is an answer.
        eos: the text of the end token. If it follows an answer, it is its end, and the text after it is not learnt.

    Raises ConfigError if these texts depend on the messages, and if nothing ends an answer.
    """
    system, first, answer, second = (f"⟦{name}⟧" for name in ("system", "first", "answer", "second"))
    turns = [("user", first), ("assistant", answer), ("user", second), ("assistant", answer), ("user", first)]
    messages = [{"role": role, "content": text} for role, text in turns]
    start, _, asked = render(messages[:1]).partition(first)
    # Text between the beginning of an answer and its content stands before every answer.
    before, _, after = render(messages[:2]).removeprefix(start + first).partition(answer)
    end = after[: after.index(eos) + len(eos)] if eos in after else after
    if not end:
        raise ConfigError(
            "model.template=auto: the tokenizer's chat template writes nothing after an answer, so the model would not "
            "learn to end one. Give model.template a name or a mapping."
        )
    again = render(messages[:3]).removeprefix(start + first + before + answer + end) + before.removeprefix(asked)
    try:
        with_system = render([{"role": "system", "content": system}, *messages[:1]]).partition(first)[0]
    except Exception:  # of a template that refuses a system text
        with_system = ""
    found = Template(
        question="{}" + before,
        end=end,
        start=start,
        system=with_system.replace(system, "{}") if system in with_system else "",
        next_question=again.replace(second, "{}") if second in again else "{}",
        bos=False,
    )
    written = "".join(question + answer for question, answer in found.exchanges([*turns, ("assistant", "")]))
    if written.removesuffix(end) != render(messages) + before.removeprefix(asked):
        raise ConfigError(
            "model.template=auto: the tokenizer's chat template writes other texts around other messages. Give "
            "model.template a name or a mapping."
        )
    return found


def join_parts(parts: Sequence[str | None]) -> str:
    """The text of a message from its parts: texts, and None where a picture stands.

    One space separates two parts; other white space at the ends of a part is left out, as answers are shown without.
    """
    pieces = [PICTURE if part is None else part.strip() for part in parts]
    return " ".join(piece for piece in pieces if piece)
