"""What the official clients send to start a run: the payload by its type, and the options.

Options that have no meaning here (`queue`, `machine`, `priority`, `maxAttempts`, …) are taken and left alone, so that a
client which always sends them works. One that has a meaning and a value of the wrong kind is refused by its name.

A small text may stand for very many values, which take time and memory. So what is too long is refused before it is
decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from asgi_realtime.asgi.trigger_dev import superjson
from asgi_realtime.core.chunks import decode, json_line, scrub_escapes
from asgi_realtime.core.config import MAX_SPAN_S, Limits, Span, parse_span
from asgi_realtime.core.errors import InvalidRequest, LimitExceeded, UsageError, shown
from asgi_realtime.tasks.records import Payload, RunOptions

JSON = "application/json"
SUPERJSON = "application/super+json"
TEXT = "text/plain"
STORED = "application/store"

OFFLOADED_BYTES = 128 * 1024
"""The official client takes a payload of this size to an object store, and sends a reference to it."""

OPTIONS_BYTES = 64 * 1024
"""Of the options besides the metadata. No limit to be set: it is room for tags and keys, which have limits of their
own, and for options that have no meaning here."""

NO_STORE = (
    f"the official client takes payloads of {OFFLOADED_BYTES} bytes and more to an object store, which this server does"
    f" not have: the limit for it is {OFFLOADED_BYTES - 1} bytes, with the types of the values"
)

T = TypeVar("T")


class Body(msgspec.Struct):
    """A run that is to be started. Payload and options are text, until their length is known to be allowed."""

    payload: msgspec.Raw = msgspec.Raw(b"")
    options: msgspec.Raw = msgspec.Raw(b"")


B = TypeVar("B", bound=Body)
Options = Mapping[str, Any]
_GivenOptions: Any = dict[str, Any] | None


def max_body_bytes(limits: Limits) -> int:
    """A payload may be text in a JSON string, in which each of its quotes takes two bytes."""
    return 2 * limits.payload_bytes + max_options_bytes(limits)


def max_options_bytes(limits: Limits) -> int:
    """Metadata may be such a text too."""
    return 2 * limits.metadata_bytes + OPTIONS_BYTES


def read_body(data: bytes, type: type[B], *, what: str = "the body") -> B:
    """Decode what starts a run. Raises `InvalidRequest`."""
    try:
        return _decode_body(data, type)
    except UsageError as exc:
        raise InvalidRequest(f"{what} is malformed: {exc}") from exc
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"{what} does not fit: {_cut(str(exc))}") from exc


def _decode_body(data: bytes, type: type[B]) -> B:
    """Raises `msgspec.ValidationError`, or `UsageError` if it is no JSON."""
    try:
        return msgspec.json.decode(data, type=type)
    except msgspec.ValidationError:
        raise
    except RecursionError as exc:
        raise UsageError("JSON is nested too deeply") from exc
    except (msgspec.MsgspecError, ValueError) as exc:
        scrubbed = scrub_escapes(data)
        if scrubbed == data:
            raise UsageError(f"not valid JSON: {exc}") from exc
    return _decode_body(scrubbed, type)


def given_options(body: Body, limits: Limits) -> Options:
    """The options as they were sent. Raises `InvalidRequest`, `LimitExceeded` (413)."""
    data = bytes(body.options)
    _check_length("the options are", len(data), max_options_bytes(limits))
    return read_json(data, _GivenOptions, what="the field options") or {} if data else {}


def _check_length(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise LimitExceeded(f"{what} {size} bytes, limit {limit}", status=413)


_MAX_MESSAGE = 300


def read_json(data: bytes, type: type[T], *, what: str = "the body") -> T:
    """Decode JSON from outside. Raises `InvalidRequest`."""
    try:
        return msgspec.json.decode(json_line(data), type=type)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"{what} does not fit: {_cut(str(exc))}") from exc
    except UsageError as exc:
        raise InvalidRequest(f"{what} is malformed: {exc}") from exc


def _cut(text: str) -> str:
    """Somebody else's message, which may repeat what came from outside, however long that is."""
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}…"


def read_payload(body: Body, options: Options, limits: Limits) -> Payload:
    """The payload as plain JSON. Raises `InvalidRequest`, `UsageError`, `LimitExceeded`."""
    type = options.get("payloadType") or JSON
    data = bytes(body.payload)
    if type == STORED:
        raise LimitExceeded(NO_STORE, status=413)
    if type not in (JSON, SUPERJSON, TEXT):
        raise UsageError(f"payloadType is {_shown(type)}; allowed are {JSON}, {SUPERJSON} and {TEXT}")
    if not data:
        return Payload(None)
    if type != JSON and not data.startswith(b'"'):
        raise InvalidRequest(f"the payload is of the type {type}, so it must be a string")
    quoting = 2 if type == SUPERJSON else 1
    _check_length("the payload is", len(data), quoting * limits.payload_bytes)
    try:
        data = json_line(data)
        if type != SUPERJSON:
            return Payload(data)
        text = decode(data).encode()
        _check_length("the payload, with the types of its values, is", len(text), limits.payload_bytes)
        return Payload(*superjson.parse(text))
    except LimitExceeded:
        raise
    except UsageError as exc:
        raise InvalidRequest(f"the payload is malformed: {exc}") from exc


def read_options(options: Options) -> RunOptions:
    """The options that have a meaning here. Raises `UsageError`."""
    given = {name: value for name, value in options.items() if value is not None}

    def take(name: str, read: Callable[[str, Any], T]) -> T | None:
        return read(name, given[name]) if name in given else None

    return RunOptions(
        tags=take("tags", _tags),
        metadata=_metadata(given.get("metadata"), given.get("metadataType", JSON)),
        idempotency_key=take("idempotencyKey", _text),
        idempotency_key_ttl=take("idempotencyKeyTTL", _span),
        ttl=take("ttl", _ttl),
        delay=take("delay", _delay),
        max_duration=take("maxDuration", _max_duration),
    )


def _tags(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise UsageError(f"{name} is {_shown(value)}; allowed are a string and a list of strings")
    return value


def _metadata(value: Any, type: Any) -> dict[str, Any] | None:
    """An object, or the text of one."""
    if isinstance(value, str) and type in (JSON, SUPERJSON):
        try:
            data = value.encode("utf-8", "replace")
            value = decode(data if type == JSON else superjson.parse(data).json)
        except UsageError as exc:
            raise UsageError(f"metadata is malformed: {exc}") from exc
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"metadata is {_shown(value)}; allowed is an object")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} is {_shown(value)}; allowed is a string")
    return value


def _span(name: str, value: Any) -> Span:
    parse_span(_text(name, value), name=name)
    return str(value)


def _ttl(name: str, value: Any) -> Span | None:
    """A span, or whole seconds; none of them is no limit."""
    if type(value) is not int:
        return _span(name, value)
    return parse_span(value, name=name) if value else None


def _delay(name: str, value: Any) -> Span | datetime:
    """A span, or a time: clients send a `Date` as text with a zone."""
    text = _text(name, value)
    try:
        parse_span(text, name=name)
    except UsageError:
        return _time(name, text)
    return text


def _time(name: str, text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise UsageError(
            f"{name} is {shown(text)}; allowed are spans like '90s', '15m', '1h30m' and times like"
            " '2026-01-15T09:30:00Z', with a time zone"
        )
    return time


def _max_duration(name: str, value: Any) -> Span | None:
    """Seconds. The client's `timeout.None` is 68 years."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} is {_shown(value)}; allowed are seconds")
    return None if value >= MAX_SPAN_S else parse_span(value, name=name)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return shown(value)
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")
