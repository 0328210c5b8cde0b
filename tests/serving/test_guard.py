"""Host check, passwords and the brake on guessing, without a server."""

import asyncio
import base64

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from minigpt4.common.errors import ConfigError
from minigpt4.serving import guard
from minigpt4.serving.guard import HostCheck, PasswordCheck, TooManyGuesses, is_exposed, read_secrets


async def hello(request):
    return PlainTextResponse("hello")


INNER = Starlette(routes=[Route(path, hello, methods=["GET", "POST"]) for path in ("/", "/health")])


def ask(app, method="GET", path="/", client="1.2.3.4", **headers):
    async def send() -> int:
        transport = httpx.ASGITransport(app=app, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as session:
            return (await session.request(method, path, headers=headers)).status_code

    return asyncio.run(send())


def refuse(headers, status, reason, values, more):
    return PlainTextResponse(reason, status, more)


def basic(text):
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("127.0.0.1:7860", "localhost", "LOCALHOST:1", "localhost.", "[::1]:7860")),
        *((host, 200) for host in ("192.168.1.7:7860", "chat.example.org", "Chat.Example.org:443")),
        *((host, 403) for host in ("evil.example", "127.0.0.1.evil.example:7860", "localhost.evil.example", "", "[")),
        *((host, 403) for host in ("user@evil.example", "evil.example/127.0.0.1", "0x7f.1.evil.example")),
    ],
)
def test_only_own_names_are_served(host, status):
    app = HostCheck(INNER, "0.0.0.0", ["chat.example.org"])
    assert ask(app, host=host) == status
    assert ask(HostCheck(INNER, "0.0.0.0", ["*"]), host=host) == 200


def test_a_request_without_headers_is_refused():
    """HTTP/1.0 allows it."""
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(HostCheck(INNER, "127.0.0.1")(scope, None, send))
    assert sent[0]["status"] == 403


def test_pages_of_other_sites_send_nothing():
    app = HostCheck(INNER, "127.0.0.1", ["chat.example.org"], own_pages_only=True)
    assert ask(app, "POST") == 200  # a program, not a page
    for origin, status in (
        ("http://127.0.0.1:7860", 200),
        ("https://chat.example.org", 200),  # behind a proxy that changes Host
        ("http://127.0.0.1:8000", 403),
        ("http://1.2.3.4", 403),
        ("null", 403),
    ):
        assert ask(app, "POST", origin=origin) == status, origin
        assert ask(app, "GET", origin=origin) == 200
    for site, status in (("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)):
        assert ask(app, "POST", **{"sec-fetch-site": site, "origin": "http://127.0.0.1:7860"}) == status, site


def test_passwords_and_the_brake(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    app = PasswordCheck(INNER, [("ann", "s:crét"), ("bob", "b")], refuse, public=["/health"])
    assert [ask(app), ask(app, path="/health")] == [401, 200]
    assert ask(app, authorization=basic("ann:s:crét")) == ask(app, authorization=basic("bob:b")) == 200
    for n in range(guard.TRIES):
        assert ask(app, authorization=basic(f"bob:{n}")) == 401
    assert ask(app, authorization=basic("bob:x")) == 429
    assert ask(app, authorization=basic("ann:s:crét")) == 200  # was right from there before
    assert ask(app, client="9.9.9.9", authorization=basic("bob:b")) == 200  # another address
    for client, status in (("2001:db8::1", 401), ("2001:db8::2", 429)):  # one network
        for n in range(guard.TRIES if status == 401 else 1):
            assert ask(app, client=client, authorization=basic(f"x:{n}")) == status
    assert ask(app, client="2001:db8::3", authorization=basic("bob:b")) == 429  # nor does it tell a right one
    now[0] += guard.BRAKE_SECONDS
    assert ask(app, client="2001:db8::3", authorization=basic("bob:b")) == 200
    for junk in ("Basic", "Basic !", "Basic /w==", "Bearer x"):
        assert ask(app, client="5.5.5.5", authorization=junk) == 401


def test_the_brake_remembers_few_addresses(monkeypatch):
    monkeypatch.setattr(guard, "REMEMBERED", 3)
    brake = guard.Brake()
    for n in range(9):
        assert not brake.check(f"10.0.0.{n}", "x", right=False)
        assert brake.check(f"10.0.0.{n}", "y", right=True)
    assert len(brake._wrong) == len(brake._proven) == 3
    with pytest.raises(TooManyGuesses, match="Wait 60 s"):
        for _ in range(guard.TRIES + 1):
            brake.check("10.0.0.8", "x", right=False)


def test_secrets_come_from_variable_and_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRETS", "a:1 b:2")
    (tmp_path / "file").write_text("\ufeffc:3\n\n d:4 \n")
    assert read_secrets("SECRETS", str(tmp_path / "file")) == ["a:1", "b:2", "c:3", "d:4"]
    monkeypatch.delenv("SECRETS")
    assert read_secrets("SECRETS", None) == []
    (tmp_path / "file").write_text("\n")
    for file in (tmp_path / "file", tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=str(file)):
            read_secrets("SECRETS", str(file))


def test_addresses_that_other_machines_reach():
    local = ("127.0.0.1", "127.0.0.2", "localhost", "::1", "[::1]")
    assert [host for host in (*local, "0.0.0.0", "::", "10.0.0.1", "box.lan") if not is_exposed(host)] == list(local)
