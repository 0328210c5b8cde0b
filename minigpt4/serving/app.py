"""The routes: /v1/chat/completions, /v1/models, /health and /metrics."""

import asyncio
import hmac
import importlib.util
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from minigpt4.conversation.decoding import Decoding
from minigpt4.serving.batching import Batcher
from minigpt4.serving.connections import Bodies
from minigpt4.serving.errors import RETRY, ApiError
from minigpt4.serving.guard import Brake, HostCheck, TooManyGuesses, client_network
from minigpt4.serving.images import Images
from minigpt4.serving.prepare import image_urls, read_prompt
from minigpt4.serving.protocol import ChatRequest, read_request
from minigpt4.serving.replies import Reply
from minigpt4.serving.settings import Settings

READ_SECONDS = 60  # the client has this long to read the end of a stream after the deadline


def create_app(batcher: Batcher, settings: Settings) -> Starlette:
    """The endpoint as an ASGI application. Its lifespan starts and closes the batcher."""

    @asynccontextmanager
    async def lifespan(app: Starlette):
        batcher.start()
        yield
        batcher.close()

    endpoint = Endpoint(batcher, settings)
    routes = [
        Route("/health", endpoint.health),
        Route("/metrics", endpoint.metrics),
        Route("/v1/models", endpoint.models),
        Route("/v1/models/{model}", endpoint.model),
        Route("/v1/chat/completions", endpoint.completions, methods=["POST"]),
    ]
    if settings.root_path:  # of a proxy that passes the whole path on; others pass on what is behind it
        routes.append(Mount(settings.root_path, routes=routes))
    origins = {"allow_origins": settings.allow_origin, "allow_headers": ["Authorization", "Content-Type"]}
    cross_origin = Middleware(CORSMiddleware, **origins, allow_methods=["GET", "POST"])
    host_check = Middleware(HostCheck, host=settings.host, allowed=settings.allow_host)
    middleware = [host_check, cross_origin] if settings.allow_origin else [host_check]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _server_error}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan, middleware=middleware)


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path
    known = path.removeprefix("/v1").rstrip("/").endswith(("/chat/completions", "/models"))
    hint = " The base URL of this server ends with /v1." if known else ""
    messages = {404: f"There is no {path}.{hint}", 405: f"{request.method} is not allowed here."}
    return await _api_error(request, ApiError(error.status_code, messages.get(error.status_code, error.detail)))


async def _server_error(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(500, "The server failed on this request. Its log says why."))


