"""The index of a topic, as this process follows it.

A message carries the position before its change and the position of the change. If the first is where this index ends,
the change continues it; anything else means that a message is missing, and the index is read again as a whole.

Messages can be late, so being LIVE does not mean being as new as Redis. A caller that starts to follow a topic that
this process follows already must know every change that was committed before (`Broker.follow`), and therefore
refreshes: asks Redis what is newer than this index. Callers that arrive while one asks cannot share that answer, which
may be older than their call; they share the next one. A refresh counts once it has *succeeded*: if the caller that asks
is cancelled or fails, the next one in line asks again."""

from __future__ import annotations

import asyncio

from asgi_realtime.brokers.redis.keys import Keys, run_of_topic
from asgi_realtime.brokers.redis.mirror import SYNCING, Mirror
from asgi_realtime.brokers.redis.pubsub import PubSub
from asgi_realtime.brokers.redis.topics import NO_EPOCH, Topics, changes_after
from asgi_realtime.core.topics import Change, Changes, Cursor, TopicIndex
from asgi_realtime.loop.waiting import WaitList


class TopicMirror(Mirror):
    """Followers wait at `waiting`."""

    def __init__(self, keys: Keys, pubsub: PubSub, topics: Topics, topic: str) -> None:
        self.waiting = WaitList()
        self._run_id = run_of_topic(topic)
        self._topics = topics
        self._index = TopicIndex(NO_EPOCH, max_runs=1)
        self._refreshing = asyncio.Lock()
        self._started = 0  # the number of the last refresh that was started
        self._refreshed = 0  # the number of the last one that succeeded
        super().__init__(topic, (keys.topic_channel(topic),), pubsub)

    async def changes(self, cursor: Cursor | None, *, limit: int = 1000) -> Changes:
        if self.failure is not None:
            raise self.failure
        index = self._index
        if cursor is not None and cursor.epoch == index.epoch and cursor.position > index.position:
            return await self._topics.changes(self.key, cursor, limit)  # its issuer is ahead of this process
        return changes_after(index, cursor, limit)

    async def refresh(self) -> None:
        """Become as new as Redis is now. Raises `BrokerUnavailable`."""
        wanted = self._started + 1
        async with self._refreshing:
            if self._refreshed < wanted:
                self._started = number = self._started + 1
                await self._refresh()
                self._refreshed = number

    async def _refresh(self) -> None:
        before = self._index
        changes = await self._topics.changes(self.key, Cursor(before.epoch, before.position), before.max_runs)
        await self._left(SYNCING)
        index = self._index
        if changes.cursor.epoch != index.epoch or changes.snapshot:
            if changes.cursor != (index.epoch, index.position):  # not the index that is here
                self.check(routine=False)
                await self._left(SYNCING)
            return
        later = [change for change in changes.items if change.position > index.position]
        for change in later:
            index.put(change)
        if later:
            self.waiting.wake()

    async def _read(self) -> None:
        index, before = await self._topics.index(self.key), self._index
        self._index = index
        changed = (index.epoch, index.position) != (before.epoch, before.position)
        if changed or not self._routine:  # followers that could not load a changed run try again after an outage
            self.waiting.wake()
        if changed:
            self._on_found_change()

    def _take(self, message: bytes) -> None:
        kind = message[:1]
        if kind == b"t":
            _, epoch, before, position, version, run_id = message.decode().split(" ", 5)
            self._put(epoch, int(before), Change(int(position), run_id, int(version)))
        elif kind == b"c" and self._run_id is not None:
            places = [int(number) for number in message[2:].split(b" ")]
            epoch = self._index.epoch
            change = Change(places[1], self._run_id, places[2])
            self._put("" if epoch == NO_EPOCH else epoch, places[0], change)
        elif kind in (b"f", b"r"):
            self._index.forget(message[2:].decode() if kind == b"f" else self._run_id or "")
            self.waiting.wake()
        elif kind == b"w":
            self.waiting.wake()

    def _put(self, epoch: str, before: int, change: Change) -> None:
        index = self._index
        if epoch == index.epoch and change.position == index.position:
            return
        if epoch == index.epoch and before == index.position:
            index.put(change)
            self.waiting.wake()
        else:
            self.check(routine=False)

    def _on_failure(self) -> None:
        self.waiting.wake()
