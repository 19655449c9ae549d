"""Decode JSON that clients send into msgspec structs."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from asgi_realtime.core.chunks import decode_as, json_line
from asgi_realtime.core.errors import InvalidRequest, UsageError
from asgi_realtime.core.nesting import MAX_PARTS, check_parts

BOM = b"\xef\xbb\xbf"
"""Some clients (PowerShell, .NET) send it before JSON. A parser may ignore it: RFC 8259, section 8.1."""

_MAX_MESSAGE = 300
"""Messages of msgspec repeat input of any length."""

T = TypeVar("T")


def read_json(
    data: bytes,
    type: type[T],
    *,
    what: str = "the body",
    error: type[UsageError] = InvalidRequest,
    max_parts: int | None = MAX_PARTS,
) -> T:
    """Decode JSON from a client.

    Raises `InvalidRequest` if it is malformed, `error` if a value has the wrong type, and `UsageError` if a value was
    rejected by its struct's `__post_init__`. More lists, objects and names than `max_parts` raise `LimitExceeded`; None
    is for a struct that keeps what can be large encoded.
    """
    if max_parts is not None:
        check_parts(data, limit=max_parts, what=what)
    try:
        return decode_as(data.removeprefix(BOM), type)
    except msgspec.ValidationError as exc:
        if isinstance(exc.__cause__, UsageError):
            raise UsageError(f"{what}: {exc.__cause__}") from exc
        raise error(f"{what} does not fit: {str(exc)[:_MAX_MESSAGE]}") from exc
    except UsageError as exc:
        raise InvalidRequest(f"{what} is malformed: {exc}") from exc


def read_line(data: bytes, *, what: str = "the body") -> bytes:
    """JSON from a client as it is stored, on one line. Raises `InvalidRequest` if it is malformed."""
    try:
        return json_line(data.removeprefix(BOM))
    except UsageError as exc:
        raise InvalidRequest(f"{what} is malformed: {exc}") from exc
