"""The endpoint of `python -m minigpt4 serve` in a thread, and helpers that build requests."""

import base64
import socket
import threading
import time
from contextlib import contextmanager

import httpx

from minigpt4.serving.batching import Batcher
from minigpt4.serving.settings import Settings


def data_url(content: bytes, kind: str = "webp") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(content: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def assistant(words: str) -> dict:
    return {"role": "assistant", "content": words}


class Served:
    """A running endpoint: its `url`, its `batcher`, an `http` client, and shorthands for calls."""

    def __init__(self, url: str, batcher: Batcher):
        self.url, self.batcher = url, batcher
        # No connection is used twice: the server closes idle ones if others need their places, or after a while.
        new_each_time = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False, limits=new_each_time)

    def get(self, path: str, **options) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, body: dict | None = None, **options) -> httpx.Response:
        options = {"json": body} | options if body is not None else options
        return self.http.post("/v1/chat/completions", **options)

    def ask(self, *messages, **settings) -> httpx.Response:
        return self.post({"model": "minigpt4", "messages": list(messages), "temperature": 0, **settings})

    def health(self) -> dict:
        return self.get("/health").json()

    def wait_for(self, **counts) -> None:
        """Wait until /health reports these counts."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            health = self.health()
            if counts.items() <= health.items():
                return
            time.sleep(0.02)
        raise AssertionError(f"{health} never became {counts}")


@contextmanager
def serving(load, **changed):
    """Serve the chat that `load()` returns until the context ends; `changed` are fields of `Settings`."""
    # Imported here, so that tests that do not serve can be collected without uvicorn.
    import uvicorn

    from minigpt4.serving.app import create_app
    from minigpt4.serving.connections import server_config

    settings = Settings(**changed)
    batcher = Batcher(load, settings.max_batch)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(create_app(batcher, settings)))
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(f"http://127.0.0.1:{sock.getsockname()[1]}", batcher)
    finally:
        batcher.close()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
