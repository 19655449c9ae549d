"""A run as one line of JSON, with or without the fields that a reader wants to skip.

Required fields are always present; optional fields are absent instead of null. Spec: docs/protocol.md, section 6, and
`retrieveRun` in the API of Trigger.dev.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.runs import StoredRecord

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


def run_json(record: StoredRecord, skip: Collection[str] = ()) -> bytes:
    """Encode a run as one line of JSON. `skip` names the fields, or columns of a run feed, to omit."""
    fields = record.json_fields()
    for name in skip:
        name = _COLUMNS.get(name, name)
        if name in _EMPTY:
            fields[name] = _EMPTY[name]
        elif name in _SKIPPABLE:
            fields.pop(name, None)
    return encode_value(fields)
