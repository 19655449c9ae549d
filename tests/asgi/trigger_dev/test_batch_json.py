from __future__ import annotations

import json
from typing import Any

import pytest

from asgi_realtime.asgi.trigger_dev.batch_json import batch_json
from asgi_realtime.core.runs import TERMINAL, BatchMember, Status, StoredRecord
from asgi_realtime.tasks.batch_records import BatchRecord


def member(index: int, status: Status, *, created_ms: int = 1000, updated_ms: int = 2000) -> StoredRecord:
    return StoredRecord(
        id=f"run_{index}",
        task="t",
        status=status,
        created_at_ms=created_ms,
        updated_at_ms=updated_ms,
        batch=BatchMember("batch_1", index, 3),
    )


def encoded(*members: StoredRecord, record: BatchRecord | None = None) -> dict[str, Any]:
    batch: dict[str, Any] = json.loads(batch_json("batch_1", members, record, now_ms=50))
    return batch


def stored(count: int = 3, created_ms: int = 7, **fields: Any) -> BatchRecord:
    return BatchRecord("batch_1", count, created_ms, **fields)


def test_a_batch_is_described_by_its_runs() -> None:
    first = member(0, Status.COMPLETED, updated_ms=5000)
    second = member(1, Status.EXECUTING, created_ms=1500)
    assert encoded(first, second) == {
        "id": "batch_1",
        "status": "PROCESSING",
        "createdAt": "1970-01-01T00:00:01.000Z",
        "updatedAt": "1970-01-01T00:00:05.000Z",
        "runCount": 3,
        "runs": ["run_0", "run_1"],
        "processing": {"errors": [], "completedAt": "1970-01-01T00:00:01.500Z"},
    }


@pytest.mark.parametrize("status", Status)
def test_a_batch_is_complete_when_all_its_runs_are_over(status: Status) -> None:
    batch = encoded(member(0, Status.COMPLETED), member(1, status))
    assert batch["status"] == ("COMPLETED" if status in TERMINAL else "PROCESSING")


def test_known_values_take_precedence_over_those_of_the_runs() -> None:
    assert encoded(record=stored(2, waits_until_ms=100, idempotency_key="k")) == {
        "id": "batch_1",
        "status": "PENDING",
        "createdAt": "1970-01-01T00:00:00.007Z",
        "updatedAt": "1970-01-01T00:00:00.007Z",
        "runCount": 2,
        "runs": [],
        "processing": {"errors": []},
        "idempotencyKey": "k",
    }
    batch = encoded(member(0, Status.QUEUED, updated_ms=1), record=stored(created_ms=5000, is_sealed=True))
    assert (batch["runCount"], batch["runs"]) == (3, ["run_0"])
    assert batch["createdAt"] == batch["updatedAt"] == batch["processing"]["completedAt"] == "1970-01-01T00:00:05.000Z"


@pytest.mark.parametrize(
    ("members", "status"),
    [
        ([], "ABORTED"),
        ([member(0, Status.COMPLETED)], "PARTIAL_FAILED"),
        ([member(0, Status.COMPLETED), member(1, Status.QUEUED)], "PROCESSING"),
    ],
)
def test_a_batch_without_all_its_runs_is_never_complete(members: list[StoredRecord], status: str) -> None:
    assert encoded(*members, record=stored())["status"] == status
