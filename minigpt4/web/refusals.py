"""Requests that are refused before they reach the page, in the visitor's language."""

from collections.abc import Container, Mapping

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse, Response


class Refusals:
    """Answers of `HostCheck` and `PasswordCheck` (see `guard.Refuse`): text for browsers, JSON for scripts of the page.

    Args:
        texts: {language: {reason: sentence}}, as in texts.json.
        headers: of all answers.
    """

    def __init__(self, texts: Mapping[str, Mapping[str, str]], headers: Mapping[str, str]):
        self._texts, self._headers = texts, {**headers, "Vary": "Accept, Accept-Language"}

    def __call__(
        self, headers: Headers, status: int, reason: str, values: dict[str, str | int], more: dict[str, str]
    ) -> Response:
        language = choose_language(headers.get("accept-language", ""), self._texts)
        text = self._texts[language][reason].format(**values)
        more = {**self._headers, **more, "Content-Language": language}
        if "text/html" in headers.get("accept", ""):
            return PlainTextResponse(text, status, more)
        return JSONResponse({"error": reason, "values": values, "message": text}, status, more)


def choose_language(accepted: str, known: Container[str]) -> str:
    """The known language that an Accept-Language header likes most, such as "zh" for "fr, zh-TW;q=0.8"; else "en"."""
    liked: dict[str, float] = {}
    for part in accepted.split(","):
        name, _, weight = part.partition(";")
        language = name.strip().lower().partition("-")[0]
        try:
            quality = float(weight.partition("=")[2] or 1)
        except ValueError:
            continue
        if language in known and quality > liked.get(language, 0):
            liked[language] = quality
    return max(liked, key=liked.__getitem__, default="en")
