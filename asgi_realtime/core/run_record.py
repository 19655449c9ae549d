"""`RunRecord`: what users see of a run, as a dict that any framework can send.

Its keys are those of the protocol, as in a handle, so a host can return it unchanged: it has nothing that a subscriber
of the run does not see. Its attributes have Python names. Internals stay in the `StoredRecord` behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from asgi_realtime.core.chunks import decode, encode_value
from asgi_realtime.core.runs import BatchMember, RunError, Status, StoredRecord

_JSON_TYPES: Mapping[tuple[str, bool], str] = {
    ("str", False): "id status taskIdentifier createdAt updatedAt triggerFunction",
    ("bool", False): "isQueued isExecuting isWaiting isCompleted isSuccess isFailed isCancelled isTest",
    ("int", False): "costInCents baseCostInCents durationMs depth",
    ("list", False): "tags realtimeStreams",
    ("dict", False): "metadata relatedRuns",
    ("str", True): "startedAt finishedAt delayedUntil expiredAt idempotencyKey ttl batchId",
    ("dict", True): "error",
    ("any", True): "payload output",
}
"""The keys of a record, by their types in a schema of pydantic and by whether they are optional."""


class RunRecord(dict[str, Any]):
    """One version of a run. As a dict, it is the JSON of the run in docs/protocol.md, section 6.

    Routes of any framework can return it. It can be pickled and copied. Later changes of the run do not change it.
    """

    __slots__ = ("_stored",)

    def __init__(self, stored: StoredRecord) -> None:
        super().__init__(decode(encode_value(stored.json_fields())))
        self._stored = stored

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._stored,)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> dict[str, Any]:
        """Makes the class an annotation of a FastAPI route. A schema of pydantic is a dict, so this needs no import."""
        fields = {
            name: {"type": "typed-dict-field", "schema": {"type": type_}, "required": not is_optional}
            for (type_, is_optional), names in _JSON_TYPES.items()
            for name in names.split()
        }
        as_dict = {"type": "typed-dict", "fields": fields, "config": {"title": cls.__name__}}
        serialization = {"type": "function-plain", "function": dict, "return_schema": as_dict}
        return {"type": "is-instance", "cls": cls, "serialization": serialization}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.status}>"

    __str__ = __repr__

    @property
    def id(self) -> str:
        """The id of the run."""
        return self._stored.id

    @property
    def task(self) -> str:
        """The id of its task, or the name that `pipe` or `open_run` gave it."""
        return self._stored.task

    @property
    def status(self) -> Status:
        """Where the run is in its life."""
        return self._stored.status

    @property
    def version(self) -> int:
        """1 for a new run, and one more for each change."""
        return self._stored.version

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the run."""
        return self._stored.tags

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the run."""
        value: dict[str, Any] = self["metadata"]
        return value

    @property
    def payload(self) -> Any:
        """The payload as JSON values; None if there is none."""
        return self.get("payload")

    @property
    def output(self) -> Any:
        """The output as JSON values; None if there is none."""
        return self.get("output")

    @property
    def error(self) -> RunError | None:
        """Why the run failed, as subscribers see it."""
        return self._stored.error

    @property
    def streams(self) -> tuple[str, ...]:
        """The keys of the streams that were written."""
        return self._stored.streams

    @property
    def thread(self) -> str | None:
        """The thread of the run, of which at most one run is active."""
        return self._stored.thread

    @property
    def idempotency_key(self) -> str | None:
        """The key that names this run in a repeated trigger."""
        return self._stored.idempotency_key

    @property
    def batch(self) -> BatchMember | None:
        """The batch of the run, and the index of the run in it."""
        return self._stored.batch

    @property
    def parent_id(self) -> str | None:
        """The run that triggered this one."""
        return self._stored.parent_id

    @property
    def root_id(self) -> str | None:
        """The first of the runs that triggered each other; None if no run triggered this one."""
        return self._stored.root_id

    @property
    def depth(self) -> int:
        """0, or one more than the depth of the run that triggered this one."""
        return self._stored.depth

    @property
    def ttl(self) -> str | None:
        """How long the run could wait for its start, such as `"600s"`."""
        return self._stored.ttl

    @property
    def max_duration_s(self) -> float | None:
        """How long the run may execute, if that was set when it was triggered."""
        return self._stored.max_duration_s

    @property
    def is_queued(self) -> bool:
        """The run has not started: DELAYED or QUEUED."""
        return self._stored.is_queued

    @property
    def is_executing(self) -> bool:
        """The run is EXECUTING."""
        return self._stored.is_executing

    @property
    def is_completed(self) -> bool:
        """The run is over, whatever its result."""
        return self._stored.is_completed

    @property
    def is_success(self) -> bool:
        """The run is COMPLETED."""
        return self._stored.is_success

    @property
    def is_failed(self) -> bool:
        """The run is FAILED, CRASHED, EXPIRED or TIMED_OUT."""
        return self._stored.is_failed

    @property
    def is_canceled(self) -> bool:
        """The run is CANCELED."""
        return self._stored.is_canceled

    @property
    def created_at(self) -> datetime:
        """When the run was triggered, in UTC, as all times here."""
        return _utc(self._stored.created_at_ms)

    @property
    def updated_at(self) -> datetime:
        """When this version was stored."""
        return _utc(self._stored.updated_at_ms)

    @property
    def started_at(self) -> datetime | None:
        """When a process began to execute the run."""
        return _utc_or_none(self._stored.started_at_ms)

    @property
    def finished_at(self) -> datetime | None:
        """When the run ended."""
        return _utc_or_none(self._stored.completed_at_ms)

    @property
    def delayed_until(self) -> datetime | None:
        """When a run with a delay is due."""
        return _utc_or_none(self._stored.delay_until_ms)

    @property
    def cancel_requested_at(self) -> datetime | None:
        """When the process that executes the run was asked to cancel it."""
        return _utc_or_none(self._stored.cancel_requested_at_ms)

    @property
    def duration_ms(self) -> int:
        """From the start to the end, or to the last change of a run that has not ended."""
        return self._stored.duration_ms


def _utc(time_ms: int) -> datetime:
    return datetime.fromtimestamp(time_ms / 1000, UTC)


def _utc_or_none(time_ms: int | None) -> datetime | None:
    return None if time_ms is None else _utc(time_ms)
