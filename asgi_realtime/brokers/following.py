"""Follow a topic without missing a change.

Reading a topic can suspend, and the topic can change while it does. A `Follower` therefore registers its waiter before
it reads: any change from then on, during the read or while the caller handles the result, ends the next `wait`. That
order is the whole rule, and it is stated here only. A wake-up can be spurious, because the read may have included the
change already, so callers loop: read, handle, wait.

Streams do not need this. A log is checked without suspending, so `live.waiting.wait()` right after a check that found
nothing misses no wake-up.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

from asgi_realtime.brokers.base import Broker, Changes, Cursor, LiveTopic
from asgi_realtime.loop.waiting import Waiter, WaitList, make_waiter


class Follower:
    """One task's place at a topic. A context manager; leaving it deregisters the waiter, also after a cancellation.

    Pass a `waiter` if something other than the topic wakes the task too, such as the ticker.
    """

    __slots__ = ("_lists", "_topic", "_waiter", "_woken")

    def __init__(self, topic: LiveTopic, *, waiter: Waiter | None = None) -> None:
        self._topic = topic
        self._waiter = waiter or make_waiter()
        self._lists = [topic.waiting]
        self._woken: Awaitable[None] | None = None

    def add(self, waiting: WaitList) -> None:
        """Let another list wake this follower too, from now on."""
        self._lists.append(waiting)
        waiting.add(self._waiter)

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        """As `LiveTopic.changes`. Whatever changes after this call begins ends the next `wait`."""
        self._woken = self._waiter.arm()
        for waiting in self._lists:
            waiting.add(self._waiter)
        return await self._topic.changes(cursor, limit=limit)

    async def wait(self) -> None:
        """Wait until something has changed since the last call of `changes` began."""
        assert self._woken is not None
        await self._woken

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for waiting in self._lists:
            waiting.discard(self._waiter)


@asynccontextmanager
async def following(broker: Broker, topic: str, *, waiter: Waiter | None = None) -> AsyncIterator[Follower]:
    """Follow a topic, with one place to wait at. Raises what `Broker.follow` raises."""
    async with broker.follow(topic) as live:
        with Follower(live, waiter=waiter) as follower:
            yield follower
