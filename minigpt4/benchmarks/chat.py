"""python -m minigpt4 bench chat: time answers.

    python -m minigpt4 bench chat                       # Llama-7B, random weights, in 16 bit and with 8-bit weights
    python -m minigpt4 bench chat --compare             # beside transformers' generate, in the same process
    python -m minigpt4 bench chat --size small --batch 1 4 --tokens 20    # to try it on a CPU

An answer has 200 tokens, drawn greedily; its prompt has 80, of which 32 are an image. The picture of a single answer
was shown before, as in a chat; a batch is captioned, its pictures are encoded in the time that is measured. Another
question in the same conversation has 20 tokens more.
"""

import argparse
import json
import statistics
import time

PROMPT = " w" * 24 + "<ImageHere>" + " w" * 23  # with <s> and 32 vectors: 80
NEXT_QUESTION = 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="minigpt4 bench chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("7b", "small"), default="7b", help="size of the model (default: 7b)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 64], help="prompts side by side (default: 1 64)")
    parser.add_argument(
        "--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS[:2]), help="of the language model (the first two)"
    )
    parser.add_argument("--tokens", type=int, default=200, help="tokens of an answer (default: 200)")
    parser.add_argument("--answers", type=int, default=5, help="timed answers, after two to warm up (default: 5)")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["compiled"], help="in the CUDA graph")
    parser.add_argument("--compare", action="store_true", help="also by transformers' generate, with 16-bit weights")
    parser.add_argument("--profile", action="store_true", help="show where the GPU's time goes")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args(argv)


WEIGHTS = ("16bit", "8bit_weights", "4bit")
# As they stand, or compiled with kernels of our own.
LAYERS = ("eager", "compiled")
# An option that the project's own loop does not know leaves the work to transformers.
THEIRS = {"transformers": {"use_cache": True}, "transformers, static cache": {"cache_implementation": "static"}}


def main(argv: list[str] | None = None) -> int:
    """Time what the arguments name, and print a line for each."""
    args = parse_args(argv)
    import torch

    from minigpt4.benchmarks.synthetic import random_model
    from minigpt4.common import dist_utils
    from minigpt4.fast.decoding.loop import Decoder, cached_decoding
    from minigpt4.quantization.int8 import quantize_model

    device = dist_utils.select_device("cuda")
    dtype = dist_utils.select_dtype(device, True, "bf16")

    def named(weights: str) -> str:
        return "32bit" if weights == "16bit" and dtype == torch.float32 else weights

    for weights in args.weights:
        model = random_model(device, dtype, args.size == "small", "4bit" if weights == "4bit" else "16bit").eval()
        llm, on_gpu = model.llama_model, device.type == "cuda"
        model.tokenizer.decode = lambda ids, skip_special_tokens=True: " w" * len(ids)
        llm.generation_config.eos_token_id = None  # answers of equal length
        if weights == "8bit_weights":
            quantize_model(llm, device)
        for batch in args.batch:
            for layers in args.layers:
                cached_decoding.decoders[llm] = Decoder(llm, compiled=layers == "compiled")
                row = {"weights": named(weights), "batch": batch, "by": f"minigpt4, {layers if on_gpu else 'eager'}"}
                report(row | time_answers(model, batch, args), args.json)
                if args.profile:
                    profile(model, batch, args)
            cached_decoding.clear_cache(llm)
            for name, options in THEIRS.items() if args.compare and weights == "16bit" else ():
                row = {"weights": named(weights), "batch": batch, "by": name}
                report(row | time_answers(model, batch, args, options), args.json)
            torch.compiler.reset()
        del model, llm  # makes room for the next
    return 0


def report(row: dict, as_json: bool = False) -> None:
    print(json.dumps(row) if as_json else "  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


def time_answers(model, batch: int, args: argparse.Namespace, options: dict | None = None) -> dict:
    """Tokens a second and milliseconds to the first token, medians over the answers; the peak of the GPU's memory."""
    import torch

    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(2):
        answer(model, batch, args.tokens, options or {})
    warm_up = time.perf_counter() - start
    timed = [answer(model, batch, args.tokens, options or {}) for _ in range(args.answers)]
    seconds, first, following = zip(*timed, strict=True)
    row = {
        "tokens_per_s": round(batch * args.tokens / statistics.median(seconds), 1),
        "slowest": round(batch * args.tokens / max(seconds), 1),
        "first_token_ms": round(1e3 * statistics.median(first), 1),
        "next_question_ms": round(1e3 * statistics.median(following), 1),
        "warm_up_s": round(warm_up, 1),
    }
    if on_gpu:
        row["max_mem_MB"] = torch.cuda.max_memory_allocated() // 2**20
        row["reserved_MB"] = torch.cuda.max_memory_reserved() // 2**20
    return row


def answer(model, batch: int, tokens: int, options: dict) -> tuple[float, float, float]:
    """Seconds of an answer to pictures never seen before, to its first token, and to the first of the next answer."""
    import torch

    from minigpt4.fast.decoding.loop import cached_decoding
    from minigpt4.models.generation import continue_embeds

    images = torch.randn(batch, 3, 224, 224).to(model.device)
    with torch.inference_mode():
        seen = model.encode_img(images)[0].unsqueeze(1) if batch == 1 else None
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        watch = Stopwatch()
        seen = model.encode_img(images)[0].unsqueeze(1) if seen is None else seen
        embeds, mask = model.context([PROMPT] * batch, seen)

        def run(embeds, mask, tokens):
            return continue_embeds(
                model.llama_model,
                model.tokenizer,
                embeds,
                mask,
                "###",
                [watch],
                decoding_loop=cached_decoding,
                max_new_tokens=tokens,
                **options,
            )

        ids = run(embeds, mask, tokens)
        seconds, first = watch.total(), watch.first
        watch = Stopwatch()
        said = model.llama_model.get_input_embeddings()(ids.to(model.device))
        asked = torch.cat([embeds, said, embeds[:, :NEXT_QUESTION]], dim=1)
        run(asked, mask.new_ones(asked.shape[:2]), 1)
        return seconds, first, watch.first


class Stopwatch:
    """A stopping criterion that stops nothing; it notes when the first token came."""

    def __init__(self):
        self.start, self.first = time.perf_counter(), None

    def __call__(self, input_ids, scores, **kwargs):
        if self.first is None:
            self.first = self.total()
        return (input_ids[:, -1] < 0).to(input_ids.device)

    def total(self) -> float:
        return time.perf_counter() - self.start


def profile(model, batch: int, args: argparse.Namespace) -> None:
    """A table of the kernels of one answer."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if model.device.type == "cuda" else ProfilerActivity.CPU]) as seen:
        answer(model, batch, min(args.tokens, 40), {})
    order = "self_cuda_time_total" if model.device.type == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=90), flush=True)


if __name__ == "__main__":
    main()
