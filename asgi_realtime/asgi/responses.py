"""Short responses: JSON, and every error as `{"error", "code"}`.

The message of one of our errors is sent unchanged. The message of any other exception can contain anything, so it is
sent only with `debug=True`.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.errors import RealtimeError, ScopeDenied, ServerShutdown, TokenError

NOT_CACHED = "private, no-store"
"""The `Cache-Control` of every response. A token in the query does not keep a cache from storing the response, as an
`Authorization` header does: RFC 6750, 2.3."""


def json_bytes_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response whose body is JSON already."""
    headers = {"cache-control": NOT_CACHED, **(headers or {})}
    return Response(body, status, headers, media_type="application/json")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return json_bytes_response(encode_value(value), status, headers)


def error_response(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error for which the library has no exception."""
    return json_response({"error": message, "code": code}, status, headers)


def exception_response(error: Exception, *, debug: bool = False) -> Response:
    """The response to a request that raised."""
    if not isinstance(error, RealtimeError):
        message = f"{type(error).__name__}: {error}" if debug else "internal error"
        return error_response(500, RealtimeError.code, message)
    if isinstance(error, ServerShutdown):  # its message is meant for tasks
        return error_response(error.status, error.code, "the server is shutting down; try again")
    body = {"error": str(error), "code": error.code}
    if isinstance(error, ScopeDenied):
        body |= {"param": "access_token", "type": "authorization"}  # the official clients expect these
    elif isinstance(error, TokenError):
        return json_response(body, error.status, {"www-authenticate": "Bearer"})  # required with 401: RFC 9110, 11.6.1
    return json_response(body, error.status)
