"""Topics in Redis: which runs changed, in the order of their last change.

The topic of a run is part of the run's own hash, so both change in one step. Topics of tags and batches have separate
keys and are published to after the commit; a version that is not newer than the known one changes nothing.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Iterable

from asgi_realtime.brokers.redis import scripts
from asgi_realtime.brokers.redis.keys import Keys, run_of_topic
from asgi_realtime.brokers.redis.servers import Servers
from asgi_realtime.core.topics import Change, Changes, Cursor, TopicIndex

NO_EPOCH = "0"
"""The epoch of a topic that does not exist. A cursor with it is before everything that the topic will ever hold."""

_MAX_STEP = 65536


def changes_after(index: TopicIndex, cursor: Cursor | None, limit: int) -> Changes:
    """As `TopicIndex.after`, for an index that may have been created after the cursor was issued."""
    if cursor is not None and cursor.epoch == NO_EPOCH:
        cursor = Cursor(index.epoch, 0)
    return index.after(cursor, limit=limit)


def random_step() -> int:
    """The distance to the next position. Random, so that after data loss no new position equals one that was lost."""
    return random.randint(1, _MAX_STEP)


def new_epoch() -> str:
    return secrets.token_hex(4)


class Topics:
    """All topics. Raises `BrokerUnavailable`."""

    def __init__(self, servers: Servers, keys: Keys, *, max_runs: int) -> None:
        self._servers = servers
        self._keys = keys
        self._max_runs = max_runs

    async def publish(self, run_id: str, version: int, topics: Iterable[str]) -> None:
        """Publish a version to topics, then clear the mark that its commit has set."""
        await asyncio.gather(*(self._publish_to(topic, run_id, version) for topic in topics))
        keys = [self._keys.run(run_id), self._keys.due("unpublished", self._keys.partition(run_id))]
        await self._servers.run(scripts.PUBLISHED, keys, run_id, version)

    async def _publish_to(self, topic: str, run_id: str, version: int) -> None:
        channel = self._keys.topic_channel(topic)
        await self._servers.run(
            scripts.PUBLISH,
            self._keys.topic(topic),
            run_id,
            version,
            random_step(),
            new_epoch(),
            self._max_runs,
            channel,
            channel=channel,
        )

    async def remove(self, run_id: str, topics: Iterable[str]) -> None:
        """Remove a run from topics."""
        for topic in topics:
            channel = self._keys.topic_channel(topic)
            await self._servers.run(scripts.TOPIC_REMOVE, self._keys.topic(topic), run_id, channel)

    async def wake(self, topics: Iterable[str]) -> None:
        """Wake the followers of topics, for something that no change records."""
        for channel in map(self._keys.topic_channel, topics):
            await self._servers.call(channel, "SPUBLISH", channel, "w")

    async def changes(self, topic: str, after: Cursor | None, limit: int) -> Changes:
        """As `Broker.changes`."""
        run_id = run_of_topic(topic)
        if run_id is not None:
            return changes_after(await self._index_of_run(run_id), after, limit)
        changes, _ = await self._read(topic, after, limit)
        return changes

    async def index(self, topic: str) -> TopicIndex:
        """The whole topic, for a mirror."""
        run_id = run_of_topic(topic)
        if run_id is not None:
            return await self._index_of_run(run_id)
        changes, floor = await self._read(topic, None, self._max_runs)
        index = TopicIndex(changes.cursor.epoch, max_runs=self._max_runs)
        for change in changes.items:
            index.put(change)
        index.position, index.floor = changes.cursor.position, floor
        return index

    async def _read(self, topic: str, after: Cursor | None, limit: int) -> tuple[Changes, int]:
        """The changes after a cursor, and the position of the last run that the topic dropped."""
        after_epoch, after_position = after or ("-", 0)
        keys = self._keys.topic(topic)
        answer = await self._servers.run(scripts.TOPIC_CHANGES, keys, after_epoch, after_position, limit)
        epoch, position, floor, snapshot, pairs, versions = answer
        items = [
            Change(int(at), run_id.decode(), int(version))
            for run_id, at, version in zip(pairs[::2], pairs[1::2], versions, strict=True)
        ]
        return Changes(Cursor(epoch.decode(), int(position)), items, bool(snapshot)), int(floor)

    async def _index_of_run(self, run_id: str) -> TopicIndex:
        key = self._keys.run(run_id)
        epoch, position, version = await self._servers.call(key, "HMGET", key, "epoch", "position", "version")
        index = TopicIndex(epoch.decode() if epoch else NO_EPOCH, max_runs=1)
        if epoch:
            index.put(Change(int(position), run_id, int(version)))
        return index
