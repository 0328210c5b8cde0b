"""python -m minigpt4 <command> …

python -m minigpt4 chat cat.jpg --cfg-path eval_configs/minigpt4_tiny_eval.yaml
python -m minigpt4 caption --dir photos --out captions.jsonl --cfg-path eval_configs/minigpt4_eval.yaml
python -m minigpt4 serve --cfg-path eval_configs/minigpt4_eval.yaml

Two commands are scripts: python train.py trains, python demo.py serves the web page.
"""

import os
import sys

from minigpt4.common.commands import accept_any_text, check_dashes, dispatch

COMMANDS = {
    "chat": "chat about pictures in the terminal",
    "caption": "describe pictures, a folder or shards, into a JSONL file",
    "evaluate": "score a model's answers, or answers in a file, against references",
    "serve": "serve OpenAI's chat completions over HTTP",
    "bench": "time training steps, answers, or the reading of pictures",
    "cache-features": "compute image features once, to train from them",
    "merge": "write the language model with its LoRA adapters merged in",
    "data": "check datasets, show samples as the model reads them, or convert them",
    "plot": "draw the curves of runs, to compare them",
    "compare": "say where two runs differ: settings, environment, numbers, samples, weights",
    "report": "write the page about a run that has not ended by itself",
    "doctor": "find what is wrong with a run before it starts",
    "make-random-weights": "write random weights in the published formats, for rehearsals and benchmarks",
    "rehearse": "run train.py and chat on such weights, and measure time and memory",
}
# Modules of `minigpt4.benchmarks`; the other commands are modules of `minigpt4.cli`.
BENCHMARKS = ("bench", "make-random-weights", "rehearse")


def main(argv: list[str] | None = None) -> int | str | None:
    """Run a command. Returns the process's exit status, or a message for stderr."""
    from minigpt4.common.failing import format_error, is_mistake

    accept_any_text()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        check_dashes(arguments)
        return dispatch(arguments, __doc__, COMMANDS, _module_of)
    except BrokenPipeError:  # whoever reads the output has seen enough: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        return 1
    except Exception as error:
        if not is_mistake(error):
            raise
        return format_error(error)


def _module_of(command: str) -> str:
    package = "benchmarks" if command in BENCHMARKS else "cli"
    return f"minigpt4.{package}.{command.replace('-', '_')}"


if __name__ == "__main__":
    sys.exit(main())
