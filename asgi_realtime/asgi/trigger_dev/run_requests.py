"""The request that creates a run: its payload and its options.

Options without a counterpart here (`queue`, `machine`, `priority`, `maxAttempts`, …) are ignored, because some clients
always send them. A supported option with a value of the wrong type is rejected with an error that names it.

A short text can describe millions of values, each of which costs time and memory. So payload and options stay encoded
(`msgspec.Raw`) until their length has been checked.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Any, Literal

import msgspec

from asgi_realtime.asgi.trigger_dev import superjson
from asgi_realtime.asgi.trigger_dev.decoding import read_json
from asgi_realtime.core.chunks import decode, json_line
from asgi_realtime.core.config import MAX_SPAN_S, Limits, Span, parse_span
from asgi_realtime.core.errors import InvalidRequest, LimitExceeded, UsageError, shown
from asgi_realtime.tasks.options import RunOptions
from asgi_realtime.tasks.records import Payload

JSON = "application/json"
SUPERJSON = "application/super+json"
TEXT = "text/plain"
STORED = "application/store"

OFFLOADED_BYTES = 128 * 1024
"""The official client uploads payloads of this size to an object store and sends a reference instead."""

OPTIONS_BYTES = 64 * 1024
"""Limit of the options without their metadata. It is not configurable: it leaves ample room for tags and keys, which
have limits of their own, and for ignored options."""

MAX_OPTIONS_PARTS = 25_000
"""Limit of lists, objects and names in the options, with their metadata, which is decoded several times."""

NO_STORE = (
    f"the official client uploads payloads of {OFFLOADED_BYTES} bytes or more to an object store, which this server"
    f" does not have; the limit is {OFFLOADED_BYTES - 1} bytes, including the superjson types of the values"
)


class RunRequest(msgspec.Struct):
    """The body of a trigger request. Batch items extend it."""

    payload: msgspec.Raw = msgspec.Raw(b"")
    options: msgspec.Raw = msgspec.Raw(b"")


class Options(msgspec.Struct, rename="camel"):
    """The options that have an effect here. None is the same as absent."""

    payload_type: str | None = None
    tags: str | list[str] | None = None
    metadata: str | dict[str, Any] | None = None
    metadata_type: Any = None
    idempotency_key: str | None = None
    idempotency_key_ttl: str | None = msgspec.field(default=None, name="idempotencyKeyTTL")
    ttl: str | int | None = None
    delay: str | None = None
    max_duration: int | float | None = None
    parent_run_id: str | None = None
    thread: str | None = None
    on_conflict: Literal["reject", "replace"] | None = None

    def run_options(self) -> RunOptions:
        """Raises `UsageError`."""
        return RunOptions(
            tags=self.tags,
            metadata=_metadata(self.metadata, JSON if self.metadata_type is None else self.metadata_type),
            idempotency_key=self.idempotency_key,
            idempotency_key_ttl=_span("idempotencyKeyTTL", self.idempotency_key_ttl),
            ttl=_span("ttl", None if self.ttl == 0 else self.ttl),  # 0 means no limit
            delay=None if self.delay is None else _delay(self.delay),
            max_duration=_max_duration(self.max_duration),
            thread=self.thread,
            on_conflict=self.on_conflict or "reject",
        )


def max_body_bytes(limits: Limits) -> int:
    """A payload sent as text in a JSON string takes two bytes for each of its quotes."""
    return 2 * limits.payload_bytes + _max_options_bytes(limits)


def _max_options_bytes(limits: Limits) -> int:
    """Metadata can be sent as text too."""
    return 2 * limits.metadata_bytes + OPTIONS_BYTES


def read_options(request: RunRequest, limits: Limits) -> Options:
    """Raises `UsageError`, `InvalidRequest` if they are not an object, `LimitExceeded` (413)."""
    data = bytes(request.options)
    _check_length("the options are", len(data), _max_options_bytes(limits))
    if data in (b"", b"null"):
        return Options()
    if not data.startswith(b"{"):
        raise InvalidRequest("the field options does not fit; it must be an object")
    return read_json(data, Options, what="the field options", error=UsageError, max_parts=MAX_OPTIONS_PARTS)


def read_payload(request: RunRequest, options: Options, limits: Limits) -> Payload:
    """The payload as plain JSON. Raises `InvalidRequest`, `UsageError`, `LimitExceeded`."""
    type = options.payload_type or JSON
    data = bytes(request.payload)
    if type == STORED:
        raise LimitExceeded(NO_STORE, status=413)
    if type not in (JSON, SUPERJSON, TEXT):
        raise UsageError(f"payloadType is {shown(type)}; allowed are {JSON}, {SUPERJSON} and {TEXT}")
    if not data:
        return Payload(None)
    if type != JSON and not data.startswith(b'"'):
        raise InvalidRequest(f"the payload has the type {type}, so it must be a string")
    quoting = 2 if type == SUPERJSON else 1
    _check_length("the payload is", len(data), quoting * limits.payload_bytes)
    try:
        line = json_line(data)
        return _superjson_payload(line, limits) if type == SUPERJSON else Payload(line)
    except LimitExceeded:
        raise
    except UsageError as exc:
        raise InvalidRequest(f"the payload is malformed: {exc}") from exc


def _superjson_payload(line: bytes, limits: Limits) -> Payload:
    text = _encoded(decode(line))
    _check_length("the payload, with the types of its values, is", len(text), limits.payload_bytes)
    return Payload(*superjson.parse(text))


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise UsageError("its text has a lone surrogate; inside of JSON, write it as an escape") from exc


def _check_length(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise LimitExceeded(f"{what} {size} bytes, limit {limit}", status=413)


def _metadata(value: str | dict[str, Any] | None, type: Any) -> dict[str, Any] | None:
    """Metadata is an object, or the text of one."""
    found: Any = value
    if isinstance(value, str) and type in (JSON, SUPERJSON):
        try:
            text = _encoded(value)
            found = decode(json_line(text) if type == JSON else superjson.parse(text).json)
        except UsageError as exc:
            raise UsageError(f"metadata is malformed: {exc}") from exc
    if found is not None and not isinstance(found, dict):
        raise UsageError(
            f"metadata is not an object; allowed are an object, and text of the type {JSON} or {SUPERJSON}"
        )
    return found


def _span(name: str, value: str | int | None) -> Span | None:
    return None if value is None else parse_span(value, name=name)


def _delay(text: str) -> Span | datetime:
    """A span, or a time: clients send a `Date` as text with a time zone."""
    with suppress(UsageError):
        return parse_span(text, name="delay")
    with suppress(ValueError):
        time = datetime.fromisoformat(text)
        if time.tzinfo is not None:
            return time
    raise UsageError(
        f"delay is {shown(text)}; allowed are spans like '90s', '15m', '1h30m' and times like"
        " '2026-01-15T09:30:00Z', with a time zone"
    )


def _max_duration(seconds: float | None) -> Span | None:
    """The client's `timeout.None` is 68 years."""
    if seconds is None or seconds >= MAX_SPAN_S:
        return None
    return parse_span(seconds, name="maxDuration")
