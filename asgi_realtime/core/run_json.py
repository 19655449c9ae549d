"""A run as JSON, as in `GET /api/v3/runs/{id}` of the official clients, plus the names of its streams.

Required fields are always present; optional fields are absent instead of null. Payload and output appear as stored.
Spec: docs/protocol.md, and `retrieveRun` in the API of Trigger.dev.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec

from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.runs import RunRecord, Status

_COLUMNS = {
    "runTags": "tags",
    "completedAt": "finishedAt",
    "delayUntil": "delayedUntil",
    "usageDurationMs": "durationMs",
}
"""Columns of a run feed whose fields have another name here."""

_EMPTY: dict[str, Any] = {"tags": [], "costInCents": 0, "baseCostInCents": 0, "durationMs": 0, "isTest": False}
"""Required fields that can be skipped: they get these values."""

_SKIPPABLE = frozenset(
    {*_COLUMNS, *_EMPTY, "metadata", "realtimeStreams", "startedAt", "finishedAt", "delayedUntil", "expiredAt"}
    | {"payload", "output", "error", "idempotencyKey", "ttl", "batchId"}
)


def skippable_fields(columns: Iterable[str]) -> tuple[str, ...]:
    """The fields and columns among these that can be skipped, sorted and without duplicates, to use as a cache key."""
    return tuple(sorted(_SKIPPABLE.intersection(columns)))


def run_json(record: RunRecord, skip: Collection[str] = ()) -> bytes:
    """Encode a run as one line of JSON. `skip` names the fields, or columns of a run feed, to omit."""
    fields = _fields(record)
    for name in skip:
        name = _COLUMNS.get(name, name)
        if name in _EMPTY:
            fields[name] = _EMPTY[name]
        elif name in _SKIPPABLE:
            fields.pop(name, None)
    return encode_value(fields)


def _fields(record: RunRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "status": record.status,
        "taskIdentifier": record.task,
        "isQueued": record.is_queued,
        "isExecuting": record.is_executing,
        "isWaiting": False,
        "isCompleted": record.is_completed,
        "isSuccess": record.is_success,
        "isFailed": record.is_failed,
        "isCancelled": record.is_canceled,
        "isTest": False,
        "createdAt": iso(record.created_at_ms),
        "updatedAt": iso(record.updated_at_ms),
        "tags": record.tags,
        "costInCents": 0,
        "baseCostInCents": 0,
        "durationMs": duration_ms(record),
        "depth": record.depth,
        "triggerFunction": "trigger" if record.batch is None else "batchTrigger",
        "relatedRuns": {},
        "metadata": record.metadata,
        "realtimeStreams": record.streams,
        **_optional(record),
    }


def _optional(record: RunRecord) -> dict[str, Any]:
    optional = {
        "startedAt": _iso_or_none(record.started_at_ms),
        "finishedAt": _iso_or_none(record.completed_at_ms),
        "delayedUntil": _iso_or_none(record.delay_until_ms),
        "expiredAt": _iso_or_none(record.completed_at_ms) if record.status is Status.EXPIRED else None,
        "payload": _raw(record.payload_json),
        "output": _raw(record.output_json),
        "error": None if record.error is None else {"name": record.error.name, "message": record.error.message},
        "idempotencyKey": record.idempotency_key,
        "ttl": record.ttl,
        "batchId": None if record.batch is None else record.batch.id,
    }
    return {name: value for name, value in optional.items() if value is not None}


def _raw(data: bytes | None) -> msgspec.Raw | None:
    return None if data is None else msgspec.Raw(data)


def duration_ms(record: RunRecord) -> int:
    """From the start to the end, or to the last change of a run that has not ended."""
    if record.started_at_ms is None:
        return 0
    return (record.completed_at_ms or record.updated_at_ms) - record.started_at_ms


def iso(time_ms: int) -> str:
    """A time in ISO 8601: UTC, with milliseconds."""
    seconds, milliseconds = divmod(time_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{milliseconds:03}Z"


def _iso_or_none(time_ms: int | None) -> str | None:
    return None if time_ms is None else iso(time_ms)
