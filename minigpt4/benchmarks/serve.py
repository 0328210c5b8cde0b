"""python -m minigpt4 bench serve: how many answers a server gives at a time, and how soon.

    python -m minigpt4 bench serve --json                          # Llama-7B, random weights; 1, 8 and 32 clients
    python -m minigpt4 bench serve --size small --clients 4 --seconds 3     # to try it on a CPU
    python -m minigpt4 bench serve --url http://127.0.0.1:8000     # a server that is running, of any kind

Each client streams one answer after the other, each about a new picture, with 8 to 60 words and 16 to 384 tokens. The
clients run in a process of their own. A figure of a first token is the time from the request to its first text.
"""

import argparse
import asyncio
import base64
import json
import random
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np

from minigpt4.benchmarks.harness import bench_parser, report
from minigpt4.benchmarks.synthetic import photograph, random_chat
from minigpt4.common.commands import check_positive

NEW_TOKENS = (16, 32, 64, 128, 256, 384)
WORDS = (8, 20, 60)
WARMUP_SECONDS = 3


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = bench_parser("serve", __doc__)
    parser.add_argument("--size", choices=("7b", "small"), default="7b", help="size of the model (default: 7b)")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32], help="at a time (default: 1 8 32)")
    parser.add_argument("--seconds", type=int, default=12, help="for each number of clients (default: 12)")
    parser.add_argument("--max-batch", type=int, help="answers computed together (default: the most clients)")
    parser.add_argument("--url", help="ask this server instead of starting one")
    parser.add_argument("--model", default="minigpt4", help="name of the model there (default: minigpt4)")
    args = parser.parse_args(argv)
    check_positive(parser, args, ("seconds",))
    return args


def main(argv: list[str]) -> int:
    """Time the answers that the arguments ask for, and print a line for each number of clients."""
    args = parse_args(argv)
    if args.url:
        for clients in args.clients:
            report(asyncio.run(measure(args.url, args.model, clients, args.seconds)), args.json)
        return 0
    with serving(args.size == "small", args.max_batch or max(args.clients), max(args.clients)) as url:
        command = [sys.executable, "-m", "minigpt4", "bench", "serve", "--url", url, "--seconds", str(args.seconds)]
        return subprocess.run([*command, "--clients", *map(str, args.clients), *["--json"] * args.json]).returncode


@contextmanager
def serving(small: bool, max_batch: int, clients: int):
    """Serve a model with random weights, in this process, until the context ends. Yields the address."""
    import threading

    import uvicorn

    from minigpt4.serving.app import create_app
    from minigpt4.serving.batching import Batcher
    from minigpt4.serving.settings import Settings

    batcher = Batcher(lambda: random_chat(small), max_batch)
    settings = Settings(max_batch=max_batch, max_queue=2 * clients)
    server = uvicorn.Server(uvicorn.Config(create_app(batcher, settings), port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while batcher.status != "ready" or not server.started:
        if batcher.failure:
            raise batcher.failure
        time.sleep(0.1)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


async def measure(url: str, model: str, clients: int, seconds: float) -> dict:
    """Figures of `clients` that ask for `seconds`, after some answers that do not count."""
    import httpcore

    async with httpcore.AsyncConnectionPool(max_connections=clients) as pool:

        async def ask_until(end: float, client: int) -> list[dict]:
            rng, found = random.Random(client), []
            while time.perf_counter() < end:
                found.append(await ask(pool, url, body(rng, model)))
            return found

        async def all_clients(duration: float) -> tuple[list[dict], float]:
            start = time.perf_counter()
            found = await asyncio.gather(*(ask_until(start + duration, client) for client in range(clients)))
            return [answer for each in found for answer in each], time.perf_counter() - start

        await all_clients(WARMUP_SECONDS)
        answers, passed = await all_clients(seconds)
    first = [answer["first"] for answer in answers]
    gaps = [gap for answer in answers for gap in answer["gaps"]]
    return {
        "clients": clients,
        "answers": len(answers),
        "tokens_per_s": round(sum(answer["tokens"] for answer in answers) / passed, 1),
        "first_token_s": round(statistics.median(first), 3),
        "first_token_p99_s": round(float(np.percentile(first, 99)), 3),
        "gap_p99_s": round(float(np.percentile(gaps or [0], 99)), 3),
    }


def body(rng: random.Random, model: str) -> bytes:
    """A request about a new picture."""
    picture = base64.b64encode(photograph(rng.randrange(2**31), 64, 64)).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}}
    question = {"type": "text", "text": " ".join(f"word{rng.randrange(1000)}" for _ in range(rng.choice(WORDS)))}
    asked = {"model": model, "max_tokens": rng.choice(NEW_TOKENS), "temperature": 0, "stream": True}
    asked["stream_options"] = {"include_usage": True}
    return json.dumps(asked | {"messages": [{"role": "user", "content": [image, question]}]}).encode()


async def ask(pool, url: str, content: bytes) -> dict:
    """Stream an answer: its `tokens`, seconds to the `first` text, and `gaps` in seconds between texts."""
    start, times, tokens, rest = time.perf_counter(), [], 0, b""
    headers = {"Content-Type": "application/json"}
    async with pool.stream(
        "POST", f"{url}/v1/chat/completions", content=content, headers=headers, extensions={"timeout": {"read": 300}}
    ) as response:
        async for chunk in response.aiter_stream():
            *lines, rest = (rest + chunk).split(b"\n\n")
            for line in lines:
                event = {} if line == b"data: [DONE]" else json.loads(line.removeprefix(b"data: "))
                if any(choice["delta"].get("content") for choice in event.get("choices", [])):
                    times.append(time.perf_counter())
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {rest.decode()[:300]}")
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    return {"tokens": tokens, "first": (times or [time.perf_counter()])[0] - start, "gaps": gaps}