class EventStream(StreamingResponse):
    """Server-sent events. `close` is called after the last event, or when the client has disconnected.

    At `deadline` (`time.monotonic()`) the stream ends, so that a client that does not read it cannot keep its place in
    the queue.
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
    """The handlers of the routes."""

    def __init__(self, batcher: Batcher, settings: Settings):
        self._batcher, self._settings = batcher, settings
        self._brake = Brake()
        self._bodies = Bodies(settings.max_bytes)
        self._images = Images(settings.allow_http_images, settings.allow_private_hosts, settings.max_bytes)
        # Only two threads, because a picture takes much memory while it is decoded.
        self._pool = ThreadPoolExecutor(2, "prepare")
        self._started = time.time()
        self._requests = 0
        self._metrics = None
        if importlib.util.find_spec("prometheus_client"):
            from minigpt4.serving.metrics import Metrics

            gauges = {"running": lambda: len(batcher.running), "waiting": lambda: len(batcher.waiting)}
            self._metrics = Metrics(gauges | {"requests": lambda: self._requests})

    async def health(self, request: Request) -> Response:
        """Status 200 if the model is loaded, else 503. No key is needed, because load balancers call this."""
        state = {"status": self._batcher.status, "seconds": round(time.time() - self._started)}
        if state["status"] != "ready":
            return JSONResponse(state, 503, RETRY)
        counts = {"requests": self._requests, "waiting": len(self._batcher.waiting)}
        return JSONResponse(state | counts | {"running": len(self._batcher.running)})

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def metrics(self, request: Request) -> Response:
        """Figures for Prometheus."""
        self._check_key(request)
        if self._metrics is None:
            raise ApiError(501, "There are no figures without prometheus-client: pip install 'minigpt4[metrics]'.")
        content, kind = self._metrics.text()
        return Response(content, media_type=kind)

    async def completions(self, request: Request) -> Response:
        """Answer a request, and count the response."""
        status = 500
        try:
            response = await self._completions(request)
            status = response.status_code
            return response
        except ApiError as error:
            status = error.status
            raise
        finally:
            if self._metrics:
                self._metrics.count_response(status)

    async def _completions(self, request: Request) -> Response:
        self._check_key(request)
        try:
            body = await self._bodies.read(request)
        except ClientDisconnect:
            return Response(status_code=499)
        start = time.monotonic()
        with ExitStack() as stack:
            stack.enter_context(self._place_in_queue())
            chat_request = await asyncio.to_thread(read_request, body)
            del body
            work = asyncio.create_task(self._answer(chat_request, client_network(request.scope), start, stack))
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

    # Checks

    def _check_key(self, request: Request) -> None:
        if not self._settings.api_keys:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip().encode("latin-1")
        right = any([hmac.compare_digest(key, each.encode()) for each in self._settings.api_keys])
        try:
            # A request without a key is no guess.
            passes = kind.lower() == "bearer" and self._brake.check(client_network(request.scope), key.hex(), right)
        except TooManyGuesses as error:
            raise ApiError(429, str(error), "too_many_guesses") from None
        if not passes:
            raise ApiError(401, "The API key is missing or wrong: send Authorization: Bearer KEY.", "invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._settings.model_name:
            known = self._settings.model_name
            raise ApiError(404, f"There is no model {name[:100]!a}; this is {known!r}.", "model_not_found", "model")

    @contextmanager
    def _place_in_queue(self) -> Iterator[None]:
        """Hold one of the `max_queue` places for requests. Raises ApiError if all are taken or the model is missing."""
        if self._batcher.status != "ready":
            raise ApiError(503, f"The server is {self._batcher.status}; it takes no requests.", "not_ready")
        if self._requests >= self._settings.max_queue:
            message = f"{self._requests} requests are being served or wait; try again later."
            raise ApiError(429, message, "queue_full")
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    # Answers

    async def _answer(self, chat_request: ChatRequest, client: str, start: float, stack: ExitStack) -> Response:
        """Answer a client's request. A streaming response takes over the callbacks of `stack`."""
        self._check_model(chat_request.model)
        deadline = start + self._settings.timeout
        reply = await self._make_reply(chat_request, client, deadline)
        if self._metrics:
            stack.callback(self._metrics.count_answers, start, reply.answers)
        stack.callback(self._batcher.cancel, reply.answers)
        self._batcher.submit(reply.answers)
        if not chat_request.stream:
            return JSONResponse(await reply.completion())
        await reply.wait_for_first_token()  # an error before that can still set the HTTP status
        return EventStream(reply.events(), stack.pop_all().close, deadline + READ_SECONDS)

    async def _make_reply(self, chat_request: ChatRequest, client: str, deadline: float) -> Reply:
        """Read the pictures and the messages of a request."""
        urls = image_urls(chat_request.messages, self._settings.max_images)
        pictures = await self._images.read_all(urls)
        chat = self._batcher.chat
        prompt = await asyncio.get_running_loop().run_in_executor(
            self._pool, read_prompt, chat, chat_request.messages, pictures, int(self._settings.max_megapixels * 1e6)
        )
        chat_request.messages.clear()  # frees megabytes while the request waits
        requested = chat_request.new_tokens or Decoding.max_new_tokens
        max_tokens = min(requested, self._settings.max_tokens, chat.window() - prompt.num_tokens)
        return Reply(chat_request, prompt, chat, max_tokens, client, deadline)


async def _disconnected(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
