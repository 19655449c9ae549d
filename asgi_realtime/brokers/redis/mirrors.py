"""The mirrors of a process: one per stream or topic that has users, and idle topics that had some just now."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from asgi_realtime.brokers.live_log import LiveLog
from asgi_realtime.brokers.redis.idle_mirrors import IdleMirrors
from asgi_realtime.brokers.redis.keys import Keys
from asgi_realtime.brokers.redis.mirror import Mirror
from asgi_realtime.brokers.redis.pubsub import PubSub
from asgi_realtime.brokers.redis.slots import Spawn
from asgi_realtime.brokers.redis.stream_mirror import ReadPage, StreamMirror
from asgi_realtime.brokers.redis.topic_mirror import TopicMirror
from asgi_realtime.brokers.redis.topics import Topics
from asgi_realtime.core.errors import ServerShutdown
from asgi_realtime.core.log import StreamKey
from asgi_realtime.loop.waiting import WakeSoon

M = TypeVar("M", bound=Mirror)


class Mirrors:
    """Creates a mirror for its first user and closes it after its last one."""

    def __init__(
        self, *, read_page: ReadPage, topics: Topics, keys: Keys, pubsub: PubSub, spawn: Spawn, max_stream_bytes: int
    ) -> None:
        self.streams: dict[StreamKey, StreamMirror] = {}
        self.topics: dict[str, TopicMirror] = {}
        self.idle = IdleMirrors(self._discard_topic)
        self._read_page = read_page
        self._stored_topics = topics
        self._keys = keys
        self._pubsub = pubsub
        self._spawn = spawn
        self._wakes = WakeSoon()
        self._max_stream_bytes = max_stream_bytes
        self._closed = False

    @asynccontextmanager
    async def live(self, key: StreamKey) -> AsyncIterator[LiveLog]:
        """As `Broker.live`."""
        async with self._used(self.streams, key, lambda: self._stream_mirror(key), self._leave_stream) as mirror:
            mirror.live.enter()
            try:
                yield mirror.live
            finally:
                mirror.live.leave()

    @asynccontextmanager
    async def follow(self, topic: str) -> AsyncIterator[TopicMirror]:
        """As `Broker.follow`."""
        known = self.topics.get(topic)
        async with self._used(self.topics, topic, lambda: self._topic_mirror(topic), self._leave_topic) as mirror:
            self.idle.discard(mirror)
            if mirror is known:
                await mirror.refresh()
            yield mirror

    @asynccontextmanager
    async def _used(
        self, mirrors: dict[Any, M], key: object, make: Callable[[], M], leave: Callable[[M], None]
    ) -> AsyncIterator[M]:
        if self._closed:
            raise ServerShutdown()
        mirror = mirrors.get(key)
        if mirror is None or not mirror.is_usable:
            mirror = mirrors[key] = make()
        mirror.users += 1
        try:
            await mirror.joined()
            yield mirror
        finally:
            mirror.users -= 1
            if not mirror.users:
                leave(mirror)

    def _stream_mirror(self, key: StreamKey) -> StreamMirror:
        return StreamMirror(
            key,
            read=self._read_page,
            keys=self._keys,
            pubsub=self._pubsub,
            spawn=self._spawn,
            wakes=self._wakes,
            max_bytes=self._max_stream_bytes,
        )

    def _topic_mirror(self, topic: str) -> TopicMirror:
        return TopicMirror(
            topic,
            read=self._stored_topics.index,
            ask=self._stored_topics.changes,
            keys=self._keys,
            pubsub=self._pubsub,
            spawn=self._spawn,
        )

    def _leave_stream(self, mirror: StreamMirror) -> None:
        mirror.close()
        if self.streams.get(mirror.key) is mirror:
            del self.streams[mirror.key]

    def _leave_topic(self, mirror: TopicMirror) -> None:
        if mirror.is_usable and not self._closed:
            self.idle.add(mirror)
        else:
            self._discard_topic(mirror)

    def _discard_topic(self, mirror: TopicMirror) -> None:
        if not mirror.users:
            mirror.close()
            if self.topics.get(mirror.topic) is mirror:
                del self.topics[mirror.topic]

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
        return (
            len(self.streams)
            + sum(1 for mirror in self.topics.values() if mirror.users)
            + sum(mirror.users for mirror in (*self.streams.values(), *self.topics.values()))
            + sum(live.readers + len(live.waiting) for live in lives)
            + sum(len(mirror.waiting) for mirror in self.topics.values())
        )
