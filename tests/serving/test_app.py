"""The routes: keys, limits, timeouts, and clients that disconnect."""

import asyncio
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial

import httpx
import pytest
from endpoint import data_url, image, serving, text, user
from PIL import Image

from minigpt4.serving import connections
from minigpt4.serving.app import EventStream
from minigpt4.serving.errors import ApiError
from minigpt4.serving.settings import Settings

HI = user(text("Hi"))
BODY = {"model": "minigpt4", "messages": [HI], "max_tokens": 2, "temperature": 0}


def error(response, status, message=""):
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert message in body["message"]
    return body


def png(size=(8, 8), **options):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


# Loading and stopping


def test_it_serves_while_the_model_is_loaded(chat):
    ready = threading.Event()

    def load():
        assert ready.wait(20)
        return chat

    with serving(load) as served:
        response = served.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "loading")
        response = served.post(BODY)
        assert error(response, 503, "is loading")["code"] == "not_ready"
        assert int(response.headers["retry-after"]) > 0
        assert served.get("/v1/models").status_code == 200
        ready.set()
        served.wait_for(status="ready")
        assert served.get("/health").status_code == 200
        assert served.post(BODY).status_code == 200
        served.batcher.close()
        assert served.health()["status"] == "stopping"
        error(served.post(BODY), 503, "stopping")


def test_stopping_answers_waiting_requests(serve, gate, talkative):
    served = serve(max_batch=1)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(served.ask, HI, max_tokens=200)
        served.wait_for(running=1)
        waiting = pool.submit(served.ask, HI)
        served.wait_for(waiting=1)
        gate.step(2)
        served.batcher.close(seconds=0)
        gate.open()
        assert running.result().json()["choices"][0]["finish_reason"] == "length"
        error(waiting.result(), 503, "stopping")


# Access


def test_keys(serve):
    served = serve(api_keys=["correct horse é", "other"])
    right = {"Authorization": "Bearer correct horse é".encode()}
    for path in ("/v1/models", "/v1/models/minigpt4"):
        assert served.get(path, headers=right).status_code == 200
        body = error(served.get(path), 401, "API key is missing or wrong")
        assert (body["code"], body["type"]) == ("invalid_api_key", "authentication_error")
    assert served.post(BODY, headers=right).status_code == 200
    wrong = ("correct horse é", "Bearer", "Bearer correct horse", "Basic correct horse é", "Bearer \xff\xfe")
    for given in wrong:
        error(served.post(BODY, headers={"Authorization": given.encode()}), 401)
    # The key is checked before the body.
    error(served.post(content=b"{", headers={"Content-Type": "application/json"}), 401)
    assert served.get("/health").status_code == 200


def test_guessing_keys_is_slow(serve):
    served = serve(api_keys=["right"])
    for n in range(10):
        error(served.get("/v1/models", headers={"Authorization": f"Bearer {n}"}), 401)
        error(served.get("/v1/models"), 401)
    response = served.get("/v1/models", headers={"Authorization": "Bearer right"})
    assert error(response, 429, "Too many wrong")["code"] == "too_many_guesses"
    assert int(response.headers["retry-after"]) > 0


def test_a_foreign_name_is_refused(serve, served):
    """A page could point its own name at this machine."""
    named = serve(allow_host=["cat.example"])
    for server, name, status in (
        (served, "evil.example", 403), (served, "localhost:1", 200), (served, "127.0.0.1", 200),
        (served, "[::1]:80", 200), (named, "cat.example:443", 200), (named, "evil.example", 403),
    ):  # fmt: skip
        for response in (server.get("/health", headers={"Host": name}), server.post(BODY, headers={"Host": name})):
            assert response.status_code == status
    error(served.get("/health", headers={"Host": "evil.example"}), 403, "--allow-host evil.example")


