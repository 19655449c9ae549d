"""Runs as immutable versioned records, as brokers store them.

`TRANSITIONS` defines which status can follow which. `run_changes.py` has the only function that changes a record, and
`run_record.py` what users and subscribers see of it. A record never contains a stack trace.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from sys import getsizeof
from typing import Any

import msgspec

from asgi_realtime.core.chunks import decode
from asgi_realtime.core.log import End
from asgi_realtime.core.metadata import NO_METADATA


class Status(StrEnum):
    """The status of a run. The last six are terminal."""

    DELAYED = "DELAYED"
    QUEUED = "QUEUED"
    EXECUTING = "EXECUTING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"
    CRASHED = "CRASHED"
    EXPIRED = "EXPIRED"
    TIMED_OUT = "TIMED_OUT"


_S = Status
TRANSITIONS: dict[Status, frozenset[Status]] = {
    _S.DELAYED: frozenset({_S.QUEUED, _S.CANCELED, _S.EXPIRED}),
    _S.QUEUED: frozenset({_S.EXECUTING, _S.CANCELED, _S.EXPIRED, _S.FAILED}),
    _S.EXECUTING: frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELED, _S.CRASHED, _S.TIMED_OUT}),
    _S.COMPLETED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELED: frozenset(),
    _S.CRASHED: frozenset(),
    _S.EXPIRED: frozenset(),
    _S.TIMED_OUT: frozenset(),
}
TERMINAL = frozenset(status for status, following in TRANSITIONS.items() if not following)
WAITING = frozenset({_S.DELAYED, _S.QUEUED})

END_REASONS: dict[Status, str] = {
    _S.COMPLETED: "complete",
    _S.FAILED: "failed",
    _S.CANCELED: "canceled",
    _S.CRASHED: "crashed",
    _S.EXPIRED: "expired",
    _S.TIMED_OUT: "timed_out",
}


class RunError(msgspec.Struct, frozen=True):
    """A failure as subscribers see it: the class name, and a message that is safe to show."""

    name: str
    message: str


class BatchMember(msgspec.Struct, frozen=True):
    """The batch of a run, the index of the run in it, and how many runs the batch has."""

    id: str
    index: int
    count: int


class StoredRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename={"metadata_json": "metadata"}):
    """One version of a run's state. Times are unix milliseconds; metadata, payload and output are JSON as stored."""

    id: str
    task: str
    status: Status
    version: int = 1
    created_at_ms: int
    updated_at_ms: int
    queued_at_ms: int | None = None
    started_at_ms: int | None = None
    completed_at_ms: int | None = None
    delay_until_ms: int | None = None
    ttl_s: float | None = None
    expires_at_ms: int | None = None
    cancel_requested_at_ms: int | None = None
    max_duration_s: float | None = None
    tags: tuple[str, ...] = ()
    metadata_json: msgspec.Raw = NO_METADATA
    """Encoded, because a decoded copy can take 30 times as much memory. Storing and sending it needs no decoding."""
    payload_json: bytes | None = None
    payload_meta_json: bytes | None = None
    """The `meta` of superjson, with which JavaScript restores the types of the payload (dates, sets, …)."""
    output_json: bytes | None = None
    error: RunError | None = None
    streams: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    idempotency_key: str | None = None
    thread: str | None = None
    """The thread of the run, of which at most one run is active. Of subscribers, only AG-UI clients see
    it: it is their `threadId`."""
    batch: BatchMember | None = None
    parent_id: str | None = None
    root_id: str | None = None
    depth: int = 0
    owner: str | None = None
    token_owner: str | None = None
    """The owner of the public token that triggered the run, to whom it is charged; None if the host triggered it."""
    traceparent: str | None = None
    """Where the trigger was in a trace (W3C Trace Context). Subscribers do not see it."""
    has_on_end: bool = False
    """Once the run is over, a process that has its task calls the `on_end` of the task."""
    counts_watchers: bool = False
    """Processes report how many readers they have of the run."""
    unwatched_grace_s: float | None = None
    """The run is canceled when it has had a reader, and then none for this long. None: it continues."""

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata, decoded: a new dict at each access."""
        decoded: dict[str, Any] = decode(bytes(self.metadata_json))
        return decoded

    @property
    def payload(self) -> Any:
        """The payload, decoded; None if there is none."""
        return None if self.payload_json is None else decode(self.payload_json)

    @property
    def output(self) -> Any:
        """The output, decoded; None if there is none."""
        return None if self.output_json is None else decode(self.output_json)

    @property
    def is_completed(self) -> bool:
        """Whether the run is over, whatever its result."""
        return self.status in TERMINAL

    @property
    def is_success(self) -> bool:
        return self.status is Status.COMPLETED

    @property
    def is_queued(self) -> bool:
        return self.status in WAITING

    @property
    def is_executing(self) -> bool:
        return self.status is Status.EXECUTING

    @property
    def is_canceled(self) -> bool:
        return self.status is Status.CANCELED

    @property
    def is_failed(self) -> bool:
        return self.status in TERMINAL and self.status not in (Status.COMPLETED, Status.CANCELED)

    @property
    def ttl(self) -> str | None:
        """`ttl_s` as clients write it: `"600s"`."""
        return None if self.ttl_s is None else f"{self.ttl_s:.3f}".rstrip("0").rstrip(".") + "s"

    @property
    def duration_ms(self) -> int:
        """From the start to the end, or to the last change of a run that has not ended."""
        if self.started_at_ms is None:
            return 0
        return (self.completed_at_ms or self.updated_at_ms) - self.started_at_ms

    def json_fields(self) -> dict[str, Any]:
        """The run as in `GET /api/v3/runs/{id}` of the official clients, plus the names of its streams.

        Optional fields are absent instead of null. Payload and output appear as stored.
        """
        return {
            "id": self.id,
            "status": self.status,
            "taskIdentifier": self.task,
            "isQueued": self.is_queued,
            "isExecuting": self.is_executing,
            "isWaiting": False,
            "isCompleted": self.is_completed,
            "isSuccess": self.is_success,
            "isFailed": self.is_failed,
            "isCancelled": self.is_canceled,
            "isTest": False,
            "createdAt": iso(self.created_at_ms),
            "updatedAt": iso(self.updated_at_ms),
            "tags": self.tags,
            "costInCents": 0,
            "baseCostInCents": 0,
            "durationMs": self.duration_ms,
            "depth": self.depth,
            "triggerFunction": "trigger" if self.batch is None else "batchTrigger",
            "relatedRuns": {},
            "metadata": self.metadata_json,
            "realtimeStreams": self.streams,
            **self._optional_fields(),
        }

    def _optional_fields(self) -> dict[str, Any]:
        optional = {
            "startedAt": _iso_or_none(self.started_at_ms),
            "finishedAt": _iso_or_none(self.completed_at_ms),
            "delayedUntil": _iso_or_none(self.delay_until_ms),
            "expiredAt": _iso_or_none(self.completed_at_ms) if self.status is Status.EXPIRED else None,
            "payload": _raw(self.payload_json),
            "output": _raw(self.output_json),
            "error": None if self.error is None else {"name": self.error.name, "message": self.error.message},
            "idempotencyKey": self.idempotency_key,
            "ttl": self.ttl,
            "batchId": None if self.batch is None else self.batch.id,
        }
        return {name: value for name, value in optional.items() if value is not None}

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that list this run, except its own."""
        batch = () if self.batch is None else (batch_topic(self.batch.id),)
        owner = () if self.token_owner is None else (owner_topic(self.token_owner),)
        return (*map(tag_topic, self.tags), *batch, *owner)

    @property
    def claim(self) -> str | None:
        """The claim that maps the idempotency key to one run of the task. It is made before the run is created.

        The keys of an owner are its own, or a guessed key would find, or take, the run of another user or the host.
        """
        if self.idempotency_key is None:
            return None
        key = f"{self.task}/{self.idempotency_key}"
        return f"idempotency:{key}" if self.token_owner is None else f"idempotency-of:{owned(self.token_owner, key)}"

    @property
    def thread_claim(self) -> str | None:
        """The claim of the run's thread. Its value is the run that is active, or was."""
        return None if self.thread is None else thread_claim(self.thread, self.token_owner)

    @property
    def claims(self) -> tuple[str, ...]:
        """The claims whose value can be this run. They are removed with it."""
        return tuple(claim for claim in (self.claim, self.thread_claim) if claim is not None)

    @property
    def end(self) -> End | None:
        """How the streams of the run end; None while it is not over."""
        if self.status not in TERMINAL:
            return None
        return End(END_REASONS[self.status], None if self.error is None else self.error.message)


