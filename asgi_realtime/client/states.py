"""The state of a run: the JSON of docs/protocol.md, section 6, under the names of `RunRecord`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from asgi_realtime.core.chunks import decode_as
from asgi_realtime.core.runs import RunError

_NAMES = {
    "task": "taskIdentifier",
    "is_canceled": "isCancelled",
    "streams": "realtimeStreams",
}


def _rename(field: str) -> str:
    head, *rest = field.split("_")
    return _NAMES.get(field) or head + "".join(map(str.title, rest))


class RunState(msgspec.Struct, frozen=True, kw_only=True, rename=_rename):
    """One state of a run. Fields that the token hides are empty or None."""

    id: str
    task: str
    status: str
    """A value of `Status`, or one that a newer server has added."""
    is_queued: bool
    is_executing: bool
    is_completed: bool
    """The run is over, whatever its outcome."""
    is_success: bool
    is_failed: bool
    is_canceled: bool
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    delayed_until: datetime | None = None
    expired_at: datetime | None = None
    duration_ms: int = 0
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}
    payload: Any = None
    output: Any = None
    error: RunError | None = None
    streams: tuple[str, ...] = ()
    """The keys of all streams that were written."""
    depth: int = 0
    idempotency_key: str | None = None
    ttl: str | None = None
    batch_id: str | None = None


def decode_state(data: bytes) -> RunState:
    return decode_as(data, RunState)