def test_a_page_in_a_browser_gets_no_answer(served):
    """A browser sends only these types without asking the server first, to any address that it can reach."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = served.post(content=json.dumps(BODY).encode(), headers={"Content-Type": kind})
        error(response, 415, "application/json")
    response = served.http.options("/v1/chat/completions", headers={"Origin": "https://example.com"})
    assert not any(name.startswith("access-control") for name in response.headers)


def test_a_page_of_an_allowed_origin_may_ask(serve):
    served = serve(allow_origin=["https://one.example"])
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    for origin, allowed in (("https://one.example", True), ("https://two.example", False)):
        asked = served.http.options("/v1/chat/completions", headers={"Origin": origin, **preflight})
        answered = served.post(BODY, headers={"Origin": origin})
        for response in (asked, answered):
            assert (response.headers.get("access-control-allow-origin") == origin) == allowed
            assert "access-control-allow-credentials" not in response.headers
    for wrong in ("one.example", "https://one.example/path", "null"):
        with pytest.raises(ValueError, match="allow_origin"):
            Settings(allow_origin=[wrong])


def test_behind_a_proxy(serve):
    """It passes on the whole path, or what is behind its own part."""
    served = serve(root_path="/apps/cat")
    for path in ("/v1/chat/completions", "/apps/cat/v1/chat/completions"):
        assert served.http.post(path, json=BODY).status_code == 200
    assert served.get("/apps/cat/health").status_code == served.get("/health").status_code == 200
    error(served.get("/apps/dog/health"), 404)
    for wrong in ("apps", "/apps/", "/"):
        with pytest.raises(ValueError, match="root_path"):
            Settings(root_path=wrong)


def test_metrics(serve, monkeypatch):
    served = serve(api_keys=["k"])
    key = {"Authorization": "Bearer k"}
    assert served.post({**BODY, "n": 2, "min_tokens": 2}, headers=key).status_code == 200
    assert served.post({**BODY, "stream": True, "min_tokens": 2}, headers=key).text.endswith("[DONE]\n\n")
    error(served.post({**BODY, "n": 0}, headers=key), 400)
    error(served.get("/metrics"), 401)
    response = served.get("/metrics", headers=key)
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if line[0] != "#")
    expected = {
        'minigpt4_responses_total{status="200"}': 2, 'minigpt4_responses_total{status="400"}': 1,
        "minigpt4_completion_tokens_total": 6, "minigpt4_first_token_seconds_count": 2,
        'minigpt4_request_seconds_bucket{le="+Inf"}': 2, "minigpt4_running": 0, "minigpt4_waiting": 0,
    }  # fmt: skip
    assert {name: float(lines[name]) for name in expected} == expected
    assert 0 < float(lines["minigpt4_first_token_seconds_sum"]) < float(lines["minigpt4_request_seconds_sum"])
    assert float(lines["minigpt4_prompt_tokens_total"]) > 10
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error(serve().get("/metrics"), 501, "minigpt4[metrics]")


def test_unknown_routes(served):
    assert error(served.get("/v1/embeddings"), 404, "There is no /v1/embeddings")["type"] == "invalid_request_error"
    for path in ("/chat/completions", "/models", "/v1/v1/chat/completions"):
        error(served.http.post(path, json=BODY), 404, "ends with /v1")
    error(served.get("/v1/../../etc/passwd"), 404)
    error(served.get("/v1/models/..%2f..%2fetc%2fpasswd"), 404)
    error(served.get("/v1/chat/completions"), 405, "GET is not allowed")
    error(served.post({**BODY, "model": "x" * 500}), 404, "There is no model")


# Limits


def test_bytes(serve):
    served = serve(max_upload_mb=0.1)
    padded = {**BODY, "user": "x" * (100_000 - len(json.dumps(BODY)))}
    assert served.post(padded).status_code == 200
    for size in (110_000, 300_000):
        assert error(served.post({**BODY, "user": "x" * size}), 413, "0.1 MB")["code"] == "request_too_large"
    taken = []
    endless = (taken.append(n) or b"x" * 2**16 for n in range(5000))
    with suppress(httpx.TransportError):  # the server closes the connection
        error(served.post(content=endless, headers={"Content-Type": "application/json"}), 413)
    assert len(taken) < 1000
    assert served.post(BODY).status_code == 200


def test_pictures(serve, pictures):
    served = serve(max_images=2, max_megapixels=0.001)
    assert served.ask(user(*[image(png())] * 2), max_tokens=2).status_code == 200
    assert error(served.ask(user(*[image(png())] * 3)), 400, "at most 2")["code"] == "too_many_images"
    error(served.ask(user(image(png((40, 40))))), 400, "40 × 40 pixels")
    for size, reason in ((9_000, "9000 × 9000 pixels"), (2**31 - 1, "too many pixels")):  # the header suffices
        header = b"IHDR" + struct.pack(">II", size, size) + b"\x08\x02\0\0\0"
        bomb = png()[:12] + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]
        error(served.ask(user(image(bomb))), 400, reason)
    body = error(served.ask(user(text("A"), image(b"<svg/>"))), 400, "is not a picture")
    assert (body["code"], body["param"]) == ("invalid_image", "messages[0].content[1]")
    error(served.ask(user(image(pictures[0][:300]))), 400, "The picture in messages[0].content[0]")
    error(served.ask(user(image(b""))), 400)
    error(served.ask(user(image(png(format="TIFF")))), 400, "Accepted: JPEG")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    animated = png(format="GIF", save_all=True, append_images=frames)
    assert served.ask(user(image(animated)), max_tokens=2).status_code == 200  # its first frame


def test_tokens_and_text(serve):
    served = serve(max_tokens=5)
    assert served.ask(HI, max_tokens=5).status_code == 200
    assert served.ask(HI).status_code == 200  # the default is less where the limit is
    for key in ("max_tokens", "max_completion_tokens"):
        body = served.ask(HI, min_tokens=6, **{key: 6}).json()  # harnesses ask for 1024 and more
        assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (5, "length")
    long = served.ask(user(text("word " * 3000)), max_tokens=5)
    assert error(long, 400, "the model holds")["code"] == "context_length_exceeded"
    error(served.ask(user(text("x" * 100_001)), max_tokens=5), 400, "at most 100,000")


def test_the_queue_is_bounded_and_its_places_are_freed(serve, gate):
    served = serve(max_queue=3)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(served.ask, HI, max_tokens=2) for _ in range(3)]
        served.wait_for(requests=3)
        response = served.post(BODY)
        assert error(response, 429, "3 requests")["code"] == "queue_full"
        assert int(response.headers["retry-after"]) > 0
        gate.open()
        assert [request.result().status_code for request in asked] == [200] * 3
    served.wait_for(requests=0)
    for bad in ({"model": "x"}, {**BODY, "model": "x"}, {**BODY, "n": 0}, {**BODY, "messages": [user()]}):
        assert served.post(bad).status_code >= 400
    assert served.health()["requests"] == 0
    assert served.post(BODY).status_code == 200


def test_time(serve, gate, talkative):
    """After the timeout, a running answer ends at its current length, and a waiting request is refused."""
    served = serve(timeout=2.5, max_batch=1)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(served.ask, HI, max_tokens=300)
        served.wait_for(running=1)
        waiting = pool.submit(served.ask, HI)
        response = waiting.result()
        assert error(response, 503, "waited too long")["code"] == "timeout"
        assert "retry-after" in response.headers
        gate.open()
        answer = running.result().json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 1
    served.wait_for(requests=0, waiting=0, running=0)


def test_a_request_that_never_arrives(serve, monkeypatch):
    monkeypatch.setattr("minigpt4.serving.connections.BODY_SECONDS", 0.3)
    served = serve()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in client.recv(1000)
    served.wait_for(requests=0)


def test_the_server_may_open_files_for_all_connections():
    """Many systems permit 1024 unless more are asked for."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        connections.server_config(None)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(connections.FILES, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_idle_connection_is_kept_longer_than_uvicorn_does(serve, monkeypatch):
    """After its 5 s, httpx drops one, too: a request that is sent at that moment would fail."""
    shorter = partial(connections.uvicorn.Config, timeout_keep_alive=0.1)
    monkeypatch.setattr(connections.uvicorn, "Config", shorter)
    served = serve()
    host, port = served.url.removeprefix("http://").split(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=60)) as client:
        client.connect()
        client.auto_open = 0  # no second connection
        for seconds in (0.5, 0):
            client.request("GET", "/health")
            response = client.getresponse()
            assert response.status == 200 and response.read()
            time.sleep(seconds)


