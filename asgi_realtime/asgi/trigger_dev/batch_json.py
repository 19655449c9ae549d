"""A batch as JSON, in the form of `GET /api/v2/batches/{id}`.

The official clients require some fields, which are always present, and treat others as optional, which are absent
rather than null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.runs import StoredRecord, iso
from asgi_realtime.tasks.batch_records import BatchRecord


def batch_json(batch_id: str, runs: Sequence[StoredRecord], batch: BatchRecord | None, *, now_ms: int) -> bytes:
    """Encode a batch. `runs` are the runs that still exist, in the order of the items.

    `batch` is None if only the runs are stored, as for a batch that was triggered in process.
    """
    launched_at_ms = max((run.created_at_ms for run in runs), default=0)
    if batch is None:
        created_at_ms = min((run.created_at_ms for run in runs), default=0)
        count = max((run.batch.count for run in runs if run.batch is not None), default=0)
        whole, waits, key = True, False, {}
    else:
        created_at_ms, count = batch.created_at_ms, batch.count
        whole = batch.is_sealed or batch.last_id in {None, *(run.id for run in runs)}
        waits = not whole and not batch.is_closed(now_ms)
        key = {} if batch.idempotency_key is None else {"idempotencyKey": batch.idempotency_key}
    encoded: dict[str, Any] = {
        "id": batch_id,
        "status": "PENDING" if waits else _status(runs, whole=whole),
        "createdAt": iso(created_at_ms),
        "updatedAt": iso(max(created_at_ms, *(run.updated_at_ms for run in runs), 0)),
        "runCount": count,
        "runs": [run.id for run in runs],
        "processing": {"errors": []} | ({} if waits else {"completedAt": iso(max(created_at_ms, launched_at_ms))}),
    }
    return encode_value(encoded | key)


def _status(runs: Sequence[StoredRecord], *, whole: bool) -> str:
    """`whole`: all runs of the batch have been created."""
    if not all(run.is_completed for run in runs):
        return "PROCESSING"
    if whole:
        return "COMPLETED"
    return "PARTIAL_FAILED" if runs else "ABORTED"
