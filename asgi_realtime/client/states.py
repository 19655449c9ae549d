"""A run as the server tells of it: the JSON of docs/protocol.md, section 6, with the names of `RunRecord`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

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
    """One state of a run. What the token keeps from its holder is empty or None."""

    id: str
    task: str
    status: str
    """Equal to one of `Status`, or a word of a later server."""
    is_queued: bool
    is_executing: bool
    is_completed: bool
    """The run is over, whatever its result."""
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
    """The keys of the streams that were written."""
    depth: int = 0
    idempotency_key: str | None = None
    ttl: str | None = None
    batch_id: str | None = None


decode_state = msgspec.json.Decoder(RunState).decode
