"""Chat with MiniGPT-4 about pictures, on a web page.

    python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --gpu-id 0
    python demo.py --cfg-path eval_configs/minigpt4_tiny_eval.yaml       # the tiny default, on a laptop's CPU

The page is served on this machine only; `--host 0.0.0.0` serves the network, `--share` opens a public tunnel. Both ask
for a password, which is made and printed if there is none; `--open` lets everybody in.
"""

import argparse
import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
from pathlib import Path

from minigpt4.cli.arguments import add_model_arguments, check_address
from minigpt4.common.commands import accept_any_text, check_dashes, check_positive
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.failing import format_error, is_mistake
from minigpt4.doctor.checks import log_warnings, preflight
from minigpt4.serving.guard import is_exposed, read_secrets
from minigpt4.web.server import load_model, serve

AUTH_VARIABLE = "MINIGPT4_AUTH"
FALSE = ("", "0", "false", "no")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(gpu_id=0)
    # The variables of gradio's that set the same.
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT")
    share = os.environ.get("GRADIO_SHARE", "").lower() not in FALSE
    group = parser.add_argument_group("the page")
    group.add_argument("--host", default=host, help="address to listen on (%(default)s: this machine only)")
    group.add_argument("--port", type=int, default=port, metavar="N", help="port (the first free one from 7860)")
    group.add_argument("--share", action="store_true", default=share, help="public, through a gradio.live tunnel")
    group.add_argument(
        "--auth", nargs="+", type=_account, metavar="USER:PASSWORD",
        help=f"who may use the page; others see command lines, so the variable {AUTH_VARIABLE} or a file is safer",
    )  # fmt: skip
    group.add_argument("--auth-file", metavar="FILE", help="the same in a file, one a line")
    group.add_argument("--open", action="store_true", help="let everybody use the page who can reach it")
    group.add_argument(
        "--allow-host", nargs="+", default=[], metavar="NAME", help="names of the page, such as a proxy's; *: any name"
    )
    root_path = os.environ.get("GRADIO_ROOT_PATH", "")
    group.add_argument(
        "--root-path", default=root_path, metavar="PATH", help="path under which a proxy serves the page"
    )
    group.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="answers computed together (%(default)s)"
    )
    group.add_argument("--max-upload-mb", type=float, default=20, metavar="N", help="largest file (%(default)s)")
    group.add_argument("--feedback", metavar="FILE", help="offer thumbs up and down, and append them to this file")
    check_dashes(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    check_positive(parser, args, ("concurrency", "max_upload_mb"))
    return args


def _account(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form USER:PASSWORD")
    return user, password


def accounts_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(user, password) of those who may use the page; if there are none, everybody may. Raises ConfigError."""
    accounts = list(args.auth or [])
    try:
        accounts += [_account(text) for text in read_secrets(AUTH_VARIABLE, args.auth_file)]
    except argparse.ArgumentTypeError:
        raise ConfigError(f"In {AUTH_VARIABLE} and --auth-file, an account has the form USER:PASSWORD.") from None
    if accounts and args.open:
        raise ConfigError("--open lets everybody in, and --auth does not. Leave one of them out.")
    return accounts


def check_feedback(file: str | None) -> None:
    """Raise ConfigError if judgements cannot be appended to this file."""
    try:
        if file:
            Path(file).open("a").close()
    except OSError as error:
        raise ConfigError(f"--feedback {file} cannot be written: {error.strerror}.") from None


def main(argv: list[str] | None = None) -> None:
    """Check the config, serve the page, load the model, and run until Ctrl-C or a signal to end."""
    accept_any_text()
    args = parse_args(argv)
    cfg = Config(args)
    cfg.check_paths()
    if args.port is not None:
        check_address(args.host, args.port)
    check_feedback(args.feedback)
    warnings = preflight(cfg, training=False, gpu=args.gpu_id)
    accounts = accounts_of(args)
    needs_password = not accounts and not args.open and (args.share or is_exposed(args.host))
    if needs_password:
        accounts = [("minigpt4", secrets.token_urlsafe(9))]
    names = ("host", "port", "share", "concurrency", "max_upload_mb", "allow_host", "root_path", "feedback")
    options = {name: getattr(args, name) for name in names} | {"auth": accounts or None}
    for name in ("SIGTERM", "SIGHUP"):  # docker stop, systemd, a terminal that closes: nothing is left behind
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit())
    # Here stood demo.launch(share=True): its arguments are flags now, --share, --host 0.0.0.0 (server_name) and --port.
    emoji = cfg.model_cfg.get("model_type") == "tiny"
    with contextlib.suppress(KeyboardInterrupt), serve(**options, emoji=emoji) as page:
        log_warnings(warnings)
        if needs_password:
            hint = "The page asks for these. --auth sets another password, --open lets everybody in."
            logging.warning("User: %s  Password: %s  %s", *accounts[0], hint)

        def check_weights() -> None:
            log_warnings(preflight(cfg, training=False, gpu=args.gpu_id, with_loaders=True))

        load_model(page, cfg, args.gpu_id, check_weights)
        threading.Event().wait()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if not is_mistake(error):
            raise
        sys.exit(format_error(error))
