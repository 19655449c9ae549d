"""A batch as JSON, in the form of `GET /api/v2/batches/{id}` of the official clients.

What is required there is always present, what is optional is absent and never null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.run_json import iso
from asgi_realtime.core.runs import RunRecord


def batch_json(
    batch_id: str,
    members: Sequence[RunRecord],
    *,
    run_ids: Sequence[str] | None = None,
    count: int | None = None,
    created_at_ms: int | None = None,
    idempotency_key: str | None = None,
    waits: bool = False,
) -> bytes:
    """Encode a batch. `members` are its runs that are still kept, in their order.

    The others are known of one that was created over HTTP: `waits` for items, and `run_ids` where some of them stand
    for earlier runs, which are no members.
    """
    if created_at_ms is None:
        created_at_ms = min((member.created_at_ms for member in members), default=0)
    launched_at_ms = max((member.created_at_ms for member in members), default=created_at_ms)
    batch: dict[str, Any] = {
        "id": batch_id,
        "status": _status(members, waits=waits),
        "createdAt": iso(created_at_ms),
        "updatedAt": iso(max((member.updated_at_ms for member in members), default=created_at_ms)),
        "runCount": _count(members) if count is None else count,
        "runs": [member.id for member in members] if run_ids is None else run_ids,
        "processing": {"errors": []} | ({} if waits else {"completedAt": iso(launched_at_ms)}),
    }
    if idempotency_key is not None:
        batch["idempotencyKey"] = idempotency_key
    return encode_value(batch)


def _status(members: Sequence[RunRecord], *, waits: bool) -> str:
    if waits:
        return "PENDING"
    return "COMPLETED" if all(member.is_completed for member in members) else "PROCESSING"


def _count(members: Sequence[RunRecord]) -> int:
    return max((member.batch.count for member in members if member.batch is not None), default=0)
