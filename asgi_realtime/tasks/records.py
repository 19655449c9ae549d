"""A run before it is one: its options, its payload, and the record that is made of both.

Everything that a caller may get wrong is refused here, before anything happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from asgi_realtime.core.config import MAX_SPAN_S, Limits, Retention, Span, parse_span
from asgi_realtime.core.errors import LimitExceeded, UsageError
from asgi_realtime.core.metadata import check_key as check_metadata_key
from asgi_realtime.core.metadata import check_size, normalize_value
from asgi_realtime.core.names import check_key, check_tags
from asgi_realtime.core.runs import RunRecord, Status
from asgi_realtime.runs.ids import new_run_id
from asgi_realtime.tasks.task import Task


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run may be started with."""

    tags: str | Iterable[str] | None = None
    metadata: Mapping[str, Any] | None = None
    idempotency_key: str | None = None
    idempotency_key_ttl: Span | None = None
    ttl: Span | None = None
    delay: Span | datetime | None = None
    max_duration: Span | None = None


@dataclass(frozen=True, slots=True)
class Payload:
    """A payload as JSON on one line; None if there is none, which the task sees as null."""

    json: bytes | None
    meta_json: bytes | None = None
    """What superjson says of it, checked: `core.superjson`."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that may be created, and for how long its idempotency key is to stand for it."""

    record: RunRecord
    key_ttl_s: float


class Records:
    """Makes the records of runs as they begin. `owner` is this process."""

    def __init__(
        self, *, limits: Limits, retention: Retention, now_ms: Callable[[], int], owner: Callable[[], str]
    ) -> None:
        self._limits = limits
        self._retention = retention
        self._now_ms = now_ms
        self._owner = owner

    def new_open_run(
        self, name: str, *, tags: str | Iterable[str] | None, metadata: Mapping[str, Any] | None
    ) -> RunRecord:
        """A run that this process executes from its begin on."""
        now_ms = self._now_ms()
        run_id = new_run_id()
        return RunRecord(
            id=run_id,
            task=check_key(name, self._limits, what="task id"),
            status=Status.EXECUTING,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            started_at_ms=now_ms,
            tags=check_tags(tags, self._limits),
            metadata=self._checked_metadata(metadata),
            root_id=run_id,
            owner=self._owner(),
        )

    def triggered(self, task: Task[Any, Any], payload: Payload, options: RunOptions) -> Prepared:
        """A run that waits for its task. The payload has been checked against the task."""
        record = self.new_open_run(task.id, tags=options.tags, metadata=options.metadata)
        now_ms = record.created_at_ms
        delay_ms = _delay_ms(options.delay, now_ms)
        ttl_s = None if options.ttl is None else parse_span(options.ttl, name="ttl")
        key, key_ttl_s = self._checked_key(options.idempotency_key, options.idempotency_key_ttl)
        record = msgspec.structs.replace(
            record,
            status=Status.DELAYED if delay_ms else Status.QUEUED,
            owner=None,
            started_at_ms=None,
            queued_at_ms=None if delay_ms else now_ms,
            delay_until_ms=now_ms + delay_ms if delay_ms else None,
            ttl_s=ttl_s,
            expires_at_ms=None if ttl_s is None else now_ms + delay_ms + round(ttl_s * 1000),
            max_duration_s=_shorter(task.max_duration_s, options.max_duration),
            payload_json=payload.json,
            payload_meta_json=payload.meta_json,
            idempotency_key=key,
        )
        return Prepared(record, key_ttl_s)

    def _checked_metadata(self, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
        if metadata is None:
            return {}
        if not isinstance(metadata, Mapping):
            raise UsageError(f"metadata is a {type(metadata).__name__}; allowed is a dict")
        for key in metadata:
            check_metadata_key(key)
        normal: dict[str, Any] = normalize_value(dict(metadata))
        check_size(normal, self._limits.metadata_bytes)
        return normal

    def _checked_key(self, key: str | None, ttl: Span | None) -> tuple[str | None, float]:
        ttl_s = self._retention.idempotency_key if ttl is None else parse_span(ttl, name="idempotency_key_ttl")
        return None if key is None else check_idempotency_key(key, self._limits), ttl_s


def check_idempotency_key(key: object, limits: Limits) -> str:
    """Raises `UsageError`, `LimitExceeded`."""
    if not isinstance(key, str) or not key:
        raise UsageError(f"idempotency_key is {key!r}; allowed is a str that is not empty")
    if len(key) > limits.idempotency_key_length:
        raise LimitExceeded(f"idempotency_key is {len(key)} characters, limit {limits.idempotency_key_length}")
    if any("\ud800" <= character <= "\udfff" for character in key):
        raise UsageError(f"idempotency_key {key!r} has half of a surrogate pair, which no encoding has room for")
    return key


def _delay_ms(delay: Span | datetime | None, now_ms: int) -> int:
    """How long a run is to wait. A time that is over is no delay: clocks differ."""
    if delay is None:
        return 0
    if not isinstance(delay, datetime):
        return round(parse_span(delay, name="delay") * 1000)
    if delay.tzinfo is None:
        raise UsageError(f"delay is {delay.isoformat()}, without a time zone; say which, such as {delay.isoformat()}Z")
    delay_ms = round(delay.timestamp() * 1000) - now_ms
    if delay_ms >= MAX_SPAN_S * 1000:
        raise UsageError(f"delay is {delay.isoformat()}; it must be less than ten years from now")
    return max(0, delay_ms)


def _shorter(of_task: float | None, of_run: Span | None) -> float | None:
    """The time that a run may take: what its task may, or less."""
    given = None if of_run is None else parse_span(of_run, name="max_duration")
    return min((seconds for seconds in (of_task, given) if seconds is not None), default=None)
