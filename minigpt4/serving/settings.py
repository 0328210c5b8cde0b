"""What the endpoint accepts: the one place of its defaults, for the command line and for tests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Every field is a flag of `python -m minigpt4 serve`; the numbers are upper limits."""

    model_name: str = "minigpt4"
    api_key: str | None = None
    allow_http_images: bool = False
    allow_private_hosts: bool = False
    max_batch: int = 8
    """Answers computed together."""
    max_queue: int = 64
    """Requests at a time, being answered or waiting."""
    max_upload_mb: float = 20.0
    """Size of a request, its pictures included (base64 makes them a third larger), and of what is fetched for it."""
    max_images: int = 8
    """Pictures in a request."""
    max_megapixels: float = 32.0
    """Size of a picture."""
    max_tokens: int = 1000
    """Tokens of an answer."""
    timeout: float = 300.0
    """Seconds for a request: one that still waits is given up, an answer ends where it is."""

    @property
    def max_bytes(self) -> int:
        return int(self.max_upload_mb * 2**20)
