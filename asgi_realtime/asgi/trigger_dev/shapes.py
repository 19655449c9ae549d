"""Runs as rows of a shape: the data model of the run feeds that the official clients poll.

A shape is a set of rows that a client holds and updates by requesting the changes after its offset. Every value of a
row is text or null, in the format that Postgres prints, and a client parses it by the schema. A row is
always complete, so it can be sent again at any time. Pure: rows and cursors in, bytes out. Spec: docs/protocol.md, and
the HTTP API of Electric, whose client reads this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from typing import NamedTuple

import msgspec

from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.run_columns import SKIPPABLE_COLUMNS
from asgi_realtime.core.runs import Status, StoredRecord, iso

WIRE_STATUS: dict[Status, str] = {
    Status.DELAYED: "DELAYED",
    Status.QUEUED: "PENDING",
    Status.EXECUTING: "EXECUTING",
    Status.COMPLETED: "COMPLETED_SUCCESSFULLY",
    Status.FAILED: "COMPLETED_WITH_ERRORS",
    Status.CANCELED: "CANCELED",
    Status.CRASHED: "CRASHED",
    Status.EXPIRED: "EXPIRED",
    Status.TIMED_OUT: "TIMED_OUT",
}
"""The statuses in a row. Clients translate them back, and show one that they do not know as QUEUED."""

MUST_REFETCH = b'[{"headers":{"control":"must-refetch"}}]'
_UP_TO_DATE = b'{"headers":{"control":"up-to-date"}}]'

_CURSOR = re.compile(r"(.+)\.([0-9]{1,18}) ([0-9]{1,18})_0", re.DOTALL)
"""A handle and an offset."""
_JSON = "application/json"
_SUPERJSON = "application/super+json"

Encode = Callable[[StoredRecord], "str | None"]


def _timestamp(time_ms: int | None) -> str | None:
    """Without a time zone: the client appends a `Z`, and a date with two of them is invalid."""
    return None if time_ms is None else iso(time_ms).removesuffix("Z")


def _array(items: Iterable[str]) -> str:
    """A Postgres array literal. Every element is quoted, so that `NULL`, braces and commas are text."""
    quoted = (item.replace("\\", "\\\\").replace('"', '\\"') for item in items)
    return "{" + ",".join(f'"{item}"' for item in quoted) + "}"


def _payload(record: StoredRecord) -> str | None:
    if record.payload_json is None:
        return None
    payload = record.payload_json.decode()
    meta = record.payload_meta_json
    return payload if meta is None else f'{{"json":{payload},"meta":{meta.decode()}}}'


def _error(record: StoredRecord) -> str | None:
    if record.error is None:
        return None
    error = {"type": "BUILT_IN_ERROR", "name": record.error.name, "message": record.error.message, "stackTrace": ""}
    return encode_value(error).decode()


_COLUMNS: dict[str, tuple[str, Encode]] = {
    "id": ("text", lambda record: record.id),
    "taskIdentifier": ("text", lambda record: record.task),
    "createdAt": ("timestamp", lambda record: _timestamp(record.created_at_ms)),
    "updatedAt": ("timestamp", lambda record: _timestamp(record.updated_at_ms)),
    "startedAt": ("timestamp", lambda record: _timestamp(record.started_at_ms)),
    "delayUntil": ("timestamp", lambda record: _timestamp(record.delay_until_ms)),
    "queuedAt": ("timestamp", lambda record: _timestamp(record.queued_at_ms)),
    "expiredAt": (
        "timestamp",
        lambda record: _timestamp(record.completed_at_ms) if record.status is Status.EXPIRED else None,
    ),
    "completedAt": ("timestamp", lambda record: _timestamp(record.completed_at_ms)),
    "friendlyId": ("text", lambda record: record.id),
    "number": ("int4", lambda record: "0"),
    "isTest": ("bool", lambda record: "f"),
    "status": ("text", lambda record: WIRE_STATUS[record.status]),
    "usageDurationMs": ("int4", lambda record: str(record.duration_ms)),
    "costInCents": ("float8", lambda record: "0"),
    "baseCostInCents": ("float8", lambda record: "0"),
    "ttl": ("text", lambda record: record.ttl),
    "payload": ("text", _payload),
    "payloadType": ("text", lambda record: _JSON if record.payload_meta_json is None else _SUPERJSON),
    "metadata": ("text", lambda record: bytes(record.metadata_json).decode()),
    "metadataType": ("text", lambda record: _JSON),
    "output": ("text", lambda record: None if record.output_json is None else record.output_json.decode()),
    "outputType": ("text", lambda record: _JSON),
    "runTags": ("text[]", lambda record: _array(record.tags)),
    "error": ("jsonb", _error),
    "realtimeStreams": ("text[]", lambda record: _array(record.streams)),
    "idempotencyKey": ("text", lambda record: record.idempotency_key),
}
"""The type of each column, and its value for a run. Columns of numbers and booleans must not be null."""


def skippable_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that can be skipped, in schema order; others are ignored."""
    requested = frozenset(columns)
    return tuple(name for name in SKIPPABLE_COLUMNS if name in requested)


@lru_cache(maxsize=64)
def schema(skip: tuple[str, ...] = ()) -> str:
    """The header `electric-schema`, by which a client parses the rows."""
    return encode_value({name: _column(kind) for name, (kind, _) in _COLUMNS.items() if name not in skip}).decode()


def _column(kind: str) -> dict[str, str | int]:
    return {"type": kind[:-2], "dims": 1} if kind.endswith("[]") else {"type": kind}


def row(record: StoredRecord, skip: Collection[str] = ()) -> bytes:
    """One run as a change message, which replaces the row that a client holds of this run.

    Pass the result of `skippable_columns` as `skip`.
    """
    value = {name: encode(record) for name, (_, encode) in _COLUMNS.items() if name not in skip}
    message = {"key": f'"public"."TaskRun"/"{record.id}"', "value": value, "headers": {"operation": "insert"}}
    return msgspec.json.encode(message)


def body(rows: Iterable[bytes]) -> list[bytes]:
    """The parts of a response: the rows, then the message on which a client shows them."""
    parts = [b"["]
    for one in rows:
        parts += one, b",\n"
    return [*parts, _UP_TO_DATE]


class ShapeCursor(NamedTuple):
    """How much of a shape a client has: everything up to a position in a topic of this epoch.

    `floor_ms` is the creation time after which a list includes runs; the first request of a client fixes it. On the
    wire these are a handle, `<epoch>.<floor>`, and an offset, `<position>_0`, both opaque to clients.
    """

    epoch: str
    floor_ms: int
    position: int

    @property
    def handle(self) -> str:
        return f"{self.epoch}.{self.floor_ms}"

    @property
    def offset(self) -> str:
        return f"{self.position}_0"

    @classmethod
    def parse(cls, handle: str, offset: str) -> ShapeCursor | None:
        """Parse a cursor. None if it was not made by this server, or by one with the same broker."""
        found = _CURSOR.fullmatch(f"{handle} {offset}")
        return None if found is None else cls(found[1], int(found[2]), int(found[3]))
