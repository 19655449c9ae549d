from __future__ import annotations

import pytest

from asgi_realtime.core.batch_progress import BatchProgress
from asgi_realtime.core.runs import BatchMember, Status, StoredRecord


def member(index: int, status: Status = Status.QUEUED, *, count: int = 3) -> StoredRecord:
    return StoredRecord(
        id=f"run_{index}",
        task="t",
        status=status,
        created_at_ms=1,
        updated_at_ms=1,
        batch=BatchMember("batch_1", index, count),
    )


def test_a_batch_is_over_once_its_last_run_was_seen_and_none_is_open() -> None:
    progress = BatchProgress()
    progress.add(member(0, Status.COMPLETED))
    assert not progress.is_over
    progress.add(member(2, Status.EXECUTING))
    assert not progress.is_over
    progress.add(member(2, Status.FAILED))
    assert progress.is_over


@pytest.mark.parametrize("status", [Status.DELAYED, Status.QUEUED, Status.EXECUTING])
def test_a_run_in_any_open_status_keeps_it_open(status: Status) -> None:
    progress = BatchProgress(closed=True)
    progress.add(member(0, status))
    assert not progress.is_over


def test_a_closed_batch_can_be_empty() -> None:
    assert BatchProgress(closed=True).is_over
    assert not BatchProgress().is_over


def test_runs_that_no_longer_exist_count_as_over() -> None:
    progress = BatchProgress()
    progress.add(member(1))
    progress.add(member(2))
    progress.retain({"run_1"})
    assert not progress.is_over
    progress.retain(())
    assert progress.is_over


def test_a_run_outside_of_any_batch_does_not_complete_one() -> None:
    progress = BatchProgress()
    progress.add(StoredRecord(id="run_1", task="t", status=Status.COMPLETED, created_at_ms=1, updated_at_ms=1))
    assert not progress.is_over
