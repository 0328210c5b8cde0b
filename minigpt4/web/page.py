"""The web page (gradio 6): pictures on the left, the conversation on the right; below each other on a phone."""

import logging
import re
import tempfile
import time
from pathlib import Path

import gradio as gr

from minigpt4.conversation import Chat
from minigpt4.conversation.videos import FRAMES
from minigpt4.web.example_images import save_examples
from minigpt4.web.session import MAX_PICTURES, ChatSession, ChatSessions

TITLE = "MiniGPT-4"
HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}
# Opening pictures and videos, so that a slow one keeps nobody else waiting.
READING = {"concurrency_id": "reading", "concurrency_limit": 4, **HIDDEN}
MEDIA = ["image", "video"]
INVISIBLE = "\u2060"  # word joiner
CSS = """
.gradio-container {width: 100% !important; max-width: 1200px !important; margin: 0 auto !important}
#picker .grid-wrap {padding-top: 32px}
#header {align-items: center}
#header h1 {margin: 0}
#notice {min-height: 1.5em; font-size: 0.9em; opacity: 0.8}
#chatbot .message-content span {white-space: pre-wrap; overflow-wrap: anywhere}
#chatbot .placeholder {padding: 0 1em; text-align: center}
#chatbot img, #chatbot video {max-height: 160px; width: auto}
#chatbot button[aria-label="Share"] {display: none}
#examples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
#examples .thumbnail-item {min-width: 0; width: 100%}
@media (max-width: 700px) {
  .gradio-container main {padding: 8px !important}
  #chatbot {height: 60vh !important}
  /* pictures, then the conversation, then the settings */
  #left {display: contents}
  #left > * {width: 100%}
  #right {order: 1}
  #settings {order: 2}
}
"""
TOGGLE_DARK = "() => { document.body.classList.toggle('dark') }"
# System fonts: the page loads nothing from elsewhere.
THEME = gr.themes.Soft(
    primary_hue="indigo",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
)


