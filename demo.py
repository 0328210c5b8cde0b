"""Chat with MiniGPT-4 about pictures, on a web page.

    python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --gpu-id 0
    python demo.py --cfg-path eval_configs/minigpt4_tiny_eval.yaml       # the tiny default, on a laptop's CPU

The page is served on this machine only; `--host 0.0.0.0` serves the network, `--share` opens a public tunnel.
"""

import argparse
import sys

from minigpt4.cli.arguments import add_model_arguments, check_address
from minigpt4.common.commands import accept_any_text, check_dashes, check_positive
from minigpt4.common.config import Config
from minigpt4.common.errors import format_error, is_mistake
from minigpt4.doctor.checks import log_warnings, preflight
from minigpt4.web.server import load_model, serve


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(gpu_id=0)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, metavar="N", help="port to listen on (the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="make the page public through a gradio.live tunnel")
    parser.add_argument("--auth", nargs="+", type=_account, metavar="USER:PASSWORD", help="who may use the page")
    parser.add_argument("--concurrency", type=int, default=1, metavar="N", help="answers computed at the same time")
    parser.add_argument("--max-upload-mb", type=float, default=20, metavar="N", help="largest file")
    check_dashes(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    check_positive(parser, args, ("concurrency", "max_upload_mb"))
    return args


def _account(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form USER:PASSWORD")
    return user, password


def main(argv: list[str] | None = None) -> None:
    """Check the config, serve the page, load the model, and run until Ctrl-C."""
    accept_any_text()
    args = parse_args(argv)
    cfg = Config(args)
    cfg.check_paths()
    if args.port is not None:
        check_address(args.host, args.port)
    warnings = preflight(cfg, training=False, gpu=args.gpu_id)
    options = {name: getattr(args, name) for name in ("host", "port", "share", "auth", "concurrency", "max_upload_mb")}
    # Here stood demo.launch(share=True): its arguments are flags now, --share, --host 0.0.0.0 (server_name) and --port.
    with serve(**options, emoji=cfg.model_cfg.get("model_type") == "tiny") as page:
        log_warnings(warnings)

        def check_weights() -> None:
            log_warnings(preflight(cfg, training=False, gpu=args.gpu_id, with_loaders=True))

        load_model(page, cfg, args.gpu_id, check_weights)
        page.blocks.block_thread()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if not is_mistake(error):
            raise
        sys.exit(format_error(error))
