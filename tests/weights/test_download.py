"""Downloads against a server on localhost: broken off, without ranges, of a wrong length, by several processes."""

import hashlib
import http.server
import multiprocessing
import threading
from pathlib import Path

import pytest

from minigpt4.weights import download as module
from minigpt4.weights.download import DownloadError, download

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`. Each request is answered by the next entry of `plan`; the last entry answers all others.

    "whole"; "endless": without a length; ("cut", n): the connection ends after n bytes; a number: that HTTP status.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.ranges, self.plan, self.requests = CONTENT, '"1"', True, ["whole"], []
        self.gate = threading.Event()
        self.gate.set()

    def url(self, name="weights.pth"):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append(asked)
        action = server.plan.pop(0) if len(server.plan) > 1 else server.plan[0]
        server.gate.wait(20)
        if isinstance(action, int):
            self.send_error(action)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        body = server.content[start:]
        if action != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.etag)
        self.end_headers()
        if isinstance(action, tuple):
            body = body[: action[1]]
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the client asks for a range instead
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(module, "PAUSES", (0, 0, 0))


def left(tmp_path):
    """The names of the files in the folder, without the lock."""
    return sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock")


def test_fetches_once(server, tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "cache" / "weights.pth"
    download(server.url(), path)
    assert path.read_bytes() == CONTENT
    assert f"Fetching {server.url()} to {path}" in caplog.text
    download(server.url(), path)
    assert server.requests == [None]
    assert left(path.parent) == ["weights.pth"]


def test_the_hubs_mirror_is_obeyed(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url("").rstrip("/"))
    download("https://huggingface.co/someone/model/resolve/main/weights.pth", tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT and len(server.requests) == 1


def test_continues_after_an_interruption(server, tmp_path):
    server.plan = [("cut", 300_000), "whole", ("cut", 200_000), "whole"]
    download(server.url(), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT
    assert server.requests == [None, None, "bytes=300000-", None, "bytes=500000-"]
    assert left(tmp_path) == ["weights.pth"]


def test_a_later_run_continues(server, tmp_path):
    server.plan = [("cut", 100_000), ("cut", 0)]
    with pytest.raises(DownloadError, match="after 100,000 bytes, which the next run goes on from.*put it at"):
        download(server.url(), tmp_path / "weights.pth")
    (part,) = left(tmp_path)
    assert part.startswith("weights.pth.") and part.endswith(".part")
    server.plan, server.requests = ["whole"], []
    download(server.url(), tmp_path / "weights.pth")
    assert server.requests == [None, "bytes=100000-"]
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def test_another_file_on_the_server_is_not_glued_to_the_old_part(server, tmp_path):
    server.plan = [("cut", 100_000), ("cut", 0)]
    with pytest.raises(DownloadError):
        download(server.url(), tmp_path / "weights.pth")
    server.plan, server.content, server.etag = ["whole"], CONTENT[::-1], '"2"'
    download(server.url(), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_begins_anew(server, tmp_path):
    server.ranges, server.plan = False, [("cut", 300_000), "whole"]
    download(server.url(), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def test_a_server_that_gives_no_length(server, tmp_path):
    server.plan = ["endless"]
    download(server.url(), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [403, 404])
def test_refusals_are_final(server, tmp_path, status):
    server.plan = [status]
    with pytest.raises(DownloadError, match=f"the server answers {status}.*Fetch it by other means and put it at"):
        download(server.url(), tmp_path / "weights.pth")
    assert len(server.requests) == 1
    assert not left(tmp_path)


def test_an_overloaded_server_is_asked_again(server, tmp_path):
    server.plan = [503, 429, "whole"]
    download(server.url(), tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def test_no_server(tmp_path):
    with pytest.raises(DownloadError, match="could not be fetched: .*refused"):
        download("http://127.0.0.1:9/weights.pth", tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("kibibytes", "sha256", "message"),
    [
        (2048, None, "truncated, with 1,048,576 bytes instead of about 2,097,152"),
        (512, None, "too long, with 1,048,576 bytes instead of about 524,288"),
        (None, "0" * 64, "its sha256 is [0-9a-f]{64}, not 0000"),
    ],
)
def test_wrong_files_are_named_and_thrown_away(server, tmp_path, kibibytes, sha256, message):
    with pytest.raises(DownloadError, match=message):
        download(server.url(), tmp_path / "weights.pth", kibibytes, sha256)
    assert not left(tmp_path)


def test_right_size_and_hash(server, tmp_path):
    download(server.url(), tmp_path / "weights.pth", 1025, hashlib.sha256(CONTENT).hexdigest().upper())
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def _in_a_process(url, path, waits):
    import logging

    logging.basicConfig(level=logging.INFO, filename=waits)
    download(url, Path(path))
    assert Path(path).read_bytes() == CONTENT


def test_processes_of_one_machine_fetch_once(server, tmp_path):
    server.gate.clear()
    context = multiprocessing.get_context("spawn")
    logs = [tmp_path / f"log{i}" for i in range(3)]
    path = tmp_path / "cache/weights.pth"
    processes = [context.Process(target=_in_a_process, args=(server.url(), str(path), str(log))) for log in logs]
    for process in processes:
        process.start()
    waiting = "Another process is fetching weights.pth: waiting for it."
    for _ in range(300):
        texts = [log.read_text() if log.exists() else "" for log in logs]
        if sum(waiting in text for text in texts) == 2:
            break
        threading.Event().wait(0.1)
    server.gate.set()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(waiting in log.read_text() for log in logs) == 2
    assert server.requests == [None]


def test_a_full_disk_is_noticed_first(server, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match="needs 0.0 GB more, and .* has 0.0 GB free.*set TORCH_HOME"):
        download(server.url(), tmp_path / "weights.pth")
    assert server.requests == [None]


def test_errors_of_the_disk_are_not_tried_again(server, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_append", full)
    with pytest.raises(OSError, match="No space left"):
        download(server.url(), tmp_path / "weights.pth")
    assert server.requests == [None]