@pytest.mark.parametrize("sent", ["nothing", "half a header", "half a body", "a body but for its end"])
def test_five_hundred_that_send_no_whole_request_deny_nobody(serve, gate, monkeypatch, sent):
    """Beside them and a full queue, others are answered, and asking for the state always is."""
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 60)
    monkeypatch.setattr(connections, "MAX_BODIES", 20)
    monkeypatch.setattr(connections, "MAX_BODY_BYTES", 2_000_000)
    header = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = b"Content-Length: 1000000\r\n\r\n{" + b" " * (900_000 if sent == "a body but for its end" else 0)
    content = {"nothing": b"", "half a header": header}.get(sent, header + body)
    served = serve(max_upload_mb=1, max_queue=2)

    host, port = served.url.removeprefix("http://").split(":")
    with ExitStack() as clients:
        for n in range(120 if len(content) < 10_000 else 30):
            client = clients.enter_context(socket.create_connection((host, int(port)), timeout=60))
            with suppress(OSError):  # it may have been closed already
                client.sendall(content)
            if n % 10 == 0:
                assert served.health()["requests"] == 0
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(served.post, BODY) for _ in "ab"]
            served.wait_for(requests=2)
            error(served.post(BODY), 429)
            gate.open()
            assert [request.result().status_code for request in asked] == [200, 200]


