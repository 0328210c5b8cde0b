"""A load test of the web page: many visitors at the same time, who send the HTTP requests of a browser.

    python tests/load_page.py                                      # 16 visitors for two minutes, on the tiny default
    python tests/load_page.py --visitors 4 --seconds 20
    python tests/load_page.py --half-open 500                      # beside so many requests that never arrive in full

It starts demo.py. Each visitor uploads a picture of its own, asks two questions, leaves, and repeats this. The answers
are greedy, and must equal those that the visitor got when it was alone. The exit status is 1 if an answer differs, a
request fails, files remain, or the server's memory grows. With a model in 16 or 8 bit (--cfg-path,
--options) an answer can differ where two tokens are nearly tied; this is reported, too.
"""

import argparse
import io
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from dataset_files import picture_bytes
from helpers import PYTHONPATH, ROOT, free_port
from PIL import Image

QUESTIONS = ("What is this?", "And what colour is it?")
BYTES = {"Content-Type": "application/octet-stream"}
GREEDY = {"do_sample": False, "max_new_tokens": 40}
GROWTH = 1.05  # limit of the memory in the last quarter of the time, relative to the second quarter


class Visitor:
    """A visitor of the page at `url`, which does what page.js does."""

    def __init__(self, url: str, number: int):
        self.number = number
        self._http = httpx.Client(base_url=url, timeout=120)
        self.messages = []

    def __enter__(self) -> "Visitor":
        return self

    def __exit__(self, *error) -> None:
        self._http.post("forget", json=[name for message in self.messages for name in message.get("pictures", [])])
        self._http.close()

    def show(self, content: bytes | None = None, name: str | None = None, **options) -> dict:
        """Upload a picture, by default the visitor's own. Returns what the server says about it."""
        name = name or f"visitor{self.number}.png"
        content = content or picture_bytes(self.number, 64)
        while True:
            response = self._http.post("pictures", params={"name": name, **options}, content=content, headers=BYTES)
            if response.status_code != 429:
                break
            time.sleep(0.2)
        upload = self._checked(response).json()
        self.messages.append({"role": "user", "text": "", "pictures": [upload["id"]]})
        return upload

    def ask(self, text: str, **settings) -> str:
        """Ask, and wait for the answer."""
        if self.messages[-1].get("pictures") and not self.messages[-1]["text"]:
            self.messages[-1]["text"] = text
        else:
            self.messages.append({"role": "user", "text": text})
        answer = "".join(update.get("add", "") for update in self.updates(**settings))
        self.messages.append({"role": "assistant", "text": answer})
        return answer

    def updates(self, **settings) -> Iterator[dict]:
        """The updates of the answer to the last message."""
        question = {"messages": self.messages, "settings": GREEDY | settings}
        with self._http.stream("POST", "answer", json=question) as response:
            if response.status_code != 200:
                raise AssertionError(f"visitor {self.number}: {response.status_code} {response.read().decode()}")
            for line in response.iter_lines():
                if line:
                    update = json.loads(line.removeprefix("data: "))
                    yield update
                    if "error" in update:
                        raise AssertionError(f"visitor {self.number}: {update}")
        if "end" not in update:
            raise AssertionError(f"visitor {self.number}: the stream ended before the answer")

    def preview(self) -> bytes:
        return self._checked(self._http.get(f"pictures/{self.messages[0]['pictures'][0]}/0")).content

    @staticmethod
    def _checked(response: httpx.Response) -> httpx.Response:
        response.raise_for_status()
        return response


def visit(url: str, number: int) -> list[str]:
    """Make one visit and return the answers. Raises AssertionError if another visitor's picture appears."""
    with Visitor(url, number) as visitor:
        visitor.show()
        answers = [visitor.ask(f"{question} ({number})") for question in QUESTIONS]
        own = Image.open(io.BytesIO(picture_bytes(number, 64))).convert("RGB").resize((1, 1)).getpixel((0, 0))
        shown = Image.open(io.BytesIO(visitor.preview())).resize((1, 1)).getpixel((0, 0))
        if max(abs(x - y) for x, y in zip(own, shown, strict=True)) > 4:
            raise AssertionError(f"visitor {number} is shown another picture")
        return answers


