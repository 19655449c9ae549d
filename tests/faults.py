"""What the tests of the in-process API share: a remote broker that can fail, and helpers that inspect and wait."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

from asgi_realtime import Realtime
from asgi_realtime.brokers import MemoryBroker
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
from asgi_realtime.core.chunks import decode
from asgi_realtime.core.errors import BrokerUnavailable
from asgi_realtime.core.runs import StoredRecord
from tests.inprocess import GUARD_S

T = TypeVar("T")

SECRET = "a secret of thirty-two bytes, or more"


def make(**options: Any) -> Realtime:
    """A `Realtime` without signal handlers. Not started."""
    return Realtime(secret_key=SECRET, signals=False, **options)


class RemoteBroker:
    """A `MemoryBroker` that behaves as if it were on another machine.

    It has no `append_nowait`, every call suspends, and calls named in `away` fail. It has to be entered first.
    """

    shared = True
    warnings: Sequence[str] = ()

    def __init__(self, inner: MemoryBroker | None = None) -> None:
        self.inner = inner or MemoryBroker()
        self.entered = False
        self.away: set[str] = set()
        self.lose_answers = 0
        """How many appends are stored but raise."""
        self.hold: anyio.Event | None = None
        """If given, appends wait for this event."""
        self.held = 0
        """How many appends have begun to wait for `hold`."""
        self.before_live: Callable[[], Any] | None = None
        """Awaited before `live` yields."""
        self.appends: list[int] = []
        """The number of items of each append that returned."""
        self.failed = 0

    async def __aenter__(self) -> RemoteBroker:
        await anyio.lowlevel.checkpoint()
        self.entered = True
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.entered = False

    async def _travel(self, call: str) -> None:
        assert self.entered, f"{call} was called before the broker was entered"
        await anyio.lowlevel.checkpoint()
        if call in self.away:
            self.failed += 1
            raise BrokerUnavailable(f"{call}: the broker is unavailable")

    async def append(
        self,
        key: StreamKey,
        items: Sequence[bytes],
        *,
        producer: Producer | None = None,
        end: End | None = None,
        at: int | None = None,
    ) -> Position:
        if self.hold is not None:
            self.held += 1
            await self.hold.wait()
        await self._travel("append")
        position = await self.inner.append(key, items, producer=producer, end=end, at=at)
        with anyio.CancelScope(shield=True):
            await anyio.lowlevel.checkpoint()
        if self.lose_answers:
            self.lose_answers -= 1
            raise BrokerUnavailable("stored, but the answer was lost")
        self.appends.append(len(items))
        return position

    async def read(self, key: StreamKey, *, after: int = -1, limit: int = 500) -> Page:
        await self._travel("read")
        return await self.inner.read(key, after=after, limit=limit)

    async def produced(self, key: StreamKey, producer_id: str) -> int:
        await self._travel("produced")
        return await self.inner.produced(key, producer_id)

    @asynccontextmanager
    async def live(self, key: StreamKey) -> AsyncIterator[LiveLog]:
        await self._travel("live")
        async with self.inner.live(key) as live:
            if self.before_live is not None:
                await self.before_live()
            yield live
            await anyio.lowlevel.checkpoint()

    async def commit(
        self,
        record: StoredRecord,
        *,
        expect: int,
        change: ChangeMark,
        floors: Mapping[tuple[str, str], int] | None = None,
    ) -> int:
        await self._travel("commit")
        return await self.inner.commit(record, expect=expect, change=change, floors=floors)

    async def load(self, run_ids: Sequence[str]) -> list[StoredRecord | None]:
        await self._travel("load")
        return await self.inner.load(run_ids)

    async def changes(self, topic: str, *, after: Cursor | None = None, limit: int = 1000) -> Changes:
        await self._travel("changes")
        return await self.inner.changes(topic, after=after, limit=limit)

    @asynccontextmanager
    async def follow(self, topic: str) -> AsyncIterator[LiveTopic]:
        await self._travel("follow")
        async with self.inner.follow(topic) as live:
            yield live
            await anyio.lowlevel.checkpoint()

    async def claim(
        self, key: str, value: str, *, ttl_s: float, owner: str | None = None, instead_of: str | None = None
    ) -> str:
        await self._travel("claim")
        return await self.inner.claim(key, value, ttl_s=ttl_s, owner=owner, instead_of=instead_of)

    async def claimed(self, key: str) -> str | None:
        await self._travel("claimed")
        return await self.inner.claimed(key)

    async def due(self, kind: str, *, limit: int = 100, skip: int = 0) -> list[str]:
        await self._travel("due")
        return await self.inner.due(kind, limit=limit, skip=skip)

    async def renew(self, run_ids: Sequence[str], *, owner: str) -> None:
        await self._travel("renew")
        await self.inner.renew(run_ids, owner=owner)

    async def enqueued(self, run_id: str) -> None:
        await self._travel("enqueued")
        await self.inner.enqueued(run_id)

    async def take_on_end(self, run_id: str) -> bool:
        await self._travel("take_on_end")
        return await self.inner.take_on_end(run_id)

    async def on_end_called(self, run_id: str) -> None:
        await self._travel("on_end_called")
        await self.inner.on_end_called(run_id)

    async def watch(self, run_id: str, *, process: str, readers: int, grace_s: float | None) -> None:
        await self._travel("watch")
        await self.inner.watch(run_id, process=process, readers=readers, grace_s=grace_s)

    async def watchers(self, run_id: str) -> int:
        await self._travel("watchers")
        return await self.inner.watchers(run_id)

    async def publish(self, run_id: str) -> None:
        await self._travel("publish")
        await self.inner.publish(run_id)

    async def remove(self, run_id: str) -> None:
        await self._travel("remove")
        await self.inner.remove(run_id)

    async def ping(self) -> None:
        await self._travel("ping")


async def stored(realtime: Realtime, run_id: str, stream: str = "default") -> list[Any]:
    """The chunks that a stream holds now."""
    broker = realtime.broker.inner if isinstance(realtime.broker, RemoteBroker) else realtime.broker
    page = await broker.read(StreamKey(run_id, stream), limit=1_000_000)
    return [decode(entry.data) for entry in page.entries]


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until a condition holds."""
    with anyio.fail_after(GUARD_S):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def steps(count: int) -> None:
    """Let the loop run this many iterations."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


def others() -> set[int]:
    """The tasks that run now, other than the caller's."""
    return {task.id for task in anyio.get_running_tasks()} - {anyio.get_current_task().id}


async def take(items: AsyncIterable[T], into: list[T]) -> None:
    """Append each item as it arrives, so that items before an error or a cancellation are kept."""
    async for item in items:
        into.append(item)  # noqa: PERF401
