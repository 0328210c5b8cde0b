"""One visitor of the web page: what was said, what is shown, and what is to be answered next."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from minigpt4.conversation import CONV_VISION, Chat, PictureError, open_picture

MAX_PICTURES = 8
MAX_CHARACTERS = 20_000


class Visit:
    """The state of one visitor.

    `history` is what the page shows: {"role": "user" or "assistant", "content": text or {"path": file}}; `notice` is a
    line for the visitor; `files` are the uploads, to be deleted when the visit ends.
    """

    def __init__(self) -> None:
        self.conv, self.img_list = CONV_VISION.copy(), []
        self.history: list[dict] = []
        self.notice = ""
        self.files: set[Path] = set()
        self.pending = False  # is there a question without an answer?
        self._pictures: list[torch.Tensor] = []  # shown, not yet seen by the model
        self._question: int | None = None  # its place in the history
        self._conv_before = self.conv
        self._ending = threading.Event()

    @property
    def started(self) -> bool:
        """Has the visitor shown a picture?"""
        return bool(self.history)

    @property
    def question(self) -> str | None:
        """The last question."""
        return None if self._question is None else self.history[self._question]["content"]

    @property
    def question_index(self) -> int | None:
        """The place of the last question in the history."""
        return self._question

    def show(self, chat: Chat, paths: list[str]) -> list[str]:
        """Take pictures; the model sees them with the next question. Returns why some were refused."""
        problems = []
        for path in paths:
            self.files.add(Path(path))
            try:
                if len(self.img_list) + len(self._pictures) >= MAX_PICTURES:
                    raise PictureError(f"{Path(path).name} is one too many: at most {MAX_PICTURES} in a conversation.")
                self._pictures.append(chat.vis_processor(open_picture(path)))
                self.history.append({"role": "user", "content": {"path": str(path)}})
            except PictureError as error:
                problems.append(str(error))
        return problems

    def ask(self, text: str) -> None:
        """Take a question, for `answer`. Raises ValueError for an empty or an endless one."""
        if not text.strip():
            raise ValueError("Ask something about the picture.")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"The question has {len(text):,} characters; at most {MAX_CHARACTERS:,} are accepted.")
        self.notice, self.pending = "Waiting for the model …", True
        self._ending.clear()
        self._question = len(self.history)
        self.history.append({"role": "user", "content": text})
        self._conv_before = None

    def take_back(self) -> str:
        """Take back the last question and its answer. Returns the question."""
        question = self.question
        del self.history[self._question :]
        if self._conv_before:
            self.conv = self._conv_before
        self._question, self.notice = None, ""
        return question

    def end(self) -> None:
        """Let a running answer end where it is."""
        self._ending.set()

    def answer(self, chat: Chat, settings: dict) -> Iterator[None]:
        """Answer the question, in steps; after each, `history` and `notice` are new.

        Raises ValueError for settings out of bounds, or when the question does not fit; it is still there then.
        """
        self.pending = False
        while self._pictures:
            chat.upload_img(self._pictures[0], self.conv, self.img_list)
            self._pictures.pop(0)
        self._conv_before = self.conv.copy()
        chat.ask(self.question, self.conv)
        notices = ["Beam search: the answer appears when it is complete."] if settings["num_beams"] > 1 else []
        self.notice = " ".join(notices)
        yield
        start, tokens = time.perf_counter(), 0
        answering = chat.stream_answer(
            self.conv, self.img_list, told_to_end=self._ending.is_set, notify=notices.append, **settings
        )
        self.history.append({"role": "assistant", "content": ""})
        while True:
            try:
                self.history[-1]["content"] = next(answering)
            except StopIteration as end:
                tokens = len(end.value)
                break
            self.notice = " ".join(notices)
            yield
        seconds = time.perf_counter() - start
        stopped = ["Stopped."] if self._ending.is_set() else []
        self.notice = " ".join([*notices, *stopped, f"{tokens} tokens, {tokens / seconds:.1f} tokens/s."])
        yield


class Visits:
    """The visits in progress, by session. The files `keep` are never deleted."""

    def __init__(self, keep: Iterable[str] = ()) -> None:
        self._keep = {Path(path) for path in keep}
        self._visits: dict[str, Visit] = {}
        self._lock = threading.Lock()

    def of(self, session: str) -> Visit:
        with self._lock:
            return self._visits.setdefault(session, Visit())

    def is_current(self, session: str, visit: Visit) -> bool:
        return self._visits.get(session) is visit

    def close(self, session: str) -> None:
        """End a visit: a running answer stops, and the uploads go, save those that another visitor also sent."""
        with self._lock:
            visit = self._visits.pop(session, None)
            others = {path for other in self._visits.values() for path in other.files}
        if visit is None:
            return
        visit.end()
        for path in visit.files - others - self._keep:
            path.unlink(missing_ok=True)
        logging.info("A visit ended; %d are in progress.", len(self._visits))
