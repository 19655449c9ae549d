"""Topics in Redis: which runs changed, in the order of their last change.

The topic of a run stands in the run itself, so both change in one step. Those of tags and batches have keys of their
own and are told after the commit; a version that is not newer than the known one changes nothing.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Iterable

from asgi_realtime.brokers.redis import scripts
from asgi_realtime.brokers.redis.keys import Keys, run_of_topic
from asgi_realtime.brokers.redis.mirror import NO_EPOCH, changes_after
from asgi_realtime.brokers.redis.servers import Servers
from asgi_realtime.core.topics import Change, Changes, Cursor, TopicIndex

_MAX_STEP = 65536


def random_step() -> int:
    """How far a position goes on. One that Redis acknowledged and lost is not taken for a later one then."""
    return random.randint(1, _MAX_STEP)


def new_epoch() -> str:
    return secrets.token_hex(4)


class Topics:
    """All topics. Raises `BrokerUnavailable`."""

    def __init__(self, servers: Servers, keys: Keys, *, max_runs: int) -> None:
        self._servers = servers
        self._keys = keys
        self._max_runs = max_runs

    async def tell(self, run_id: str, version: int, topics: Iterable[str]) -> None:
        """Tell topics of a version, then take back the mark of its commit."""
        await asyncio.gather(*(self._tell_one(topic, run_id, version) for topic in topics))
        keys = [self._keys.run(run_id), self._keys.due("untold", self._keys.partition(run_id))]
        await self._servers.run(scripts.TOLD, keys, run_id, version)

    async def _tell_one(self, topic: str, run_id: str, version: int) -> None:
        channel = self._keys.topic_channel(topic)
        await self._servers.run(
            scripts.TELL,
            self._keys.topic(topic),
            run_id,
            version,
            random_step(),
            new_epoch(),
            self._max_runs,
            channel,
            tells=channel,
        )

    async def forget(self, run_id: str, topics: Iterable[str]) -> None:
        """Take a run out of topics."""
        for topic in topics:
            await self._servers.run(scripts.FORGET, self._keys.topic(topic), run_id, self._keys.topic_channel(topic))

    async def wake(self, topics: Iterable[str]) -> None:
        """Wake those who follow: something that stands in no change has changed."""
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
        """The whole of a topic, to be mirrored."""
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
        """What changed, and the position of what the topic dropped last."""
        asked_epoch, asked_position = after or ("-", 0)
        answer = await self._servers.run(scripts.CHANGES, self._keys.topic(topic), asked_epoch, asked_position, limit)
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
