"""Who may use the page and the endpoint: the names they are asked by, passwords, and a brake on guessing.

    app = HostCheck(PasswordCheck(app, accounts), host="0.0.0.0", allowed=["chat.example.org"])

Both are ASGI applications around another one. The caller chooses how they answer what they refuse (`Refuse`).
"""

import base64
import hmac
import ipaddress
import math
import os
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response

from minigpt4.common.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY = "*"
TRIES = 10  # wrong passwords or keys of an address within BRAKE_SECONDS, before it has to wait
BRAKE_SECONDS = 60
REMEMBERED = 10_000  # addresses

MESSAGES = {
    "wrong_host": "This server is not called {name!r}. If it should be, start it with --allow-host {name}.",
    "other_site": "A page of another site has sent this request.",
}

# The answer to a request that is refused, from: the request's headers, a status, the reason in one word, values of a
# sentence about it, and further headers of the answer.
Refuse = Callable[[Headers, int, str, dict[str, str | int], dict[str, str]], Response]


def read_secrets(variable: str, file: str | None) -> list[str]:
    """The secrets in an environment variable (separated by blanks) and in a file (one a line).

    They are safer there than on the command line, which other users of the machine see. Raises ConfigError.
    """
    secrets = os.environ.get(variable, "").split()
    if file:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The file of passwords {file} cannot be read: {error}") from None
        secrets += [line.strip() for line in lines if line.strip()]
        if not secrets:
            raise ConfigError(f"The file of passwords {file} is empty.")
    return secrets


def is_exposed(host: str) -> bool:
    """Whether other machines can reach a server that listens on `host`."""
    try:
        return not ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() not in LOOPBACK


def client_network(scope: dict) -> str:
    """The address of the client, for limits per client. Of IPv6 only the network, which one client has to itself."""
    address = (scope.get("client") or ("unknown",))[0]
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    return str(parsed.ipv4_mapped or ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))


class HostCheck:
    """Refuses requests for a name that is not this server's.

    A page of another site could otherwise point its own name at this machine (DNS rebinding) and use the server from
    its visitor's browser. Addresses as names are accepted, because no such page has one.

    Args:
        host: the address or name on which the server listens.
        allowed: further names, or ANY.
        own_pages_only: also refuse what pages of other sites send, other than GET.
        refuse: answers what is refused: 403, "wrong_host" with the name, or "other_site".
    """

    def __init__(
        self, app, host: str, allowed: Iterable[str] = (), own_pages_only: bool = False, refuse: Refuse | None = None
    ):
        self._app, self._own_pages_only, self._refuse = app, own_pages_only, refuse or _refuse_as_openai
        machine = socket.gethostname()
        self._own = {name.lower() for name in ("localhost", host, machine, f"{machine}.local", socket.getfqdn())}
        self.allowed = {name.lower().rstrip(".") for name in allowed}

    async def __call__(self, scope, receive, send) -> None:
        answer = self._app
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            problem = self._problem(headers, scope.get("method"))
            if problem:
                answer = self._refuse(headers, 403, *problem, {})
        await answer(scope, receive, send)

    def _problem(self, headers: Headers, method: str | None) -> tuple[str, dict[str, str | int]] | None:
        """Why a request is refused, and values for a sentence about it."""
        host = headers.get("host", "")
        name = _host_name(host)
        if ANY not in self.allowed and name not in self._own | self.allowed and not _is_address(name):
            shown = name[:100].encode("ascii", "replace").decode()
            return "wrong_host", {"name": shown}
        if self._own_pages_only and method not in ("GET", "HEAD"):
            site, origin = headers.get("sec-fetch-site"), headers.get("origin")
            # A proxy may change Host, so the page's own name can be one of the allowed ones.
            same = origin is None or urlsplit(origin).netloc.lower() == host.lower()
            own = site in ("same-origin", "none") if site else same or _host_name(origin) in self.allowed
            if not own:
                return "other_site", {}
        return None


def _refuse_as_openai(headers: Headers, status: int, reason: str, values: dict, more: dict[str, str]) -> Response:
    """In the form of OpenAI's errors, which programs read."""
    message = MESSAGES[reason].format(**values)
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": reason}
    return JSONResponse({"error": error}, status, more)


def _host_name(host: str) -> str:
    """The name in a Host header or an origin, in lower case, without port, brackets and final dot."""
    try:
        name = urlsplit(host if "//" in host else f"//{host}").hostname or ""
    except ValueError:
        return ""
    return name.rstrip(".")


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class TooManyGuesses(Exception):
    """An address has sent too many wrong passwords or keys. `seconds`: it is refused for so long."""

    def __init__(self, seconds: float):
        super().__init__(f"Too many wrong passwords or keys came from your address. Wait {seconds:.0f} s.")
        self.seconds = seconds


class Brake:
    """Slows down the guessing of passwords and keys: an address has TRIES within BRAKE_SECONDS.

    A right one passes all the same if it was right from the same address before: its owner is not locked out.
    """

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()
        self._proven: OrderedDict[tuple[str, str], None] = OrderedDict()

    def check(self, address: str, secret: str, right: bool) -> bool:
        """Return `right`, and count it if it is False. Raises TooManyGuesses without saying whether it is right."""
        if right and (address, secret) in self._proven:
            return True
        now = time.monotonic()
        times = self._wrong.setdefault(address, deque())
        self._wrong.move_to_end(address)
        while times and times[0] <= now - BRAKE_SECONDS:
            times.popleft()
        if len(times) >= TRIES:
            raise TooManyGuesses(times[0] + BRAKE_SECONDS - now)
        if right:
            self._proven[address, secret] = None
        else:
            times.append(now)
        for known in (self._wrong, self._proven):
            while len(known) > REMEMBERED:
                known.popitem(last=False)
        return right


class PasswordCheck:
    """Asks for a user and a password (HTTP Basic), which the browser then remembers.

    Args:
        accounts: (user, password) of those who may pass.
        refuse: answers what is refused: 401, "password_needed", or 429, "guesses" with the seconds to wait.
        public: paths for which nothing is asked.
    """

    def __init__(self, app, accounts: Iterable[tuple[str, str]], refuse: Refuse, public: Iterable[str] = ()):
        self._app, self._accounts, self._public = app, [f"{user}:{word}" for user, word in accounts], set(public)
        self._refuse, self._brake = refuse, Brake()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._public:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            answer = self._app
            if not self._passes(headers, client_network(scope)):
                more = {"WWW-Authenticate": 'Basic realm="MiniGPT-4", charset="UTF-8"'}
                answer = self._refuse(headers, 401, "password_needed", {}, more)
        except TooManyGuesses as error:
            seconds = math.ceil(error.seconds)
            answer = self._refuse(headers, 429, "guesses", {"seconds": seconds}, {"Retry-After": str(seconds)})
        await answer(scope, receive, send)

    def _passes(self, headers: Headers, address: str) -> bool:
        kind, _, code = headers.get("authorization", "").partition(" ")
        if kind.lower() != "basic":
            return False  # a browser's first request, not a guess
        try:
            given = base64.b64decode(code, validate=True).decode()
        except ValueError:
            given = ""
        right = [hmac.compare_digest(given.encode(), account.encode()) for account in self._accounts]
        return self._brake.check(address, given, any(right))
