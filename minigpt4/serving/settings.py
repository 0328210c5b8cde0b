"""The settings of the endpoint and their defaults, for the command line and for tests."""

from dataclasses import dataclass

from minigpt4.common.settings import setting


@dataclass(frozen=True)
class Settings:
    """Each field is a flag of `python -m minigpt4 serve`. Those with a text are upper limits."""

    model_name: str = "minigpt4"
    api_key: str | None = None
    allow_http_images: bool = False
    allow_private_hosts: bool = False
    max_batch: int = setting(8, "answers that are computed together")
    max_queue: int = setting(64, "requests that are answered or wait at a time")
    max_upload_mb: float = setting(20.0, "size of a request, with its pictures")
    """base64 adds a third. It also limits the size of all pictures fetched for a request."""
    max_images: int = setting(8, "pictures in a request")
    max_megapixels: float = setting(32.0, "size of a picture")
    max_tokens: int = setting(1000, "tokens of an answer")
    timeout: float = setting(300.0, "seconds for a request")
    """After that, a request that waits is refused, and a running answer ends early."""

    @property
    def max_bytes(self) -> int:
        return int(self.max_upload_mb * 2**20)
