"""The routes: /v1/chat/completions, /v1/models and /health."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from minigpt4.conversation.decoding import Decoding
from minigpt4.serving.batching import Batcher
from minigpt4.serving.errors import ApiError
from minigpt4.serving.images import Images
from minigpt4.serving.prepare import image_urls, read_prompt
from minigpt4.serving.protocol import ChatRequest, read_request
from minigpt4.serving.replies import Reply
from minigpt4.serving.settings import Settings

BODY_SECONDS = 60
READ_SECONDS = 60  # for reading the end of an answer, once its time is over
RETRY_SECONDS = 5


def create_app(batcher: Batcher, settings: Settings) -> Starlette:
    """The endpoint as an ASGI application, which starts and closes the batcher."""

    @asynccontextmanager
    async def lifespan(app: Starlette):
        batcher.start()
        yield
        batcher.close()

    endpoint = Endpoint(batcher, settings)
    routes = [
        Route("/health", endpoint.health),
        Route("/v1/models", endpoint.models),
        Route("/v1/models/{model}", endpoint.model),
        Route("/v1/chat/completions", endpoint.completions, methods=["POST"]),
    ]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _server_error}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    what = {404: f"There is no {request.url.path}.", 405: f"{request.method} is not allowed here."}
    return JSONResponse(
        ApiError(error.status_code, what.get(error.status_code, error.detail)).body(), error.status_code
    )


async def _server_error(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "The server failed on this request. Its log says why.").body(), 500)


class EventStream(StreamingResponse):
    """Server-sent events; `close` is called when the last was sent or the client is gone.

    A client that does not read what it is sent is gone at `deadline` (`time.monotonic()`): it would keep its place.
    """

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None], deadline: float):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._close, self._deadline = close, deadline

    async def __call__(self, scope, receive, send) -> None:
        with suppress(ClientDisconnect, TimeoutError):
            try:
                async with asyncio.timeout(max(0, self._deadline - time.monotonic())):
                    await super().__call__(scope, receive, send)
            finally:
                self._close()


class Endpoint:
    def __init__(self, batcher: Batcher, settings: Settings):
        self._batcher, self._settings = batcher, settings
        self._images = Images(settings.allow_http_images, settings.allow_private_hosts, settings.max_bytes)
        # Few at a time: a picture takes much memory while it is unpacked.
        self._pool = ThreadPoolExecutor(2, "prepare")
        self._started = time.time()
        self._requests = 0

    async def health(self, request: Request) -> Response:
        """200 when the model is there, else 503; for load balancers, so without a key."""
        seconds = round(time.time() - self._started)
        if self._batcher.closed or self._batcher.chat is None:
            status = "stopping" if self._batcher.closed else "loading"
            return JSONResponse({"status": status, "seconds": seconds}, 503, {"Retry-After": str(RETRY_SECONDS)})
        counts = {"requests": self._requests, "waiting": self._batcher.num_waiting}
        return JSONResponse({"status": "ready", "seconds": seconds, **counts, "running": len(self._batcher.running)})

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        self._check_key(request)
        deadline = time.monotonic() + self._settings.timeout
        with ExitStack() as stack:
            stack.enter_context(self._place_in_line())
            try:
                asked = await asyncio.to_thread(read_request, await self._body(request))
            except ClientDisconnect:
                return Response(status_code=499)
            work = asyncio.create_task(self._answer(asked, deadline, stack))
            gone = asyncio.create_task(_disconnected(request))
            try:
                await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
                return work.result() if work.done() else Response(status_code=499)
            finally:
                work.cancel()
                gone.cancel()

    def _model(self) -> dict:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": int(self._started),
            "owned_by": "minigpt4",
        }

    # What is checked first

    def _check_key(self, request: Request) -> None:
        if self._settings.api_key is None:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self._settings.api_key.encode())
        if kind.lower() != "bearer" or not right:
            raise ApiError(401, "The API key is missing or wrong: send Authorization: Bearer KEY.", "invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._settings.model_name:
            known = self._settings.model_name
            raise ApiError(404, f"There is no model {name[:100]!a}; this is {known!r}.", "model_not_found", "model")

    @contextmanager
    def _place_in_line(self) -> Iterator[None]:
        """A place among the requests that are served at a time. Raises ApiError when there is none."""
        if self._batcher.closed or self._batcher.chat is None:
            state = "stopping" if self._batcher.closed else "still loading the model"
            raise ApiError(503, f"The server is {state}.", "not_ready", retry_after=RETRY_SECONDS)
        if self._requests >= self._settings.max_queue:
            message = f"{self._requests} requests are being served or wait; try again later."
            raise ApiError(429, message, "queue_full", retry_after=RETRY_SECONDS)
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def _body(self, request: Request) -> bytes:
        """The body of a request. Raises ApiError for one that is too large, too slow or not JSON."""
        # A page in a browser can send other types to any server; for JSON the browser asks first, and gets no consent.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Send Content-Type: application/json.")
        limit, body, size = self._settings.max_bytes, bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limit:
                        body += chunk
                    elif size > 4 * limit:  # most clients listen only when all is sent, so not much less is read
                        break
        except TimeoutError:
            raise ApiError(408, f"The request took longer than {BODY_SECONDS} s to arrive.") from None
        if size > limit:
            raise ApiError(
                413, f"The request is larger than {self._settings.max_upload_mb:g} MB. Send smaller or fewer pictures.",
                "request_too_large",
            )  # fmt: skip
        return bytes(body)

    # The answer

    async def _answer(self, asked: ChatRequest, deadline: float, stack: ExitStack) -> Response:
        """Answer; of a stream, the response takes over what `stack` closes."""
        self._check_model(asked.model)
        if asked.new_tokens and asked.new_tokens > self._settings.max_tokens:
            raise ApiError(
                400, f"{asked.new_tokens} tokens are too many: at most {self._settings.max_tokens} for an answer.",
                "invalid_value", "max_completion_tokens" if asked.max_completion_tokens else "max_tokens",
            )  # fmt: skip
        reply = await self._begin(asked, deadline)
        stack.callback(self._batcher.cancel, reply.answers)
        self._batcher.submit(reply.answers)
        if not asked.stream:
            return JSONResponse(await reply.whole())
        await reply.begun()  # an error before the first word still has a status
        return EventStream(reply.events(), stack.pop_all().close, deadline + READ_SECONDS)

    async def _begin(self, asked: ChatRequest, deadline: float) -> Reply:
        """Read the pictures and the messages."""
        urls = image_urls(asked.messages, self._settings.max_images)
        pictures = await self._images.read_all(urls)
        chat = self._batcher.chat
        prompt = await asyncio.get_running_loop().run_in_executor(
            self._pool, read_prompt, chat, asked.messages, pictures, int(self._settings.max_megapixels * 1e6)
        )
        asked.messages.clear()  # megabytes that nobody needs while the request waits
        wanted = asked.new_tokens or Decoding.max_new_tokens
        max_tokens = min(wanted, self._settings.max_tokens, chat.window() - prompt.num_tokens)
        return Reply(asked, prompt, chat, max_tokens, deadline)


async def _disconnected(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
