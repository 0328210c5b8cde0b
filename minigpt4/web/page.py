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
from minigpt4.serving.guard import client_network
from minigpt4.web.answers import ANSWER_SECONDS, Answering, Message, PageError, Question, prepare
from minigpt4.web.pictures import MAX_PICTURES, Uploads, read_upload

STATIC = Path(__file__).with_name("static")
EXAMPLES = Path(__file__).parents[1] / "assets" / "examples"
STATIC_FILES = ("page.css", "page.js", "view.js", "store.js", "markdown.js", "icon.svg")
JSON_BYTES = 2 * 2**20  # limit of a question with its conversation
BODY_SECONDS = 120  # limit for receiving a body
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
        self._folder, self._max_bytes, self._root_path = folder, int(max_upload_mb * 2**20), root_path.rstrip("/")
        self._feedback, self._started = feedback, time.monotonic()
        self._examples = EXAMPLES / ("emoji" if emoji else "drawings")
        self._config = {
            "texts": json.loads((STATIC / "texts.json").read_text(encoding="utf-8")),
            "examples": [path.name for path in sorted(self._examples.iterdir())],
            "emoji": emoji,
            "feedback": feedback is not None,
            "max_upload_mb": max_upload_mb,
            "max_pictures": MAX_PICTURES,
        }
        # Four at the same time, so that a slow file does not block other visitors.
        self._readers = ThreadPoolExecutor(4, "reading")
        self._open: dict[str, Counter] = {"questions": Counter(), "uploads": Counter()}
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
            Route("/examples/{name}", self._example),
            Route("/pictures", self._upload, methods=["POST"]),
            Route("/pictures/{upload}/{number:int}", self._preview),
            Route("/forget", self._forget, methods=["POST"]),
            Route("/answer", self._answer, methods=["POST"]),
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
        """Status 200 if the model is loaded, else 503. For the page, and for load balancers."""
        seconds = round(time.monotonic() - self._started)
        if self.batcher is None:
            return JSONResponse({"status": "loading", "progress": self.progress, "seconds": seconds}, 503, HEADERS)
        return JSONResponse({"status": "ready", "seconds": seconds}, headers=HEADERS)

    # Pictures

    async def _upload(self, request: Request) -> Response:
        """Keep the picture or video that is the body of the request. Returns its name and its number of pictures."""
        name = Path(request.query_params.get("name", "")).name[:200] or "picture"
        frames = request.query_params.get("frames", str(FRAMES))
        if not (frames.isdecimal() and 1 <= int(frames[:4]) <= MAX_PICTURES):
            raise PageError(400, "bad_setting", detail=f"frames={frames[:20]} must be from 1 to {MAX_PICTURES}.")
        answering, owner = self._ready(), client_network(request.scope)
        with self._place("uploads", owner, MAX_UPLOADS, OWN_UPLOADS):
            content = await _body(request, self._max_bytes, name)
            read = (content, name, int(frames), owner, answering.batcher.chat.vis_processor, self._folder)
            try:
                upload = await asyncio.get_running_loop().run_in_executor(self._readers, read_upload, *read)
            except PictureError as error:
                raise PageError(400, "bad_picture", detail=str(error)) from None
        return JSONResponse({"id": self.uploads.add(upload), "pictures": len(upload.pixels)}, headers=HEADERS)

    async def _preview(self, request: Request) -> Response:
        """A picture as people see it, or a frame of a video."""
        upload, number = self.uploads.get(request.path_params["upload"]), request.path_params["number"]
        if upload is None or number >= len(upload.previews):
            raise PageError(404, "gone")
        return Response(upload.previews[number], media_type="image/jpeg", headers=HEADERS)

    async def _forget(self, request: Request) -> Response:
        names = await _json(request)
        if isinstance(names, list):
            self.uploads.forget(name for name in names if isinstance(name, str))
        return Response(status_code=204)

    # Answers

    async def _answer(self, request: Request) -> Response:
        """Answer a question with a stream of updates (`Answering.updates`)."""
        answering = self._ready()
        with ExitStack() as stack:
            owner = client_network(request.scope)
            stack.enter_context(self._place("questions", owner, MAX_QUESTIONS, OWN_QUESTIONS))
            try:
                question = Question.model_validate(await _json(request))
            except ValidationError as error:
                raise PageError(400, "bad_request", detail=str(error.errors()[0]["msg"])[:200]) from None
            prepared = await asyncio.to_thread(prepare, answering.batcher.chat, self.uploads, question)
            updates = answering.updates(prepared)
            return EventStream(updates, stack.pop_all().close, time.monotonic() + ANSWER_SECONDS)

    async def _judge(self, request: Request) -> Response:
        """Append a visitor's judgement of an answer to the file."""
        if self._feedback is None:
            raise PageError(404, "gone")
        try:
            feedback = Feedback.model_validate(await _json(request))
        except ValidationError:
            raise PageError(400, "bad_request", detail="feedback") from None
        messages = [{"role": each.role, "text": each.text} for each in feedback.messages]
        line = {"time": round(time.time()), "good": feedback.good, "messages": messages}
        if not self._feedback.exists() or self._feedback.stat().st_size < MAX_FEEDBACK_BYTES:
            with self._feedback.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return Response(status_code=204)

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


async def _body(request: Request, limit: int, name: str = "") -> bytes:
    """The body of a request. Raises PageError if it is too large or too slow."""
    body, too_large = bytearray(), PageError(413, "large_file", name=name, megabytes=round(limit / 2**20, 1))
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except (TimeoutError, ClientDisconnect):
        raise PageError(408, "slow") from None
    return bytes(body)


async def _json(request: Request):
    """The body as JSON; pages of other sites cannot send this type without asking. Raises PageError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise PageError(415, "bad_request", detail="Content-Type")
    try:
        return json.loads(await _body(request, JSON_BYTES))
    except (ValueError, RecursionError):
        raise PageError(400, "bad_request", detail="JSON") from None


async def _page_error(request: Request, error: PageError) -> Response:
    return JSONResponse(error.body, error.status, HEADERS)


async def _server_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "failed", "values": {}}, 500, HEADERS)
