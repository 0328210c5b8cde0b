"""A load test of the web page: many visitors at the same time, who send the HTTP requests of a browser.

    python tests/load_page.py                                      # 16 visitors for two minutes, on the tiny default
    python tests/load_page.py --visitors 4 --seconds 20

It starts demo.py. Each visitor uploads a picture of its own, asks two questions, leaves, and repeats this. The answers
are greedy, and must equal those that the visitor got when it was alone. The exit status is 1 if an answer differs, a
request fails, sessions or uploads remain, or the server's memory grows. With a model in 16 or 8 bit (--cfg-path,
--options) an answer can differ where two tokens are nearly tied; this is reported, too.
"""

import argparse
import json
import secrets
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

QUESTIONS = ("What is this?", "And what colour is it?")
GROWTH = 1.05  # limit of the memory in the last quarter of the time, relative to the second quarter


class Visitor:
    """A visitor of the page at `url`. The end of the context closes the tab."""

    def __init__(self, url: str, number: int):
        self.number = number
        self._http = httpx.Client(base_url=url, timeout=120)
        self._session = secrets.token_hex(8)
        config = self._get("config").json()
        self._components = {component["id"]: component for component in config["components"]}
        self._events = config["dependencies"]

    def __enter__(self) -> "Visitor":
        request = self._http.build_request("GET", f"gradio_api/heartbeat/{self._session}")
        self._heartbeat = self._http.send(request, stream=True)
        return self

    def __exit__(self, *error) -> None:
        self._heartbeat.close()
        self._http.close()

    def start_chat(self) -> None:
        """Upload the visitor's own picture and start the chat."""
        self.name = f"visitor{self.number}.png"
        files = {"files": (self.name, picture_bytes(self.number, 64), "image/png")}
        (path,) = self._checked(self._http.post("gradio_api/upload", files=files)).json()
        file = {"path": path, "orig_name": self.name, "meta": {"_type": "gradio.FileData"}}
        gallery = [{"image": file, "caption": None}]
        self._trigger("picker", "upload", {"picker": gallery})
        self._trigger("start", "click", {"picker": gallery})

    def ask(self, text: str) -> list[tuple[str, str]]:
        """Ask, and wait for the answer. Returns the (role, text) of all messages on the page, without the pictures."""
        chatbot, *_ = self._trigger("box", "submit", {"box": {"text": text, "files": []}})
        contents = [(message["role"], message["content"][0]) for message in chatbot]
        for _, content in contents:
            if "file" in content and not content["file"]["path"].endswith(self.name):
                raise AssertionError(f"{self.name} is shown {content['file']['path']}")
        return [(role, content["text"]) for role, content in contents if "text" in content]

    def _trigger(self, elem_id: str, event: str, values: dict) -> list:
        """Make the calls that a browser makes for an event. Returns the output of the last one."""
        return [self.call(call, values) for call in self.chain(elem_id, event)][-1]

    def chain(self, elem_id: str, event: str) -> list[dict]:
        """The calls of an event: its own call, then those that follow it."""
        component = next(i for i, c in self._components.items() if c["props"].get("elem_id") == elem_id)
        calls = [e for e in self._events if [component, event] in e["targets"]]
        while followers := [e for e in self._events if e["trigger_after"] == calls[-1]["id"]]:
            calls += followers
        return calls

    def call(self, event: dict, values: dict) -> list:
        """Make a call and return its output. The inputs are `values`, by elem_id, or the page's initial values."""
        data = [self._value(self._components[i]["props"], values) for i in event["inputs"]]
        body = {"data": data, "fn_index": event["id"], "session_hash": self._session}
        if not event["queue"]:
            return self._checked(self._http.post("gradio_api/run/predict", json=body)).json()["data"]
        self._checked(self._http.post("gradio_api/queue/join", json=body))
        with self._http.stream("GET", f"gradio_api/queue/data?session_hash={self._session}") as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise AssertionError(f"visitor {self.number}: {message['output']}")
                    return message["output"].get("data")
        raise AssertionError(f"visitor {self.number}: the stream ended before the answer")

    @staticmethod
    def _value(props: dict, values: dict):
        greedy = {"Sample": False, "Longest answer, in tokens": 40}
        return values.get(props.get("elem_id"), greedy.get(props.get("label"), props.get("value")))

    def _get(self, path: str) -> httpx.Response:
        return self._checked(self._http.get(path))

    @staticmethod
    def _checked(response: httpx.Response) -> httpx.Response:
        response.raise_for_status()
        return response


def visit(url: str, number: int) -> list[str]:
    """Make one visit and return the answers. Raises AssertionError if content of another visitor appears."""
    with Visitor(url, number) as visitor:
        visitor.start_chat()
        asked = [f"{question} ({number})" for question in QUESTIONS]
        for n, question in enumerate(asked, start=1):
            shown = visitor.ask(question)
            questions = [text for role, text in shown if role == "user"]
            if questions != asked[:n]:
                raise AssertionError(f"visitor {number} asked {asked[:n]} and is shown {questions}")
        return [text for role, text in shown if role == "assistant"]


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", default="eval_configs/minigpt4_tiny_eval.yaml")
    parser.add_argument("--visitors", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--options", nargs="+", metavar="KEY=VALUE", help="settings for demo.py")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, served(args.cfg_path, Path(folder), args.options) as (url, server):
        print((Path(folder) / "log.txt").read_text())
        expected = [visit(url, number) for number in range(args.visitors)]
        print(f"{len({str(answers) for answers in expected})} different answers among {args.visitors} visitors")
        process, memory, start = psutil.Process(server.pid), [], time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(crowd, url, args.visitors, args.seconds, expected)
            while not running.done():
                memory.append(process.memory_info().rss / 2**20)
                if len(memory) % 10 == 1:
                    print(f"{time.monotonic() - start:6.0f} s {memory[-1]:8.0f} MB", flush=True)
                time.sleep(1)
        visits, problems = running.result()
        time.sleep(2)
        problems += [f"remaining upload: {path.name}" for path in Path(folder).rglob("visitor*.png")]
        log = (Path(folder) / "log.txt").read_text()
        problems += [line for line in log.splitlines() if "Traceback" in line or "failed" in line]
        if "A visit ended; 0 are in progress" not in log.splitlines()[-1]:
            problems.append(f"remaining sessions: {log.splitlines()[-1]}")
    quarter = max(1, len(memory) // 4)
    before, after = (statistics.median(part) for part in (memory[quarter : 2 * quarter] or memory, memory[-quarter:]))
    print(f"{visits} visits, {visits * len(QUESTIONS)} answers; memory {before:.0f} MB, at the end {after:.0f} MB")
    if after > GROWTH * before:
        problems.append("memory grows")
    print("\n".join(problems) or "no problem")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
