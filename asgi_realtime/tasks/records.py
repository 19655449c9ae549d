"""Builds the first record of a run from the caller's options and payload.

Everything a caller can get wrong raises here, before anything is stored.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from asgi_realtime.core.config import MAX_SPAN_S, Limits, Retention, Span, parse_span
from asgi_realtime.core.errors import LimitExceeded, UsageError, shown
from asgi_realtime.core.metadata import NO_METADATA, check_metadata_key, check_size, encode_metadata
from asgi_realtime.core.names import check_key, check_run_id, check_tags, check_thread
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.engine.engine import Engine
from asgi_realtime.runs.tracing import current_traceparent
from asgi_realtime.tasks.options import OpenRunOptions, RunOptions, ThreadOptions, check_names, unwatched_fields
from asgi_realtime.tasks.task import Task


class Payload(NamedTuple):
    """A payload as JSON on one line. None means that there is no payload; the task then receives None."""

    json: bytes | None
    meta_json: bytes | None = None
    """The `meta` of superjson, validated: the types of values that JSON cannot express."""


class Prepared(NamedTuple):
    """A checked run that is not stored yet."""

    record: StoredRecord
    key_ttl_s: float = 0
    """How long its idempotency key names it."""
    replaces: bool = False
    """It cancels the active run of its thread."""

    def under(self, parent: StoredRecord | None) -> Prepared:
        """The same run as a child of `parent`."""
        if parent is None:
            return self
        return self._with(parent_id=parent.id, root_id=parent.root_id or parent.id, depth=parent.depth + 1)

    def triggered_by(self, owner: str | None) -> Prepared:
        """The same run, triggered with a public token of this owner; None if the host triggers it."""
        return self._with(token_owner=owner)

    def renamed(self, run_id: str) -> Prepared:
        """The same run under another id, which is also that of its root if the run has no parent."""
        root_id = run_id if self.record.root_id in (self.record.id, None) else self.record.root_id
        return self._with(id=run_id, root_id=root_id)

    def in_thread(self, options: ThreadOptions, limits: Limits) -> Prepared:
        """The same run in the thread that the options name. Raises `UsageError`, `LimitExceeded`."""
        thread, on_conflict = options.get("thread"), options.get("on_conflict", "reject")
        if on_conflict not in ("reject", "replace"):
            raise UsageError(f"on_conflict is {shown(on_conflict)}; allowed are 'reject' and 'replace'")
        if thread is None:
            if on_conflict == "replace":
                raise UsageError("on_conflict is 'replace', but the run has no thread; pass thread= too")
            return self
        return self._replace(replaces=on_conflict == "replace")._with(thread=check_thread(thread, limits))

    def _with(self, **fields: Any) -> Prepared:
        return self._replace(record=msgspec.structs.replace(self.record, **fields))


class RecordFactory:
    """Builds the records of runs that this process creates."""

    def __init__(self, engine: Engine, *, retention: Retention) -> None:
        self._engine = engine
        self._limits = engine.limits
        self._retention = retention

    def new_open_run(self, name: str, options: OpenRunOptions) -> Prepared:
        """A run that this process executes from its creation on."""
        run_id, tags, metadata = options.get("run_id"), options.get("tags"), options.get("metadata")
        checked_id = None if run_id is None else check_run_id(run_id, self._limits)
        record = self._new(check_key(name, self._limits, what="task id"), Status.EXECUTING, tags, metadata, checked_id)
        record = msgspec.structs.replace(
            record, started_at_ms=record.created_at_ms, owner=self._engine.owner, **unwatched_fields(options)
        )
        return Prepared(record).in_thread(options, self._limits)

    def new_triggered_run(self, task: Task[Any, Any], payload: Payload, options: RunOptions) -> Prepared:
        """A run that waits for its task. The caller has checked the payload against the task."""
        check_names(options, RunOptions)
        ttl, key, key_ttl = options.get("ttl"), options.get("idempotency_key"), options.get("idempotency_key_ttl")
        record = self._new(task.id, Status.QUEUED, options.get("tags"), options.get("metadata"))
        now_ms = record.created_at_ms
        delay_ms = _delay_ms(options.get("delay"), now_ms)
        ttl_s = None if ttl is None else parse_span(ttl, name="ttl")
        record = msgspec.structs.replace(
            record,
            status=Status.DELAYED if delay_ms else Status.QUEUED,
            queued_at_ms=None if delay_ms else now_ms,
            delay_until_ms=now_ms + delay_ms if delay_ms else None,
            ttl_s=ttl_s,
            expires_at_ms=None if ttl_s is None else now_ms + delay_ms + round(ttl_s * 1000),
            max_duration_s=_shorter(task.max_duration_s, options.get("max_duration")),
            has_on_end=task.on_end is not None,
            **(unwatched_fields(options) or task.unwatched),
            payload_json=payload.json,
            payload_meta_json=payload.meta_json,
            idempotency_key=None if key is None else check_idempotency_key(key, self._limits),
        )
        retained_s = self._retention.idempotency_key
        key_ttl_s = retained_s if key_ttl is None else parse_span(key_ttl, name="idempotency_key_ttl")
        return Prepared(record, key_ttl_s).in_thread(options, self._limits)

    def _new(
        self,
        task_id: str,
        status: Status,
        tags: str | Iterable[str] | None,
        metadata: Mapping[str, Any] | None,
        run_id: str | None = None,
    ) -> StoredRecord:
        run_id, now_ms = run_id or new_run_id(), self._engine.runs.now_ms()
        return StoredRecord(
            id=run_id,
            task=task_id,
            status=status,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            tags=check_tags(tags, self._limits),
            metadata_json=NO_METADATA if metadata is None else self._checked_metadata(metadata),
            root_id=run_id,
            traceparent=current_traceparent(),
        )

    def _checked_metadata(self, metadata: Mapping[str, Any]) -> msgspec.Raw:
        if not isinstance(metadata, Mapping):
            raise UsageError(f"metadata is a {type(metadata).__name__}; allowed is a dict")
        for key in metadata:
            check_metadata_key(key)
        encoded = encode_metadata(dict(metadata))
        check_size(encoded, self._limits.metadata_bytes)
        return encoded


def new_run_id() -> str:
    return f"run_{secrets.token_hex(13)}"


def check_idempotency_key(key: object, limits: Limits) -> str:
    """Raises `UsageError`, `LimitExceeded`."""
    if not isinstance(key, str) or not key:
        raise UsageError(f"idempotency_key is {key!r}; allowed is a non-empty str")
    if len(key) > limits.idempotency_key_length:
        raise LimitExceeded(f"idempotency_key is {len(key)} characters, limit {limits.idempotency_key_length}")
    if any("\ud800" <= character <= "\udfff" for character in key):
        raise UsageError(f"idempotency_key {key!r} contains a lone surrogate, which cannot be encoded as UTF-8")
    return key


def _delay_ms(delay: Span | datetime | None, now_ms: int) -> int:
    """How long a run waits. A time in the past means no delay, because clocks differ."""
    if delay is None:
        return 0
    if not isinstance(delay, datetime):
        return round(parse_span(delay, name="delay") * 1000)
    if delay.tzinfo is None:
        raise UsageError(f"delay is {delay.isoformat()}, without a time zone; pass one, such as {delay.isoformat()}Z")
    delay_ms = round(delay.timestamp() * 1000) - now_ms
    if delay_ms >= MAX_SPAN_S * 1000:
        raise UsageError(f"delay is {delay.isoformat()}; it must be less than ten years from now")
    return max(0, delay_ms)


def _shorter(of_task: float | None, of_run: Span | None) -> float | None:
    """The `max_duration` of a run: it can shorten that of its task, not extend it."""
    if of_run is None:
        return of_task
    seconds = parse_span(of_run, name="max_duration")
    return seconds if of_task is None else min(of_task, seconds)
