"""Short responses: JSON, and every error as `{"error", "code"}`.

The message of one of our errors is sent unchanged. The message of any other exception can contain anything, so it is
sent only with `debug=True`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from asgi_realtime.asgi.connection import WHOLE_BYTES
from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.errors import (
    AuthorizeFailed,
    LimitExceeded,
    RealtimeError,
    ScopeDenied,
    ServerShutdown,
    ThreadBusy,
    TokenError,
)

NOT_CACHED = "private, no-store"
"""The `Cache-Control` of every response except that of `browser_module`, which is the same for everyone. A token in the
query does not keep a cache from storing the response, as an `Authorization` header does: RFC 6750, 2.3."""


_BUSY = "the previous request is still in progress; wait until it is done, or stop it"


def json_bytes_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response whose body is JSON already."""
    headers = {"cache-control": NOT_CACHED, **(headers or {})}
    return Response(body, status, headers, media_type="application/json")


class PartsResponse(Response):
    """A large body of JSON whose parts are shared with other responses. One body would be a copy of them."""

    def __init__(self, parts: Sequence[bytes], headers: dict[str, str] | None) -> None:
        length = str(sum(map(len, parts)))
        headers = {"cache-control": NOT_CACHED, **(headers or {}), "content-length": length}
        super().__init__(b"", headers=headers, media_type="application/json")
        self.parts = parts


def json_parts_response(parts: Sequence[bytes], headers: dict[str, str] | None = None) -> Response:
    """A response whose body is JSON already, in parts."""
    if sum(map(len, parts)) > WHOLE_BYTES:
        return PartsResponse(parts, headers)
    return json_bytes_response(b"".join(parts), headers=headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return json_bytes_response(encode_value(value), status, headers)


def error_response(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error for which the library has no exception."""
    return json_response({"error": message, "code": code}, status, headers)


def exception_response(error: Exception, *, now: float, debug: bool = False) -> Response:
    """The response to a request that raised. `now` is in unix seconds."""
    if not isinstance(error, RealtimeError):
        message = f"{type(error).__name__}: {error}" if debug else "internal error"
        return error_response(500, RealtimeError.code, message)
    if isinstance(error, ServerShutdown):  # its message is meant for tasks
        message = "the server is shutting down; try again"
        return error_response(error.status, error.code, message, {"retry-after": "1"})
    body = {"error": str(error), "code": error.code}
    if isinstance(error, ThreadBusy):  # the user of a chat sees the text; the log has that of the exception
        body |= {"error": _BUSY, "runId": error.run_id}
        return json_response(body, error.status, {"x-should-retry": "false"})  # the official clients repeat after a 409
    if isinstance(error, ScopeDenied):
        body |= {"param": "access_token", "type": "authorization"}  # the official clients expect these
    elif isinstance(error, TokenError):
        return json_response(body, error.status, {"www-authenticate": "Bearer"})  # required with 401: RFC 9110, 11.6.1
    return json_response(body, error.status, _retry_headers(error, now))


def _retry_headers(error: RealtimeError, now: float) -> dict[str, str]:
    """When to send the request again: the standard header, in seconds, and that of the official clients, a time."""
    if isinstance(error, AuthorizeFailed):
        return {"retry-after": "1"}
    if not isinstance(error, LimitExceeded) or error.retry_after_s is None:
        return {}
    reset_ms = math.ceil((now + error.retry_after_s) * 1000)
    return {"retry-after": str(math.ceil(error.retry_after_s)), "x-ratelimit-reset": str(reset_ms)}
