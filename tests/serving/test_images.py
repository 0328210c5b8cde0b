"""Pictures by URL: which ones are read, and which ones the server refuses to fetch."""

import asyncio
import base64
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from endpoint import data_url, text, user

from minigpt4.serving import images
from minigpt4.serving.errors import ApiError
from minigpt4.serving.images import Images, is_public

LOCAL = Images(allow_http=True, allow_private=True, max_bytes=100_000)
PUBLIC = Images(allow_http=True, allow_private=False, max_bytes=100_000)


def read(url, reader=LOCAL):
    return asyncio.run(reader.read_all({"here": url}))["here"]


def refusal(url, reader=LOCAL):
    with pytest.raises(ApiError) as error:
        read(url, reader)
    assert error.value.status == 400
    assert error.value.code == "invalid_image_url"
    return str(error.value)


class Site(BaseHTTPRequestHandler):
    """A web site: /picture, /to?URL, /loop, /large, /endless, /slow, /404."""

    def do_GET(self):
        self.server.paths.append(self.path)
        path, _, query = self.path.partition("?")
        if path == "/picture":
            self.answer(200, b"content")
        elif path == "/large":
            self.answer(200, b"x" * 100_001)
        elif path == "/endless":
            self.answer(200, b"x" * 50_000, {"Content-Length": "10000000"})
        elif path == "/slow":
            self.server.release.wait(10)
        elif path in ("/to", "/loop"):
            self.answer(302, b"", {"Location": query or "/loop"})
        else:
            self.answer(404, b"")

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.paths, server.release = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def test_data_urls():
    assert read(data_url(b"content", "png")) == b"content"
    assert read(data_url(b"", "png")) == b""
    assert read("DATA:image/png;charset=utf-8;BASE64," + base64.b64encode(b"x").decode()) == b"x"
    content = bytes(range(256)) + b"\xff\xfe"
    plain = base64.b64encode(content).decode()
    broken = "\r\n".join(plain[n : n + 76] for n in range(0, len(plain), 76))
    safe = base64.urlsafe_b64encode(content).decode()
    assert "-" in safe and "_" in safe
    for written in (broken, safe, plain.rstrip("="), f" {plain}\n", plain.replace("+", "%2B").replace("=", "%3D")):
        assert read(f"data:image/png;base64,{written}") == content
    for url in ("data:", "data:,", "data:image/png,abc", "data:text/html;base64,aGk=", "data:image/png;base64"):
        assert "must begin with data:image/" in refusal(url)
    for url in (
        "data:image/png;base64,a",
        "data:image/png;base64,$$$$",
        "data:image/png;base64,é",
    ):
        assert "base64 is damaged" in refusal(url)


@pytest.mark.parametrize(
    "url",
    ["", "/etc/passwd", "file:///etc/passwd", "ftp://x/y", "gopher://x", "javascript:alert(1)", "cat.png", "\0", "//x"],
)
def test_other_schemes(url):
    assert "it must be a data: URL" in refusal(url)


def test_nothing_is_fetched_without_the_flag(site):
    before = len(site.paths)
    assert "--allow-http-images" in refusal(f"{site.url}/picture", Images(False, False, 100_000))
    assert "--allow-http-images" in refusal(f"{site.url}/picture", Images(False, True, 100_000))
    assert len(site.paths) == before


def test_fetching(site):
    assert read(f"{site.url}/picture") == b"content"
    assert read(f"{site.url.upper()}/picture") == b"content"
    assert read(f"{site.url}/to?/picture") == b"content"
    assert read(f"{site.url}/to?{site.url}/to?/picture") == b"content"
    assert "answered 404" in refusal(f"{site.url}/ä ö\r\nX: y")
    assert site.paths[-1] == "/%C3%A4%20%C3%B6X:%20y"  # the URL cannot add a header


def test_all_pictures_of_a_request_share_one_limit(site):
    """The limit is for fetched pictures; data URLs are part of the request, whose size is limited already."""
    reader = Images(allow_http=True, allow_private=True, max_bytes=15)
    inside = data_url(b"x" * 100, "png")
    two = {"a": f"{site.url}/picture", "b": inside, "c": f"{site.url}/picture"}
    assert [len(content) for content in asyncio.run(reader.read_all(two)).values()] == [7, 100, 7]
    with pytest.raises(ApiError, match="The picture in d cannot be used: it is larger than"):
        asyncio.run(reader.read_all(two | {"d": f"{site.url}/picture"}))