def content_bytes(record: StoredRecord) -> int:
    """What the JSON and the texts of a run take in memory, without the objects around them."""
    return (
        len(record.metadata_json)
        + len(record.payload_json or b"")
        + len(record.payload_meta_json or b"")
        + len(record.output_json or b"")
        + (0 if record.error is None else getsizeof(record.error.message))
        + (0 if record.idempotency_key is None else getsizeof(record.idempotency_key))
        + (0 if record.thread is None else getsizeof(record.thread))
        + (0 if record.token_owner is None else getsizeof(record.token_owner))
        + (0 if record.traceparent is None else getsizeof(record.traceparent))
        + sum(map(getsizeof, record.tags))
    )


def _raw(data: bytes | None) -> msgspec.Raw | None:
    return None if data is None else msgspec.Raw(data)


def iso(time_ms: int) -> str:
    """A time in ISO 8601: UTC, with milliseconds."""
    seconds, milliseconds = divmod(time_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{milliseconds:03}Z"


def _iso_or_none(time_ms: int | None) -> str | None:
    return None if time_ms is None else iso(time_ms)


def owned(owner: str, name: str) -> str:
    """A name in the namespace of an owner. Both can be any text, and no two pairs give the same name."""
    return f"{len(owner)}:{owner}:{name}"


def thread_claim(thread: str, token_owner: str | None) -> str:
    """The claim of a thread. The threads of an owner of public tokens are its own, as its idempotency keys are."""
    return f"thread:{thread}" if token_owner is None else f"thread-of:{owned(token_owner, thread)}"


def run_topic(run_id: str) -> str:
    return f"run:{run_id}"


def tag_topic(tag: str) -> str:
    return f"tag:{tag}"


def batch_topic(batch_id: str) -> str:
    return f"batch:{batch_id}"


def owner_topic(owner: str) -> str:
    """The topic of the runs that are charged to an owner of public tokens. No feed follows it."""
    return f"owner:{owner}"


LEASE_KINDS = ("lease", "enqueue", "on_end")
"""What a run is due for if no process renews it; see `lease_kind`."""

DUE_KINDS = (*LEASE_KINDS, "delay", "ttl", "cancel", "expiry", "unpublished", "unwatched")
"""What a run can be due for. The broker schedules leases, `unpublished` and `unwatched`; `due_times` has the others."""


def lease_kind(record: StoredRecord) -> str | None:
    """What a run in this status needs a process for: to execute it, to start it, or to call its `on_end`."""
    if record.status in TERMINAL:
        return "on_end" if record.has_on_end else None
    return {Status.EXECUTING: "lease", Status.QUEUED: "enqueue"}.get(record.status)


def due_times(record: StoredRecord, *, cancel_s: float, after_end_s: float) -> dict[str, int]:
    """When the run is due, by kind, in unix milliseconds."""
    if record.completed_at_ms is not None:
        return {"expiry": record.completed_at_ms + round(after_end_s * 1000)}
    due: dict[str, int] = {}
    if record.status is Status.DELAYED and record.delay_until_ms is not None:
        due["delay"] = record.delay_until_ms
    if record.status in WAITING and record.expires_at_ms is not None:
        due["ttl"] = record.expires_at_ms
    if record.status is Status.EXECUTING and record.cancel_requested_at_ms is not None:
        due["cancel"] = record.cancel_requested_at_ms + round(cancel_s * 1000)
    return due