def test_a_header_that_never_ends(serve, monkeypatch):
    """Also behind a request that was answered."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1)
    served = serve()
    host, port = served.url.removeprefix("http://").split(":")
    for before in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(before)
            if before:
                assert b" 200 " in client.recv(10_000)
            client.sendall(b"GET /health HTTP/1.1\r\nHo")
            with suppress(ConnectionResetError):
                assert client.recv(1000) == b""


# Clients that disconnect


def leave(served, body, after):
    """Send a request, call `after(client)`, and disconnect without reading the answer."""
    host, port = served.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: %d\r\n\r\n" % len(content) + content)
        after(client)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(serve, gate, talkative, stream):
    served = serve(max_batch=1)
    long = {**BODY, "max_tokens": 300, "stream": stream}

    def once_it_waits(client):
        served.wait_for(running=1, waiting=1)

    def once_it_runs(client):
        served.wait_for(running=1)
        gate.step(3)
        if stream:
            received = b""
            while b"data: " not in received:
                received += client.recv(10_000)
        else:
            while served.batcher.running and len(served.batcher.running[0].ids) < 3:
                time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(served.ask, HI, max_tokens=2)
        served.wait_for(running=1)
        leave(served, long, once_it_waits)
        served.wait_for(requests=1, waiting=0)
        gate.step(2)
        assert kept.result().status_code == 200
    served.wait_for(requests=0, running=0)
    leave(served, long, once_it_runs)
    served.wait_for(requests=0)
    gate.step()  # the step that was running; then the batch ends
    served.wait_for(running=0)


def test_a_client_that_leaves_while_it_sends(served):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.1)
        assert served.health()["requests"] == 0
    assert served.post(BODY).status_code == 200


def test_a_client_that_never_reads_its_stream_loses_its_place():
    """Its socket is full, so that the server's `send` waits forever."""
    closed = []

    async def events():
        yield "data: {}\n\n"

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    response = EventStream(events(), lambda: closed.append(1), time.monotonic() + 0.1)
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(asyncio.wait_for(response(scope, receive, send), 60))
    assert closed == [1]


# Two users


def test_users_never_see_each_others_content(served, pictures, gate, steps):
    """Requests that are answered together get the same answers as alone."""
    gate.open()
    things = [(picture, f"Is this number {n}?") for n, picture in enumerate(pictures)]
    alone = [served.ask(user(image(p), text(q)), max_tokens=20).json()["choices"] for p, q in things]
    assert len({choices[0]["message"]["content"] for choices in alone}) == len(things)
    steps.clear()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(served.ask, user(image(p), text(q)), max_tokens=20) for _ in range(4) for p, q in things]
        together = [request.result().json()["choices"] for request in asked]
    assert together == alone * 4
    assert max(rows for rows in steps if rows != "prompt") > 1


def test_a_placeholder_in_a_text_gets_no_other_users_picture(served, pictures):
    words = "<Img><ImageHere></Img> What is this?"
    alone = served.ask(user(text(words)), max_tokens=20).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(8) as pool:
        shown = [pool.submit(served.ask, user(image(p), text("What is this?")), max_tokens=20) for p in pictures]
        thief = pool.submit(served.ask, user(text(words)), max_tokens=20)
        assert thief.result().json()["choices"][0]["message"]["content"] == alone
        assert all(request.result().status_code == 200 for request in shown)


def test_damaged_data_urls_name_no_content(served):
    response = served.ask(user({"type": "image_url", "image_url": {"url": data_url(b"secret") + "$"}}))
    assert "messages[0].content[0]" in error(response, 400)["message"]


def test_a_body_that_others_have_ended_is_not_taken_for_a_whole_one():
    """Its last chunk may arrive before the timeout that ends it."""
    bodies = connections.Bodies(1000)

    class Sending:
        headers = {"content-type": "application/json"}
        client = ("192.0.2.1", 1)

        async def stream(self):
            yield b"[1,"
            for limit in list(bodies._received):  # as `_admit` does for another body
                del bodies._received[limit]
                limit.reschedule(asyncio.get_running_loop().time())
            yield b"2]"

    with pytest.raises(ApiError) as refused:
        asyncio.run(bodies.read(Sending()))
    assert refused.value.status == 503
