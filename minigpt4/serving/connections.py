"""Connections and bodies that have not arrived in full: bounded in time and number.

Half a header, or half a body, costs a sender nothing. Where there are too many, those that have been idle longest go,
so that a new client always gets in.
"""

import asyncio
import time
from collections import Counter

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt4.serving.errors import ApiError

MAX_CONNECTIONS = 500
HEADER_SECONDS = 10  # from the connection, or the last response, to the end of a request's header
MAX_BODIES = 100  # that are being received,
MAX_BODY_BYTES = 200 * 2**20  # and all their bytes
BODY_SECONDS = 60
GRACE_SECONDS = 10
FILES = 4096  # open at a time: all that wait (uvicorn: 2048) are accepted before the first connection is closed


class Connection(H11Protocol):
    """A connection that is closed unless a request arrives in time, or if others need its place meanwhile."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # uvicorn's own time, 5 s, is also when many clients (httpx, openai) let a connection go. One that is closed
        # while it sends the next request would fail.
        self.timeout_keep_alive = 2 * HEADER_SECONDS
        self._wait_for_request()
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered, nor its body received."""
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

    def _wait_for_request(self) -> None:
        if hasattr(self, "_timer"):
            self._timer.cancel()
        self.idle_since = time.monotonic()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.idle:
            self.transport.abort()

    def _make_room(self) -> None:
        """Close the connection that has been idle longest, among those of the address that has most of them."""
        idle = [other for other in self.connections if other.idle and other is not self]
        count = Counter(_address(other.client) for other in idle)
        rank = {other: (-count[_address(other.client)], other.idle_since) for other in idle}
        min(idle, key=rank.__getitem__, default=self).transport.abort()


class Bodies:
    """Receives the bodies of requests.

    Args:
        max_bytes: limit of one body.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._received: dict[asyncio.Timeout, tuple[str, int]] = {}  # address and bytes, the oldest first

    async def read(self, request: Request, kind: str = "application/json") -> bytes:
        """The body of a request. Raises ApiError if it is too large, too slow or not of that kind, and
        ClientDisconnect."""
        # Any web page can make a browser send texts and forms. For other types the browser first asks the server, which
        # refuses.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
            raise ApiError(415, f"Send Content-Type: {kind}.")
        # A body that is up to four times too large is read to its end: most clients read the response only after that.
        body, size, dropped = bytearray(), 0, False
        try:
            async with asyncio.timeout(BODY_SECONDS) as limit:
                try:
                    self._admit(limit, request, 0)
                    async for chunk in request.stream():
                        if limit not in self._received:  # others have ended it: the timeout comes at the next await
                            continue
                        size += len(chunk)
                        if size <= self._max_bytes:
                            body += chunk
                        elif size > 4 * self._max_bytes:
                            break
                        self._admit(limit, request, len(body))
                finally:
                    dropped = self._received.pop(limit, None) is None
        except TimeoutError:
            if not dropped:
                raise ApiError(408, f"The request took longer than {BODY_SECONDS} s to arrive.") from None
        if dropped:  # perhaps with its last chunk, before the timeout
            raise ApiError(503, "Too many requests are being received; try again later.", "busy")
        if size > self._max_bytes:
            message = f"The request is larger than {self._max_bytes / 2**20:.3g} MB. Send smaller or fewer pictures."
            raise ApiError(413, message, "request_too_large")
        return bytes(body)

    def _admit(self, limit: asyncio.Timeout, request: Request, size: int) -> None:
        """Note what has been received, and end the oldest bodies if there are too many, or too many bytes.

        Those of the address that has most of them go first.
        """
        self._received[limit] = _address(request.client), size
        while len(self._received) > MAX_BODIES or self._total() > max(MAX_BODY_BYTES, 2 * self._max_bytes):
            count = Counter(address for address, _ in self._received.values())
            oldest = min(self._received, key=lambda each: -count[self._received[each][0]])
            del self._received[oldest]
            if not oldest.expired():
                oldest.reschedule(asyncio.get_running_loop().time())

    def _total(self) -> int:
        return sum(size for _, size in self._received.values())


def _address(client: tuple | None) -> str:
    return client[0] if client else ""


def allow_files() -> None:
    """Let this process open FILES files, or as many as the system permits, in place of the usual 1024.

    Where none is left, asyncio accepts nobody and is busy with thousands of log lines; uvloop resets new connections.
    """
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def server_config(app: ASGIApp, **options) -> uvicorn.Config:
    """The settings of the endpoint's server; `options` as for uvicorn."""
    allow_files()
    return uvicorn.Config(
        app, http=Connection, ws="none", log_config=None, server_header=False, timeout_graceful_shutdown=GRACE_SECONDS,
        **options,
    )  # fmt: skip