class Page:
    """The page, and the state of its visitors.

    It can be served before the model is there: `chat` is set when it is, and until then the page shows `progress`.

    Args:
        concurrency: how many visitors the model serves at the same time; the others wait in line.
        emoji: offer emoji as examples, which is what the tiny model knows.
    """

    def __init__(self, concurrency: int = 1, emoji: bool = False):
        self.chat: Chat | None = None
        self.progress = "Starting"
        self._started = time.monotonic()
        self._model = {"concurrency_id": "model", "concurrency_limit": concurrency, **HIDDEN}
        with tempfile.TemporaryDirectory() as folder:
            self.blocks = self._build(save_examples(Path(folder), emoji))
        # gradio has made copies
        self._examples = [entry["image"]["path"] for entry in self._example_gallery.value]
        self._visits = ChatSessions(keep=self._examples)

    def sweep(self, folder: Path, every: float = 600, age: float = 3600) -> None:
        """Keep deleting uploads in `folder` that belong to no visit; `every` and `age` in seconds. Never returns."""
        while True:
            time.sleep(every)
            self._visits.sweep(folder, age)

    # What the page looks like

    def _build(self, examples: list[Path]) -> gr.Blocks:
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 21600), fill_width=True) as blocks:
            with gr.Row(elem_id="header"):
                gr.Markdown(f"# {TITLE}", container=False)
                dark = gr.Button("Light / dark", size="sm", scale=0, min_width=110)
            self._status = gr.Markdown(self._status_text(), elem_id="status")
            with gr.Row():
                with gr.Column(scale=2, min_width=280, elem_id="left"):
                    self._build_left(examples)
                with gr.Column(scale=3, min_width=320, elem_id="right"):
                    self._build_right()
            self._timer = gr.Timer(1)
            dark.click(None, js=TOGGLE_DARK, api_visibility="private")
            self._connect()
            blocks.load(self._ready, None, [self._status, self._start, self._timer], queue=False, **HIDDEN)
            blocks.unload(self._leave)
        return blocks

    def _build_left(self, examples: list[Path]) -> None:
        self._picker = gr.Gallery(
            label="Pictures and videos", type="filepath", file_types=MEDIA, columns=2, height=250, object_fit="contain",
            fit_columns=False, interactive=True, elem_id="picker", buttons=[],
        )  # fmt: skip
        self._start = gr.Button("Upload & Start Chat", variant="primary", interactive=False, elem_id="start")
        self._restart = gr.Button("Restart", elem_id="restart")
        gr.Markdown("Or take an example:", container=False)
        self._example_gallery = gr.Gallery(
            examples, label="Examples", show_label=False, columns=4, height=120, object_fit="contain",
            interactive=False, allow_preview=False, elem_id="examples", buttons=[],
        )  # fmt: skip
        with gr.Column(elem_id="settings"):
            self._build_settings()

    def _build_settings(self) -> None:
        beams = gr.Slider(1, 10, value=1, step=1, label="Beam search numbers", elem_id="beams")
        temperature = gr.Slider(0.1, 2.0, value=1.0, step=0.1, label="Temperature", elem_id="temperature")
        with gr.Accordion("More settings", open=False):
            sample = gr.Checkbox(True, label="Sample", info="Off: always the likeliest answer")
            top_p = gr.Slider(0.05, 1.0, value=0.9, step=0.05, label="Top p")
            new_tokens = gr.Slider(1, 1000, value=300, step=1, label="Longest answer, in tokens")
            repetition = gr.Slider(1.0, 2.0, value=1.0, step=0.05, label="Repetition penalty")
            length = gr.Slider(-2.0, 2.0, value=1.0, step=0.1, label="Length penalty", info="With beam search")
            seed = gr.Number(None, label="Seed", info="Makes an answer repeatable", precision=0)
            self._frames = gr.Slider(
                1, MAX_PICTURES, value=FRAMES, step=1, label="Pictures from a video", info="Drawn evenly",
                elem_id="frames",
            )  # fmt: skip
        self._settings = [beams, temperature, sample, top_p, new_tokens, repetition, length, seed]

    def _build_right(self) -> None:
        self._chatbot = gr.Chatbot(
            label="Conversation", height=600, elem_id="chatbot", editable="user", buttons=["copy", "copy_all"],
            render_markdown=False, feedback_options=None, layout="bubble",
            group_consecutive_messages=False,  # gradio cannot edit a text that shares a bubble with a picture
            placeholder="Choose a picture or a video and press **Upload & Start Chat**.",
        )  # fmt: skip
        self._notice = gr.Markdown("", elem_id="notice")
        self._box = gr.MultimodalTextbox(
            **self._waiting_box(), show_label=False, file_types=MEDIA, file_count="multiple", sources=["upload"],
            max_plain_text_length=100_000, elem_id="box", interactive=False, autofocus=False,
        )  # fmt: skip

    @staticmethod
    def _waiting_box() -> dict:
        return {"value": None, "placeholder": "Please upload your image first"}

    # What happens when

    def _connect(self) -> None:
        view = [self._chatbot, self._notice]
        begun = self._start.click(
            self._begin, [self._picker, self._frames], [*view, self._picker, self._start, self._box], **READING
        )
        self._picker.upload(self._note_chosen, self._picker, None, queue=False, **HIDDEN)
        # It comes with what is typed as well (some 5 ms of the server each): gradio has none for attached files alone.
        self._box.change(self._note_attached, self._box, None, queue=False, **HIDDEN)
        self._example_gallery.select(self._add_example, self._picker, self._picker, queue=False, **HIDDEN)
        said = self._box.submit(self._say, [self._box, self._frames], [*view, self._box], **READING)
        retried = self._chatbot.retry(self._retry, None, [*view, self._box], **HIDDEN)
        edited = self._chatbot.edit(self._edit, None, [*view, self._box], **HIDDEN)
        running = [begun, said, retried, edited]
        for asked in (said, retried, edited):
            answered = asked.success(self._answer, self._settings, view, **self._model)
            answered.then(self._open_box, None, [*view, self._box], queue=False, **HIDDEN)
            running.append(answered)
        self._box.stop(self._stop, None, None, queue=False, **HIDDEN)
        gr.on(
            [self._restart.click, self._chatbot.clear], self._begin_again, None,
            [*view, self._picker, self._start, self._box], cancels=running, queue=False, **HIDDEN,
        )  # fmt: skip
        self._timer.tick(self._ready, None, [self._status, self._start, self._timer], queue=False, **HIDDEN)

    def _ready(self, request: gr.Request):
        visit = self._visit(request)  # which begins here, so that it can note uploads
        if self.chat is None:
            return self._status_text(), gr.skip(), gr.skip()
        return "", gr.Button(interactive=not visit.started), gr.Timer(active=False)

    def _status_text(self) -> str:
        return "" if self.chat else f"⏳ {self.progress} … ({time.monotonic() - self._started:.0f} s)"

    def _begin(self, pictures: list[tuple[str, str | None]] | None, frames: int, request: gr.Request):
        """Upload & Start Chat."""
        visit = self._idle_visit(request)
        if not pictures:
            raise gr.Error("Choose a picture first.", print_exception=False)
        _warn(visit.show(self._loaded(), [path for path, _ in pictures], int(frames)))
        opened = visit.started
        box = gr.MultimodalTextbox(interactive=True, placeholder="Type and press Enter") if opened else gr.skip()
        return *_view(visit), gr.Gallery(interactive=not opened), gr.Button(interactive=not opened), box

    def _note_chosen(self, pictures: list[tuple[str, str | None]] | None, request: gr.Request) -> None:
        self._visits.note(request.session_hash, [path for path, _ in pictures or []])

    def _note_attached(self, message: dict | None, request: gr.Request) -> None:
        self._visits.note(request.session_hash, message["files"] if message else [])

    def _add_example(self, pictures, selected: gr.SelectData):
        chosen = [path for path, _ in pictures or []]
        return [*chosen, self._examples[selected.index]]

    def _say(self, message: dict, frames: int, request: gr.Request):
        """A question from the text box, perhaps with more pictures."""
        visit = self._idle_visit(request)
        if not visit.started:
            raise gr.Error("Please upload your image first.", print_exception=False)
        _warn(visit.show(self._loaded(), message["files"], int(frames)))
        return self._ask(visit, message["text"])

    def _retry(self, request: gr.Request):
        visit = self._idle_visit(request)
        if visit.question is None:
            raise gr.Error("There is no question to answer again.", print_exception=False)
        return self._ask(visit, visit.take_back())

    def _edit(self, edit: gr.EditData, request: gr.Request):
        visit = self._idle_visit(request)
        if edit.index != visit.question_index:
            gr.Info("Only the last question can be edited.")
            return *_view(visit), gr.skip()
        visit.take_back()
        return self._ask(visit, str(edit.value).replace(INVISIBLE, ""))

    @staticmethod
    def _ask(visit: ChatSession, text: str):
        try:
            visit.ask(text)
        except ValueError as error:
            gr.Warning(str(error))
        busy = visit.busy
        return *_view(visit), gr.MultimodalTextbox(value=None, submit_btn=not busy, stop_btn=busy)

    def _answer(self, beams, temperature, sample, top_p, new_tokens, repetition, length, seed, request: gr.Request):
        visit, session = self._visit(request), request.session_hash
        if not visit.pending:
            return
        settings = {
            "num_beams": int(beams), "temperature": temperature, "do_sample": sample, "top_p": top_p,
            "max_new_tokens": int(new_tokens), "repetition_penalty": repetition, "length_penalty": length,
            "seed": None if seed is None else int(seed),
        }  # fmt: skip
        try:
            for _ in visit.answer(self._loaded(), settings):
                if not self._visits.is_current(session, visit):
                    return
                yield _view(visit)
        except ValueError as error:
            visit.take_back()
            gr.Warning(str(error))
        except Exception:
            logging.exception("An answer failed.")
            visit.take_back()
            gr.Warning("The model failed on this question. The server's log says why.")

    def _open_box(self, request: gr.Request):
        visit = self._visit(request)
        if visit.pending:  # the answer never began
            visit.take_back()
            gr.Warning("Too many visitors are waiting for an answer. Try again in a moment.")
        return *_view(visit), gr.MultimodalTextbox(submit_btn=True, stop_btn=False)

    def _stop(self, request: gr.Request) -> None:
        self._visit(request).end()

    def _begin_again(self, request: gr.Request):
        """Restart."""
        self._leave(request)
        self._visit(request)  # the next one
        box = gr.MultimodalTextbox(**self._waiting_box(), interactive=False, submit_btn=True, stop_btn=False)
        picker, start = gr.Gallery(value=None, interactive=True), gr.Button(interactive=self.chat is not None)
        return [], "", picker, start, box

    def _leave(self, request: gr.Request) -> None:
        self._visits.close(request.session_hash)

    def _visit(self, request: gr.Request) -> ChatSession:
        return self._visits.of(request.session_hash)

    def _idle_visit(self, request: gr.Request) -> ChatSession:
        """The visit, for something new."""
        visit = self._visit(request)
        if visit.busy:
            raise gr.Error("Wait for the answer, or stop it.", print_exception=False)
        return visit

    def _loaded(self) -> Chat:
        if self.chat is None:
            raise gr.Error("The model is still being loaded.", print_exception=False)
        return self.chat


def _view(visit: ChatSession) -> tuple[list[dict], str]:
    """What the chatbot and the notice show."""
    return [entry | {"content": _as_text(entry["content"])} for entry in visit.history], visit.notice


def _as_text(content):
    """Text that the chatbot shows as it is: an invisible character keeps a tag from being one.

    gradio takes text for HTML, and a picture in it would be fetched from elsewhere.
    """
    return re.sub(r"([<&])(?=[a-zA-Z/!?#])", f"\\1{INVISIBLE}", content) if isinstance(content, str) else content


def _warn(problems: list[str]) -> None:
    for problem in problems:
        gr.Warning(problem)
