"""The session of one visitor of the web page: the conversation, the chat history on display, and the uploaded files."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image

from minigpt4.common.text import pluralize
from minigpt4.conversation import CONV_VISION, Chat, Conversation, PictureError, open_media
from minigpt4.conversation.pictures import FORMATS
from minigpt4.conversation.videos import FRAMES

MAX_PICTURES = 16  # in a conversation, video frames included
MAX_SESSIONS = 200
MAX_CHARACTERS = 20_000


class ChatSession:
    """The state of one visitor.

    Attributes:
        history: the messages on the page, {"role": "user" or "assistant", "content": text or {"path": file}}.
        notice: a line of text for the visitor.
        files: the uploads, which are deleted when the session ends.
        pending: True if there is a question whose answer has not begun.
        question_index: the place of the last question in `history`, or None.
    """

    def __init__(self) -> None:
        self.conv, self.img_list = CONV_VISION.copy(), []
        self.history: list[dict] = []
        self.notice = ""
        self.files: set[Path] = set()
        self.pending = False
        self.question_index: int | None = None
        self._answering = False
        self._new_images: list[torch.Tensor] = []  # in the history, but not yet encoded by the model
        self._conv_before_question: Conversation | None = None
        self._stop_requested = threading.Event()

    @property
    def started(self) -> bool:
        """True once the visitor has shown a picture."""
        return bool(self.history)

    @property
    def busy(self) -> bool:
        """True while there is a question whose answer is not complete."""
        return self.pending or self._answering

    @property
    def question(self) -> str | None:
        """The last question."""
        return None if self.question_index is None else self.history[self.question_index]["content"]

    def add_files(self, chat: Chat, paths: Iterable[str], frames: int = FRAMES) -> list[str]:
        """Add pictures and videos to the history; the model sees them with the next question.

        `frames` frames are sampled from each video. Returns an error message for each file that was refused.
        """
        problems = []
        for path in paths:
            self.files.add(Path(path))
            try:
                self._new_images += [chat.vis_processor(picture) for picture in self._open(path, frames)]
                self.history.append({"role": "user", "content": {"path": str(path)}})
            except PictureError as error:
                problems.append(str(error))
        return problems

    def _open(self, path: str, frames: int) -> list[Image.Image]:
        """The picture, or the frames of the video, in a file. Raises PictureError if there are too many."""
        room = MAX_PICTURES - len(self.img_list) - len(self._new_images)
        pictures = open_media(path, frames, formats=FORMATS) if room else []
        if not 0 < len(pictures) <= room:
            many = f"has {len(pictures)} pictures, too many" if len(pictures) > 1 else "is one too many"
            limit = f"at most {MAX_PICTURES} in a conversation, those of videos included"
            raise PictureError(f"{Path(path).name} {many}: {limit}.")
        return pictures

    def ask(self, text: str) -> None:
        """Add a question, which `answer` then answers. Raises ValueError if it is empty or too long."""
        if self.busy:
            raise ValueError("The last question is still being answered. Wait, or stop the answer.")
        if not text.strip():
            raise ValueError("Ask something about the picture.")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"The question has {len(text):,} characters; at most {MAX_CHARACTERS:,} are accepted.")
        self.notice, self.pending = "Waiting for the model …", True
        self._stop_requested.clear()
        self.question_index = len(self.history)
        self.history.append({"role": "user", "content": text})
        self._conv_before_question = None

    def undo_last_question(self) -> str:
        """Remove the last question and its answer. Returns the question."""
        question = self.question
        del self.history[self.question_index :]
        if self._conv_before_question:
            self.conv = self._conv_before_question
        self.question_index, self.notice, self.pending = None, "", False
        return question

    def stop(self) -> None:
        """Stop a running answer at its current length."""
        self._stop_requested.set()

    def answer(self, chat: Chat, settings: dict) -> Iterator[None]:
        """Answer the question. Each step of this iterator updates `history` and `notice`.

        `settings` are those of `Decoding`. Raises ValueError if a setting is out of bounds or the question does not
        fit into the context; the question then stays in the history.
        """
        self._answering = True  # before `pending` is reset, so that `busy` is true throughout
        self.pending = False
        try:
            while self._new_images:
                chat.upload_img(self._new_images[0], self.conv, self.img_list)
                self._new_images.pop(0)
            self._conv_before_question = self.conv.copy()
            chat.ask(self.question, self.conv)
            notices = ["Beam search: the answer appears when it is complete."] if settings["num_beams"] > 1 else []
            self.notice = " ".join(notices)
            yield
            start = time.perf_counter()
            answering = chat.stream_answer(
                self.conv, self.img_list, should_stop=self._stop_requested.is_set, notify=notices.append, **settings
            )
            answer = {"role": "assistant", "content": ""}
            self.history.append(answer)
            while True:
                try:
                    answer["content"] = next(answering)
                except StopIteration as end:
                    num_tokens = len(end.value)
                    break
                self.notice = " ".join(notices)
                yield
            if self._stop_requested.is_set():
                notices.append("Stopped.")
            speed = num_tokens / (time.perf_counter() - start)
            notices.append(f"{pluralize(num_tokens, 'token')}, {speed:.1f} tokens/s.")
            self.notice = " ".join(notices)
            yield
        finally:
            self._answering = False


class ChatSessions:
    """The sessions in progress, `by_id`, the longest idle first.

    Above MAX_SESSIONS the longest idle session is closed, because some clients leave without a message.

    Args:
        uploads: folder that holds the uploads of all sessions.
        keep: files that are never deleted.
    """

    def __init__(self, uploads: Path, keep: Iterable[str] = ()) -> None:
        self.uploads = uploads
        self.by_id: OrderedDict[str, ChatSession] = OrderedDict()
        self._keep = {Path(path) for path in keep}
        self._lock = threading.Lock()

    def get(self, session_id: str) -> ChatSession:
        """The session with this id. A new one is made if there is none."""
        with self._lock:
            session = self.by_id.setdefault(session_id, ChatSession())
            self.by_id.move_to_end(session_id)
            longest_idle = next(iter(self.by_id)) if len(self.by_id) > MAX_SESSIONS else None
        if longest_idle is not None:
            self.close(longest_idle)
        return session

    def add_uploads(self, session_id: str, paths: Iterable[str]) -> None:
        """Register uploads, so that they are deleted when the session is closed.

        If the session is already closed, nothing is registered, and `delete_stale_uploads` deletes them.
        """
        with self._lock:
            if session := self.by_id.get(session_id):
                session.files |= {Path(path) for path in paths}
                self.by_id.move_to_end(session_id)

    def close(self, session_id: str) -> None:
        """End a session: stop its answer and delete its uploads, except those that other sessions hold, too."""
        with self._lock:
            session = self.by_id.pop(session_id, None)
            in_use = self._files_in_use()
        if session is None:
            return
        session.stop()
        for path in session.files - in_use:
            path.unlink(missing_ok=True)
        logging.info("A visit ended; %d are in progress.", len(self.by_id))

    def delete_stale_uploads(self, age: float) -> None:
        """Delete uploads that belong to no session and are older than `age` seconds.

        These are interrupted uploads, and uploads that were completed after their session was closed. `age` must
        exceed the duration of an upload: of several files uploaded together, the first one waits for the others.
        """
        with self._lock:
            in_use = self._files_in_use()
        for path in self.uploads.rglob("*"):
            with suppress(FileNotFoundError):
                if path not in in_use and path.is_file() and time.time() - path.stat().st_ctime > age:
                    path.unlink()

    def _files_in_use(self) -> set[Path]:
        return self._keep.union(*(session.files.copy() for session in self.by_id.values()))
