"""Short answers: JSON, and every error as `{"error", "code"}`.

The message of an error says what was wrong and what is allowed, so it is sent as it is. That of a foreign exception may
hold anything and is shown with `debug=True` only.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.errors import RealtimeError, ScopeDenied, TokenError


def json_bytes_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer whose body is JSON already."""
    headers = {"cache-control": "no-store", **(headers or {})}
    return Response(body, status, headers, media_type="application/json")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return json_bytes_response(encode_value(value), status, headers)


def error_response(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error that is no exception of the library."""
    return json_response({"error": message, "code": code}, status, headers)


def exception_response(error: Exception, *, debug: bool = False) -> Response:
    """The answer to a request that raised."""
    if not isinstance(error, RealtimeError):
        message = f"{type(error).__name__}: {error}" if debug else "internal error"
        return error_response(500, RealtimeError.code, message)
    body = {"error": str(error), "code": error.code}
    if isinstance(error, ScopeDenied):
        body |= {"param": "access_token", "type": "authorization"}  # what the official clients know
    elif isinstance(error, TokenError):
        return json_response(body, error.status, {"www-authenticate": "Bearer"})  # a must with 401: RFC 9110, 11.6.1
    return json_response(body, error.status)
