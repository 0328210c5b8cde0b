"""Reading the pictures of a request: from data URLs, or by HTTP from public addresses only."""

import asyncio
import base64
import ipaddress
import socket
from urllib.parse import quote, unquote, urljoin, urlsplit

import httpcore

from minigpt4.serving.errors import ApiError

MAX_REDIRECTS = 3
URL_SAFE = str.maketrans("-_", "+/")
FETCH_SECONDS = 15
# Addresses of the public internet: global unicast. Of IPv6 it is one block, without those inside it that serve a
# purpose (tunnels, benchmarks, overlays, examples).
GLOBAL_6 = ipaddress.ip_network("2000::/3")
SPECIAL_6 = [ipaddress.ip_network(block) for block in ("2001::/23", "2001:db8::/32", "3fff::/20")]
# In addition to what Python knows: protocols, relays of 6to4, and Azure's platform, as a machine there sees it.
SPECIAL_4 = [ipaddress.ip_network(block) for block in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")]
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # by which networks without IPv4 reach it: their resolvers give it out
ISATAP = 0x5EFE  # begins the lower half of an address, before the IPv4 address


class Images:
    """Reads pictures.

    Args:
        allow_http: fetch http and https URLs.
        allow_private: also from private networks and from this machine.
        max_bytes: limit of all fetched pictures of a request together.
    """

    def __init__(self, allow_http: bool, allow_private: bool, max_bytes: int):
        self._allow_http, self._max_bytes = allow_http, max_bytes
        self._network = PublicNetwork(allow_private)

    async def read_all(self, urls: dict[str, str]) -> dict[str, bytes]:
        """The contents of a request's picture files, by place, as in `urls`. Raises ApiError."""
        contents, left = {}, self._max_bytes
        for place, url in urls.items():
            contents[place] = await self._read(url, place, left)
            if _scheme(url) != "data":
                left -= len(contents[place])
        return contents

    async def _read(self, url: str, place: str, limit: int) -> bytes:
        """The content of the file at `url`. At most `limit` bytes are fetched. Raises ApiError, which names `place`."""
        try:
            scheme = _scheme(url)
            if scheme == "data":
                return await asyncio.to_thread(read_data_url, url)
            if scheme not in ("http", "https"):
                raise _Refused("it must be a data: URL, such as data:image/png;base64,…")
            if not self._allow_http:
                raise _Refused(
                    "this server fetches no pictures; send a data: URL (or start it with --allow-http-images)"
                )
            async with asyncio.timeout(FETCH_SECONDS):
                return await self._fetch(url, limit)
        except TimeoutError:
            reason = f"it took longer than {FETCH_SECONDS} s to fetch"
        except _Refused as error:
            reason = str(error)
        raise ApiError(400, f"The picture in {place} cannot be used: {reason}.", "invalid_image_url", place)

    async def _fetch(self, url: str, limit: int) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            target = _http_url(url)
            try:
                async with httpcore.AsyncConnectionPool(network_backend=self._network) as pool:
                    headers = {"User-Agent": "minigpt4", "Accept": "image/*", "Accept-Encoding": "identity"}
                    async with pool.stream("GET", target, headers=headers) as response:
                        if response.status == 200:
                            return await self._body(response, limit)
                        location = {name.lower(): value for name, value in response.headers}.get(b"location")
                        if response.status not in (301, 302, 303, 307, 308) or not location:
                            raise _Refused(f"its server answered {response.status}")
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError):
                raise _Refused("its server cannot be reached") from None
            url = urljoin(url, location.decode("latin-1"))
        raise _Refused(f"there were more than {MAX_REDIRECTS} redirects")

    async def _body(self, response: httpcore.Response, limit: int) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_stream():
            content += chunk
            if len(content) > limit:
                raise _Refused(
                    f"it is larger than {limit / 2**20:.3g} MB, and at most {self._max_bytes / 2**20:g} MB are fetched "
                    "for a request"
                )
        return bytes(content)


def _scheme(url: str) -> str:
    return url[:10].partition(":")[0].lower()


class _Refused(Exception):
    """A picture is not read. The message is the reason."""


def read_data_url(url: str) -> bytes:
    """The content of a base64 data URL. Line breaks, URL-safe letters and missing padding are accepted."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise _Refused("a data URL must begin with data:image/…;base64,")
    try:
        letters = "".join(unquote(data).split()).translate(URL_SAFE).rstrip("=")
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except ValueError:
        raise _Refused("its base64 is damaged") from None


def _http_url(url: str) -> httpcore.URL:
    """An http or https URL in httpcore's form, with encoded host and path."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise _Refused("it leads to something other than http and https")
        if parts.username or parts.password:
            raise _Refused("a URL with a password is not fetched")
        host, port = (parts.hostname or "").encode("idna"), parts.port
        if not host:
            raise ValueError("no host")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        ascii_target = quote(target, safe="/%:@!$&'()*+,;=?~").encode()
        return httpcore.URL(scheme=parts.scheme.encode(), host=host, port=port, target=ascii_target)
    except ValueError:
        raise _Refused("its URL is malformed") from None


class PublicNetwork(httpcore.AnyIOBackend):
    """Connects to public addresses only.

    A host name is looked up once, and the connection goes to the address that was checked. A second lookup could return
    another address (DNS rebinding).
    """

    def __init__(self, allow_private: bool):
        self._allow_private = allow_private

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        """Connect to an address of the host. Raises _Refused unless all its addresses are public.

        The message is the same for private and unknown hosts, so that clients learn nothing about the network.
        """
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        addresses = [entry[4][0] for entry in found]
        if not addresses or not (self._allow_private or all(map(is_public, addresses))):
            raise _Refused("its host has no public address")
        return await super().connect_tcp(addresses[0], port, timeout, local_address, socket_options)


def is_public(address: str) -> bool:
    """True if an IP address belongs to the public internet.

    Three kinds of IPv6 address can be public that hold an IPv4 address: mapped, 6to4, and NAT64's well-known ones. The
    address inside decides. All other kinds are refused.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 4:
        is_unicast = not (ip.is_multicast or ip.is_reserved)
        return ip.is_global and is_unicast and not any(ip in block for block in SPECIAL_4)
    inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour
    if inner:
        return is_public(str(inner))
    is_isatap = int(ip) >> 32 & 0xFDFFFFFF == ISATAP  # one bit says whether the IPv4 address is a public one
    return ip in GLOBAL_6 and not is_isatap and not any(ip in block for block in SPECIAL_6)
