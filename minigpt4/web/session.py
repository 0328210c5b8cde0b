"""One visitor of the web page: what was said, what is shown, and what is to be answered next."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from minigpt4.common.text import pluralize
from minigpt4.conversation import CONV_VISION, Chat, PictureError, open_media
from minigpt4.conversation.videos import FRAMES

MAX_PICTURES = 16  # in a conversation, those of videos included
MAX_VISITS = 200
MAX_CHARACTERS = 20_000


class ChatSession:
    """The state of one visitor.

    `history` is what the page shows: {"role": "user" or "assistant", "content": text or {"path": file}}; `notice` is a
    line for the visitor; `files` are the uploads, to be deleted when the visit ends.
    """

    def __init__(self) -> None:
        self.conv, self.img_list = CONV_VISION.copy(), []
        self.history: list[dict] = []
        self.notice = ""
        self.files: set[Path] = set()
        self.pending = False  # is there a question whose answer has not begun?
        self._answering = False
        self._pictures: list[torch.Tensor] = []  # shown, not yet seen by the model
        self._question: int | None = None  # its place in the history
        self._conv_before = self.conv
        self._ending = threading.Event()

    @property
    def started(self) -> bool:
        """Has the visitor shown a picture?"""
        return bool(self.history)

    @property
    def busy(self) -> bool:
        """Is there a question whose answer is not complete?"""
        return self.pending or self._answering

    @property
    def question(self) -> str | None:
        """The last question."""
        return None if self._question is None else self.history[self._question]["content"]

    @property
    def question_index(self) -> int | None:
        """The place of the last question in the history."""
        return self._question

    def show(self, chat: Chat, paths: list[str], frames: int = FRAMES) -> list[str]:
        """Take pictures and videos; the model sees them with the next question. Returns why some were refused.

        `frames`: pictures taken from a video.
        """
        problems = []
        for path in paths:
            self.files.add(Path(path))
            try:
                self._pictures += [chat.vis_processor(picture) for picture in self._open(path, frames)]
                self.history.append({"role": "user", "content": {"path": str(path)}})
            except PictureError as error:
                problems.append(str(error))
        return problems

    def _open(self, path: str, frames: int) -> list:
        """The pictures that a file holds. Raises PictureError if they are too many."""
        room = MAX_PICTURES - len(self.img_list) - len(self._pictures)
        pictures = open_media(path, frames) if room else []
        if not 0 < len(pictures) <= room:
            many = f"has {len(pictures)} pictures, too many" if len(pictures) > 1 else "is one too many"
            limit = f"at most {MAX_PICTURES} in a conversation, those of videos included"
            raise PictureError(f"{Path(path).name} {many}: {limit}.")
        return pictures

    def ask(self, text: str) -> None:
        """Take a question, for `answer`. Raises ValueError for an empty or an endless one."""
        if self.busy:
            raise ValueError("The last question is still being answered. Wait, or stop the answer.")
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
        self._question, self.notice, self.pending = None, "", False
        return question

    def end(self) -> None:
        """Let a running answer end where it is."""
        self._ending.set()

    def answer(self, chat: Chat, settings: dict) -> Iterator[None]:
        """Answer the question, in steps; after each, `history` and `notice` are new.

        Raises ValueError for settings out of bounds, or when the question does not fit; it is still there then.
        """
        self._answering, self.pending = True, False  # in this order: it is busy throughout
        try:
            yield from self._answer(chat, settings)
        finally:
            self._answering = False

    def _answer(self, chat: Chat, settings: dict) -> Iterator[None]:
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
            self.conv, self.img_list, should_stop=self._ending.is_set, notify=notices.append, **settings
        )
        answer = {"role": "assistant", "content": ""}
        self.history.append(answer)
        while True:
            try:
                answer["content"] = next(answering)
            except StopIteration as end:
                tokens = len(end.value)
                break
            self.notice = " ".join(notices)
            yield
        seconds = time.perf_counter() - start
        stopped = ["Stopped."] if self._ending.is_set() else []
        self.notice = " ".join([*notices, *stopped, f"{pluralize(tokens, 'token')}, {tokens / seconds:.1f} tokens/s."])
        yield


class ChatSessions:
    """The visits in progress, by session. The files `keep` are never deleted.

    Beyond `limit` visits, the one that was idle for longest ends: not every client says goodbye.
    """

    def __init__(self, keep: Iterable[str] = (), limit: int = MAX_VISITS) -> None:
        self._keep = {Path(path) for path in keep}
        self._limit = limit
        self._visits: OrderedDict[str, ChatSession] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visits)

    def of(self, session: str) -> ChatSession:
        with self._lock:
            visit = self._visits.setdefault(session, ChatSession())
            self._visits.move_to_end(session)
            idle = next(iter(self._visits)) if len(self._visits) > self._limit else None
        if idle is not None:
            self.close(idle)
        return visit

    def is_current(self, session: str, visit: ChatSession) -> bool:
        return self._visits.get(session) is visit

    def note(self, session: str, paths: Iterable[str]) -> None:
        """Remember uploads, so that they go with the visit. When it has already ended, `sweep` deletes them."""
        with self._lock:
            if visit := self._visits.get(session):
                visit.files |= {Path(path) for path in paths}
                self._visits.move_to_end(session)

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

    def sweep(self, folder: Path, age: float) -> None:
        """Delete what is in `folder`, belongs to no visit, and is older than `age` seconds.

        That is what is left of an upload that was cut off, and a file that arrived when its visitor had just gone. A
        file that is still arriving is young, but the first of several is as old as the others take, so be generous.
        """
        with self._lock:
            kept = self._keep.union(*(visit.files.copy() for visit in self._visits.values()))
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                if path not in kept and path.is_file() and time.time() - path.stat().st_ctime > age:
                    path.unlink()
