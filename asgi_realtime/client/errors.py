"""What a server's refusal becomes: where there is one, the error that the same call raises in the server's process."""

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
_MESSAGE = 500
"""How much is shown of what is no answer of ours."""


class ServerUnreachable(RealtimeError):
    """The server did not answer for `give_up_after`. Whoever asks again goes on where it was. `__cause__` is the last
    failure, if it was one of the network."""

    status = 503
    code = "server_unreachable"


class UnexpectedAnswer(RealtimeError):
    """The server, or what stands in front of it, answered something else than a stream or a known refusal.

    `status` is the answer's, `code` the server's word if it gave one. Mostly `base_url` is not right.
    """

    code = "unexpected_answer"

    def __init__(self, message: str, *, status: int, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status  # type: ignore[misc]
        if code is not None:
            self.code = code  # type: ignore[misc]


def refusal(status: int, body: bytes) -> RealtimeError:
    """The error for an answer with a status that is final."""
    told = _json_object(body)
    code, message = told.get("code"), told.get("error")
    if not isinstance(code, str) or not isinstance(message, str):
        return _foreign_refusal(status, body)
    if code == LimitExceeded.code:
        return LimitExceeded(message, status=status)
    if code in _BY_CODE:
        return _BY_CODE[code](message)
    return UnexpectedAnswer(f"the server answered {status} {code}: {message}", status=status, code=code)


def _foreign_refusal(status: int, body: bytes) -> RealtimeError:
    text = body.decode("utf-8", "replace").strip()
    detail = f": {shown(text[:_MESSAGE])}" if text else ""
    message = f"the server answered {status}{detail}"
    if status == TokenError.status:
        return InvalidToken(message)
    return UnexpectedAnswer(message, status=status)


def redirected(status: int, location: str) -> UnexpectedAnswer:
    """Nothing of ours redirects, and a token must not follow to where it was not meant for."""
    target = shown(location.partition("?")[0])
    return UnexpectedAnswer(
        f"the server answered {status}, a redirect to {target}, which is not followed; set base_url to where it leads",
        status=status,
    )


def no_stream(status: int, content_type: str) -> UnexpectedAnswer:
    return UnexpectedAnswer(
        f"the server answered {status} with {shown(content_type)} instead of text/event-stream; base_url has to be"
        " the origin and the mount, like https://api.example.com/realtime",
        status=status,
    )


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = decode(body)
    except UsageError:
        return {}
    return value if isinstance(value, dict) else {}
