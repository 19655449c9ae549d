"""The mirrors of a process: one per stream or topic that has users, and idle topics that had some just now."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.brokers.redis.mirror import Mirror
from asgi_realtime.brokers.redis.stream_mirror import StreamMirror
from asgi_realtime.brokers.redis.topic_mirror import TopicMirror
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.core.log import StreamKey

IDLE_S = 5.0
"""How long an idle mirror is retained at least; twice that at most."""

MAX_IDLE = 1000
"""Of all topics together; the oldest are dropped first. Clients choose the names of topics, so this is a bound."""

K = TypeVar("K", StreamKey, str)
M = TypeVar("M", StreamMirror, TopicMirror)


class Mirrors:
    """Creates a mirror for its first user and closes it after its last one."""

    def __init__(
        self, new_stream: Callable[[StreamKey], StreamMirror], new_topic: Callable[[str], TopicMirror]
    ) -> None:
        self.streams: dict[StreamKey, StreamMirror] = {}
        self.topics: dict[str, TopicMirror] = {}
        self.idle = IdleMirrors(self._discard)
        self._new_stream = new_stream
        self._new_topic = new_topic
        self._closed = False

    def live(self, key: StreamKey) -> AbstractAsyncContextManager[LiveLog]:
        """As `Broker.live`."""
        return _Reading(self, key)

    async def enter(self, key: StreamKey) -> StreamMirror:
        """Add a user to a stream, until `leave`."""
        return await self._enter(self.streams, key, self._new_stream)

    @asynccontextmanager
    async def follow(self, topic: str) -> AsyncIterator[TopicMirror]:
        """As `Broker.follow`."""
        known = self.topics.get(topic)
        mirror = await self._enter(self.topics, topic, self._new_topic)
        try:
            self.idle.discard(mirror)
            if mirror is known:
                await mirror.refresh()
            yield mirror
        finally:
            self.leave(mirror)

    async def _enter(self, mirrors: dict[K, M], key: K, make: Callable[[K], M]) -> M:
        if self._closed:
            raise ServerShutdown()
        mirror = mirrors.get(key)
        if mirror is None or not mirror.is_usable:
            mirror = mirrors[key] = make(key)
        mirror.users += 1
        try:
            await mirror.joined()
        except BaseException:
            self.leave(mirror)
            raise
        return mirror

    def leave(self, mirror: Mirror) -> None:
        """Remove a user."""
        mirror.users -= 1
        if mirror.users:
            return
        if isinstance(mirror, TopicMirror) and mirror.is_usable:
            self.idle.add(mirror)
        else:
            self._discard(mirror)

    def _discard(self, mirror: Mirror) -> None:
        if not mirror.users:
            mirror.close()
            for mirrors in (self.streams, self.topics):
                if mirrors.get(mirror.key) is mirror:
                    del mirrors[mirror.key]

    def close(self) -> None:
        """The broker closes: all users get `ServerShutdown`."""
        self._closed = True
        self.idle.clear()
        for mirror in (*self.streams.values(), *self.topics.values()):
            mirror.shut_down()
        self.streams.clear()
        self.topics.clear()

    @property
    def held(self) -> int:
        """How much is held for readers: mirrors, their users, waiters. Idle mirrors do not count."""
        lives = [mirror.live for mirror in self.streams.values()]
        users = [mirror.users for mirror in (*self.streams.values(), *self.topics.values()) if mirror.users]
        waiting = [live.waiting for live in lives] + [mirror.waiting for mirror in self.topics.values()]
        return len(users) + sum(users) + sum(live.readers for live in lives) + sum(map(len, waiting))


class _Reading:
    """What `Mirrors.live` returns. The frames of generators would take 1,000 bytes for each idle reader."""

    __slots__ = ("_key", "_mirror", "_mirrors")

    def __init__(self, mirrors: Mirrors, key: StreamKey) -> None:
        self._mirrors = mirrors
        self._key = key

    async def __aenter__(self) -> LiveLog:
        self._mirror = await self._mirrors.enter(self._key)
        self._mirror.live.enter()
        return self._mirror.live

    async def __aexit__(self, *exc_info: object) -> None:
        self._mirror.live.leave()
        self._mirrors.leave(self._mirror)


class IdleMirrors:
    """Topic mirrors without users, retained for a while: a client that polls follows its topic anew with each request.

    Without this, each poll would subscribe and read the whole topic again. There is one timer for all. `drop` is called
    with each mirror that was not used again in time.
    """

    def __init__(self, drop: Callable[[TopicMirror], None]) -> None:
        self._drop = drop
        self._young: dict[TopicMirror, None] = {}
        self._old: dict[TopicMirror, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, mirror: TopicMirror) -> None:
        self._old.pop(mirror, None)
        self._young[mirror] = None
        if len(self._young) + len(self._old) > MAX_IDLE:
            oldest = self._old or self._young
            mirror = next(iter(oldest))
            del oldest[mirror]
            self._drop(mirror)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._sweep)

    def discard(self, mirror: TopicMirror) -> None:
        """The mirror has a user again."""
        self._young.pop(mirror, None)
        self._old.pop(mirror, None)

    def clear(self) -> None:
        """Forget all without dropping them, because the broker closes."""
        self._young.clear()
        self._old.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        expired, self._old, self._young = self._old, self._young, {}
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._sweep) if self._old else None
        for mirror in expired:
            self._drop(mirror)
