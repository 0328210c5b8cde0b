"""Serving the web page: `serve` starts the server, and `load_model` loads the model while the page shows the progress.

gradio and torch are imported inside the functions. gradio reads environment variables when it is imported, and both
take seconds.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.common.config import Config

if TYPE_CHECKING:
    from minigpt4.web.page import Page
    from minigpt4.web.session import ChatSessions

CLEANING_SECONDS = 600  # interval at which stale uploads are deleted
STALE_SECONDS = 3600  # age from which an upload that belongs to no session is stale


@contextmanager
def serve(
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: list[tuple[str, str]] | None = None,
    concurrency: int = 1,
    max_upload_mb: float = 20,
    emoji: bool = False,
) -> Iterator[Page]:
    """Serve the page, without a model, until the context ends. Uploads go to a temporary folder.

    Args:
        port: the first free port from 7860 if None.
        share: also open a public tunnel of gradio.live.
        auth: (user, password) of those who may use the page; everybody if None.
        concurrency: number of answers computed at the same time.
        max_upload_mb: size limit of a file.
        emoji: offer emoji as example pictures.
    """
    with tempfile.TemporaryDirectory(prefix="minigpt4-uploads-") as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        from minigpt4.common.logger import setup_logger

        setup_logger()
        logging.getLogger("httpx").setLevel(logging.WARNING)
        # gradio makes a client when it is imported, and asks its own server whether it is there. Only sharing the page
        # takes a proxy.
        others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
        with _no_proxy(f"localhost,127.0.0.1,::1,{host},{others}" if share else "*"):
            from minigpt4.web.page import CSS_FILE, THEME, Page

            page = Page(Path(uploads), concurrency, emoji)
            page.blocks.queue(max_size=100)
            page.blocks.launch(
                server_name=host,
                server_port=port,
                share=share,
                auth=auth,
                max_file_size=int(max_upload_mb * 2**20),
                prevent_thread_lock=True,
                theme=THEME,
                css_paths=CSS_FILE,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                quiet=True,  # gradio's hints are for programmers
                state_session_capacity=200,  # gradio keeps about 300 kB for a session
            )
        try:
            threading.Thread(target=_keep_cleaning, args=(page.sessions,), name="cleaning", daemon=True).start()
            logging.info("Running on local URL:  %s", page.blocks.local_url)
            if not share:
                logging.info("For the network, start with --host 0.0.0.0. To create a public link, start with --share.")
            yield page
        finally:
            page.blocks.close()


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
    """Load the model of `cfg` into `page.chat`. Meanwhile the page shows each log message as the progress.

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
        page.chat = load_chat(cfg, select_gpu(cfg, gpu_id), warm_up=[1])
    finally:
        logging.getLogger().removeHandler(handler)
    logging.info("Initialization Finished")
    logging.info("The model is ready after %.0f s.", time.monotonic() - start)


class _ProgressHandler(logging.Handler):
    """Shows each log message on a page, as its progress."""

    def __init__(self, page: Page):
        super().__init__(logging.INFO)
        self._page = page

    def emit(self, record: logging.LogRecord) -> None:
        self._page.progress = record.getMessage().splitlines()[0]


def _keep_cleaning(sessions: ChatSessions) -> None:
    """Delete stale uploads every CLEANING_SECONDS."""
    while True:
        time.sleep(CLEANING_SECONDS)
        sessions.delete_stale_uploads(STALE_SECONDS)
