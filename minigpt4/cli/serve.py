"""Serve MiniGPT-4 over HTTP, in the format of OpenAI's chat completions.

    python -m minigpt4 serve --cfg-path eval_configs/minigpt4_tiny_eval.yaml
    curl http://127.0.0.1:8000/health

docs/serving.md has example requests and the list of supported fields. Ctrl-C ends the answers that are being written,
then the server.
"""

import argparse
import logging
import os

from minigpt4.cli.arguments import add_model_arguments, add_settings, check_address, given, parse
from minigpt4.common.commands import command_parser
from minigpt4.common.config import Config
from minigpt4.serving.settings import Settings

KEY_VARIABLE = "MINIGPT4_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("serve", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on (%(default)s)")
    parser.add_argument(
        "--api-key", default=os.environ.get(KEY_VARIABLE), metavar="KEY",
        help=f"key that clients must send; the variable {KEY_VARIABLE} is safer, since other users see command lines",
    )  # fmt: skip
    add_settings(parser.add_argument_group("the endpoint; the numbers are upper limits"), Settings)
    args = parse(parser, argv, Settings)
    if args.api_key == "":
        parser.error(f"--api-key or {KEY_VARIABLE} is empty; leave it out to serve without a key.")
    return args


def main(argv: list[str]) -> None:
    """Serve until Ctrl-C, and load the model meanwhile. Raises the error with which loading fails."""
    args = parse_args(argv)
    cfg = Config(args)
    cfg.check_paths()
    check_address(args.host, args.port)
    import uvicorn

    from minigpt4.common.logger import setup_logger
    from minigpt4.conversation.loading import load_chat, select_gpu
    from minigpt4.serving.app import create_app
    from minigpt4.serving.batching import Batcher
    from minigpt4.serving.connections import server_config

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame) -> None:
            batcher.close(seconds=0)  # uvicorn waits for open answers, so end them
            super().handle_exit(sig, frame)

    setup_logger()
    if args.api_key is None and args.host not in LOOPBACK:
        logging.warning("Everyone who can reach %s can use this server. Set %s.", args.host, KEY_VARIABLE)
    settings = Settings(**given(args, Settings))

    def load():
        return load_chat(cfg, select_gpu(cfg, args.gpu_id or 0))

    def give_up() -> None:
        server.should_exit = True

    batcher = Batcher(load, settings.max_batch, failed=give_up)
    server = Server(server_config(create_app(batcher, settings), host=args.host, port=args.port))
    try:
        server.run()
    except KeyboardInterrupt:
        logging.info("Stopped.")
    if batcher.failure:
        raise batcher.failure
    if batcher.is_alive():  # still loading: at a normal exit, torch would abort because its thread is cut off
        logging.shutdown()
        os._exit(0)
