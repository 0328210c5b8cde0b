"""The settings of the endpoint and their defaults, for the command line and for tests."""

import re
from dataclasses import dataclass

from minigpt4.common.settings import check_bounds, setting


@dataclass(frozen=True)
class Settings:
    """Each field is a flag of `python -m minigpt4 serve`. The numbers are upper limits.

    Raises ValueError if one is out of bounds.
    """

    model_name: str = setting("minigpt4", "its name in requests")
    host: str = setting("127.0.0.1")
    """The address on which the endpoint listens."""
    allow_host: list[str] = setting(list)
    """Names by which it may be asked, beside those of this machine; "*": any."""
    api_keys: list[str] = setting(list)
    """Clients must send one of them; none: everybody may ask."""
    allow_http_images: bool = setting(False, "fetch pictures by URL, from public addresses")
    allow_private_hosts: bool = setting(False, "… and from private networks, for tests")
    allow_origin: list[str] = setting(list)
    """Origins of web pages that may use the endpoint, such as "https://example.com"."""
    root_path: str = setting("", "path under which a reverse proxy serves the endpoint, such as /minigpt4")
    max_batch: int = setting(8, "answers that are computed together", more_than=0)
    max_queue: int = setting(64, "requests that are answered or wait at a time", more_than=0)
    max_upload_mb: float = setting(20.0, "size of a request, with its pictures", more_than=0)
    """base64 adds a third. It also limits the size of all pictures fetched for a request."""
    max_images: int = setting(8, "pictures in a request", more_than=0)
    max_megapixels: float = setting(32.0, "size of a picture", more_than=0)
    max_tokens: int = setting(1000, "tokens of an answer", more_than=0)
    timeout: float = setting(300.0, "seconds for a request", more_than=0)
    """After that, a request that waits is refused, and a running answer ends early."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.root_path and not re.fullmatch(r"(/[\w.~-]+)+", self.root_path):
            raise ValueError(
                f"root_path={self.root_path!r} must be a path such as /minigpt4, without a slash at its end."
            )
        for origin in self.allow_origin:
            if origin != "*" and not re.fullmatch(r"https?://[\w.-]+(:\d+)?|https?://\[[\da-f:]+\](:\d+)?", origin):
                raise ValueError(f"allow_origin={origin!r} must be like https://example.com, without a path, or *.")

    @property
    def max_bytes(self) -> int:
        return int(self.max_upload_mb * 2**20)
