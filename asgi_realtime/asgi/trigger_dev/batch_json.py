"""A batch as JSON, in the form of `GET /api/v2/batches/{id}`.

The official clients require some fields, which are always present, and treat others as optional, which are absent
rather than null.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asgi_realtime.core.chunks import encode_value
from asgi_realtime.core.run_json import iso
from asgi_realtime.core.runs import RunRecord


@dataclass(frozen=True, slots=True)
class BatchRun:
    """A run of a batch without its payload and output, which can be large."""

    id: str
    is_completed: bool
    created_at_ms: int
    updated_at_ms: int
    index: int
    """Its position among the runs of the batch."""
    count: int
    """The number of these runs."""

    @classmethod
    def of(cls, record: RunRecord) -> BatchRun:
        batch = record.batch
        index, count = (0, 0) if batch is None else (batch.index, batch.count)
        return cls(record.id, record.is_completed, record.created_at_ms, record.updated_at_ms, index, count)


def batch_json(
    batch_id: str,
    runs: Sequence[BatchRun],
    *,
    count: int | None = None,
    created_at_ms: int | None = None,
    idempotency_key: str | None = None,
    waits: bool = False,
    whole: bool = True,
) -> bytes:
    """Encode a batch. `runs` are the runs that still exist, in the order of the items.

    The other arguments are known for batches created over HTTP: `waits` while items are missing, `whole` once all runs
    have been created.
    """
    if created_at_ms is None:
        created_at_ms = min((run.created_at_ms for run in runs), default=0)
    launched_at_ms = max((run.created_at_ms for run in runs), default=0)
    batch: dict[str, Any] = {
        "id": batch_id,
        "status": "PENDING" if waits else _status(runs, whole=whole),
        "createdAt": iso(created_at_ms),
        "updatedAt": iso(max(created_at_ms, *(run.updated_at_ms for run in runs), 0)),
        "runCount": max((run.count for run in runs), default=0) if count is None else count,
        "runs": [run.id for run in runs],
        "processing": {"errors": []} | ({} if waits else {"completedAt": iso(max(created_at_ms, launched_at_ms))}),
    }
    if idempotency_key is not None:
        batch["idempotencyKey"] = idempotency_key
    return encode_value(batch)


def _status(runs: Sequence[BatchRun], *, whole: bool) -> str:
    if not all(run.is_completed for run in runs):
        return "PROCESSING"
    if whole:
        return "COMPLETED"
    return "PARTIAL_FAILED" if runs else "ABORTED"
