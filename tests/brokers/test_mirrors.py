"""Mirrors of topics and streams, on a fake Redis that the test holds up, breaks and corrects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import pytest

from asgi_realtime.brokers.redis.keys import Keys
from asgi_realtime.brokers.redis.topic_mirror import TopicMirror
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.topics import Change, Changes, Cursor, TopicIndex
from tests.brokers.streaming import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakePubSub:
    """Confirms every subscription at once."""

    def add(self, channel: str, subscriber: object) -> None: ...

    def discard(self, channel: str, subscriber: object) -> None: ...

    def missed(self, channel: str) -> None: ...

    async def confirmed(self, channels: Sequence[str]) -> None: ...


class FakeTopic:
    """The topic as Redis stores it. Reads raise `failure`; while it `holds`, each question waits for its future."""

    def __init__(self) -> None:
        self.index = TopicIndex("epoch", max_runs=10)
        self.failure: Exception | None = None
        self.holds = False
        self.asks: list[asyncio.Future[None]] = []

    def change(self, run_id: str) -> None:
        self.index.put(Change(self.index.position + 1, run_id, 1))

    async def read(self, topic: str) -> TopicIndex:
        if self.failure is not None:
            raise self.failure
        copy = TopicIndex(self.index.epoch, max_runs=10)
        for change in self.index.after(None, limit=10).items:
            copy.put(change)
        return copy

    async def ask(self, topic: str, cursor: Cursor, limit: int) -> Changes:
        changes = self.index.after(cursor, limit=limit)
        answer = asyncio.get_running_loop().create_future()
        self.asks.append(answer)
        if self.holds:
            await answer
        return changes


class Jobs:
    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def spawn(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(job)
        self.tasks.append(task)
        return task


@pytest.fixture
async def jobs() -> AsyncIterator[Jobs]:
    jobs = Jobs()
    yield jobs
    for task in jobs.tasks:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


@pytest.fixture
async def stored() -> FakeTopic:
    return FakeTopic()


@pytest.fixture
async def mirror(stored: FakeTopic, jobs: Jobs) -> TopicMirror:
    mirror = TopicMirror(
        "tag:a",
        read=stored.read,
        ask=stored.ask,
        keys=Keys("test"),
        pubsub=FakePubSub(),  # type: ignore[arg-type]
        spawn=jobs.spawn,
    )
    await mirror.joined()
    return mirror


async def run_ids(mirror: TopicMirror) -> list[str]:
    return [change.run_id for change in (await mirror.changes(None)).items]


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_refresh_that_did_not_happen_is_not_shared(stored: FakeTopic, mirror: TopicMirror, how: str) -> None:
    """A follower shared the refresh of another, whose client had left, and missed a committed change."""
    stored.holds = True
    first = asyncio.create_task(mirror.refresh())
    await until(lambda: len(stored.asks) == 1)
    second, third = (asyncio.create_task(mirror.refresh()) for _ in range(2))
    await asyncio.sleep(0)
    stored.asks[0].set_result(None)
    await until(lambda: len(stored.asks) == 2)
    stored.change("run_1")
    stored.holds = False
    if how == "cancelled":
        second.cancel()
    else:
        stored.asks[1].set_exception(BrokerUnavailable("the connection was lost"))
    await asyncio.gather(first, third)
    assert await run_ids(mirror) == ["run_1"]
    with pytest.raises((asyncio.CancelledError, BrokerUnavailable)):
        await second


async def test_callers_share_a_refresh_that_began_after_they_called(stored: FakeTopic, mirror: TopicMirror) -> None:
    stored.holds = True
    first = asyncio.create_task(mirror.refresh())
    await until(lambda: len(stored.asks) == 1)
    later = [asyncio.create_task(mirror.refresh()) for _ in range(5)]
    await asyncio.sleep(0)
    stored.holds = False
    stored.asks[0].set_result(None)
    await asyncio.gather(first, *later)
    assert len(stored.asks) == 2


async def test_a_topic_that_cannot_be_read_says_so(stored: FakeTopic, mirror: TopicMirror, jobs: Jobs) -> None:
    """Its followers kept the old index for ever: feeds and `RunWatch` were silently deaf."""
    woken = asyncio.create_task(mirror.waiting.wait())
    await asyncio.sleep(0)
    stored.failure = ValueError("an answer of another version")
    mirror.check(routine=False)
    async with asyncio.timeout(5):
        await woken
    with pytest.raises(BrokerUnavailable, match="an answer of another version"):
        await mirror.changes(None)
    with pytest.raises(BrokerUnavailable, match="an answer of another version"):
        async with asyncio.timeout(5):
            await mirror.refresh()
    mirror.on_message(b"t epoch 0 1 1 run_1")
    assert not mirror._pending, "messages are not retained for a reading that will never come"


async def test_who_refreshes_while_the_topic_becomes_unreadable_hears_of_it(
    stored: FakeTopic, mirror: TopicMirror, jobs: Jobs
) -> None:
    stored.failure = ValueError("an answer of another version")
    mirror.check(routine=False)
    with pytest.raises(BrokerUnavailable, match="an answer of another version"):
        async with asyncio.timeout(5):
            await mirror.refresh()
