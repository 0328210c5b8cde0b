"""python -m minigpt4 bench chat: time answers.

    python -m minigpt4 bench chat                       # Llama-7B, random weights, in 16 bit and with 8-bit weights
    python -m minigpt4 bench chat --compare             # beside transformers' generate, in the same process
    python -m minigpt4 bench chat --size small --batch 1 4 --tokens 20    # to try it on a CPU

An answer has 200 tokens, chosen greedily; its prompt has 80, of which 32 are an image. The image of a single answer was
encoded before, as in a chat. The images of a batch are encoded within the time that is measured, as in captioning. The
next question of the same conversation adds 20 tokens.
"""

import argparse
import statistics
import time

from minigpt4.benchmarks.harness import bench_parser, clock, free_memory, peak_memory, report, reset_peak_memory
from minigpt4.benchmarks.synthetic import PROMPT, random_chat, weights_name
from minigpt4.common.commands import check_positive

NEXT_QUESTION = 20
WARMUP_ANSWERS = 2
WEIGHTS = ("16bit", "8bit_weights", "4bit")
# The layers of the project's own decoding loop: the library's, or compiled ones with kernels of our own.
LAYERS = ("eager", "compiled")
# Options that leave decoding to transformers' `generate`.
THEIRS = {
    "transformers": {"decoding_loop": None},
    "transformers, static cache": {"decoding_loop": None, "cache_implementation": "static"},
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = bench_parser("chat", __doc__)
    parser.add_argument("--size", choices=("7b", "small"), default="7b", help="size of the model (default: 7b)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 64], help="prompts side by side (default: 1 64)")
    parser.add_argument(
        "--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS[:2]), help="of the language model (the first two)"
    )
    parser.add_argument("--tokens", type=int, default=200, help="tokens of an answer (default: 200)")
    parser.add_argument("--answers", type=int, default=5, help="timed answers, after two to warm up (default: 5)")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["compiled"], help="in the CUDA graph")
    parser.add_argument("--compare", action="store_true", help="also time transformers' generate, with 16-bit weights")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the GPU's time")
    args = parser.parse_args(argv)
    check_positive(parser, args, ("tokens", "answers"))
    return args


def main(argv: list[str]) -> int:
    """Time the answers that the arguments ask for, and print a line for each way."""
    args = parse_args(argv)
    from minigpt4.fast.decoding.loop import Decoder, cached_decoding

    for weights in args.weights:
        chat = random_chat(args.size == "small", weights)
        model = chat.model
        for batch in args.batch:
            row = {"weights": weights_name(chat, weights), "batch": batch}
            for layers in args.layers:
                cached_decoding.decoders[model.llama_model] = Decoder(model.llama_model, compiled=layers == "compiled")
                row["by"] = f"minigpt4, {layers if chat.device.type == 'cuda' else 'eager'}"
                report(row | time_answers(model, batch, args, {}), args.json)
                if args.profile:
                    profile(model, batch, args)
                cached_decoding.clear_cache(model.llama_model)  # and the CUDA graphs
            for by, options in THEIRS.items() if args.compare and weights == "16bit" else ():
                report(row | {"by": by} | time_answers(model, batch, args, options), args.json)
        del chat, model
        free_memory()
    return 0


def time_answers(model, batch: int, args: argparse.Namespace, options: dict) -> dict:
    """Tokens a second, milliseconds to the first token, and the peak of the GPU's memory; medians over the answers.

    options: for `continue_embeds`.
    """
    free_memory()
    reset_peak_memory(model.device)
    start = time.perf_counter()
    for _ in range(WARMUP_ANSWERS):
        answer(model, batch, args.tokens, options)
    warm_up = time.perf_counter() - start
    timed = [answer(model, batch, args.tokens, options) for _ in range(args.answers)]
    seconds, first, following = zip(*timed, strict=True)
    return {
        "tokens_per_s": round(batch * args.tokens / statistics.median(seconds), 1),
        "slowest": round(batch * args.tokens / max(seconds), 1),
        "first_token_ms": round(1e3 * statistics.median(first), 1),
        "next_question_ms": round(1e3 * statistics.median(following), 1),
        "warm_up_s": round(warm_up, 1),
        **peak_memory(model.device),
    }


def answer(model, batch: int, tokens: int, options: dict) -> tuple[float, float, float]:
    """Answer about new images. Returns seconds to the end, to the first token, and to the first of the next answer."""
    import torch

    from minigpt4.fast.decoding.loop import cached_decoding
    from minigpt4.models.generation import continue_embeds

    def run(embeds, mask, tokens, start):
        """The ids of an answer, and the seconds from `start` to its end and to its first token."""
        passed = []

        def watch(input_ids, scores, **kwargs):  # a stopping criterion that never stops
            passed.append(time.perf_counter() - start)
            return (input_ids[:, -1] < 0).to(input_ids.device)

        how = {"decoding_loop": cached_decoding, "max_new_tokens": tokens} | options
        ids = continue_embeds(model.llama_model, model.tokenizer, embeds, mask, "###", [watch], **how)
        return ids, time.perf_counter() - start, passed[0]

    images = torch.randn(batch, 3, 224, 224).to(model.device)
    with torch.inference_mode():
        start = clock(model.device)
        image_embeds = model.encode_img(images)[0].unsqueeze(1)
        if batch == 1:  # encoded before the question
            start = clock(model.device)
        embeds, mask = model.context([PROMPT] * batch, image_embeds)
        ids, seconds, first = run(embeds, mask, tokens, start)
        start = clock(model.device)
        answered = model.llama_model.get_input_embeddings()(ids.to(model.device))
        longer = torch.cat([embeds, answered, embeds[:, :NEXT_QUESTION]], dim=1)
        _, _, following = run(longer, mask.new_ones(longer.shape[:2]), 1, start)
        return seconds, first, following


def profile(model, batch: int, args: argparse.Namespace) -> None:
    """Print a table of the kernels of one answer."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = model.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        answer(model, batch, min(args.tokens, 40), {})
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=90), flush=True)
