"""Serve MiniGPT-4 over HTTP, in the format of OpenAI's chat completions.

    python -m minigpt4 serve --cfg-path eval_configs/minigpt4_tiny_eval.yaml
    curl http://127.0.0.1:8000/health

docs/serving.md has example requests and the list of supported fields. Ctrl-C ends the answers that are being written,
then the server.
"""

import argparse
import logging
import os
import secrets

from minigpt4.cli.arguments import add_model_arguments, add_settings, check_address, given, parse
from minigpt4.common.commands import command_parser
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.serving.guard import is_exposed, read_secrets
from minigpt4.serving.settings import Settings

KEY_VARIABLE = "MINIGPT4_API_KEY"


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("serve", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on (%(default)s)")
    parser.add_argument(
        "--api-key", metavar="KEY",
        help=f"key that clients must send; others see command lines, so the variable {KEY_VARIABLE} or a file is safer",
    )  # fmt: skip
    parser.add_argument("--api-key-file", metavar="FILE", help="keys in a file, one a line")
    parser.add_argument("--open", action="store_true", help="let everybody use the endpoint who can reach it")
    parser.add_argument(
        "--allow-host", nargs="+", action="extend", default=[], metavar="NAME",
        help="names of the endpoint, such as a proxy's; *: any name",
    )  # fmt: skip
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL",
        help="origin of a web page (https://example.com) that may use the endpoint in browsers; * for all",
    )  # fmt: skip
    add_settings(parser.add_argument_group("the endpoint; the numbers are upper limits"), Settings)
    args = parse(parser, argv, Settings)
    if "" in (args.api_key, os.environ.get(KEY_VARIABLE)):
        parser.error(f"--api-key or {KEY_VARIABLE} is empty; leave it out to serve without a key.")
    return args


def keys_of(args: argparse.Namespace) -> list[str]:
    """The keys of which clients must send one. Raises ConfigError."""
    keys = [args.api_key] if args.api_key else []
    keys += read_secrets(KEY_VARIABLE, args.api_key_file)
    if keys and args.open:
        raise ConfigError("--open lets everybody in, and a key does not. Leave one of them out.")
    return keys


def main(argv: list[str]) -> None:
    """Serve until Ctrl-C, and load the model meanwhile. Raises the error with which loading fails."""
    args = parse_args(argv)
    cfg = Config(args)
    cfg.check_paths()
    keys = keys_of(args)
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
    if not keys and not args.open and is_exposed(args.host):
        keys = [secrets.token_urlsafe(16)]
        hint = f"Other machines can reach this server. {KEY_VARIABLE} sets another key, --open lets everybody in."
        logging.warning("API key: %s  %s", *keys, hint)
    settings = Settings(**given(args, Settings), api_keys=keys)

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