def crowd(url: str, visitors: int, seconds: float, expected: list[list[str]]) -> tuple[int, list[str]]:
    """Let all visitors make visits at the same time. Returns the number of visits and the problems."""
    problems, counts, deadline = [], [0] * visitors, time.monotonic() + seconds

    def visit_repeatedly(number: int) -> None:
        while not counts[number] or time.monotonic() < deadline:
            try:
                if (answers := visit(url, number)) != expected[number]:
                    problems.append(f"visitor {number} got {answers} instead of {expected[number]}")
            except Exception as error:  # any exception is a problem to report
                problems.append(f"visitor {number}: {error!r}")
            counts[number] += 1

    threads = [threading.Thread(target=visit_repeatedly, args=(number,)) for number in range(visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts), problems


@contextmanager
def half_open(url: str, number: int) -> Iterator[None]:
    """Meanwhile, so many connections send half a header or half a body, and come again when the server closes them."""
    host, port = url.split("/")[2].split(":")
    head = b"POST /pictures?name=x.png HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    connections: list[socket.socket | None] = [None] * number
    ended = threading.Event()

    def closed(connection: socket.socket) -> bool:
        try:
            return not connection.recv(1000, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def keep() -> None:
        while not ended.wait(0.5):
            for n, connection in enumerate(connections):
                if connection is None or closed(connection):
                    if connection:
                        connection.close()
                    connections[n] = socket.create_connection((host, int(port)))
                    connections[n].sendall(head + b"Content-Length: 1000\r\n\r\nab" if n % 2 else head)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for connection in filter(None, connections):
            connection.close()


@contextmanager
def served(cfg_path: str, folder: Path, options: list[str] | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run demo.py in a process of its own. Yields the URL and the process once the model is loaded.

    Temporary files go to `folder`.
    """
    port = free_port()
    command = [sys.executable, "demo.py", "--cfg-path", cfg_path, "--port", str(port)]
    command += ["--options", *options] if options else []
    log = (folder / "log.txt").open("w+")
    environment = {
        **psutil.Process().environ(),
        "TMPDIR": str(folder),
        "PYTHONPATH": PYTHONPATH,
    }
    server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        while "The model is ready" not in (text := (folder / "log.txt").read_text()):
            if server.poll() is not None:
                raise SystemExit(text)
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/", server
    finally:
        server.terminate()
        server.wait()


def _sizes(process: psutil.Process) -> str:
    memory = process.memory_full_info()
    return f"RSS {memory.rss / 2**20:.0f} MB, PSS {memory.pss / 2**20:.0f} MB, {process.num_fds()} open files"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", default="eval_configs/minigpt4_tiny_eval.yaml")
    parser.add_argument("--visitors", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--half-open", type=int, default=0, metavar="N", help="connections beside the visitors")
    parser.add_argument("--options", nargs="+", metavar="KEY=VALUE", help="settings for demo.py")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, served(args.cfg_path, Path(folder), args.options) as (url, server):
        print((Path(folder) / "log.txt").read_text())
        expected = [visit(url, number) for number in range(args.visitors)]
        print(f"{len({str(answers) for answers in expected})} different answers among {args.visitors} visitors")
        process, memory, start = psutil.Process(server.pid), [], time.monotonic()
        print(f"before: {_sizes(process)}")
        with ThreadPoolExecutor(1) as pool, half_open(url, args.half_open):
            running = pool.submit(crowd, url, args.visitors, args.seconds, expected)
            while not running.done():
                memory.append(process.memory_info().rss / 2**20)
                if len(memory) % 10 == 1:
                    print(f"{time.monotonic() - start:6.0f} s: {_sizes(process)}", flush=True)
                time.sleep(1)
        visits, problems = running.result()
        time.sleep(2)
        print(f"after: {_sizes(process)}")
        problems += [f"remaining file: {path}" for path in Path(folder).rglob("*.*") if path.name != "log.txt"]
        log = (Path(folder) / "log.txt").read_text()
        problems += [line for line in log.splitlines() if "Traceback" in line or "failed" in line]
    quarter = max(1, len(memory) // 4)
    before, after = (statistics.median(part) for part in (memory[quarter : 2 * quarter] or memory, memory[-quarter:]))
    print(f"{visits} visits, {visits * len(QUESTIONS)} answers; memory {before:.0f} MB, at the end {after:.0f} MB")
    if after > GROWTH * before:
        problems.append("memory grows")
    print("\n".join(problems) or "no problem")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
