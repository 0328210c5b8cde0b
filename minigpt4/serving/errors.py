"""Errors that are sent to the client."""


class ApiError(Exception):
    """A request cannot be answered. The client receives this error in OpenAI's format.

    Args:
        status: HTTP status.
        message: text for the client's user.
        code: identifier for programs.
        param: the invalid part of the request, such as "messages[1].content[0]".
        retry_after: seconds after which the client should try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status in (408, 413):  # the rest of the request is not read
            self.headers["Connection"] = "close"

    def body(self) -> dict:
        """The JSON body of the response."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
