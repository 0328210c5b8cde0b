"""Errors that are sent to the client."""

RETRY = {"Retry-After": "5"}  # seconds
CLOSE = {"Connection": "close"}  # the rest of the request is not read
HEADERS = {408: CLOSE, 413: CLOSE, 429: RETRY, 503: RETRY}


class ApiError(Exception):
    """A request cannot be answered. The client receives this error in OpenAI's format.

    Args:
        status: HTTP status.
        message: text for the client's user.
        code: identifier for programs.
        param: the invalid part of the request, such as "messages[1].content[0]".
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = HEADERS.get(status)

    def body(self) -> dict:
        """The JSON body of the response."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
