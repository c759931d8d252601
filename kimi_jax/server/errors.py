"""Tells clients of errors, in the objects of OpenAI's and Anthropic's APIs. None has a path or a trace in it."""

from typing import Any, Literal

from kimi_jax.printable import printable

Style = Literal["openai", "anthropic"]

_LONGEST = 1_000  # characters of a message
_OPENAI = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class RequestError(Exception):
    """Ends a request with an HTTP status and a message for its client.

    param: the field that is wrong. code: OpenAI's short name of the error. retry_after: seconds after which the client
    may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self.message = printable(message, _LONGEST)

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with the answer; OpenAI's and Anthropic's clients read them."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}

    def body(self, style: Style) -> dict[str, Any]:
        """Returns the error's object in one API's form."""
        if style == "anthropic":
            kind = _ANTHROPIC.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = _OPENAI.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """Returns the error of a request that cannot be served as it is."""
    return RequestError(400, message, param=param, code=code)


def unavailable(message: str) -> RequestError:
    """Returns the error of a server that takes no requests now."""
    return RequestError(503, message, code="unavailable", retry_after=5)


def failed() -> RequestError:
    """Returns the error of a fault in the server, whose reason only its log has."""
    return RequestError(500, "the server failed to answer this request; its log says why", code="internal_error")
