"""The errors of the clients. A refusal with a known code becomes the error that the same call raises in the server."""

from __future__ import annotations

from typing import Any

from asgi_realtime.core.chunks import decode
from asgi_realtime.core.errors import (
    ExpiredToken,
    InvalidRequest,
    InvalidToken,
    LimitExceeded,
    RealtimeError,
    RunKeptElsewhere,
    RunNotFound,
    ScopeDenied,
    TokenError,
    UsageError,
    shown,
)

_KNOWN: tuple[type[RealtimeError], ...] = (
    ExpiredToken,
    InvalidRequest,
    InvalidToken,
    RunKeptElsewhere,
    RunNotFound,
    ScopeDenied,
    TokenError,
    UsageError,
)
_BY_CODE = {cls.code: cls for cls in _KNOWN}
_EXCERPT = 500
"""How many characters of a foreign error body an error shows."""


class ServerUnreachable(RealtimeError):
    """The subscription made no progress for `give_up_after`; iterating it again resumes.

    `__cause__` is the last network error, if there was one.
    """

    status = 503
    code = "server_unreachable"


class UnexpectedAnswer(RealtimeError):
    """The server, or a proxy in front of it, sent neither an event stream nor a known refusal.

    Most often `base_url` is wrong. `status` is that of the response, `code` that of its JSON body if it has one.
    """

    code = "unexpected_answer"

    def __init__(self, message: str, *, status: int, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status  # type: ignore[misc]
        if code is not None:
            self.code = code  # type: ignore[misc]


def error_from_response(status: int, body: bytes) -> RealtimeError:
    """The error for a response whose status is final."""
    details = _json_object(body)
    code, message = details.get("code"), details.get("error")
    if not isinstance(code, str) or not isinstance(message, str):
        return _foreign_error(status, body)
    if code == LimitExceeded.code:
        return LimitExceeded(message, status=status)
    if code in _BY_CODE:
        return _BY_CODE[code](message)
    return UnexpectedAnswer(f"the server responded with {status} {code}: {message}", status=status, code=code)


def _foreign_error(status: int, body: bytes) -> RealtimeError:
    text = body.decode("utf-8", "replace").strip()
    detail = f": {shown(text[:_EXCERPT])}" if text else ""
    message = f"the server responded with {status}{detail}"
    if status == TokenError.status:
        return InvalidToken(message)
    return UnexpectedAnswer(message, status=status)


def redirected(status: int, location: str) -> UnexpectedAnswer:
    """Our server never redirects, and a token must not be sent to a host that it was not meant for."""
    target = shown(location.partition("?")[0])
    return UnexpectedAnswer(
        f"the server responded with {status}, a redirect to {target}, which is not followed; set base_url to its"
        " target",
        status=status,
    )


def not_a_stream(status: int, content_type: str) -> UnexpectedAnswer:
    return UnexpectedAnswer(
        f"the server responded with {status} and {shown(content_type)} instead of text/event-stream; set base_url to"
        " the origin and the mount path, like https://api.example.com/realtime",
        status=status,
    )


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = decode(body)
    except UsageError:
        return {}
    return value if isinstance(value, dict) else {}
