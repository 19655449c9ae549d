"""The changes of a run, and the only function that applies them.

`apply` is pure: it takes a record, changes and the time, and returns the next record. A run in a terminal status
ignores all changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from asgi_realtime.core.errors import InvalidTransition
from asgi_realtime.core.metadata import Operation, apply_operations, encode_metadata
from asgi_realtime.core.runs import TERMINAL, TRANSITIONS, WAITING, RunError, Status, StoredRecord


class Queued(msgspec.Struct, frozen=True, tag=True):
    """The delay of the run has passed."""


class Started(msgspec.Struct, frozen=True, tag=True):
    """A process claims the run for execution. This happens once per run, so the owner is also the fencing token."""

    owner: str


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The run ended. Output and status change in one version."""

    status: Status
    output_json: bytes | None = None
    error: RunError | None = None


class CancelRequested(msgspec.Struct, frozen=True, tag=True):
    """Cancel the run: immediately if it has not started; otherwise its owner is asked to."""


class TagsAdded(msgspec.Struct, frozen=True, tag=True):
    tags: tuple[str, ...]


class StreamAdded(msgspec.Struct, frozen=True, tag=True):
    name: str


class InputAdded(msgspec.Struct, frozen=True, tag=True):
    """A client sends data to a new input of the run. Counted apart from the streams, which the run itself opens."""

    name: str


class MetadataChanged(msgspec.Struct, frozen=True, tag=True):
    operations: tuple[Operation, ...]


_FieldChange = Queued | Started | Finished | CancelRequested | TagsAdded | StreamAdded | InputAdded
RunChange = _FieldChange | MetadataChanged


def apply(record: StoredRecord, changes: Sequence[RunChange], now_ms: int) -> StoredRecord:
    """Return the record after the changes, one version later; the same object if they have no effect.

    Changes after a terminal status are ignored. Raises `InvalidTransition` for a status that cannot follow the current
    one.
    """
    now_ms = max(now_ms, record.updated_at_ms)
    fields: dict[str, Any] = {}
    operations: list[Operation] = []
    for change in changes:
        if fields.get("status", record.status) in TERMINAL:
            break
        if isinstance(change, MetadataChanged):
            operations += change.operations
        else:
            fields.update(_effect(record, fields, change, now_ms))
    if operations:
        # Compared as JSON, because in Python `True == 1`, and a change from one to the other would be dropped.
        encoded = encode_metadata(apply_operations(record.metadata, operations, strict=False))
        if encoded != record.metadata_json:
            fields["metadata_json"] = encoded
    if not fields:
        return record
    return msgspec.structs.replace(record, version=record.version + 1, updated_at_ms=now_ms, **fields)


def _effect(record: StoredRecord, fields: dict[str, Any], change: _FieldChange, now_ms: int) -> dict[str, Any]:
    """The fields that one change sets, after `fields` were set by earlier changes of the same call."""

    def now(name: str) -> Any:
        return fields[name] if name in fields else getattr(record, name)

    match change:
        case Queued():
            return {**_to(now("status"), Status.QUEUED), "queued_at_ms": now_ms}
        case Started(owner):
            return {**_to(now("status"), Status.EXECUTING), "started_at_ms": now_ms, "owner": owner}
        case Finished(status, output_json, error):
            ended = _to(now("status"), status)
            return {**ended, "completed_at_ms": now_ms, "output_json": output_json, "error": error}
        case CancelRequested() if now("status") in WAITING:
            return {**_to(now("status"), Status.CANCELED), "completed_at_ms": now_ms}
        case CancelRequested():
            return {} if now("cancel_requested_at_ms") is not None else {"cancel_requested_at_ms": now_ms}
        case TagsAdded(tags):
            merged = tuple(dict.fromkeys((*now("tags"), *tags)))
            return {} if merged == now("tags") else {"tags": merged}
        case StreamAdded(name):
            return {} if name in now("streams") else {"streams": (*now("streams"), name)}
        case _:
            return {} if change.name in now("inputs") else {"inputs": (*now("inputs"), change.name)}


def _to(present: Status, following: Status) -> dict[str, Any]:
    if following not in TRANSITIONS[present]:
        allowed = ", ".join(sorted(TRANSITIONS[present])) or "none"
        raise InvalidTransition(f"a run that is {present} cannot become {following}; allowed: {allowed}")
    return {"status": following}