def test_bounds(site, monkeypatch):
    assert "more than 3 redirects" in refusal(f"{site.url}/loop")
    assert "larger than" in refusal(f"{site.url}/large")
    assert "cannot be reached" in refusal(f"{site.url}/endless")  # cut short
    monkeypatch.setattr(images, "FETCH_SECONDS", 0.5)
    start = time.monotonic()
    assert "longer than 0.5 s" in refusal(f"{site.url}/slow")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "url",
    [
        "http://", "http:///x", "http://user:pass@127.0.0.1/", "http://user@127.0.0.1/", "http://127.0.0.1:99999/",
        "http://127.0.0.1:x/", "http://[::1/", "http://" + "a" * 300, "http://a..b/", "http://\u2100/",
        "http://localhost:1/",
    ],
)  # fmt: skip
def test_malformed(url):
    refusal(url)


def test_redirects_lead_to_http_only(site):
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/", "data:image/png;base64,YWJj"):
        assert "other than http" in refusal(f"{site.url}/to?{target}")


PRIVATE = [
    "127.0.0.1", "127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1", "0.0.0.0", "localhost", "10.0.0.1", "172.16.0.1",
    "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "[::1]", "[::]", "[fe80::1]",
    "[fd00::1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[2002:7f00:1::]", "[64:ff9b::a00:1]", "[ff02::1]",
    "[::127.0.0.1]", "[64:ff9b:1::7f00:1]", "[fec0::1]", "192.0.0.8",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused(site, host):
    """The message is always the same, so that a client learns nothing about the server's network."""
    before = len(site.paths)
    assert "its host has no public address" in refusal(f"http://{host}:{site.server_port}/picture", PUBLIC)
    assert len(site.paths) == before


def test_unknown_hosts_get_the_same_message(monkeypatch):
    async def look_up(self, host, port, **options):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    assert "its host has no public address" in refusal("http://no.such.host.invalid/", PUBLIC)


def test_redirects_are_checked_too(site, monkeypatch):
    """A public site that redirects to a private one."""
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")
    assert "no public address" in refusal(f"{site.url}/to?http://169.254.169.254/latest/meta-data", PUBLIC)
    assert read(f"{site.url}/to?/picture", PUBLIC) == b"content"


def test_a_name_is_looked_up_once(site, monkeypatch):
    """DNS rebinding: the second lookup returns a private address. One private address among others is refused, too."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]

    async def look_up(self, host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    connected = []

    async def connect(self, host, *args):
        connected.append(host)
        raise images.httpcore.ConnectError

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    monkeypatch.setattr(images.httpcore.AnyIOBackend, "connect_tcp", connect)
    assert "cannot be reached" in refusal("http://rebinding.example/", PUBLIC)
    assert connected == ["93.184.216.34"]
    assert "no public address" in refusal("http://rebinding.example/", PUBLIC)
    answers.append(["93.184.216.34", "10.0.0.1"])
    assert "no public address" in refusal("http://rebinding.example/", PUBLIC)
    assert connected == ["93.184.216.34"]


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8", "64:ff9b::808:808",
        "2002:808:808::",
    ],
)  # fmt: skip
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "::7f00:1", "::808:808",  # IPv4-compatible
        "::ffff:0:7f00:1", "::ffff:0:808:808",  # IPv4-translated
        "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "64:ff9b:1::808:808",  # NAT64
        "2002:a00:1::1", "2002:c058:6301::1",  # 6to4: private, and the relay's
        "2001:0:7f00:1::1", "2001:0:4136:e378:8000:63bf:f7f7:f7f7",  # Teredo: server and client
        "2606:4700::5efe:7f00:1", "2606:4700::200:5efe:808:808",  # ISATAP
        "fec0::1", "fe80::1%1", "fc00::1", "100::1", "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1", "3fff::1",
        "5f00::1", "4000::1", "::ffff:192.0.0.8",
        "192.0.0.1", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "240.0.0.1", "0.1.2.3",
        "168.63.129.16",
    ],
)  # fmt: skip
def test_addresses_that_are_not_global_unicast(address):
    assert not is_public(address)


def test_through_the_endpoint(serve, served, site, pictures):
    """The settings of the endpoint decide what is fetched."""
    picture = {"type": "image_url", "image_url": {"url": f"{site.url}/picture"}}
    message = user(picture, text("What is this?"))
    assert "--allow-http-images" in served.ask(message).json()["error"]["message"]
    assert "no public address" in serve(allow_http_images=True).ask(message).json()["error"]["message"]
    allowed = serve(allow_http_images=True, allow_private_hosts=True)
    assert "is not a picture" in allowed.ask(message).json()["error"]["message"]  # fetched
    assert site.paths[-1] == "/picture"
