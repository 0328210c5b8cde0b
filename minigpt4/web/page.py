"""The web page as an ASGI application: its files, uploads, answers.

The browser (`static/page.js`) holds the conversation. The server holds pictures, and runs the model.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from minigpt4.conversation import PictureError
from minigpt4.conversation.videos import FRAMES
from minigpt4.serving.app import EventStream
from minigpt4.serving.batching import Batcher
from minigpt4.serving.connections import Bodies
from minigpt4.serving.errors import ApiError
from minigpt4.serving.guard import client_network
from minigpt4.web.answers import ANSWER_SECONDS, Answering, Message, PageError, Question, prepare
from minigpt4.web.formulas import read_formulas
from minigpt4.web.pictures import MAX_PICTURES, Uploads, read_upload
from minigpt4.web.refusals import Refusals

STATIC = Path(__file__).with_name("static")
EXAMPLES = Path(__file__).parents[1] / "assets" / "examples"
STATIC_FILES = ("page.css", "page.js", "view.js", "store.js", "markdown.js", "formulas.js", "icon.svg")
JSON_BYTES = 2 * 2**20  # limit of a question with its conversation
REFUSED = {408: "slow", 413: "large_file", 415: "bad_request", 503: "busy"}  # texts for the errors of `Bodies`
# Requests at a time, of all and of one client.
MAX_QUESTIONS, OWN_QUESTIONS = 100, 32
MAX_UPLOADS, OWN_UPLOADS = 32, 16
MAX_FEEDBACK_BYTES = 64 * 2**20  # of the file
# The page loads nothing from other servers, whatever a model writes.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Feedback(BaseModel):
    """A visitor's judgement of the last answer of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    good: bool
    messages: list[Message] = Field(min_length=2, max_length=400)


