"""Chat with MiniGPT-4 about pictures, on a web page.

    python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --gpu-id 0
    python demo.py --cfg-path eval_configs/minigpt4_tiny_eval.yaml       # the tiny default, on a laptop's CPU

The page is served on this machine only; `--host 0.0.0.0` serves the network, `--share` opens a public tunnel.
"""

import argparse
import logging
import os
import sys
import tempfile
import threading
from datetime import datetime
from pathlib import Path

from minigpt4.cli.arguments import check_address, port
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import UnknownNameError
from minigpt4.doctor.checks import log_warnings, preflight, preflight_weights


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, metavar="FILE", help="YAML file of the model")
    parser.add_argument("--gpu-id", type=int, default=0, metavar="N", help="GPU to use; without one, the CPU is")
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument("--options", **several, metavar="KEY=VALUE", help="settings that override the file's")
    parser.add_argument("--import", **several, dest="imports", metavar="MODULE", help="plug-ins to import first")
    parser.add_argument("--offline", action="store_true", help="fetch nothing: what is not cached is an error")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=port, metavar="N", help="port to listen on (the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="make the page public through a gradio.live tunnel")
    parser.add_argument("--auth", nargs="+", type=_account, metavar="USER:PASSWORD", help="who may use the page")
    parser.add_argument("--concurrency", type=int, default=1, metavar="N", help="answers computed at the same time")
    parser.add_argument("--max-upload-mb", type=float, default=20, metavar="N", help="largest file")
    args = parser.parse_args(argv)
    for name in ("concurrency", "max_upload_mb"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0, not {getattr(args, name)}.")
    return args


def _account(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form USER:PASSWORD")
    return user, password


def main(argv: list[str] | None = None) -> None:
    """Read the config, serve the page, load the model, and go on until Ctrl-C."""
    args = parse_args(argv)
    cfg = Config(args)
    cfg.check_paths()
    if args.port is not None:
        check_address(args.host, args.port)
    warnings = preflight(cfg, training=False, gpu=args.gpu_id)
    with tempfile.TemporaryDirectory(prefix="minigpt4-uploads-") as uploads:
        page = serve(args, uploads, emoji=cfg.model_cfg.get("model_type") == "tiny")
        log_warnings(warnings)
        try:
            load(cfg, args.gpu_id, page)
            page.blocks.block_thread()
        finally:
            page.blocks.close()


def serve(args: argparse.Namespace, uploads: str, emoji: bool = False):
    """Start serving the page, which waits for a model. Uploads go to the folder `uploads`; examples may be emoji."""
    os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}  # read when gradio is imported
    from minigpt4.common.logger import setup_logger
    from minigpt4.web.page import CSS, THEME, Page

    setup_logger()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    page = Page(args.concurrency, emoji)
    page.blocks.queue(max_size=100)
    page.blocks.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        auth=args.auth,
        max_file_size=int(args.max_upload_mb * 2**20),
        prevent_thread_lock=True,
        theme=THEME,
        css=CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        quiet=True,  # its hints are for programmers
        state_session_capacity=200,  # what gradio remembers of a visitor, some 300 kB
    )
    threading.Thread(target=page.sweep, args=(Path(uploads),), name="sweep", daemon=True).start()
    logging.info("Running on local URL:  %s", page.blocks.local_url)
    if not args.share:
        logging.info("To create a public link, start with --share.")
    return page


def load(cfg: Config, gpu_id: int, page) -> None:
    """Load the model while the page shows how far it is, and hand it over."""
    start = datetime.now()
    handler = _ShowOn(page)
    logging.getLogger().addHandler(handler)
    try:
        page.progress = "Loading the libraries"
        from minigpt4.conversation.loading import load_chat, select_gpu
        from minigpt4.fast.decoding.loop import warm_up

        log_warnings(preflight_weights(cfg, training=False, gpu=gpu_id))
        page.progress = "Loading the model"
        page.chat = load_chat(cfg, select_gpu(cfg, gpu_id))
        warm_up(page.chat.model.llama_model)
    finally:
        logging.getLogger().removeHandler(handler)
    logging.info("The model is ready after %.0f s.", (datetime.now() - start).total_seconds())


class _ShowOn(logging.Handler):
    """Shows what is logged as the progress of a page."""

    def __init__(self, page):
        super().__init__(logging.INFO)
        self._page = page

    def emit(self, record: logging.LogRecord) -> None:
        self._page.progress = record.getMessage().splitlines()[0]


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, UnknownNameError) as error:
        sys.exit(f"Error: {error}")
