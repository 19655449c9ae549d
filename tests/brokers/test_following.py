"""Following a topic: no change is missed between the read and the wait."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from asgi_realtime.brokers import MemoryBroker
from asgi_realtime.brokers.base import ChangeMark, Changes, Cursor
from asgi_realtime.brokers.following import Follower, following
from asgi_realtime.core.runs import Status, StoredRecord
from asgi_realtime.loop.waiting import WaitList, make_waiter
from tests.inprocess import GUARD_S

pytestmark = pytest.mark.anyio


class QuietTopic:
    """A topic without changes."""

    def __init__(self) -> None:
        self.waiting = WaitList()
        self.failure: Exception | None = None

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        return Changes(Cursor("epoch", 0), [], snapshot=False)


class ChangingTopic(QuietTopic):
    """A topic that changes during each read, too late for its answer."""

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        found = await super().changes(cursor, limit=limit)
        await anyio.lowlevel.checkpoint()
        self.waiting.wake()
        return found


async def test_a_change_during_the_read_ends_the_wait() -> None:
    with Follower(ChangingTopic()) as follower, anyio.fail_after(GUARD_S):
        await follower.changes(None)
        await follower.wait()


async def test_a_follower_waits_at_every_list_that_was_added() -> None:
    topic, other = QuietTopic(), WaitList()
    with Follower(topic) as follower, anyio.fail_after(GUARD_S):
        await follower.changes(None)
        follower.add(other)
        other.wake()
        await follower.wait()
        for waiting in (topic.waiting, other):
            await follower.changes(None)
            waiting.wake()
            await follower.wait()
        await follower.changes(None)
    assert not len(topic.waiting) + len(other)


async def test_the_waiter_of_the_caller_ends_the_wait_too() -> None:
    waiter = make_waiter()
    with Follower(QuietTopic(), waiter=waiter) as follower, anyio.fail_after(GUARD_S):
        await follower.changes(None)
        waiter.wake()
        await follower.wait()


async def test_a_cancelled_follower_leaves_no_waiter() -> None:
    async with MemoryBroker() as broker, broker.follow("tag:a") as topic:
        with anyio.move_on_after(0.01):
            async with following(broker, "tag:a") as follower:
                await follower.changes(None)
                assert len(topic.waiting) == 1
                await follower.wait()
        assert not len(topic.waiting)


async def test_following_reports_each_commit() -> None:
    run = StoredRecord(id="run_1", task="t", status=Status.QUEUED, tags=("a",), created_at_ms=1, updated_at_ms=1)
    async with MemoryBroker() as broker, following(broker, "tag:a") as follower:
        assert not (await follower.changes(None)).items
        await broker.commit(run, expect=0, change=ChangeMark("us", 0))
        with anyio.fail_after(GUARD_S):
            await follower.wait()
        assert [change.run_id for change in (await follower.changes(None)).items] == ["run_1"]
