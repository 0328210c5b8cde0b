"""The web page (gradio 6): pictures on the left, the conversation on the right; on a phone they are stacked."""

import logging
import re
import time
from pathlib import Path

import gradio as gr
from PIL import Image

from minigpt4.conversation import Chat
from minigpt4.conversation.videos import FRAMES
from minigpt4.web.session import MAX_PICTURES, ChatSession, ChatSessions

TITLE = "MiniGPT-4"
HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}
# Events that open pictures and videos: four at the same time, so that a slow file does not block other visitors.
OPENS_FILES = {"concurrency_id": "reading", "concurrency_limit": 4, **HIDDEN}
MEDIA = ["image", "video"]
INVISIBLE = "\u2060"  # word joiner
EMPTY_BOX = {"value": None, "placeholder": "Please upload your image first", "interactive": False}
GalleryValue = list[tuple[str, str | None]] | None  # (path, caption) of each picture
CSS_FILE = Path(__file__).with_name("page.css")
EXAMPLES = Path(__file__).parents[1] / "assets" / "examples"
TOGGLE_DARK = "() => { document.body.classList.toggle('dark') }"
# System fonts, because the page must load nothing from other servers.
THEME = gr.themes.Soft(
    primary_hue="indigo",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
)


class Page:
    """The page and the sessions of its visitors.

    The page can be served before the model is loaded: until `chat` is set, the page shows `progress`.

    Args:
        uploads: folder for the visitors' files.
        concurrency: number of visitors that the model answers at the same time; the others wait in a queue.
        emoji: offer emoji as example pictures, for the tiny model, which was trained on emoji.
    """

    def __init__(self, uploads: Path, concurrency: int, emoji: bool):
        self.chat: Chat | None = None
        self.progress = "Starting"
        self._started = time.monotonic()
        self._model = {"concurrency_id": "model", "concurrency_limit": concurrency, **HIDDEN}
        pictures = (EXAMPLES / ("emoji" if emoji else "drawings")).iterdir()
        self.blocks = self._build([Image.open(path) for path in sorted(pictures)])
        self.examples = [entry["image"]["path"] for entry in self._example_gallery.value]  # gradio's copies
        self.sessions = ChatSessions(uploads, keep=self.examples)

    # Layout

    def _build(self, examples: list[Image.Image]) -> gr.Blocks:
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
            self._connect(blocks)
        return blocks

    def _build_left(self, examples: list[Image.Image]) -> None:
        self._picker = gr.Gallery(
            label="Pictures and videos", type="filepath", file_types=MEDIA, columns=2, height=250, object_fit="contain",
            fit_columns=False, interactive=True, elem_id="picker", buttons=[],
        )  # fmt: skip
        self._start = gr.Button("Upload & Start Chat", variant="primary", interactive=False, elem_id="start")
        self._restart = gr.Button("Restart", elem_id="restart")
        gr.Markdown("Or take an example:", container=False)
        self._example_gallery = gr.Gallery(
            examples, label="Examples", show_label=False, columns=4, height=120, object_fit="contain",
            format="png", interactive=False, allow_preview=False, elem_id="examples", buttons=[],
        )  # fmt: skip
        with gr.Column(elem_id="settings"):
            self._build_settings()

    def _build_settings(self) -> None:
        settings = self._settings = {}  # by field of `Decoding`
        settings["num_beams"] = gr.Slider(1, 10, 1, step=1, precision=0, label="Beam search numbers", elem_id="beams")
        settings["temperature"] = gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature", elem_id="temperature")
        with gr.Accordion("More settings", open=False):
            settings["do_sample"] = gr.Checkbox(True, label="Sample", info="Off: always the likeliest answer")
            settings["top_p"] = gr.Slider(0.05, 1.0, 0.9, step=0.05, label="Top p")
            settings["max_new_tokens"] = gr.Slider(1, 1000, 300, step=1, precision=0, label="Longest answer, in tokens")
            settings["min_length"] = gr.Slider(
                1, 1000, 1, step=1, precision=0, label="Shortest answer, in tokens", elem_id="shortest"
            )
            settings["repetition_penalty"] = gr.Slider(1.0, 2.0, 1.0, step=0.05, label="Repetition penalty")
            settings["length_penalty"] = gr.Slider(
                -2.0, 2.0, 1.0, step=0.1, label="Length penalty", info="With beam search"
            )
            settings["seed"] = gr.Number(None, label="Seed", info="Makes an answer repeatable", precision=0)
            self._frames = gr.Slider(
                1, MAX_PICTURES, FRAMES, step=1, precision=0, label="Pictures from a video", info="Drawn evenly",
                elem_id="frames",
            )  # fmt: skip

    def _build_right(self) -> None:
        self._chatbot = gr.Chatbot(
            label="Conversation", height=600, elem_id="chatbot", editable="user", buttons=["copy", "copy_all"],
            render_markdown=False, feedback_options=None, layout="bubble",
            group_consecutive_messages=False,  # gradio cannot edit a text that shares a bubble with a picture
            placeholder="Choose a picture or a video and press **Upload & Start Chat**.",
        )  # fmt: skip
        self._notice = gr.Markdown("", elem_id="notice")
        self._box = gr.MultimodalTextbox(
            **EMPTY_BOX, show_label=False, file_types=MEDIA, file_count="multiple", sources=["upload"],
            max_plain_text_length=100_000, elem_id="box", autofocus=False,
        )  # fmt: skip

    # Events

    def _connect(self, blocks: gr.Blocks) -> None:
        view = [self._chatbot, self._notice]
        started = self._start.click(
            self._start_chat, [self._picker, self._frames], [*view, self._picker, self._start, self._box], **OPENS_FILES
        )
        self._picker.upload(self._register_uploads, self._picker, None, queue=False, **HIDDEN)
        # This event also runs at each key press (about 5 ms of server time): gradio has none for attached files alone.
        self._box.change(self._register_uploads, self._box, None, queue=False, **HIDDEN)
        self._example_gallery.select(self._add_example, self._picker, self._picker, queue=False, **HIDDEN)
        submitted = self._box.submit(self._submit, [self._box, self._frames], [*view, self._box], **OPENS_FILES)
        retried = self._chatbot.retry(self._retry, None, [*view, self._box], **HIDDEN)
        edited = self._chatbot.edit(self._edit, None, [*view, self._box], **HIDDEN)
        running = [started, submitted, retried, edited]
        for asked in (submitted, retried, edited):
            answered = asked.success(self._answer, set(self._settings.values()), view, **self._model)
            answered.then(self._enable_box, None, [*view, self._box], queue=False, **HIDDEN)
            running.append(answered)
        self._box.stop(self._stop, None, None, queue=False, **HIDDEN)
        gr.on(
            [self._restart.click, self._chatbot.clear], self._restart_chat, None,
            [*view, self._picker, self._start, self._box], cancels=running, queue=False, **HIDDEN,
        )  # fmt: skip
        status = [self._status, self._start, self._timer]
        gr.on([blocks.load, self._timer.tick], self._show_status, None, status, queue=False, **HIDDEN)
        blocks.unload(self._close_session)

    def _show_status(self, request: gr.Request):
        session = self._session(request)  # made when the page loads, so that uploads can be registered with it
        if self.chat is None:
            return self._status_text(), gr.skip(), gr.skip()
        return "", gr.Button(interactive=not session.started), gr.Timer(active=False)

    def _status_text(self) -> str:
        return "" if self.chat else f"⏳ {self.progress} … ({time.monotonic() - self._started:.0f} s)"

    def _start_chat(self, pictures: GalleryValue, frames: int, request: gr.Request):
        session = self._idle_session(request)
        if not pictures:
            raise gr.Error("Choose a picture first.", print_exception=False)
        self._add_files(session, _paths(pictures), frames)
        started = session.started
        box = gr.MultimodalTextbox(interactive=True, placeholder="Type and press Enter") if started else gr.skip()
        return *_view(session), gr.Gallery(interactive=not started), gr.Button(interactive=not started), box

    def _register_uploads(self, value: GalleryValue | dict, request: gr.Request) -> None:
        """Register the files of the gallery, or of the message in the text box."""
        paths = value["files"] if isinstance(value, dict) else _paths(value)
        self.sessions.add_uploads(request.session_hash, paths)

    def _add_example(self, pictures: GalleryValue, selected: gr.SelectData) -> list[str]:
        return [*_paths(pictures), self.examples[selected.index]]

    def _submit(self, message: dict, frames: int, request: gr.Request):
        """Ask the question in the text box, about the attached files, too."""
        session = self._idle_session(request)
        if not session.started:
            raise gr.Error("Please upload your image first.", print_exception=False)
        self._add_files(session, message["files"], frames)
        return self._ask(session, message["text"])

    def _retry(self, request: gr.Request):
        session = self._idle_session(request)
        if session.question is None:
            raise gr.Error("There is no question to answer again.", print_exception=False)
        return self._ask(session, session.undo_last_question())

    def _edit(self, edit: gr.EditData, request: gr.Request):
        session = self._idle_session(request)
        if edit.index != session.question_index:
            gr.Info("Only the last question can be edited.")
            return *_view(session), gr.skip()
        session.undo_last_question()
        return self._ask(session, str(edit.value).replace(INVISIBLE, ""))

    def _add_files(self, session: ChatSession, paths: list[str], frames: int) -> None:
        if self.chat is None:
            raise gr.Error("The model is still being loaded.", print_exception=False)
        for problem in session.add_files(self.chat, paths, frames):
            gr.Warning(problem)

    @staticmethod
    def _ask(session: ChatSession, text: str):
        try:
            session.ask(text)
        except ValueError as error:
            gr.Warning(str(error))
        busy = session.busy
        return *_view(session), gr.MultimodalTextbox(value=None, submit_btn=not busy, stop_btn=busy)

    def _answer(self, values: dict, request: gr.Request):
        session = self._session(request)
        if not session.pending:
            return
        settings = {name: values[component] for name, component in self._settings.items()}
        try:
            for _ in session.answer(self.chat, settings):
                if self.sessions.by_id.get(request.session_hash) is not session:  # the visitor has restarted or left
                    return
                yield _view(session)
        except ValueError as error:
            session.undo_last_question()
            gr.Warning(str(error))
        except Exception:
            logging.exception("An answer failed.")
            session.undo_last_question()
            gr.Warning("The model failed on this question. The server's log says why.")

    def _enable_box(self, request: gr.Request):
        session = self._session(request)
        if session.pending:  # `_answer` has not run, because the queue was full
            session.undo_last_question()
            gr.Warning("Too many visitors are waiting for an answer. Try again in a moment.")
        return *_view(session), gr.MultimodalTextbox(submit_btn=True, stop_btn=False)

    def _stop(self, request: gr.Request) -> None:
        self._session(request).stop()

    def _restart_chat(self, request: gr.Request):
        self._close_session(request)
        self._session(request)  # makes the new one, so that uploads can be registered with it
        box = gr.MultimodalTextbox(**EMPTY_BOX, submit_btn=True, stop_btn=False)
        picker, start = gr.Gallery(value=None, interactive=True), gr.Button(interactive=self.chat is not None)
        return [], "", picker, start, box

    def _close_session(self, request: gr.Request) -> None:
        self.sessions.close(request.session_hash)

    def _session(self, request: gr.Request) -> ChatSession:
        return self.sessions.get(request.session_hash)

    def _idle_session(self, request: gr.Request) -> ChatSession:
        """The visitor's session. Raises gr.Error while a question is being answered."""
        session = self._session(request)
        if session.busy:
            raise gr.Error("Wait for the answer, or stop it.", print_exception=False)
        return session


def _paths(pictures: GalleryValue) -> list[str]:
    return [path for path, _ in pictures or []]


def _view(session: ChatSession) -> tuple[list[dict], str]:
    """The values of the chatbot and of the notice."""
    return [entry | {"content": _escape(entry["content"])} for entry in session.history], session.notice


def _escape(content: str | dict) -> str | dict:
    """Text with an invisible character after each "<" and "&" that could begin a tag or an entity.

    gradio renders text as HTML. Without this, a browser would load a picture that the text names from another server.
    """
    return re.sub(r"([<&])(?=[a-zA-Z/!?#])", f"\\1{INVISIBLE}", content) if isinstance(content, str) else content
