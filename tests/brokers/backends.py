"""The memory broker for the conformance suite, and two variants that keep the same promises differently."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio

from asgi_realtime.brokers.base import (
    ChangeMark,
    Changes,
    Cursor,
    End,
    LiveTopic,
    Page,
    Position,
    Producer,
    StreamKey,
)
from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.brokers.memory import MemoryBroker, _MemoryTopic
from asgi_realtime.brokers.memory_runs import StoredRun
from asgi_realtime.core.config import Limits, Retention, Timeouts
from asgi_realtime.core.runs import StoredRecord, run_topic
from asgi_realtime.core.topics import TopicIndex
from asgi_realtime.testing.conformance import Backend
from asgi_realtime.testing.conformance.kit import pause


class Clock:
    """Unix seconds that tests move."""

    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds

    async def advance(self, seconds: float) -> None:
        self.seconds += seconds


def held(broker: MemoryBroker) -> int:
    """How many readers, followers and waiters there are, and what is held only for them."""
    streams = [live for run in broker._runs.values() for live in run.streams.values()]
    topics = list(broker._topics.values())
    return (
        sum(live.readers + len(live.waiting) + len(live._slices) for live in streams)
        + sum(topic.followers + len(topic.waiting) for topic in topics)
        + sum(live.log.next == 0 and live.end is None for live in streams)
        + sum(not len(topic.index) for topic in topics)
    )


class Memory:
    """`make_broker` for the memory broker or a variant of it."""

    def __init__(self, factory: Callable[..., MemoryBroker] = MemoryBroker, *, guard_s: float = 10.0) -> None:
        self.factory = factory
        self.guard_s = guard_s

    def __call__(
        self, *, limits: Limits, retention: Retention, timeouts: Timeouts
    ) -> AbstractAsyncContextManager[Backend]:
        return self._opened(limits, retention, timeouts)

    @asynccontextmanager
    async def _opened(self, limits: Limits, retention: Retention, timeouts: Timeouts) -> AsyncIterator[Backend]:
        clock = Clock()
        made = self.factory(limits=limits, retention=retention, timeouts=timeouts, clock=clock)
        async with made as broker:
            yield Backend(broker=broker, peer=broker, now=clock, advance=clock.advance, held=lambda: held(broker))


class RepeatingIndex(TopicIndex):
    """Accepts a version that it has as if it were new."""

    def update(self, run_id: str, version: int) -> bool:
        known = self._entries.get(run_id)
        if known is not None and known.version == version:
            del self._entries[run_id]
        return super().update(run_id, version)


class RepeatingBroker(MemoryBroker):
    """Publishes every change twice, the second time after the commit. The contract is at least once."""

    async def __aenter__(self) -> RepeatingBroker:
        self._later = anyio.create_task_group()
        await self._later.__aenter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self._later.cancel_scope.cancel()
        await self._later.__aexit__(None, None, None)

    def _add_topic(self, topic: str) -> _MemoryTopic:
        entry = super()._add_topic(topic)
        entry.index = RepeatingIndex(entry.index.epoch, max_runs=entry.index.max_runs)
        return entry

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        version = await super().commit(record, expect=expect, change=change, floors=floors)
        self._later.start_soon(self._publish_again, record.id)
        return version

    async def _publish_again(self, run_id: str) -> None:
        await pause(3)
        run = self._runs.get(run_id)
        if run is not None:
            self._publish(run_topic(run_id), run.record)
            self._publish_topics(run)


class DistantBroker(MemoryBroker):
    """Every call suspends, and changes are published after the commit, under a mark, as over a network."""

    async def append(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        await pause(1)
        position = self.append_nowait(key, items, producer=producer, end=end, at=at)
        await pause(1)
        return position

    async def read(self, key: StreamKey, *, after: int = -1, limit: int = 500) -> Page:
        await pause(1)
        page = await super().read(key, after=after, limit=limit)
        await pause(1)
        return page

    async def produced(self, key: StreamKey, producer_id: str) -> int:
        await pause(1)
        counted = await super().produced(key, producer_id)
        await pause(1)
        return counted

    @asynccontextmanager
    async def live(self, key: StreamKey) -> AsyncIterator[LiveLog]:
        await pause(1)
        async with super().live(key) as live:
            await pause(1)
            yield live

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        await pause(1)
        version = await super().commit(record, expect=expect, change=change, floors=floors)
        await pause(1)
        await self.publish(record.id)
        await pause(1)
        return version

    def _publish_topics(self, run: StoredRun) -> None:
        self._due["unpublished"].set(run.record.id, self._now_ms() + 1000)

    async def publish(self, run_id: str) -> None:
        run = self._runs.get(run_id)
        for topic in () if run is None else run.record.topics:
            await pause(1)
            if run_id in self._runs and run is not None:
                self._publish(topic, run.record)
        if run_id in self._runs and run is not None:
            super()._publish_topics(run)  # including what was committed during the calls
            self._due["unpublished"].set(run_id, None)

    async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
        await pause(1)
        records = await super().load(run_ids)
        await pause(1)
        return records

    @asynccontextmanager
    async def follow(self, topic: str) -> AsyncIterator[LiveTopic]:
        await pause(1)
        async with super().follow(topic) as followed:
            await pause(1)
            yield DistantTopic(followed)

    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        await pause(1)
        stored = await super().claim(key, value, ttl_s=ttl_s, owner=owner, instead_of=instead_of)
        await pause(1)
        return stored


class DistantTopic:
    def __init__(self, topic: LiveTopic) -> None:
        self.waiting = topic.waiting
        self.failure: Exception | None = None
        self._topic = topic

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        await pause(1)
        changes = await self._topic.changes(cursor, limit=limit)
        await pause(1)
        return changes