class Page:
    """The page. It can be served before the model is loaded: until `batcher` is set, it shows `progress`.

    Args:
        folder: for videos while they are decoded.
        batch: number of answers that are computed together.
        max_upload_mb: size limit of a file.
        emoji: the model knows only emoji: say so, and offer emoji as examples.
        feedback: file to which visitors' judgements are appended; None: they are not asked for any.
        root_path: path under which a proxy serves the page.
    """

    def __init__(
        self, folder: Path, batch: int, max_upload_mb: float, emoji: bool, feedback: Path | None, root_path: str = ""
    ):
        self.url = ""
        self.progress = "Starting"
        self.uploads = Uploads()
        self.batch = batch
        self._answering: Answering | None = None
        self._folder, self._root_path = folder, root_path.rstrip("/")
        self._files, self._questions = Bodies(int(max_upload_mb * 2**20)), Bodies(JSON_BYTES)
        self._feedback, self._started = feedback, time.monotonic()
        self._examples = EXAMPLES / ("emoji" if emoji else "drawings")
        texts = json.loads((STATIC / "texts.json").read_text(encoding="utf-8"))
        self.refuse = Refusals(texts, HEADERS)
        self._config = {
            "texts": texts,
            "examples": [path.name for path in sorted(self._examples.iterdir())],
            "emoji": emoji,
            "feedback": feedback is not None,
            "max_upload_mb": max_upload_mb,
            "max_pictures": MAX_PICTURES,
        }
        # Four at the same time, so that a slow file does not block other visitors.
        self._readers = ThreadPoolExecutor(4, "reading")
        self._open: dict[str, Counter] = {"questions": Counter(), "uploads": Counter(), "formulas": Counter()}
        self.app = self._make_app()

    @property
    def batcher(self) -> Batcher | None:
        """The thread that owns the model."""
        return self._answering and self._answering.batcher

    @batcher.setter
    def batcher(self, batcher: Batcher) -> None:
        self._answering = Answering(batcher, self.batch)

    def _make_app(self) -> Starlette:
        routes = [
            Route("/", self._index),
            Route("/config.json", self._send_config),
            Route("/health", self._health),
            Route("/progress", self._progress),
            Route("/examples/{name}", self._example),
            Route("/pictures", self._upload, methods=["POST"]),
            Route("/pictures/{upload}/{number:int}", self._preview),
            Route("/forget", self._forget, methods=["POST"]),
            Route("/answer", self._answer, methods=["POST"]),
            Route("/formulas", self._formulas, methods=["POST"]),
            Route("/feedback", self._judge, methods=["POST"]),
            *(Route(f"/{name}", self._static) for name in STATIC_FILES),
        ]
        handlers: dict = {PageError: _page_error, Exception: _server_error}
        return Starlette(routes=routes, exception_handlers=handlers)

    # Files

    async def _index(self, request: Request) -> Response:
        page = (STATIC / "index.html").read_text(encoding="utf-8")
        return HTMLResponse(page.replace('<base href="./">', f'<base href="{self._root_path}/">'), headers=HEADERS)

    async def _static(self, request: Request) -> Response:
        return FileResponse(STATIC / Path(request.url.path).name, headers=HEADERS)

    async def _example(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._config["examples"]:
            raise PageError(404, "gone")
        return FileResponse(self._examples / name, headers=HEADERS)

    async def _send_config(self, request: Request) -> Response:
        return JSONResponse(self._config, headers=HEADERS)

    async def _health(self, request: Request) -> Response:
        """Status 200 if the model is loaded, else 503. For load balancers: no password is needed."""
        ready = self._answering is not None
        return JSONResponse({"status": "ready" if ready else "loading"}, 200 if ready else 503, HEADERS)

    async def _progress(self, request: Request) -> Response:
        """How far the model is loaded."""
        seconds = round(time.monotonic() - self._started)
        state = {"ready": self._answering is not None, "progress": self.progress, "seconds": seconds}
        return JSONResponse(state, headers=HEADERS)

    # Pictures

    async def _upload(self, request: Request) -> Response:
        """Keep the picture or video that is the body of the request. Returns its name and its number of pictures."""
        name = Path(request.query_params.get("name", "")).name[:200] or "picture"
        frames = request.query_params.get("frames", str(FRAMES))
        if not (frames.isdecimal() and 1 <= int(frames[:4]) <= MAX_PICTURES):
            raise PageError(400, "bad_setting", detail=f"frames={frames[:20]} must be from 1 to {MAX_PICTURES}.")
        answering, owner = self._ready(), client_network(request.scope)
        content = await self._read(self._files, request, "application/octet-stream", name)
        with self._place("uploads", owner, MAX_UPLOADS, OWN_UPLOADS):
            read = (content, name, int(frames), owner, answering.batcher.chat.vis_processor, self._folder)
            try:
                upload = await asyncio.get_running_loop().run_in_executor(self._readers, read_upload, *read)
            except PictureError as error:
                raise PageError(400, error.kind, **error.values, name=name) from None
        return JSONResponse({"id": self.uploads.add(upload), "pictures": len(upload.pixels)}, headers=HEADERS)

    async def _preview(self, request: Request) -> Response:
        """A picture as people see it, or a frame of a video."""
        upload, number = self.uploads.get(request.path_params["upload"]), request.path_params["number"]
        if upload is None or number >= len(upload.previews):
            raise PageError(404, "gone")
        return Response(upload.previews[number], media_type="image/jpeg", headers=HEADERS)

    async def _forget(self, request: Request) -> Response:
        names = await self._read_json(request)
        if isinstance(names, list):
            self.uploads.forget(name for name in names if isinstance(name, str))
        return Response(status_code=204)

    # Answers

    async def _answer(self, request: Request) -> Response:
        """Answer a question with a stream of updates (`Answering.updates`)."""
        answering, owner = self._ready(), client_network(request.scope)
        try:
            question = Question.model_validate(await self._read_json(request))
        except ValidationError as error:
            raise PageError(400, "bad_request", detail=str(error.errors()[0]["msg"])[:200]) from None
        with ExitStack() as stack:
            stack.enter_context(self._place("questions", owner, MAX_QUESTIONS, OWN_QUESTIONS))
            prepared = await asyncio.to_thread(prepare, answering.batcher.chat, self.uploads, question)
            updates = answering.updates(prepared, owner)
            return EventStream(updates, stack.pop_all().close, time.monotonic() + ANSWER_SECONDS)

    async def _formulas(self, request: Request) -> Response:
        """The MathML of formulas in answers."""
        formulas = await self._read_json(request)
        if not (isinstance(formulas, list) and all(isinstance(each, str) for each in formulas)):
            raise PageError(400, "bad_request", detail="formulas")
        with self._place("formulas", client_network(request.scope), MAX_UPLOADS, OWN_UPLOADS):
            read = asyncio.get_running_loop().run_in_executor(self._readers, read_formulas, formulas)
            return JSONResponse(await read, headers=HEADERS)

    async def _judge(self, request: Request) -> Response:
        """Append a visitor's judgement of an answer to the file."""
        if self._feedback is None:
            raise PageError(404, "gone")
        try:
            feedback = Feedback.model_validate(await self._read_json(request))
        except ValidationError:
            raise PageError(400, "bad_request", detail="feedback") from None
        messages = [{"role": each.role, "text": each.text} for each in feedback.messages]
        line = {"time": round(time.time()), "good": feedback.good, "messages": messages}
        if not self._feedback.exists() or self._feedback.stat().st_size < MAX_FEEDBACK_BYTES:
            with self._feedback.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return Response(status_code=204)

    async def _read(self, bodies: Bodies, request: Request, kind: str, name: str = "") -> bytes:
        """The body of a request. Raises PageError."""
        try:
            return await bodies.read(request, kind)
        except ApiError as error:
            megabytes = round(self._config["max_upload_mb"], 1)
            code = "long_talk" if error.status == 413 and bodies is self._questions else REFUSED[error.status]
            raise PageError(error.status, code, name=name, megabytes=megabytes, detail=kind) from None
        except ClientDisconnect:
            raise PageError(408, "slow") from None

    async def _read_json(self, request: Request):
        try:
            return json.loads(await self._read(self._questions, request, "application/json"))
        except (ValueError, RecursionError):
            raise PageError(400, "bad_request", detail="JSON") from None

    def _ready(self) -> Answering:
        if self._answering is None:
            raise PageError(503, "loading")
        return self._answering

    @contextmanager
    def _place(self, kind: str, owner: str, most: int, own: int) -> Iterator[None]:
        """Hold one of the places for requests of a kind. Raises PageError if they are taken."""
        counts = self._open[kind]
        if counts.total() >= most or counts[owner] >= own:
            raise PageError(429, "busy")
        counts[owner] += 1
        try:
            yield
        finally:
            counts[owner] -= 1
            if not counts[owner]:
                del counts[owner]


async def _page_error(request: Request, error: PageError) -> Response:
    return JSONResponse(error.body, error.status, HEADERS)


async def _server_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "server_failed", "values": {}}, 500, HEADERS)
