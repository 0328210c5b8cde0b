"""Serving the web page: `serve` starts the server, and `load_model` loads the model while the page shows the progress.

gradio opens the port and the public tunnel. gradio and torch are imported inside the functions: gradio reads
environment variables when it is imported, and both take seconds.
"""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from minigpt4.common.config import Config
from minigpt4.serving.guard import HostCheck, PasswordCheck

if TYPE_CHECKING:
    from minigpt4.web.page import Page


@contextmanager
def serve(
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: list[tuple[str, str]] | None = None,
    concurrency: int = 8,
    max_upload_mb: float = 20,
    emoji: bool = False,
    allow_host: Iterable[str] = (),
    root_path: str = "",
    feedback: str | None = None,
) -> Iterator[Page]:
    """Serve the page, without a model, until the context ends.

    Args:
        port: the first free port from 7860 if None.
        share: also open a public tunnel of gradio.live.
        auth: (user, password) of those who may use the page; everybody if None.
        concurrency: number of answers that are computed together.
        max_upload_mb: size limit of a file.
        emoji: the model knows only emoji.
        allow_host: names by which browsers may ask for the page, beside those of this machine.
        root_path: path under which a proxy serves the page.
        feedback: file for visitors' judgements of answers; None: there are none.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from minigpt4.common.logger import setup_logger
    from minigpt4.serving.connections import Connection, allow_files
    from minigpt4.web.page import Page
    from minigpt4.web.pictures import video_folder

    setup_logger()
    allow_files()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with video_folder() as folder:
        page = Page(folder, concurrency, max_upload_mb, emoji, Path(feedback) if feedback else None, root_path)
        checks = HostCheck(
            PasswordCheck(page.app, auth, page.refuse, public=["/health"]) if auth else page.app,
            host, allow_host, own_pages_only=True, refuse=page.refuse,
        )  # fmt: skip
        # gradio makes a client when it is imported, and asks its own server whether it is there. Only sharing the page
        # takes a proxy.
        others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
        with _no_proxy(f"localhost,127.0.0.1,::1,{host},{others}" if share else "*"):
            server = _gradio_server(checks, root_path)
            if share:
                logging.info("--share: gradio's tunnel. Its program (frpc) is downloaded unless that was done before.")
            with redirect_stdout(io.StringIO()):  # what happened is said below
                _, page.url, shared = server.launch(
                    server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True,
                    footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, root_path=root_path,
                )  # fmt: skip
        # The first connection is gradio's own. Later ones are bounded in time and number.
        server.get_blocks().server.config.http_protocol_class = Connection
        try:
            logging.info("Running on local URL:  %s", page.url)
            if shared:
                checks.allowed.add(urlsplit(shared).hostname)
                logging.info("Running on public URL: %s", shared)
            elif share:
                logging.warning("There is no public link: gradio's tunnel cannot be reached.")
            else:
                logging.info("For the network, start with --host 0.0.0.0. To create a public link, start with --share.")
            yield page
        finally:
            if page.batcher:
                page.batcher.close()
            server.get_blocks().close(verbose=False)


def _gradio_server(app, root_path: str):
    """A server of gradio's that serves `app`, and of its own routes only the one that it asks when it starts."""
    import gradio

    class Server(gradio.Server):
        def build_middleware_stack(self):
            own = super().build_middleware_stack()

            async def choose(scope, receive, send) -> None:
                if scope["type"] == "lifespan" or scope["path"] == "/gradio_api/startup-events":
                    await own(scope, receive, send)
                elif scope["type"] == "http":
                    await app({**scope, "root_path": root_path.rstrip("/"), "app": None}, receive, send)

            return choose

    return Server(docs_url=None, redoc_url=None, openapi_url=None)


@contextmanager
def _no_proxy(hosts: str) -> Iterator[None]:
    """While entered, no proxy is used for these hosts. `*`: none at all, so that httpx does not even look at them."""
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = hosts
    try:
        yield
    finally:
        os.environ.pop("no_proxy")
        if before is not None:
            os.environ["no_proxy"] = before


def load_model(page: Page, cfg: Config, gpu_id: int, check_weights: Callable[[], None] = lambda: None) -> None:
    """Load the model of `cfg`, and let the page answer. Meanwhile the page shows each log message as the progress.

    check_weights: called once the libraries are loaded, before the model is.
    """
    start = time.monotonic()
    logging.info("Initializing Chat")
    handler = _ProgressHandler(page)
    logging.getLogger().addHandler(handler)
    try:
        page.progress = "Loading the libraries"
        from minigpt4.conversation.loading import load_chat, select_gpu

        check_weights()
        page.progress = "Loading the model"
        answer_with(page, load_chat(cfg, select_gpu(cfg, gpu_id)))
    finally:
        logging.getLogger().removeHandler(handler)
    logging.info("Initialization Finished")
    logging.info("The model is ready after %.0f s.", time.monotonic() - start)


def answer_with(page: Page, chat) -> None:
    """Let the page answer with a `Chat`."""
    from minigpt4.serving.batching import Batcher

    batcher = Batcher(lambda: chat, page.batch)
    batcher.start()
    while batcher.chat is None:
        time.sleep(0.01)
    page.batcher = batcher


class _ProgressHandler(logging.Handler):
    """Shows each log message on a page, as its progress."""

    def __init__(self, page: Page):
        super().__init__(logging.INFO)
        self._page = page

    def emit(self, record: logging.LogRecord) -> None:
        self._page.progress = record.getMessage().splitlines()[0]
