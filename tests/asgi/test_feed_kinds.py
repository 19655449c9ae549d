from __future__ import annotations

import pytest

from asgi_realtime.asgi.feed_kinds import BatchFeed
from asgi_realtime.core.runs import Status, StoredRecord


@pytest.mark.parametrize(("status", "is_over"), [(Status.EXECUTING, False), (Status.COMPLETED, True)])
def test_the_feed_of_a_closed_batch_ends_with_its_open_runs(status: Status, is_over: bool) -> None:
    feed = BatchFeed("batch_1", closed=True)
    assert feed.end is not None, "without a run, nothing is left to wait for"
    feed.note(StoredRecord(id="run_1", task="chat", status=status, created_at_ms=0, updated_at_ms=0))
    assert (feed.end is not None) is is_over
