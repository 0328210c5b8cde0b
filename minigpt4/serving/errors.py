"""What goes back to a client whose request cannot be answered."""


class ApiError(Exception):
    """An error in OpenAI's shape.

    Args:
        status: HTTP status.
        message: for the client's user.
        code: a name that programs can compare.
        param: the part of the request that is at fault, such as "messages[1].content[0]".
        retry_after: seconds after which trying again makes sense.
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
        if status in (408, 413):  # the rest of the request is not waited for
            self.headers["Connection"] = "close"

    def body(self) -> dict:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
