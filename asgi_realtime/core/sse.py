"""The bytes of a `text/event-stream`: one function per kind of frame or line.

A frame is one complete event with its empty line, so frames can be concatenated. Outside of an event, `retry` and a
comment are a line without an empty one after it: httpx-sse and fetch-event-source dispatch an empty message at every
empty line, although the spec drops an event without data. The data is one line of JSON, which `core.chunks` guarantees.
Everything else that enters a frame is checked here for CR, LF and NUL: a value with a line break could inject events.
Spec: WHATWG HTML, section 9.2 (server-sent events).
"""

from __future__ import annotations

import re

from asgi_realtime.core.chunks import escape_separators
from asgi_realtime.core.errors import UsageError

_LINE_BREAK = re.compile(r"[\r\n\0]")  # NUL: clients ignore an id that contains it, and would resume at an older one
_DATA = len(b"data: ")


CHUNK_FRAME = b"id: %d\ndata: %b\n\n"
"""The frame of a stream entry: its seq, and its data as `encode_value` returns it. Unchecked, for the hot path."""


def chunk_frame(seq: int, data: bytes) -> bytes:
    """The frame of a stream entry. `data` must come from `encode_value`."""
    return CHUNK_FRAME % (seq, data)


def frame_data(frame: bytes) -> bytes:
    """The data of a frame made by `chunk_frame`."""
    return frame[frame.index(10) + 1 + _DATA : -2]


def control_frame(event: str, data: bytes | None, *, id: str | None = None, retry_ms: int | None = None) -> bytes:
    """A named event. Without `data` it has an empty data line, because browsers drop events without one."""
    head = control_head(event, id=id, retry_ms=retry_ms)
    return (head + event_data(data) if data else head.removesuffix(b": ")) + CONTROL_TAIL


CONTROL_TAIL = b"\n\n"
"""What ends a frame."""


def control_head(event: str, *, id: str | None = None, retry_ms: int | None = None) -> bytes:
    """The frame of a named event up to its data, for data that is too large to copy."""
    if not event:
        raise UsageError("event is empty; a control event needs a name")
    lines = [b"event: " + _text("event", event)]
    if retry_ms is not None:
        lines.append(_retry(retry_ms))
    if id is not None:
        lines.append(b"id: " + _text("id", id))
    return b"\n".join([*lines, b"data: "])


def retry_line(retry_ms: int) -> bytes:
    """Sets how long the client waits before it reconnects. Dispatches no event."""
    return _retry(retry_ms) + b"\n"


def comment_line(text: str) -> bytes:
    """A comment: keeps the connection open, is visible in `curl -N`, dispatches no event."""
    return b": " + _text("comment", text) + b"\n"


def _text(name: str, text: str) -> bytes:
    if _LINE_BREAK.search(text):
        raise UsageError(f"{name} is {text!r}; it must not contain CR, LF or NUL")
    return text.encode("utf-8", "replace")


def event_data(data: bytes) -> bytes:
    """The data as it is on the wire."""
    if b"\n" in data or b"\r" in data:
        raise UsageError(f"data of {len(data)} bytes has line breaks; it must be one line of JSON")
    return data if data.isascii() else escape_separators(data)


def _retry(retry_ms: int) -> bytes:
    if retry_ms < 0:
        raise UsageError(f"retry_ms is {retry_ms}; it must not be negative")
    return b"retry: %d" % retry_ms


HEARTBEAT = comment_line("heartbeat")
