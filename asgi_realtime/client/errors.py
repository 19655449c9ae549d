"""The errors of the clients. A refusal with a known code becomes the error that the same call raises in the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asgi_realtime.client.arguments import EXAMPLE
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

_KNOWN = {
    cls.code: cls
    for cls in (
        ExpiredToken,
        InvalidRequest,
        InvalidToken,
        RunKeptElsewhere,
        RunNotFound,
        ScopeDenied,
        TokenError,
        UsageError,
    )
}
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


def error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> RealtimeError:
    """The error for a response whose status is final, and which is not an event stream."""
    if status < 400:
        return UnexpectedAnswer(_not_a_stream(status, headers), status=status)
    details = _json_object(body)
    code, message = details.get("code"), details.get("error")
    if not isinstance(code, str) or not isinstance(message, str):
        return _foreign_error(status, body)
    if code == LimitExceeded.code:
        return LimitExceeded(message, status=status)
    if code in _KNOWN:
        return _KNOWN[code](message)
    return UnexpectedAnswer(f"the server responded with {status} {code}: {message}", status=status, code=code)


def _not_a_stream(status: int, headers: Mapping[str, str]) -> str:
    if status < 300:
        return (
            f"the server responded with {status} and {shown(headers.get('content-type', ''))} instead of"
            f" text/event-stream; set base_url to {EXAMPLE}"
        )
    # Our server never redirects, and a token must not be sent to a host that it was not meant for.
    target = shown(headers.get("location", "").partition("?")[0])
    return (
        f"the server responded with {status}, a redirect to {target}, which is not followed; set base_url to its target"
    )


def _foreign_error(status: int, body: bytes) -> RealtimeError:
    text = body.decode("utf-8", "replace").strip()
    message = f"the server responded with {status}{f': {shown(text[:_EXCERPT])}' if text else ''}"
    return InvalidToken(message) if status == TokenError.status else UnexpectedAnswer(message, status=status)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = decode(body)
    except UsageError:
        return {}
    return value if isinstance(value, dict) else {}
