"""The format of requests: the part of OpenAI's chat completions that this endpoint supports."""

import codecs
from typing import Annotated, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError, field_validator
from pydantic_core import from_json

from minigpt4 import PACKAGE_ROOT
from minigpt4.conversation.decoding import Decoding
from minigpt4.serving.errors import ApiError
from minigpt4.serving.sampling import RowSampling

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 100
MAX_MESSAGES = 200

_PARAMETERS = OmegaConf.to_container(OmegaConf.load(PACKAGE_ROOT / "assets/openai_parameters.yaml"))
IGNORED: list[str] = _PARAMETERS["ignored"]
REFUSED: dict[str, list] = _PARAMETERS["refused"]
"""With the values that are accepted all the same."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Text(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str


class Image(_Strict):
    """A picture. Its URL may also stand without an object around it, as many clients write it."""

    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before")
    @classmethod
    def _url(cls, image_url):
        return {"url": image_url} if isinstance(image_url, str) else image_url


class Message(_Strict):
    """A message. Its content is converted to a list of parts. Other fields, such as `name`, have no effect."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[Text | Image, Discriminator("type")]] = Field(default=[], validate_default=True)
    tool_calls: None = None
    function_call: None = None

    @field_validator("tool_calls", "function_call", mode="before")
    @classmethod
    def _nothing(cls, asked):
        return asked or None

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content):
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        return [] if content is None else content


class StreamOptions(_Strict):
    include_usage: bool | None = None


class ChatRequest(_Strict, RowSampling):
    """The body of a request to /v1/chat/completions. A key with the value null counts as absent."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=Decoding.min_length, ge=0)
    """Not OpenAI's; vLLM's name. The server's own limit of an answer's length comes first."""
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]] = Field(
        default=[], max_length=MAX_STOPS
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, stop):
        return [stop] if stop and isinstance(stop, str) else stop or []

    @property
    def new_tokens(self) -> int | None:
        """The requested maximum length of an answer in tokens."""
        return self.max_completion_tokens or self.max_tokens

    def sampling(self, choice: int) -> RowSampling:
        """The sampling settings of choice number `choice`. Each choice has its own seed."""
        return self.model_copy(update={"seed": None if self.seed is None else self.seed + choice})


def read_request(body: bytes) -> ChatRequest:
    """Parse and check the body of a request. Raises ApiError."""
    try:
        fields = from_json(body.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.")
    given = {name: value for name, value in fields.items() if value is not None and name not in IGNORED}
    for name, neutral in REFUSED.items():
        value = given.pop(name, None)
        if value not in (None, False, [], {}, "", *neutral):
            raise ApiError(400, f"{name} is not supported here.", "unsupported_parameter", name)
    try:
        request = ChatRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = _place(first["loc"])
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"Unrecognized request argument: {place}", "unknown_parameter", place) from None
        raise ApiError(400, f"{place}: {first['msg'][:300]}", "invalid_value", place) from None
    if request.min_tokens > (request.new_tokens or request.min_tokens):
        what = f"min_tokens={request.min_tokens} must be at most max_tokens={request.new_tokens}."
        raise ApiError(400, what, "invalid_value", "min_tokens")
    return request


def _place(location: tuple[str | int, ...]) -> str:
    """A pydantic location as text: ("messages", 1, "content", 0, "text", "text") is messages[1].content[0].text.

    The first "text" is the type of the part, which is omitted.
    """
    name = ""
    for before, step in zip((None, *location), location, strict=False):
        if isinstance(step, int):
            name += f"[{step}]"
        elif not (isinstance(before, int) and step in ("text", "image_url")):
            name += f".{step[:100]}" if name else step[:100]
    return name
