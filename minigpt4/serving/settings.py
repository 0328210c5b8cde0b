"""The settings of the endpoint and their defaults, for the command line and for tests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Each field is a flag of `python -m minigpt4 serve`. The numbers are upper limits."""

    model_name: str = "minigpt4"
    api_key: str | None = None
    allow_http_images: bool = False
    allow_private_hosts: bool = False
    max_batch: int = 8
    """Answers in a batch."""
    max_queue: int = 64
    """Requests that are being answered or waiting at the same time."""
    max_upload_mb: float = 20.0
    """Size of a request with its pictures (base64 adds a third), and size of all pictures fetched for it."""
    max_images: int = 8
    """Number of pictures in a request."""
    max_megapixels: float = 32.0
    """Size of a picture."""
    max_tokens: int = 1000
    """Tokens of an answer."""
    timeout: float = 300.0
    """Seconds for a request. After that, a request that waits is refused, and a running answer ends early."""

    @property
    def max_bytes(self) -> int:
        return int(self.max_upload_mb * 2**20)
